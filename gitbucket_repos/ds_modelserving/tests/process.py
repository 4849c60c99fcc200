"""Start, watch and end the real serving process."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from airloom.contract import Stage, StageRequest

REPO = Path(__file__).resolve().parent.parent
TOKEN = "token-for-tests"


def free_port() -> int:
    """A port that nobody uses now, below those that the kernel hands out to whoever connects meanwhile."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", random.randrange(10_000, 32_000)))
            return int(probe.getsockname()[1])


class ServingProcess:
    """`python main.py serve` on a free port; the folder keeps its request, journal, database and log."""

    def __init__(self, folder: Path, bundle: Path, *, database: str | None = "", **params: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.journal_dir = Path(params.get("journal_dir", folder / "journal"))
        self.database = f"sqlite:///{folder / 'log.db'}" if database == "" else database
        self.request = folder / "request.json"
        self.result = folder / "result.json"
        self.log = folder / "serving.log"
        self.process: subprocess.Popen[bytes] | None = None
        StageRequest(
            pipeline=bundle.parent.name,
            run_id="test",
            stage=Stage.SERVE,
            commit="0" * 40,
            params={
                "journal_dir": str(self.journal_dir),
                "releases_root": str(bundle.parent.parent),
                "port": 1,
                **params,
            },
            inputs={"model": bundle / "model", "release": bundle / "release.json"},
        ).write(self.request)

    def start(self) -> ServingProcess:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("AIRLOOM_")}
        environment["AIRLOOM_PORT"] = str(self.port)
        environment["AIRLOOM_SERVING_ADMIN_TOKEN"] = TOKEN
        if self.database:
            environment["AIRLOOM_PREDICTION_DB"] = self.database
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "main.py", "serve", "--request", str(self.request), "--result", str(self.result)],
                cwd=REPO,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def wait_for(self, status: int = 200, seconds: float = 240) -> httpx.Response:
        """The first answer of /health with this status."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process is None or self.process.poll() is not None:
                raise AssertionError(f"serving has ended:\n{self.log.read_text()[-3000:]}")
            try:
                answer = httpx.get(f"{self.url}/health", timeout=5)
                if answer.status_code == status:
                    return answer
            except httpx.HTTPError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"no {status} from /health in {seconds} s:\n{self.log.read_text()[-3000:]}")

    def end(self, number: signal.Signals = signal.SIGTERM, seconds: float = 120) -> int:
        """Send a signal and give the exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"serving did not end:\n{self.log.read_text()[-3000:]}") from None

    def __enter__(self) -> ServingProcess:
        self.start()
        self.wait_for()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.end()
