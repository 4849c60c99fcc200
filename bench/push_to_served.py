"""How long a push takes to be served: a changed model goes from `git push` to answering at the gateway.

    python bench/push_to_served.py             # needs a started platform (make demo)

Each round commits a new comment to the training code, so that the model is trained, evaluated, judged, released
and deployed anew. Printed is the time of each part, from the push's start to the first answer of the new release.
"""

from __future__ import annotations

import argparse
import base64
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

REPO, FILE, PIPELINE = "ds_mlmodeling", "modeling/train.py", "digits"


def wait_for(what: str, condition: Callable[[], Any], timeout_seconds: float = 300) -> Any:
    """Poll every 50 ms until the condition gives something true."""
    deadline = time.monotonic() + timeout_seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise SystemExit(f"{what} has not come within {timeout_seconds:g} s; see: airloom status, airloom runs")
        time.sleep(0.05)
    return found


def main() -> None:
    """Print a table of seconds and write bench/results/push_to_served.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    import httpx

    from airloom.cli.output import print_table
    from airloom.cli.runs import ordered
    from airloom.flows.build import find_build
    from airloom.hooks.connect import Hooks
    from airloom.hooks.git_command import git_environment

    hooks = Hooks()
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
        for number in range(arguments.rounds):
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
            rounds.append({**parts, "push -> first answer of the new release": served - start})
    names = list(rounds[0])
    rows = []
    for name in names:
        seconds = [item.get(name, 0.0) for item in rounds]
        rows.append((name, *(f"{value:.1f}" for value in (*seconds, statistics.median(seconds)))))
    print_table(["part, seconds", *(f"round {n + 1}" for n in range(len(rounds))), "median"], rows)
    results = ROOT / "bench" / "results"
    results.mkdir(exist_ok=True)
    (results / "push_to_served.json").write_text(json.dumps(rounds, indent=2))


if __name__ == "__main__":
    main()
