"""stages.yaml names exactly the files that each stage is made of."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml
from modeling_samples import REPO

# MLmodel names pyfunc.py, and no import does.
ENTRIES = {"train": ["modeling.train", "image_classifier.pyfunc"], "evaluate": ["modeling.evaluate"]}


def imported(path: Path) -> set[str]:
    """Names of modules that a file imports anywhere; for `from a import b` both `a` and `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def local_file(module: str) -> Path | None:
    base = REPO / module.replace(".", "/")
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.exists()), None)


def files_of(entries: list[str]) -> set[str]:
    found: set[Path] = set()
    waiting = list(entries)
    while waiting:
        path = local_file(waiting.pop())
        if path is None or path in found:
            continue
        found.add(path)
        waiting += imported(path)
    return {path.relative_to(REPO).as_posix() for path in found}


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_the_listed_files_are_the_imported_ones(stage: str) -> None:
    listed: set[str] = set()
    for name in yaml.safe_load((REPO / "stages.yaml").read_text())["stages"][stage]["paths"]:
        path = REPO / name
        files = path.rglob("*.py") if path.is_dir() else [path]
        listed |= {file.relative_to(REPO).as_posix() for file in files}
    found = files_of(ENTRIES[stage])
    packages = {f"{name.partition('/')[0]}/__init__.py" for name in found}
    assert listed == found | packages | {"main.py", "requirements.txt"}


def test_evaluation_knows_no_model_but_through_its_artifact() -> None:
    assert not any(name.startswith("image_classifier") for name in files_of(ENTRIES["evaluate"]))
