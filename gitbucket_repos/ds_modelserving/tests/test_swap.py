"""PUT /model: good, bad and forbidden, while clients are answered."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
from process import TOKEN, ServingProcess
from tiny import make_release, picture, scores

BEARER = {"Authorization": f"Bearer {TOKEN}"}


def swap(serving: ServingProcess, folder: Path | str, headers: dict[str, str] | None = None) -> httpx.Response:
    headers = BEARER if headers is None else headers
    return httpx.put(f"{serving.url}/model", json={"release_dir": str(folder)}, headers=headers, timeout=60)


def answers(serving: ServingProcess) -> tuple[str, list[float]]:
    body = httpx.post(f"{serving.url}/predict", content=picture(1, 2, 3, 4)).json()
    return body["release"], body["scores"]


@pytest.fixture
def releases(tmp_path: Path) -> Path:
    return tmp_path / "releases"


@pytest.fixture
def first(releases: Path) -> Path:
    return make_release(releases, "1.0.0")


def test_a_swap_under_load_fails_no_request_and_mixes_no_releases(tmp_path: Path, releases: Path, first: Path) -> None:
    second = make_release(releases, "1.0.1", factor=10)
    expected = {"1.0.0": scores(1, 2, 3, 4), "1.0.1": scores(1, 2, 3, 4, factor=10)}
    seen: Counter[str] = Counter()
    faults: list[object] = []
    done = threading.Event()

    def ask(url: str) -> None:
        with httpx.Client(timeout=60) as client:
            while not done.is_set():
                answer = client.post(f"{url}/predict", content=picture(1, 2, 3, 4))
                body = answer.json()
                if answer.status_code != 200 or body["scores"] != expected[body["release"]]:
                    faults.append(body)
                seen[body["release"]] += 1

    def until_seen(release: str) -> None:
        before, deadline = seen[release], time.monotonic() + 60
        while seen[release] < before + 10:
            assert time.monotonic() < deadline, (release, seen, faults)
            time.sleep(0.01)

    with ServingProcess(tmp_path, first) as serving:
        clients = [threading.Thread(target=ask, args=(serving.url,)) for _ in range(4)]
        for client in clients:
            client.start()
        until_seen("1.0.0")
        for folder in (second, first, second):
            assert swap(serving, folder).status_code == 200
            until_seen(folder.name)
        done.set()
        for client in clients:
            client.join(20)
        assert faults == []
        assert set(seen) == {"1.0.0", "1.0.1"}
        text = httpx.get(f"{serving.url}/metrics").text
        assert 'release="1.0.1"} 1.0' in text
        assert 'release="1.0.0"} 1.0' not in text
        assert httpx.get(f"{serving.url}/health").json()["release"] == "1.0.1"


def test_a_swap_survives_a_kill_but_not_a_new_deployment(tmp_path: Path, releases: Path, first: Path) -> None:
    second, third = make_release(releases, "1.0.1", factor=10), make_release(releases, "1.0.2", factor=100)
    with ServingProcess(tmp_path, first) as serving:
        assert swap(serving, second).json() == {"release": "1.0.1", "previous": "1.0.0"}
        serving.end(signal.SIGKILL)
        serving.start().wait_for()
        assert answers(serving) == ("1.0.1", scores(1, 2, 3, 4, factor=10))
    with ServingProcess(tmp_path, third) as deployed:
        assert answers(deployed)[0] == "1.0.2"


def test_bad_swaps_leave_the_old_model_answering(tmp_path: Path, releases: Path, first: Path) -> None:
    outside = make_release(tmp_path / "elsewhere", "1.0.9")
    (releases / "link").symlink_to(outside)
    other = make_release(releases, "1.0.1", pipeline="other")
    broken = make_release(releases, "1.0.2", code="import nothing_of_that_name\n")
    raising = make_release(releases, "1.0.3", code="def load(folder):\n    raise ValueError('weights are bad')\n")
    changed = make_release(releases, "1.0.4")
    (changed / "model" / "weights" / "weights.json").write_text("{}")
    half = make_release(releases, "1.0.5")
    (half / "model" / "model.json").unlink()
    with ServingProcess(tmp_path, first) as serving:
        for folder in (outside, releases / "link", releases, "/etc", "1.0.0", releases / "tiny" / ".." / ".." / "x"):
            refused = swap(serving, folder)
            assert (refused.status_code, refused.json()["error"]["type"]) == (422, "not_swapped")
            assert "not a release below" in refused.json()["error"]["message"]
        for folder, words in (
            (other, "'other'"),
            (broken, "nothing_of_that_name"),
            (raising, "weights are bad"),
            (changed, "digest"),
            (half, "no model"),
        ):
            refused = swap(serving, folder)
            assert refused.status_code == 422
            assert words in refused.json()["error"]["message"]
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
            refused = swap(serving, first, headers)
            assert (refused.status_code, refused.json()["error"]["type"]) == (401, "unauthorized")
        assert httpx.put(f"{serving.url}/model", json={"dir": "x"}, headers=BEARER).status_code == 422
        assert answers(serving) == ("1.0.0", scores(1, 2, 3, 4))
        serving.end(signal.SIGKILL)
        serving.start().wait_for()
        assert answers(serving)[0] == "1.0.0"


def test_without_a_releases_root_nothing_is_swapped(tmp_path: Path, first: Path) -> None:
    with ServingProcess(tmp_path, first, releases_root=None) as serving:
        assert swap(serving, first).status_code == 422
