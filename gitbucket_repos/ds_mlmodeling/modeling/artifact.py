"""Build the model artifact: the folder of `airloom.contract.model`, which MLflow can load as well.

    model.json      what Airloom reads
    MLmodel, *.yaml, requirements.txt   what MLflow reads
    code/image_classifier/              the model's code
    weights/network.pt, config.json     its numbers

Nothing in it depends on the time or the run: the same training gives the same digest.
"""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import image_classifier
from airloom.contract import sha256_bytes
from airloom.contract.model import MODEL_FILE, ModelCard
from airloom.contract.pictures import MEDIA_TYPES
from image_classifier.config import CONFIG_FILE, WEIGHTS_FILE, ModelConfig

# What image_classifier imports.
_REQUIREMENTS = ("airloom", "numpy", "pillow", "torch")


def build_artifact(folder: Path, *, config: ModelConfig, weights: dict[str, Any], facts: dict[str, str]) -> None:
    """Write the artifact into an emptied folder.

    Args:
        weights: state dict of the network.
        facts: where the model came from, for `model.json`.
    """
    import mlflow.pyfunc
    from mlflow.models import Model

    shutil.rmtree(folder, ignore_errors=True)
    package = Path(image_classifier.__file__).parent
    mlflow.pyfunc.save_model(
        folder,
        loader_module=f"{package.name}.pyfunc",
        code_paths=[str(package)],
        # Given, since MLflow would put the time and a random id there, and guess requirements by importing.
        mlflow_model=Model(
            utc_time_created="1970-01-01 00:00:00.000000",
            model_uuid=sha256_bytes(config.model_dump_json().encode())[:32],
        ),
        pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in _REQUIREMENTS],
    )
    (folder / WEIGHTS_FILE).parent.mkdir()
    torch.save({name: tensor.cpu() for name, tensor in weights.items()}, folder / WEIGHTS_FILE)
    config.write(folder / CONFIG_FILE)
    ModelCard(
        entry=f"{package.name}.predictor:load",
        packages=[package.name],
        task="classification",
        classes=config.classes,
        media_types=list(MEDIA_TYPES),
        facts=facts,
    ).write(folder / MODEL_FILE)
