"""Benchmarks that need nothing but the project run to their end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_parsing_is_measured_and_imports_nothing_heavy() -> None:
    command = [sys.executable, "bench/dag_parsing.py", "--counts", "2", "--rounds", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    head, row = done.stdout.splitlines()
    assert head.split()[0] == "pipelines"
    assert (row.split()[0], row.split()[-1]) == ("2", "none")
