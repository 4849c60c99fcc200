"""What a pipeline costs beyond Airflow itself: an unchanged pipeline against a DAG of no-ops of the same shape.

    python bench/overhead.py                # needs a started platform (make demo) whose pipeline has run once
    python bench/overhead.py --noop-only    # the no-ops alone, in an Airflow of its own

An unchanged pipeline reuses every stage's result, so what is left is Airloom's own work: pinning, looking up,
deciding, recording. Rounds are interleaved; the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

NOOP_DAG = """
from datetime import UTC, datetime
from airflow.sdk import DAG, BaseOperator


class NoOp(BaseOperator):
    def execute(self, context):
        return {}


with DAG("noop", schedule=None, start_date=datetime(2024, 1, 1, tzinfo=UTC), catchup=False):
    tasks = [NoOp(task_id=f"task_{number}") for number in range(%d)]
    for earlier, later in zip(tasks, tasks[1:]):
        earlier >> later
"""


def seconds_of(run: dict) -> float:
    """From the run's first task to its end."""
    return (datetime.fromisoformat(run["end_date"]) - datetime.fromisoformat(run["start_date"])).total_seconds()


def main() -> None:
    """Print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="digits")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=10, help="tasks of the no-op DAG")
    parser.add_argument("--noop-only", action="store_true")
    arguments = parser.parse_args()

    from airloom.embedded.airflow_server import services
    from airloom.hooks.airflow_api import AirflowApi
    from airloom.settings import get_settings
    from tests.conftest import make_settings
    from tests.fixtures.airflow import until
    from tests.fixtures.services import running

    platform = None if arguments.noop_only else AirflowApi.from_settings(get_settings())
    if platform is not None and not platform.healthy():
        raise SystemExit("no platform is running: start one with make demo, or use --noop-only")
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        project = Path(name) / "project"
        (project / "dags" / "configs").mkdir(parents=True)
        (project / "dags" / "noop.py").write_text(NOOP_DAG % arguments.tasks)
        settings = make_settings(Path(name) / "home", project=project)
        for service in services(settings):
            stack.enter_context(running(service, Path(name) / "logs"))
        own = AirflowApi.from_settings(settings)
        until(lambda: any(dag["dag_id"] == "noop" for dag in own.dags()), seconds=60, what="the no-ops are not parsed")
        contenders = {"no-ops": (own, "noop")}
        if platform is not None:
            contenders[arguments.pipeline] = (platform, arguments.pipeline)
        times: dict[str, list[float]] = {label: [] for label in contenders}
        for round_number in range(arguments.rounds + 1):
            for label, (api, dag_id) in contenders.items():
                run = api.wait(dag_id, api.trigger(dag_id, {}), poll_seconds=0.2)
                if run["state"] != "success":
                    raise SystemExit(f"the run {run['dag_run_id']} of {dag_id} has ended as {run['state']}")
                if round_number:  # the first warms up
                    times[label].append(seconds_of(run))
    for label, values in times.items():
        spread = f"{min(values):.2f}-{max(values):.2f}"
        print(f"{label:>12}: median {statistics.median(values):6.2f} s of {len(values)} ({spread})")
    if platform is not None:
        ratio = statistics.median(times[arguments.pipeline]) / statistics.median(times["no-ops"])
        print(f"{'ratio':>12}: {ratio:.2f}")


if __name__ == "__main__":
    main()
