"""The benchmarks' tables say of each figure with an aim whether it reaches it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import push_to_served, serving, versioning
from bench.aims import held_to


def test_a_bound_itself_is_met() -> None:
    assert held_to(1.5, at_least=1.5) == ">= 1.50: met"
    assert held_to(1.49, at_least=1.5) == ">= 1.50: missed"
    assert held_to(0.6, at_most=0.6) == "<= 0.60: met"
    assert held_to(0.61, at_most=0.6) == "<= 0.60: missed"


def line_of(text: str, name: str, number: int = 0) -> str:
    return [line for line in text.splitlines() if line.startswith(f"{name} ")][number]


def test_serving_holds_airloom_to_plain_fastapi(capsys: pytest.CaptureFixture[str]) -> None:
    even = dict.fromkeys(("requests_per_second", "p50_ms", "p99_ms", *serving.RATIOS), 1.0) | {"failures": 0.0}
    table = {serving.BASELINE: {"1": even, "16": even}, "Airloom": {"1": even, "16": even | {"rate_ratio": 1.8}}}
    serving.show(table, [])
    shown = capsys.readouterr().out
    assert line_of(shown, "Airloom").endswith("x req/s >= 0.95: met")
    assert line_of(shown, "Airloom", 1).endswith("x req/s >= 1.50: met, x p99 <= 0.60: missed")
    assert line_of(shown, serving.BASELINE, 1).split()[-1] == "0"


def test_versioning_holds_airloom_to_the_bare_upload(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(versioning, "RESULTS", tmp_path)
    monkeypatch.setattr(versioning, "ROOT", tmp_path)
    seconds = {versioning.BASELINE: [2.0], "Airloom": [2.5], "Airloom, unchanged": [0.2], "dvc, unchanged": [3.0]}
    versioning.report({"10 x 1 KB": seconds}, 1)
    shown = capsys.readouterr().out
    assert line_of(shown, "Airloom").endswith("x s5cmd <= 1.20: missed")
    assert line_of(shown, "Airloom, unchanged").endswith("median s <= 0.30: met")
    assert line_of(shown, "dvc, unchanged").split()[-1] == "1.50"


def test_a_push_has_an_aim_as_a_whole(capsys: pytest.CaptureFixture[str]) -> None:
    rounds = [{"build": 70.0, push_to_served.WHOLE: seconds} for seconds in (50.0, 61.0, 59.0)]
    push_to_served.show(rounds, aim=True)
    shown = capsys.readouterr().out
    assert "<= 60.00: met" in line_of(shown.replace("│ ", ""), push_to_served.WHOLE)
    assert shown.count("met") == 1
    push_to_served.show(rounds, aim=False)
    assert "met" not in capsys.readouterr().out
