"""A trained and evaluated model that tests share; puts the repo on the import path."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"  # results are equal for equal numbers of threads

from modeling_samples import request_for, write_dataset

from airloom.contract import Stage, StageResult


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="session")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> StageResult:
    """The result of a training that nothing disturbed."""
    from modeling.train import train

    return train(request_for(Stage.TRAIN, {"dataset": dataset}, tmp_path_factory.mktemp("trained")))


@pytest.fixture(scope="session")
def model(trained: StageResult) -> Path:
    return trained.outputs["model"].path


@pytest.fixture(scope="session")
def evaluated(dataset: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> StageResult:
    from modeling.evaluate import evaluate

    return evaluate(request_for(Stage.EVALUATE, {"dataset": dataset, "model": model}, tmp_path_factory.mktemp("eval")))


@pytest.fixture(autouse=True)
def own_image_classifier() -> Iterator[None]:
    """Loading an artifact replaces the model's modules: give each test those that it began with."""
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "image_classifier"}
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "image_classifier"]:
        del sys.modules[name]
    sys.modules.update(before)
