"""What a commit has to pass before it is used: no finding of the linter, a `main.py` that loads, and its own tests."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import airloom
from airloom.errors import BuildFailedError, ConfigError, ServiceError
from airloom.settings import Settings

LINT_RULES = "E9,F63,F7,F82"  # what cannot run: syntax, undefined names, comparisons that are always one way
_LINT_SECONDS = 60.0
_ENTRY_SECONDS = 90.0
_TEST_SECONDS = 300.0
_SHOWN_CHARACTERS = 600


def lint(what: str, folder: Path) -> None:
    """Raises BuildFailedError with the first findings."""
    ruff = shutil.which("ruff", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    if ruff is None:
        raise ConfigError(
            "there is no ruff, which builds lint with", hint="it comes with airloom[platform]: make install"
        )
    command = [ruff, "check", "--isolated", "--no-cache", "--quiet", "--output-format", "concise"]
    code, output = _run([*command, "--select", LINT_RULES, "."], folder, _LINT_SECONDS)
    if code == 1:
        raise BuildFailedError(f"{what}: {_shortened(output.splitlines()[:5])}")
    if code != 0:
        raise ServiceError(f"ruff could not be run on {what}: {_shortened(output.splitlines()[-5:])}")


def load_entry_point(settings: Settings, what: str, folder: Path, image: str = "") -> None:
    """Raises BuildFailedError when `python main.py --help` fails: as the image holds it where there is one."""
    if not (folder / "main.py").is_file():
        raise BuildFailedError(f"{what}: there is no main.py", hint="every stage of a repo starts from it")
    code, output = _python(settings, ["main.py", "--help"], _ENTRY_SECONDS, None if image else folder, image)
    if code is None:
        raise BuildFailedError(f"{what}: `python main.py --help` did not end within {_ENTRY_SECONDS:.0f} s")
    if code != 0:
        raise BuildFailedError(f"{what}: `python main.py --help` ended with {code}: {_last(output)}")


def run_tests(settings: Settings, what: str, folder: Path, tests: list[str], image: str = "") -> None:
    """Raises BuildFailedError when a test fails: in the image where there is one, else with this Python's packages."""
    if not tests:
        return
    arguments = ["-m", "pytest", "-q", "-x", "--tb=line", "-p", "no:cacheprovider", *tests]
    code, output = _python(settings, arguments, _TEST_SECONDS, folder, image)
    if code is None:
        raise BuildFailedError(
            f"{what}: its tests did not end within {_TEST_SECONDS:.0f} s", hint="name quick ones in stages.yaml: tests"
        )
    if code != 0:
        raise BuildFailedError(f"{what}: its tests failed: {_last(output)}")


def _python(
    settings: Settings, arguments: list[str], limit_seconds: float, folder: Path | None, image: str
) -> tuple[int | None, str]:
    """Exit code (None: out of time) and output of an image's Python; of this one where there is no image.

    Pushed code meets nothing of the platform's in an image: neither its packages, nor its secrets, nor its network.
    """
    if image:
        from airloom.hooks.image_builder import ImageBuilder

        return ImageBuilder(settings).run(image, folder, ["python3", *arguments], limit_seconds=limit_seconds)
    assert folder is not None  # noqa: S101 - nobody asks for what is neither
    return _run([sys.executable, *arguments], folder, limit_seconds)


def _last(output: str) -> str:
    return _shortened([line for line in output.splitlines() if line.strip()][-4:])


def _run(command: Sequence[str], folder: Path, limit_seconds: float) -> tuple[int | None, str]:
    """Exit code (None: out of time) and output of a program that knows nothing of this process's environment."""
    with tempfile.TemporaryDirectory(prefix="airloom-build-") as home:
        environment = {
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.defpath)),
            "HOME": home,
            "TMPDIR": home,
            "LANG": "C.UTF-8",
            # The contract is all that stage code may import of the platform.
            "PYTHONPATH": str(Path(airloom.__file__).parent.parent),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=limit_seconds)
            code: int | None = process.returncode
        except subprocess.TimeoutExpired:
            code, output = None, b""
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return code, output.decode(errors="replace")


def _shortened(lines: Sequence[str]) -> str:
    text = " | ".join(line.strip() for line in lines)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
