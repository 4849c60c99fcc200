"""Serving against peers: the same model behind Airloom, plain FastAPI, LitServe, BentoML and `mlflow models serve`.

    python -m bench.serving            # about 6 minutes, and the installation of the peers at the first run
    python -m bench.serving --quick    # a smoke test: one short round

Each server runs one worker on this machine, answers the same pictures with the same predictor, and is measured at 1 and
16 connections in interleaved rounds: the others are stopped (SIGSTOP) meanwhile. A figure is the median of the rounds,
a ratio the median of the rounds' own ratios to plain FastAPI. All run torch with one thread, which
suits the peers best; else they keep their defaults where the table's notes name no others.
Airloom's journal and prediction log are on; the peers record nothing. The table says whether Airloom's ratios reach
their aims.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from airloom.contract import Stage, StageRequest
from bench.aims import held_to
from bench.serving_peers.artifact import make_bundle, make_pictures
from bench.serving_peers.load import Load, http_request, measure

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "bench" / "serving_peers"
RESULTS = ROOT / "bench" / "results"
SERVING_REPO = ROOT / "gitbucket_repos" / "ds_modelserving"
PEER_REQUIREMENTS = [
    "torch==2.13.0",
    "numpy",
    "pillow",
    "pydantic",
    "pydantic-settings",
    "pyyaml",
    "fastapi",
    "uvicorn[standard]",
    "litserve==0.2.19",
    "bentoml==1.4.39",
    "mlflow>=3.17,<4",
]
BASELINE = "plain FastAPI"
CONNECTIONS = (1, 16)
# Of Airloom's ratios to plain FastAPI.
AIMS: dict[str, dict[str, dict[str, float]]] = {
    "1": {"rate_ratio": {"at_least": 0.95}},
    "16": {"rate_ratio": {"at_least": 1.5}, "p99_ratio": {"at_most": 0.6}},
}
RATIOS = {"rate_ratio": "x req/s", "p50_ratio": "x p50", "p99_ratio": "x p99"}
# One thread for each operation of the model, in all of them: torch's default of one for each processor
# makes every server slower here at 16 connections, plain FastAPI most of all.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
START_SECONDS = 120.0


@dataclass
class Server:
    """One server under measurement.

    Attributes:
        command: given its port; its environment gets BENCH_PORT and BENCH_MODEL.
        request: from a picture to a whole HTTP request.
        label: from the answer's JSON to the predicted label: all servers must agree.
        note: what is particular to it.
    """

    name: str
    command: list[str]
    request: Callable[[bytes], bytes]
    label: Callable[[Any], str]
    health: str
    note: str
    env: dict[str, str] = field(default_factory=dict)
    cwd: Path = ROOT
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    def start(self, work: Path, model: Path) -> None:
        import socket

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        filled = [part.replace("{port}", str(self.port)) for part in self.command]
        env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("AIRLOOM_", "MLFLOW_"))},
            **ONE_THREAD,
            **self.env,
            "BENCH_PORT": str(self.port),
            "AIRLOOM_PORT": str(self.port),
            "BENCH_MODEL": str(model),
            "PYTHONPATH": f"{ROOT / 'plugins'}{os.pathsep}{ROOT}",
        }
        with (work / f"{self.slug}.log").open("wb") as log:
            self.process = subprocess.Popen(
                filled, cwd=self.cwd, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def slug(self) -> str:
        return self.name.lower().replace(" ", "-")

    def wait(self, work: Path) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process is None or self.process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{self.health}", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        log = (work / f"{self.slug}.log").read_text(errors="replace")
        raise SystemExit(f"{self.name} did not start:\n{log[-3000:]}")

    def signal(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def end(self) -> None:
        """End the server and whatever it started, also in process groups of their own."""
        if self.process is None:
            return
        import psutil

        with suppress(psutil.NoSuchProcess):
            started = psutil.Process(self.process.pid).children(recursive=True)
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(15)
            for process in started:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def peers_python(venv: Path) -> Path:
    """The interpreter of the peers' own environment, made if it is not there."""
    python = venv / "bin" / "python"
    stamp = venv / "installed.json"
    if stamp.is_file() and json.loads(stamp.read_text()) == PEER_REQUIREMENTS:
        return python
    print(f"Installing the peers into {venv} (once) ...", flush=True)
    uv = shutil.which("uv") or str(Path(sys.executable).parent / "uv")
    links = os.environ.get("PIP_FIND_LINKS")
    extra = ["--find-links", links] if links else []
    if not python.exists():
        subprocess.run([uv, "venv", "-q", "--python", sys.executable, str(venv)], check=True)
    subprocess.run([uv, "pip", "install", "-q", "--python", str(python), *extra, *PEER_REQUIREMENTS], check=True)
    stamp.write_text(json.dumps(PEER_REQUIREMENTS))
    return python


def encoded(picture: bytes) -> str:
    return base64.b64encode(picture).decode()


def as_json(path: str, wrap: Callable[[str], Any]) -> Callable[[bytes], bytes]:
    return lambda picture: http_request(path, "application/json", json.dumps(wrap(encoded(picture))).encode())


def as_body(path: str, media_type: str) -> Callable[[bytes], bytes]:
    return lambda picture: http_request(path, media_type, picture)


def airloom_server(bundle: Path, work: Path, threads: int) -> Server:
    request = work / "airloom" / "request.json"
    StageRequest(
        pipeline="bench",
        run_id="bench",
        stage=Stage.SERVE,
        commit="0" * 40,
        params={"journal_dir": str(work / "airloom" / "journal"), **({"threads": threads} if threads else {})},
        inputs={"model": bundle / "model", "release": bundle / "release.json"},
    ).write(request)
    return Server(
        name="Airloom",
        command=[sys.executable, "main.py", "serve", "--request", str(request), "--result", str(work / "result.json")],
        cwd=SERVING_REPO,
        env={"AIRLOOM_PREDICTION_DB": f"sqlite:///{work / 'airloom' / 'log.db'}"},
        request=as_body("/predict", "image/jpeg"),
        label=lambda value: value["label"],
        health="/health",
        note="micro-batches of up to 32, never waiting; journal and prediction log on",
    )


def peer_servers(python: Path, work: Path) -> list[Server]:
    binaries = python.parent
    mlflow_model = work / "mlflow-model"
    return [
        Server(
            name=BASELINE,
            command=[str(python), str(PEERS / "plain_fastapi.py")],
            request=as_body("/predict", "application/octet-stream"),
            label=lambda value: value["label"],
            health="/health",
            note="def endpoint in the thread pool; uvicorn with httptools and uvloop",
        ),
        Server(
            name="LitServe",
            command=[str(python), str(PEERS / "litserve_app.py")],
            request=as_json("/predict", lambda image: {"image": image}),
            label=lambda value: value["label"],
            health="/health",
            note="max_batch_size=16, batch_timeout=5 ms, one worker; base64 in JSON",
        ),
        Server(
            name="BentoML",
            command=[
                *(str(binaries / "bentoml"), "serve", "bentoml_app:Bench"),
                *("--host", "127.0.0.1", "--port", "{port}", "--working-dir", str(PEERS)),
            ],
            env={"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": str(work / "bentoml")},
            request=as_json("/predict", lambda image: {"images": [image]}),
            label=lambda value: value[0]["label"],
            health="/readyz",
            note="batchable=True, max_batch_size=16; base64 in JSON",
        ),
        Server(
            name="mlflow models serve",
            command=[
                *(str(binaries / "mlflow"), "models", "serve", "-m", str(mlflow_model), "--env-manager", "local"),
                *("--host", "127.0.0.1", "--port", "{port}", "--workers", "1"),
            ],
            env={"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "MLFLOW_DISABLE_TELEMETRY": "true"},
            request=as_json("/invocations", lambda image: {"inputs": [image]}),
            label=lambda value: value["predictions"][0]["label"],
            health="/ping",
            note="one worker; base64 in JSON",
        ),
    ]


def save_mlflow_model(python: Path, work: Path, model: Path) -> None:
    env = {
        **os.environ,
        "BENCH_MODEL": str(model),
        "PYTHONPATH": f"{ROOT / 'plugins'}{os.pathsep}{ROOT}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    target = work / "mlflow-model"
    subprocess.run(
        [str(python), str(PEERS / "mlflow_model.py"), str(target)],
        check=True, env=env, cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def check_answers(servers: list[Server], pictures: list[bytes]) -> None:
    """All servers must give the same labels: else they are not serving the same model."""
    import socket

    def ask(server: Server, picture: bytes) -> str:
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(server.request(picture).replace(b"Host:", b"Connection: close\r\nHost:", 1))
            answer = b""
            while chunk := connection.recv(65536):
                answer += chunk
        head, _, body = answer.partition(b"\r\n\r\n")
        if b" 200 " not in head.split(b"\r\n")[0]:
            raise SystemExit(f"{server.name} answered {answer[:500]!r}")
        return server.label(json.loads(body[body.index(b"{") if body[:1] not in b"[{" else 0 :]))

    for picture in pictures[:4]:
        labels = {server.name: ask(server, picture) for server in servers}
        if len(set(labels.values())) != 1:
            raise SystemExit(f"the servers disagree: {labels}")


def run_rounds(servers: list[Server], pictures: list[bytes], *, rounds: int, seconds: float, warm: float) -> Results:
    results: Results = {server.name: {n: [] for n in CONNECTIONS} for server in servers}
    requests = {server.name: [server.request(picture) for picture in pictures] for server in servers}
    for server in servers:
        server.signal(signal.SIGSTOP)
    for number in range(rounds):
        # Another order in each round, so that no server always follows the same one.
        order = servers[number % len(servers) :] + servers[: number % len(servers)]
        for connections in CONNECTIONS:
            for server in order:
                server.signal(signal.SIGCONT)
                measure(server.port, requests[server.name], connections=connections, seconds=warm)
                load = measure(server.port, requests[server.name], connections=connections, seconds=seconds)
                server.signal(signal.SIGSTOP)
                if not load.latencies:
                    raise SystemExit(f"{server.name} answered nothing at {connections} connections")
                results[server.name][connections].append(load)
        print(f"  round {number + 1} of {rounds}", flush=True)
    return results


Results = dict[str, dict[int, list[Load]]]


def summary(results: Results) -> dict[str, dict[str, dict[str, float]]]:
    """Medians of the rounds, and medians of the rounds' ratios to plain FastAPI."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for name, by_connections in results.items():
        table[name] = {}
        for connections, loads in by_connections.items():
            base = results[BASELINE][connections]
            pairs = list(zip(loads, base, strict=True))
            table[name][str(connections)] = {
                "requests_per_second": statistics.median(load.rate for load in loads),
                "p50_ms": 1000 * statistics.median(load.percentile(50) for load in loads),
                "p99_ms": 1000 * statistics.median(load.percentile(99) for load in loads),
                "rate_ratio": statistics.median(load.rate / other.rate for load, other in pairs),
                "p50_ratio": statistics.median(load.percentile(50) / other.percentile(50) for load, other in pairs),
                "p99_ratio": statistics.median(load.percentile(99) / other.percentile(99) for load, other in pairs),
                "failures": sum(load.failures for load in loads),
            }
    return table


def show(table: dict[str, dict[str, dict[str, float]]], servers: list[Server]) -> None:
    for connections in map(str, CONNECTIONS):
        print(f"\n{connections} connection{'s' if connections != '1' else ''}")
        titles = f"{'req/s':>9}{'p50 ms':>9}{'p99 ms':>9}{'x req/s':>9}{'x p50':>8}{'x p99':>8}{'failed':>8}"
        print(f"{'':22}{titles}  aim")
        for name, row in table.items():
            values = row[connections]
            aims = AIMS[connections].items() if name == "Airloom" else ()
            held = ", ".join(f"{RATIOS[figure]} {held_to(values[figure], **bound)}" for figure, bound in aims)
            print(
                f"{name:22}{values['requests_per_second']:9.1f}{values['p50_ms']:9.2f}{values['p99_ms']:9.2f}"
                f"{values['rate_ratio']:9.2f}{values['p50_ratio']:8.2f}{values['p99_ratio']:8.2f}{values['failures']:8.0f}"
                f"{f'  {held}' if held else ''}"
            )
    print(f"\nx: ratio to {BASELINE}.")
    print("The peers record nothing; every answer of Airloom is in its journal before it is sent.")
    for server in servers:
        print(f"{server.name}: {server.note}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--only", nargs="*", help="names of servers; plain FastAPI always takes part")
    parser.add_argument("--threads", type=int, default=0, help="of Airloom's model; 0: its default")
    parser.add_argument("--peers", type=Path, default=ROOT / "build" / "bench-peers", help="environment of the peers")
    parser.add_argument("--output", type=Path, default=RESULTS / "serving.json")
    options = parser.parse_args()
    rounds, seconds, warm = (1, 1.0, 0.5) if options.quick else (options.rounds, options.seconds, 1.0)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are ended then, too
    python = peers_python(options.peers)
    work = Path(tempfile.mkdtemp(prefix="bench-serving-"))
    bundle, pictures = make_bundle(work), make_pictures()
    servers = [airloom_server(bundle, work, options.threads), *peer_servers(python, work)]
    if options.only:
        servers = [server for server in servers if server.name in {*options.only, BASELINE}]
    if any(server.name.startswith("mlflow") for server in servers):
        save_mlflow_model(python, work, bundle / "model")
    try:
        for server in servers:  # one after the other: a start takes the whole machine
            server.start(work, bundle / "model")
            server.wait(work)
        check_answers(servers, pictures)
        results = run_rounds(servers, pictures, rounds=rounds, seconds=seconds, warm=warm)
    finally:
        for server in servers:
            server.end()
    table = summary(results)
    show(table, servers)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "machine": {"processors": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()},
        "rounds": rounds,
        "seconds": seconds,
        "baseline": BASELINE,
        "notes": {server.name: server.note for server in servers},
        "servers": table,
    }
    options.output.write_text(json.dumps(record, indent=2) + "\n")
    print(f"\nWritten to {options.output}")
    shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
