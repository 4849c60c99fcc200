"""What stage code runs in, told by one digest."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from airloom.contract import sha256_json
from airloom.flows.environment import environment, environment_digest, store_environment
from tests.fixtures.plans import MemoryStore


def normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def test_it_lists_what_is_installed_here() -> None:
    listed = environment()["distributions"]
    assert listed == sorted(set(listed))
    names = {line.partition("==")[0] for line in listed}
    for known in ("pydantic", "pytest", "airloom"):
        assert known in names
    prefix = Path(sys.prefix)
    installed = {
        normal(found.metadata["Name"])
        for found in distributions()
        if Path(str(found.locate_file(""))).is_relative_to(prefix)
    }
    assert {normal(name) for name in names} == installed


def test_another_process_in_another_folder_finds_the_same(tmp_path: Path) -> None:
    code = "from airloom.flows.environment import environment_digest as d; print(d())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == environment_digest() == sha256_json(environment())


def test_the_list_is_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hooks: Any = SimpleNamespace(store=MemoryStore(), settings=SimpleNamespace(bucket_airloom="airloom"))
    digest = store_environment(hooks)
    assert hooks.store.get_json("airloom", f"environments/{digest}.json") == environment()
    # Another run wrote it between the look and the write.
    monkeypatch.setattr(hooks.store, "exists", lambda *_: False)
    assert store_environment(hooks) == digest
    assert len(hooks.store.objects) == 1
