"""The real gateway in front of real processes that come, go and die."""

from __future__ import annotations

import collections
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from airloom.embedded import gateway_server
from airloom.errors import UnavailableError
from airloom.hooks.gateway import Gateway, Upstream
from airloom.settings import Settings
from tests.conftest import make_settings
from tests.fixtures.services import free_port, running

MAX_BODY = 1000
SLOW_ECHO = textwrap.dedent("""
    import http.server, sys, time
    name, port = sys.argv[1], int(sys.argv[2])
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if body == b"slow":
                time.sleep(3)
            answer = name.encode() + b" " + self.path.encode() + b" " + body
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)
        def log_message(self, *arguments):
            pass
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
""")


@pytest.fixture
def gateway(settings: Settings) -> Iterator[Gateway]:
    with running(gateway_server.service(settings), settings.log_dir):
        yield Gateway.from_settings(settings)


class Echo:
    def __init__(self, name: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = subprocess.Popen([sys.executable, "-c", SLOW_ECHO, name, str(self.port)])
        deadline = time.monotonic() + 20
        while True:
            try:
                httpx.post(self.url, content=b"ready?")
                return
            except httpx.TransportError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def old() -> Iterator[Echo]:
    echo = Echo("old")
    yield echo
    echo.kill()


@pytest.fixture
def new() -> Iterator[Echo]:
    echo = Echo("new")
    yield echo
    echo.kill()


def test_weights_are_kept_to_the_request(gateway: Gateway, old: Echo, new: Echo) -> None:
    weights = [Upstream(url=old.url, weight=90), Upstream(url=new.url, weight=10)]
    gateway.set_upstreams("digits", weights, max_body_bytes=MAX_BODY)
    with httpx.Client(trust_env=False) as client:
        answers = [client.post(gateway.model_url("digits") + "/predict", content=b"x").text for _ in range(100)]
    assert collections.Counter(answers) == {"old /predict x": 90, "new /predict x": 10}
    assert gateway.upstreams("digits") == weights


def test_a_change_of_weights_drops_no_request(gateway: Gateway, old: Echo, new: Echo) -> None:
    def direct(*shares: tuple[Echo, int]) -> None:
        upstreams = [Upstream(url=echo.url, weight=weight) for echo, weight in shares]
        gateway.set_upstreams("digits", upstreams, max_body_bytes=MAX_BODY)

    direct((old, 100))
    statuses: collections.Counter[int] = collections.Counter()
    stop = threading.Event()

    def client_loop() -> None:
        # A new configuration opens the port anew: a connection that was just being made is made again.
        with httpx.Client(trust_env=False, transport=httpx.HTTPTransport(retries=3)) as client:
            while not stop.is_set():
                statuses[client.post(gateway.model_url("digits") + "/predict", content=b"x").status_code] += 1

    thread = threading.Thread(target=client_loop)
    thread.start()
    for share in (10, 50):
        direct((old, 100 - share), (new, share))
    direct((new, 100))
    old.kill()
    stop.set()
    thread.join()
    assert set(statuses) == {200}


def test_a_request_that_a_dying_process_had_is_answered_by_another(gateway: Gateway, old: Echo, new: Echo) -> None:
    weights = [Upstream(url=old.url, weight=1), Upstream(url=new.url, weight=1)]
    gateway.set_upstreams("digits", weights, max_body_bytes=MAX_BODY)
    answers: list[str] = []

    def ask() -> None:
        answers.append(httpx.post(gateway.model_url("digits") + "/predict", content=b"slow", timeout=30).text)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(1)  # both requests are being worked on now
    old.kill()
    for thread in threads:
        thread.join()
    assert answers == ["new /predict slow"] * 2


def test_no_route_is_a_typed_404_and_removing_twice_is_fine(gateway: Gateway, old: Echo) -> None:
    gateway.set_upstreams("digits", [Upstream(url=old.url, weight=100)], max_body_bytes=MAX_BODY)
    gateway.remove("digits")
    gateway.remove("digits")
    answer = httpx.post(gateway.model_url("digits") + "/predict", content=b"x")
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "no_such_model"
    assert gateway.upstreams("digits") == []


def test_a_body_over_the_limit_is_left_to_the_serving_process_to_refuse(gateway: Gateway, old: Echo) -> None:
    gateway.set_upstreams("digits", [Upstream(url=old.url, weight=100)], max_body_bytes=MAX_BODY)
    body = b"x" * (MAX_BODY * 50)
    answer = httpx.post(gateway.model_url("digits") + "/predict", content=body, timeout=30)
    assert answer.content == b"old /predict " + body


def test_routes_survive_a_restart_even_on_another_port(settings: Settings, old: Echo) -> None:
    with running(gateway_server.service(settings), settings.log_dir) as process:
        gateway = Gateway.from_settings(settings)
        gateway.set_upstreams("digits", [Upstream(url=old.url, weight=100)], max_body_bytes=MAX_BODY)
        process.kill()
        process.wait()
    moved = make_settings(settings.home_dir, gateway_port=free_port())
    with running(gateway_server.service(moved), settings.log_dir):
        answer = httpx.post(Gateway.from_settings(moved).model_url("digits") + "/predict", content=b"x")
    assert answer.text == "old /predict x"


def test_metrics_and_health_have_one_address(settings: Settings, gateway: Gateway) -> None:
    metrics = httpx.get(f"{settings.gateway_base_url}/-/metrics").text
    assert "caddy_config_last_reload_successful 1" in metrics
    assert httpx.get(f"{settings.gateway_base_url}/-/health").text == "ok"


def test_a_gateway_that_is_down_is_named(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenacity.stop_after_delay", lambda _: lambda _state: True)
    with pytest.raises(UnavailableError, match=r"gateway\.sock"):
        Gateway.from_settings(settings).upstreams("digits")


def test_a_broken_autosave_does_not_keep_the_gateway_down(settings: Settings) -> None:
    autosave: Path = settings.data_dir / "gateway" / "config" / "caddy" / "autosave.json"
    autosave.parent.mkdir(parents=True)
    autosave.write_text("{half")
    with running(gateway_server.service(settings), settings.log_dir):
        assert httpx.get(f"{settings.gateway_base_url}/-/health").text == "ok"
