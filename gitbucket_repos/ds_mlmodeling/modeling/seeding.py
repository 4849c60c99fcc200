"""Make every random draw depend on the request's seed alone."""

from __future__ import annotations

import hashlib
import os
import random

import numpy as np
import torch


def prepare(seed: int) -> torch.device:
    """Seed all generators, fix the number of threads, forbid algorithms that give varying sums; choose the device.

    On a CPU, equal inputs then give equal weights to the last bit, for the same number of threads.
    """
    # cuBLAS reads it when it is first used; see PyTorch's notes on reproducibility.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    # The same as `use_deterministic_algorithms(True)`, which also imports a compiler for two seconds.
    torch.set_deterministic_debug_mode("error")
    torch.backends.cudnn.benchmark = False
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """The generator of one epoch's order and augmentation.

    It depends on nothing that came before, so a training that was killed goes on as if it had not been.
    """
    drawn = hashlib.sha256(f"{seed}:{epoch}".encode()).digest()
    value = int.from_bytes(drawn[:8], "big") >> 1
    torch.manual_seed(value)  # for layers that draw
    return torch.Generator().manual_seed(value)
