"""How long a push takes to be served: a changed model goes from `git push` to answering at the gateway.

    python bench/push_to_served.py                            # needs a started platform (make demo)
    python bench/push_to_served.py --runner docker            # starts one of its own, with this runner

Each round commits a new comment to the training code, so that the model is trained, evaluated, judged, released
and deployed anew. Printed is the time of each part, from the push's start to the first answer of the new release; where
stages run as processes, that has an aim.

A platform of its own has the demo's pipeline, takes the settings of images and wheels from the environment
(AIRLOOM_PYTHON_IMAGE, AIRLOOM_WHEELS, AIRLOOM_TORCH_BACKEND, AIRLOOM_CA_BUNDLE), and with runner docker builds the
runtimes first: minutes, where the engine has no layers of them.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

REPO, FILE, PIPELINE = "ds_mlmodeling", "modeling/train.py", "digits"
NAMESPACE = "airloom-bench"
WHOLE, WHOLE_SECONDS = "push -> first answer of the new release", 60.0
TAKEN = ("python_image", "wheels", "torch_backend", "ca_bundle")


def wait_for(what: str, condition: Callable[[], Any], timeout_seconds: float = 300) -> Any:
    """Poll every 50 ms until the condition gives something true."""
    deadline = time.monotonic() + timeout_seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise SystemExit(f"{what} has not come within {timeout_seconds:g} s; see: airloom status, airloom runs")
        time.sleep(0.05)
    return found


@contextmanager
def started(runner: str | None) -> Iterator[Any]:
    """The hooks of the platform that is started, or of one of its own with this runner."""
    from airloom.hooks.connect import Hooks

    if runner is None:
        yield Hooks()
        return
    from airloom.flows.gc import remove_from_engine
    from tests.e2e.conftest import Platform

    given = {name: os.environ[f"AIRLOOM_{name.upper()}"] for name in TAKEN if f"AIRLOOM_{name.upper()}" in os.environ}
    with tempfile.TemporaryDirectory(prefix="airloom-bench-", ignore_cleanup_errors=True) as folder:
        platform = Platform(Path(folder), runner=runner, image_namespace=NAMESPACE, **given)
        for name in ("images", "requirements"):
            shutil.copytree(ROOT / name, platform.project / name)
        for name in ("pyproject.toml", "dags/configs/digits.yaml"):  # the demo's, not the tests'
            shutil.copy(ROOT / name, platform.project / name)
        try:
            platform.airloom("init")
            if runner == "docker":
                print("Building the runtimes ...", flush=True)
                platform.airloom("images", "build", timeout=1800)
            print("Starting the platform, and running the pipeline once ...", flush=True)
            platform.airloom("up", "--embedded", timeout=600)
            platform.airloom("run", PIPELINE, timeout=900)
            yield platform.hooks
        finally:
            platform.airloom("down", check=False)
            if runner == "docker":
                remove_from_engine(platform.settings)
                list_images = ["docker", "images", "-q", "--filter", f"reference={NAMESPACE}/*"]
                for image in subprocess.run(list_images, capture_output=True, text=True, check=True).stdout.split():
                    subprocess.run(["docker", "rmi", "-f", image], capture_output=True, check=False)


def main() -> None:
    """Print a table of seconds and write it to bench/results/ as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runner", choices=("process", "docker"), help="start a platform with this one")
    arguments = parser.parse_args()

    with started(arguments.runner) as hooks:
        rounds = measure(hooks, arguments.rounds)
        show(rounds, aim=(hooks.settings.runner or "process") == "process")
    results = ROOT / "bench" / "results"
    results.mkdir(exist_ok=True)
    file = "_".join(filter(None, ("push_to_served", arguments.runner)))
    (results / f"{file}.json").write_text(json.dumps(rounds, indent=2))


def show(rounds: list[dict[str, float]], *, aim: bool) -> None:
    """Print each part's seconds; `aim`: and whether the whole is quick enough."""
    from airloom.cli.output import print_table
    from bench.aims import held_to

    rows = []
    for name in rounds[0]:
        seconds = [item.get(name, 0.0) for item in rounds]
        median = statistics.median(seconds)
        held = held_to(median, at_most=WHOLE_SECONDS) if aim and name == WHOLE else None
        rows.append((name, *(f"{value:.1f}" for value in (*seconds, median)), held))
    print_table(["part, seconds", *(f"round {n + 1}" for n in range(len(rounds))), "median", "aim"], rows)


def measure(hooks: Any, number_of_rounds: int) -> list[dict[str, float]]:
    """Seconds of each part, for each round."""
    import httpx

    from airloom.cli.runs import ordered
    from airloom.flows.build import find_build
    from airloom.hooks.git_command import git_environment

    login = f"{hooks.settings.git_user}:{hooks.settings.secret('git_password')}".encode()
    environment = git_environment(
        {
            "user.name": "Bench",
            "user.email": "bench@localhost",
            "http.extraHeader": f"Authorization: Basic {base64.b64encode(login).decode()}",
        }
    )
    info = hooks.gateway.model_url(PIPELINE) + "/info"

    def released() -> str:
        return str(httpx.get(info, timeout=10, trust_env=False).json().get("release"))

    def run_ids() -> set[str]:
        return {run["dag_run_id"] for run in hooks.airflow.runs(PIPELINE)}

    rounds = []
    with tempfile.TemporaryDirectory() as folder:

        def git(*words: str) -> str:
            done = subprocess.run(
                ["git", *words], cwd=folder, env=environment, check=True, capture_output=True, text=True
            )
            return done.stdout.strip()

        git("clone", "-q", hooks.git.clone_url(REPO), ".")
        for number in range(number_of_rounds):
            before, earlier = released(), run_ids()
            path = Path(folder) / FILE
            path.write_text(path.read_text() + f"# {time.time_ns()}\n")
            git("commit", "-q", "-a", "-m", f"Measure a push, round {number + 1}")
            commit = git("rev-parse", "HEAD")
            start = time.time()
            git("push", "-q", "origin", "main")
            pushed = time.time()
            wait_for("the build", lambda commit=commit: find_build(hooks, REPO, commit))
            built = time.time()
            run_id = wait_for("the run", lambda earlier=earlier: next(iter(run_ids() - earlier), None))
            run_started = time.time()
            wait_for("the new release", lambda before=before: released() != before)
            served = time.time()
            hooks.airflow.wait(PIPELINE, run_id)
            parts = {"push": pushed - start, "build": built - pushed, "run starts": run_started - built}
            for task in ordered(hooks.airflow.task_instances(PIPELINE, run_id)):
                parts[f"  {task['task_id']}"] = task["duration"] or 0.0
            rounds.append({**parts, WHOLE: served - start})
    return rounds


if __name__ == "__main__":
    main()
