"""Keep a training's state so that a killed one goes on where its last finished epoch ended."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

CHECKPOINT_FILE = "checkpoint.pt"


@dataclass
class Checkpoint:
    """The state after an epoch.

    Attributes:
        fingerprint: digest of what the training depends on; another training's checkpoint is not resumed.
        epoch: the last finished one, counted from 1.
        network / best_network: state dicts, the latter of `best_epoch`.
        history: one mapping of figures for each finished epoch.
    """

    fingerprint: str
    epoch: int
    network: dict[str, Any]
    optimizer: dict[str, Any]
    best_network: dict[str, Any]
    best_epoch: int
    history: list[dict[str, float]]

    def save(self, folder: Path) -> None:
        """Write whole or not at all, on the disk before the earlier one is replaced."""
        temporary = folder / f".{CHECKPOINT_FILE}.tmp"
        with temporary.open("wb") as file:
            torch.save(asdict(self), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / CHECKPOINT_FILE)

    @classmethod
    def load(cls, folder: Path, fingerprint: str, device: torch.device) -> Checkpoint | None:
        """What an earlier try of the same training left, or `None`."""
        path = folder / CHECKPOINT_FILE
        if not path.exists():
            return None
        found = cls(**torch.load(path, map_location=device, weights_only=True))
        if found.fingerprint != fingerprint:
            print(f"{path} belongs to a training with other inputs: starting afresh", flush=True)
            return None
        return found
