"""How long Airflow needs to parse dags/ with 1 and with 200 pipelines, and what that imports.

    python bench/dag_parsing.py

Each figure is the median of fresh processes, as Airflow's DAG processor uses: `import` is what the DAG file
itself imports beyond Airflow, `parse` is reading, validating and building all pipelines, `task` is what a
task that starts needs of it: its own DAG alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "docker", "dvc", "mlflow", "git", "minio", "pandas", "numpy")

PROBE = """
import json, os, sys, time
import airflow.sdk, airflow.dag_processing.dagbag
from airflow.dag_processing.dagbag import DagBag
folder = sys.argv[1]
started = time.perf_counter()
import airloom.dag_factory
imported = time.perf_counter()
bag = DagBag(dag_folder=folder, bundle_path=folder, bundle_name="bench")
parsed = time.perf_counter()
os.environ["_AIRFLOW_PARSING_CONTEXT_DAG_ID"] = "digits"
DagBag(dag_folder=os.path.join(folder, "pipelines.py"), safe_mode=False, bundle_path=folder, bundle_name="bench")
ended = time.perf_counter()
assert not bag.import_errors, bag.import_errors
pipelines = [name for name in bag.dags if not name.startswith("airloom__")]  # those are the platform's own
print(json.dumps({"dags": len(pipelines), "import": imported - started, "parse": parsed - imported,
                  "task": ended - parsed, "modules": sorted(set(sys.modules))}))
"""


def measure(count: int, rounds: int) -> dict[str, object]:
    """Medians for a project with `count` pipelines."""
    with tempfile.TemporaryDirectory() as name:
        project = Path(name)
        shutil.copytree(ROOT / "dags", project / "dags", ignore=shutil.ignore_patterns("__pycache__", "*.yaml"))
        text = (ROOT / "dags/configs/digits.yaml").read_text()
        (project / "dags/configs").mkdir(exist_ok=True)
        for number in range(count):
            pipeline = "digits" if number == 0 else f"digits_{number}"
            (project / f"dags/configs/{pipeline}.yaml").write_text(text.replace("name: digits", f"name: {pipeline}", 1))
        environment = {
            **os.environ,
            "AIRLOOM_PROJECT": name,
            "AIRFLOW_HOME": f"{name}/airflow",
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__LOGGING__LOGGING_LEVEL": "ERROR",
        }
        found = []
        for _ in range(rounds):
            done = subprocess.run(
                [sys.executable, "-c", PROBE, str(project / "dags")],
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            )
            found.append(json.loads(done.stdout.strip().splitlines()[-1]))
    heavy = sorted({name for name in found[0]["modules"] if name in HEAVY})
    medians = {key: statistics.median(one[key] for one in found) for key in ("import", "parse", "task")}
    return {"dags": found[0]["dags"], **medians, "heavy": heavy}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 200])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{'pipelines':>9} {'import s':>9} {'parse s':>9} {'ms each':>9} {'task s':>9}  heavy modules imported")
    for count in arguments.counts:
        result = measure(count, arguments.rounds)
        assert result["dags"] == count, result
        print(
            f"{count:>9} {result['import']:>9.3f} {result['parse']:>9.3f} {result['parse'] / count * 1000:>9.1f}"
            f" {result['task']:>9.3f}  {', '.join(result['heavy']) or 'none'}"
        )


if __name__ == "__main__":
    main()
