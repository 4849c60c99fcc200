"""The parameters of training, checked before anything is read."""

from __future__ import annotations

from typing import Any

from pydantic import Field, ValidationError

from airloom.contract import Frozen, StageInputError


class TrainParams(Frozen):
    """`stages.train.params` of a pipeline.

    Attributes:
        batch_size: rows in one step at most; an epoch's rows are spread evenly over its steps.
        learning_rate: at the top of the schedule.
        warmup: fraction of all steps in which the learning rate rises from 0.
        weight_decay: of AdamW.
        width: channels of the network's first block.
        label_smoothing: of the training loss; 0 keeps probabilities calibrated.
        max_shift: augmentation, as a fraction of the picture's side.
        max_rotation: augmentation, in degrees.
        max_scale: augmentation, as a fraction.
    """

    epochs: int = Field(default=6, ge=1, le=10_000)
    batch_size: int = Field(default=128, ge=2)
    learning_rate: float = Field(default=0.005, gt=0)
    warmup: float = Field(default=0.1, ge=0, lt=1)
    weight_decay: float = Field(default=0.01, ge=0)
    width: int = Field(default=16, ge=1, le=1024)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    max_shift: float = Field(default=0.07, ge=0, lt=0.5)
    max_rotation: float = Field(default=10.0, ge=0, le=180)
    max_scale: float = Field(default=0.1, ge=0, lt=0.5)

    @classmethod
    def of(cls, params: dict[str, Any]) -> TrainParams:
        """Check the parameters of a request.

        Raises:
            StageInputError: a parameter is unknown or out of range; every problem is listed.
        """
        try:
            return cls.model_validate(params)
        except ValidationError as error:
            problems = (
                f"stages.train.params.{'.'.join(map(str, e['loc']))}: {e['msg']}, found {e['input']!r}"
                for e in error.errors()
            )
            raise StageInputError("\n".join(problems)) from None
