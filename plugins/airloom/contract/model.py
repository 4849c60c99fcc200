"""Load a model artifact with the code it carries, whatever other model the process has loaded.

A model artifact is a folder:

    model.json     what it is: `ModelCard`
    code/          the Python package that trained it; `entry` names its predictor
    weights/       whatever the predictor's `load` reads

The artifact that MLflow stores holds this folder, so that `mlflow.pyfunc.load_model` works too.
"""

from __future__ import annotations

import importlib
import sys
import threading
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from airloom.contract.base import Frozen
from airloom.contract.predictor import Predictor
from airloom.errors import ContractError

MODEL_FILE = "model.json"
CODE_FOLDER = "code"

_import_lock = threading.Lock()


class ModelCard(Frozen):
    """`model.json`.

    Attributes:
        entry: `module:function` inside `code/`; called with the artifact's folder, it returns the `Predictor`.
        packages: the top-level names in `code/` that belong to the model alone.
        task: what kind of model it is, such as `classification`.
        classes: label names in output order; empty where there are none.
        media_types: what `decode` accepts, such as `image/png`.
        facts: where the model came from (run, data version, commit).
    """

    schema_version: Literal[1] = 1
    entry: str = Field(pattern=r"^[\w.]+:\w+$")
    packages: list[str]
    task: str
    classes: list[str] = Field(default_factory=list)
    media_types: list[str] = Field(default_factory=list)
    facts: dict[str, str] = Field(default_factory=dict)


def load_predictor(folder: Path) -> tuple[ModelCard, Predictor]:
    """Load the artifact in `folder`.

    Two artifacts whose packages have the same name can be loaded into one process: the modules of an
    earlier one leave `sys.modules` and live on only in the predictor that uses them. A model's code
    must therefore import at module level, not inside functions.

    Raises:
        ContractError: the folder is no artifact, or its code does not give a `Predictor`.
    """
    card = ModelCard.read(folder / MODEL_FILE)
    code = folder / CODE_FOLDER
    module_name, function_name = card.entry.split(":")
    with _import_lock:
        for name in list(sys.modules):
            if name.partition(".")[0] in card.packages:
                del sys.modules[name]
        sys.path.insert(0, str(code))
        importlib.invalidate_caches()
        writes_bytecode, sys.dont_write_bytecode = not sys.dont_write_bytecode, True  # the folder has a digest
        try:
            module = importlib.import_module(module_name)
            loaded: Any = getattr(module, function_name)(folder)
        except (ImportError, AttributeError) as error:
            raise ContractError(
                f"the model in {folder} cannot be loaded from its own code: {error}",
                hint="its packages must be in code/ and its requirements in this image",
            ) from error
        finally:
            sys.path.remove(str(code))
            sys.dont_write_bytecode = not writes_bytecode
    if not isinstance(loaded, Predictor):
        raise ContractError(f"{card.entry} in {folder} returned a {type(loaded).__name__}, which is no Predictor")
    return card, loaded
