"""The learning rate as a function of the step: linear warm-up, then half a cosine down to zero."""

from __future__ import annotations

import math

from airloom.contract import Frozen


class Schedule(Frozen):
    """The arithmetic of a training.

    Attributes:
        rows: of the training split.
        peak: learning rate at the end of the warm-up.
        warmup: fraction of all steps.
    """

    rows: int
    batch_size: int
    epochs: int
    peak: float
    warmup: float

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.rows / self.batch_size)

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    @property
    def warmup_steps(self) -> int:
        return round(self.steps * self.warmup)

    def learning_rate(self, step: int) -> float:
        """For a step counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.peak * (1 + math.cos(math.pi * done)) / 2

    def __str__(self) -> str:
        rows = f"{self.rows:,} rows / at most {self.batch_size} a batch"
        epoch = f"{self.steps_per_epoch} steps an epoch of {self.rows / self.steps_per_epoch:.1f} rows on average"
        return f"{rows} = {epoch}; x {self.epochs} epochs = {self.steps:,} steps, {self.warmup_steps} of them warm-up"
