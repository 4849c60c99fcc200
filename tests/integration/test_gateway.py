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
    import http.server, sys, threading
    name, port = sys.argv[1], int(sys.argv[2])
    held, go = [], threading.Event()
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # one packet for an answer, or the kernel waits 40 ms between its two
        def do_GET(self):
            self.answer(str(len(held)).encode())
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if body == b"slow":
                held.append(body)
                go.wait(60)
            elif body == b"go":
                go.set()
            self.answer(name.encode() + b" " + self.path.encode() + b" " + body)
        def answer(self, answer):
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
        deadline = time.monotonic() + 60
        while True:
            try:
                self.say("ready?")
                return
            except httpx.TransportError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def say(self, word: str) -> None:
        httpx.post(self.url, content=word.encode(), timeout=30)

    def held(self) -> int:
        """The slow requests that it has, until it is told to go on."""
        return int(httpx.get(self.url, timeout=30).text)

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


def direct(gateway: Gateway, *shares: tuple[Echo, int]) -> None:
    upstreams = [Upstream(url=echo.url, weight=weight) for echo, weight in shares]
    gateway.set_upstreams("digits", upstreams, max_body_bytes=MAX_BODY)
    assert gateway.upstreams("digits") == upstreams


def answers(gateway: Gateway, requests: int) -> collections.Counter[str]:
    with httpx.Client(trust_env=False, timeout=30) as client:
        url = gateway.model_url("digits") + "/predict"
        return collections.Counter(client.post(url, content=b"x").text.split()[0] for _ in range(requests))


def test_each_process_gets_its_share(gateway: Gateway, old: Echo, new: Echo) -> None:
    direct(gateway, (old, 100))
    assert answers(gateway, 50) == {"old": 50}
    direct(gateway, (old, 80), (new, 20))
    # Each request is drawn by itself: 500 of them lie within 6 standard deviations (of 8.9) but for one in 10^9 times.
    assert 100 - 54 <= answers(gateway, 500)["new"] <= 100 + 54
    direct(gateway, (old, 1), (new, 99))
    assert answers(gateway, 100)["new"] >= 90
    direct(gateway, (new, 100))
    assert answers(gateway, 50) == {"new": 50}


def test_traffic_is_moved_without_losing_a_request(gateway: Gateway, old: Echo, new: Echo) -> None:
    """On kept connections and on new ones, with a client that never asks twice."""
    direct(gateway, (old, 100))
    lost: list[str] = []
    statuses: collections.Counter[int] = collections.Counter()
    stop = threading.Event()

    def ask(kept: bool) -> None:
        headers = {} if kept else {"Connection": "close"}
        with httpx.Client(trust_env=False, timeout=30, headers=headers) as client:
            while not stop.is_set():
                try:
                    answer = client.post(gateway.model_url("digits") + "/predict", content=b"x")
                except httpx.HTTPError as error:
                    lost.append(repr(error))
                else:
                    statuses[answer.status_code] += 1

    threads = [threading.Thread(target=ask, args=(kept,)) for kept in (True, True, False, False)]
    for thread in threads:
        thread.start()
    for live, candidate in [(old, new), (new, old)] * 10:
        for share in (10, 50):
            direct(gateway, (live, 100 - share), (candidate, share))
        direct(gateway, (candidate, 100))
    # Back and forth as a roll-back does it, and to the end as a deployment does.
    direct(gateway, (old, 90), (new, 10))
    direct(gateway, (old, 100))
    direct(gateway, (old, 50), (new, 50))
    direct(gateway, (new, 100))
    old.kill()
    stop.wait(0.5)
    stop.set()
    for thread in threads:
        thread.join()
    assert lost == []
    assert set(statuses) == {200}
    assert statuses[200] > 100


def test_a_share_for_more_than_two_is_refused(gateway: Gateway, old: Echo) -> None:
    with pytest.raises(ValueError, match="not to 3"):
        direct(gateway, (old, 50), (old, 25), (old, 25))
    assert gateway.upstreams("digits") == []


def test_a_request_that_a_dying_process_had_is_answered_by_another(gateway: Gateway, old: Echo, new: Echo) -> None:
    direct(gateway, (old, 50), (new, 50))
    found: list[str] = []

    def ask() -> None:
        found.append(httpx.post(gateway.model_url("digits") + "/predict", content=b"slow", timeout=90).text)

    # At even odds, at least one of them meets the one that dies but for one in 1000 times.
    threads = [threading.Thread(target=ask) for _ in range(10)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while old.held() + new.held() < len(threads):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    old.kill()
    new.say("go")
    for thread in threads:
        thread.join()
    assert found == ["new /predict slow"] * 10


def test_no_route_is_a_typed_404_and_removing_twice_is_fine(gateway: Gateway, old: Echo) -> None:
    gateway.set_upstreams("digits", [Upstream(url=old.url, weight=100)], max_body_bytes=MAX_BODY)
    gateway.remove("digits")
    gateway.remove("digits")
    answer = httpx.post(gateway.model_url("digits") + "/predict", content=b"x")
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "no_such_model"
    assert gateway.upstreams("digits") == []


def test_where_no_process_answers_clients_are_told_so_in_the_same_form(
    settings: Settings, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("airloom.hooks.gateway._HELD_FOR", "300ms")
    nobody = Upstream(url=f"http://127.0.0.1:{free_port()}", weight=100)
    gateway.set_upstreams("digits", [nobody], max_body_bytes=MAX_BODY)
    answer = httpx.post(gateway.model_url("digits") + "/predict", content=b"x", timeout=30)
    assert answer.status_code in {502, 503}  # 503 where it is known already that nobody is there
    assert answer.headers["Content-Type"] == "application/json"
    assert set(answer.json()["error"]) == {"type", "message", "hint"}
    assert answer.json()["error"]["type"] == "no_answer"
    assert answer.headers["Retry-After"] == "2"


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
    autosave: Path = settings.gateway_dir / "config" / "caddy" / "autosave.json"
    autosave.parent.mkdir(parents=True)
    autosave.write_text("{half")
    with running(gateway_server.service(settings), settings.log_dir):
        assert httpx.get(f"{settings.gateway_base_url}/-/health").text == "ok"
