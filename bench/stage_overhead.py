"""What a stage costs beyond its own work: each runner against the same program started without Airloom.

    python bench/stage_overhead.py             # process alone where no Docker engine answers

The stage does nothing: Python starts, reads its request and writes its result. Rounds are interleaved.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    """Print the medians in seconds, and each runner's difference from its peer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds

    from airloom.contract import Stage, StageRequest
    from airloom.hooks.process_runner import ProcessRunner
    from airloom.hooks.runner import Runner, StageJob
    from tests.conftest import make_settings
    from tests.fixtures.stage_image import built_image
    from tests.fixtures.stage_repo import MAIN

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = make_settings(folder / "home")
        checkout = folder / "checkout"
        checkout.mkdir()
        (checkout / "main.py").write_text(MAIN)

        def job(kind: str, image: str | None = None) -> StageJob:
            workspace = folder / kind
            outputs = {"dataset": workspace / "outputs" / "dataset"}
            StageRequest(
                pipeline="bench", run_id=kind, stage=Stage.PREPROCESS, commit="c" * 40, params={"do": "success"},
                outputs=outputs,
            ).write(workspace / "request.json")  # fmt: skip
            return StageJob(
                pipeline="bench", run_id=kind, stage=Stage.PREPROCESS, key=kind, workspace=workspace,
                checkout=checkout, memory_bytes=2**28, timeout_seconds=60.0, image=image,
            )  # fmt: skip

        def by(runner: Runner, wanted: StageJob) -> Callable[[], None]:
            def once() -> None:
                handle = runner.start(wanted)
                found = runner.wait(handle, lambda line: None, lambda: False)
                runner.mark_collected(handle)
                if found.exit_code != 0:
                    raise SystemExit(f"the stage ended with {found}")

            return once

        def plain(command: list[str], cwd: Path) -> Callable[[], None]:
            return lambda: subprocess.run(command, cwd=cwd, check=True, capture_output=True) and None

        arguments = ["main.py", "preprocess", "--request", "request.json", "--result", "result.json"]
        bare = job("bare")
        absolute = [str(checkout / "main.py"), *arguments[1:]]
        contenders = {
            "plain process": plain([sys.executable, *absolute], bare.workspace),
            "runner process": by(ProcessRunner(), job("process")),
        }
        pairs = [("runner process", "plain process")]
        engine = subprocess.run(["docker", "info"], capture_output=True, check=False)
        if engine.returncode == 0:
            from airloom.hooks.docker_runner import DockerRunner

            with built_image(folder / "image") as image:
                mount = f"{job('mounted').workspace}:{folder / 'mounted'}"
                docker = ["docker", "run", "--rm", "--network", "host", "-v", mount, "-w", str(folder / "mounted")]
                contenders["docker run"] = plain([*docker, image, "python3", "/app/main.py", *arguments[1:]], folder)
                contenders["runner docker"] = by(DockerRunner(settings), job("docker", image))
                pairs.append(("runner docker", "docker run"))
                measure(contenders, pairs, rounds)
        else:
            print("no Docker engine answers: runner docker is left out")
            measure(contenders, pairs, rounds)


def measure(contenders: dict[str, Callable[[], None]], pairs: list[tuple[str, str]], rounds: int) -> None:
    times: dict[str, list[float]] = {label: [] for label in contenders}
    for number in range(rounds + 1):
        for label, once in contenders.items():
            started = time.perf_counter()
            once()
            if number:  # the first warms up
                times[label].append(time.perf_counter() - started)
    for label, values in times.items():
        print(
            f"{label:>14}: median {statistics.median(values):.2f} s of {rounds} ({min(values):.2f}-{max(values):.2f})"
        )
    for runner, peer in pairs:
        more = statistics.median(times[runner]) - statistics.median(times[peer])
        print(f"{runner:>14}: {more:+.2f} s beside {peer}")


if __name__ == "__main__":
    main()
