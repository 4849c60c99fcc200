"""The training loop."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from image_classifier.config import ModelConfig
from image_classifier.network import Network
from modeling.augment import augment
from modeling.checkpoint import Checkpoint
from modeling.data import Examples
from modeling.loss import classification_loss
from modeling.params import TrainParams
from modeling.schedule import Schedule
from modeling.seeding import epoch_generator

PROGRESS_SECONDS = 1.0

OnEpoch = Callable[[dict[str, float]], None]


class Training:
    """A training that can be killed at any moment and gone on with.

    Args:
        fingerprint: digest of everything that the result depends on.
        checkpoints: folder that survives a killed try.
        on_epoch: told each finished epoch's figures, after its checkpoint is on the disk.
    """

    def __init__(
        self,
        *,
        config: ModelConfig,
        params: TrainParams,
        seed: int,
        device: torch.device,
        fingerprint: str,
        checkpoints: Path,
        on_epoch: OnEpoch,
    ) -> None:
        self._params = params
        self._seed = seed
        self._device = device
        self._fingerprint = fingerprint
        self._checkpoints = checkpoints
        self._on_epoch = on_epoch
        self._network = Network(config).to(device)
        self._optimizer = torch.optim.AdamW(
            self._network.parameters(), lr=params.learning_rate, weight_decay=params.weight_decay
        )

    def fit(self, train: Examples, validation: Examples) -> Checkpoint:
        """Train to the end; the returned state's `best_network` is of the epoch with the lowest validation loss."""
        schedule = Schedule(
            rows=len(train),
            batch_size=self._params.batch_size,
            epochs=self._params.epochs,
            peak=self._params.learning_rate,
            warmup=self._params.warmup,
        )
        print(schedule, flush=True)
        state = self._resume()
        for epoch in range(state.epoch + 1 if state else 1, self._params.epochs + 1):
            started = time.monotonic()
            train_loss, train_accuracy = self._train_epoch(train, epoch, schedule)
            validation_loss, validation_accuracy = measure(self._network, validation, self._device)
            figures = {
                "epoch": float(epoch),
                "train_loss": train_loss,
                "train_accuracy": train_accuracy,
                "validation_loss": validation_loss,
                "validation_accuracy": validation_accuracy,
                "learning_rate": schedule.learning_rate(epoch * schedule.steps_per_epoch - 1),
                "epoch_seconds": time.monotonic() - started,
            }
            state = self._advance(state, figures)
            state.save(self._checkpoints)
            self._on_epoch(figures)
            print(
                f"epoch {epoch} of {self._params.epochs}: train loss {train_loss:.4f}, validation loss "
                f"{validation_loss:.4f}, validation accuracy {validation_accuracy:.4f}, "
                f"{figures['epoch_seconds']:.1f} s{' (best so far)' if state.best_epoch == epoch else ''}",
                flush=True,
            )
        assert state is not None, "epochs >= 1"
        return state

    def _resume(self) -> Checkpoint | None:
        state = Checkpoint.load(self._checkpoints, self._fingerprint, self._device)
        if state is not None:
            self._network.load_state_dict(state.network)
            self._optimizer.load_state_dict(state.optimizer)
            print(f"resuming after epoch {state.epoch} of {self._params.epochs}", flush=True)
        return state

    def _train_epoch(self, train: Examples, epoch: int, schedule: Schedule) -> tuple[float, float]:
        generator = epoch_generator(self._seed, epoch)
        order = torch.randperm(len(train), generator=generator)
        self._network.train()
        loss_sum, hits, said = 0.0, 0, time.monotonic()
        # Nearly equal batches: batch normalisation suffers from a last one of few rows.
        for number, chosen in enumerate(order.tensor_split(schedule.steps_per_epoch)):
            step = (epoch - 1) * schedule.steps_per_epoch + number
            loss, correct = self._step(train.images[chosen], train.labels[chosen], generator, schedule, step)
            loss_sum, hits = loss_sum + loss * len(chosen), hits + correct
            if time.monotonic() - said >= PROGRESS_SECONDS:
                said = time.monotonic()
                print(f"epoch {epoch}: step {number + 1} of {schedule.steps_per_epoch}, loss {loss:.4f}", flush=True)
        return loss_sum / len(train), hits / len(train)

    def _step(
        self, images: Tensor, labels: Tensor, generator: torch.Generator, schedule: Schedule, step: int
    ) -> tuple[float, int]:
        """One optimizer step; return the batch's mean loss and its hits."""
        for group in self._optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step)
        images, labels = images.to(self._device), labels.to(self._device)
        logits = self._network(augment(images, self._params, generator))
        loss = classification_loss(logits, labels, label_smoothing=self._params.label_smoothing)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        return loss.item(), int((logits.argmax(dim=1) == labels).sum())

    def _advance(self, state: Checkpoint | None, figures: dict[str, float]) -> Checkpoint:
        """The state after an epoch with these figures."""
        epoch = int(figures["epoch"])
        history = [*(state.history if state else []), figures]
        best = min(history, key=lambda row: row["validation_loss"])
        network = self._network.state_dict()
        improved = best is figures or state is None
        return Checkpoint(
            fingerprint=self._fingerprint,
            epoch=epoch,
            network=network,
            optimizer=self._optimizer.state_dict(),
            best_network=copy.deepcopy(network) if improved or state is None else state.best_network,
            best_epoch=int(best["epoch"]),
            history=history,
        )


def measure(network: Network, examples: Examples, device: torch.device) -> tuple[float, float]:
    """Mean loss and accuracy on examples in their order, nothing augmented."""
    network.eval()
    loss_sum, hits = 0.0, 0
    with torch.inference_mode():
        for images, labels in zip(examples.images.split(512), examples.labels.split(512), strict=True):
            on_device = labels.to(device)
            logits = network(images.to(device))
            loss_sum += classification_loss(logits, on_device).item() * len(labels)
            hits += int((logits.argmax(dim=1) == on_device).sum())
    return loss_sum / len(examples), hits / len(examples)
