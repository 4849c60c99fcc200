"""What clients send and get, through the real process."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from process import ServingProcess
from tiny import FAILS, make_release, picture, scores

PNG = {"content-type": "image/png"}


def raw(serving: ServingProcess, request: bytes, *, then: bytes = b"") -> bytes:
    """Speak HTTP by hand: what well-behaved clients refuse to send."""
    with socket.create_connection(("127.0.0.1", serving.port), timeout=15) as connection:
        connection.sendall(request)
        if then:
            connection.sendall(then)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    return answer


def error_of(answer: httpx.Response) -> dict[str, str]:
    error = answer.json()["error"]
    assert set(error) == {"type", "message", "hint"}
    return error


def test_an_answer_names_its_release_and_has_an_id(serving: ServingProcess) -> None:
    answer = httpx.post(f"{serving.url}/predict", content=picture(1, 2, 3, 4), headers=PNG)
    assert answer.status_code == 200
    body = answer.json()
    assert re.fullmatch(r"tiny-1\.0\.0-[0-9a-v]{26}", body.pop("id"))
    assert body == {"release": "1.0.0", "model_version": "1", "label": "c", "scores": scores(1, 2, 3, 4)}


@pytest.mark.parametrize(
    "content_type",
    ["image/png", "IMAGE/PNG; charset=x", "application/octet-stream", "application/x-www-form-urlencoded", None],
)
def test_a_body_may_say_its_type_or_leave_it_open(serving: ServingProcess, content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type else {}
    answer = httpx.post(f"{serving.url}/predict", content=picture(9, 0, 0, 0), headers=headers)
    assert answer.json()["scores"] == [9.0, 0.0, 0.0]


def test_a_form_is_taken_as_browsers_send_it(serving: ServingProcess) -> None:
    files = {"file": ("picture.png", picture(0, 7, 0, 0), "image/png")}
    assert httpx.post(f"{serving.url}/predict", files=files).json()["label"] == "b"


def test_ids_sort_by_time(serving: ServingProcess) -> None:
    ids = []
    for _ in range(3):
        ids.append(httpx.post(f"{serving.url}/predict", content=picture(1, 0, 0, 0)).json()["id"])
        httpx.get(f"{serving.url}/health")  # more than a millisecond
    assert ids == sorted(ids)


@pytest.mark.parametrize(
    ("content", "headers", "status", "kind", "words"),
    [
        (b"", PNG, 422, "unusable_input", "empty"),
        (picture(1, 2), PNG, 422, "unusable_input", "truncated"),
        (b"not a picture", PNG, 422, "unusable_input", "first bytes"),
        (b"not a picture", {}, 415, "unsupported_media_type", "this content"),
        (b"\xff\xd8\xff\xe0rest", {}, 415, "unsupported_media_type", "image/jpeg"),
        (b"\xff\xd8\xff\xe0rest", PNG, 415, "unsupported_media_type", "image/jpeg"),
        (picture(1, 2, 3, 4), {"content-type": "text/html"}, 415, "unsupported_media_type", "text/html"),
        (picture(1, 2, 3, 4), {"content-type": "<script>"}, 415, "unsupported_media_type", "no media type"),
        (picture(1, 2, 3, 4), {"content-type": "multipart/form-data"}, 422, "unusable_form", "boundary"),
        (picture(1, 2, 3, 4, padding=70_000), PNG, 413, "too_large", "65536"),
        (picture(1, 2, 3, 4, padding=17 * 2**20), PNG, 413, "too_large", "65536"),
    ],
)
def test_bad_bodies_get_a_typed_error(
    serving: ServingProcess, content: bytes, headers: dict[str, str], status: int, kind: str, words: str
) -> None:
    for route in ("/predict", "/explain"):
        answer = httpx.post(f"{serving.url}{route}", content=content, headers=headers, timeout=20)
        assert (answer.status_code, error_of(answer)["type"]) == (status, kind)
        assert words in error_of(answer)["message"].lower()


def test_a_form_without_a_file_or_with_a_large_one_is_refused(serving: ServingProcess) -> None:
    missing = httpx.post(f"{serving.url}/predict", files={"other": ("a.png", picture(1, 2, 3, 4), "image/png")})
    assert (missing.status_code, error_of(missing)["type"]) == (422, "unusable_form")
    large = {"file": ("a.png", picture(1, 2, 3, 4, padding=66_000), "image/png")}
    assert httpx.post(f"{serving.url}/predict", files=large).status_code == 413


@pytest.mark.parametrize("size", [70_000, 17 * 2**20])
def test_the_size_limit_holds_for_bodies_without_a_length(serving: ServingProcess, size: int) -> None:
    def chunks() -> Iterator[bytes]:
        yield picture(1, 2, 3, 4)
        for _ in range(size // 10_000):
            yield b"\0" * 10_000

    answer = httpx.post(f"{serving.url}/predict", content=chunks(), headers=PNG, timeout=20)
    assert (answer.status_code, error_of(answer)["type"]) == (413, "too_large")
    assert answer.headers["connection"] == "close"


def test_a_chunked_body_within_the_limit_is_answered(serving: ServingProcess) -> None:
    whole = picture(3, 0, 0, 0)
    answer = httpx.post(f"{serving.url}/predict", content=iter([whole[:5], whole[5:]]), headers=PNG)
    assert answer.json()["scores"] == [3.0, 0.0, 0.0]


def test_a_length_that_promises_more_than_comes_times_out(tmp_path: Path) -> None:
    request = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n" + picture(1, 2, 3, 4)
    with ServingProcess(tmp_path, make_release(tmp_path / "releases"), read_timeout_seconds=1.0) as impatient:
        answer = raw(impatient, request)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"too_slow"' in answer


def test_a_length_that_promises_less_than_comes_is_not_believed(serving: ServingProcess) -> None:
    body = picture(1, 2, 3, 4)
    answer = raw(serving, b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n" + body + b"\r\n\r\n")
    assert b"HTTP/1.1 400" in answer  # the rest is no request
    assert b"HTTP/1.1 200" not in answer


def test_who_waits_for_a_continue_is_refused_before_sending(serving: ServingProcess) -> None:
    answer = raw(
        serving, b"POST /predict HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 99999999\r\n\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"100 Continue" not in answer


def test_a_client_that_leaves_half_way_harms_nobody(serving: ServingProcess) -> None:
    with socket.create_connection(("127.0.0.1", serving.port)) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
    assert httpx.post(f"{serving.url}/predict", content=picture(1, 0, 0, 0)).status_code == 200


def test_errors_of_the_model_tell_nothing_of_the_inside(serving: ServingProcess) -> None:
    answer = httpx.post(f"{serving.url}/predict", content=picture(FAILS, 0, 0, 0))
    assert (answer.status_code, error_of(answer)["type"]) == (500, "internal")
    assert "/etc" not in answer.text
    assert "Runtime" not in answer.text


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/predict", 405, "method_not_allowed"),
        ("GET", "/nothing", 404, "not_found"),
        ("DELETE", "/model", 405, "method_not_allowed"),
    ],
)
def test_other_routes_and_methods(serving: ServingProcess, method: str, path: str, status: int, kind: str) -> None:
    answer = httpx.request(method, f"{serving.url}{path}")
    assert (answer.status_code, error_of(answer)["type"]) == (status, kind)


def test_an_explanation_is_a_picture(serving: ServingProcess) -> None:
    answer = httpx.post(f"{serving.url}/explain", content=picture(1, 2, 3, 4), headers=PNG)
    assert answer.headers["content-type"] == "image/png"
    assert answer.content.endswith(b"explained\x01\x02\x03\x04")


def test_health_info_page_and_description(serving: ServingProcess) -> None:
    health = httpx.get(f"{serving.url}/health")
    assert (health.status_code, health.json()["release"]) == (200, "1.0.0")
    info = httpx.get(f"{serving.url}/info").json()
    assert info["data_tag"].startswith("tiny/CV_")
    assert (info["classes"], info["max_upload_bytes"]) == (["a", "b", "c"], 65536)
    page = httpx.get(f"{serving.url}/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    paths = httpx.get(f"{serving.url}/openapi.json").json()["paths"]
    assert {"/predict", "/explain", "/health", "/info", "/metrics", "/model"} <= set(paths)


def test_metrics_count_what_happened(serving: ServingProcess) -> None:
    def value(name: str) -> float:
        text = httpx.get(f"{serving.url}/metrics").text
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    answered = 'airloom_serving_requests_total{route="/predict",status="200"}'
    refused = 'airloom_serving_requests_total{route="/predict",status="422"}'
    label = 'airloom_serving_predictions_total{label="b"}'
    timed = 'airloom_serving_latency_seconds_count{route="/predict"}'
    before = [value(name) for name in (answered, refused, label, timed)]
    httpx.post(f"{serving.url}/predict", content=picture(0, 7, 0, 0))
    httpx.post(f"{serving.url}/predict", content=b"", headers=PNG)
    after = [value(name) for name in (answered, refused, label, timed)]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, 1, 2]
    assert value('airloom_serving_model_info{model_version="1",pipeline="tiny",release="1.0.0"}') == 1
    assert value("airloom_serving_batch_size_count") >= 1
    assert value("airloom_serving_queue") == 0


def test_many_connections_get_their_own_answers(serving: ServingProcess) -> None:
    """Batched or not, each answer is the one that its input has alone."""
    from concurrent.futures import ThreadPoolExecutor

    with httpx.Client(limits=httpx.Limits(max_connections=16)) as client, ThreadPoolExecutor(16) as pool:

        def ask(n: int) -> bool:
            values = (n % 200, n * 7 % 200, n * 13 % 200, n % 5)
            body = client.post(f"{serving.url}/predict", content=picture(*values)).json()
            return bool(body["scores"] == scores(*values))

        assert all(pool.map(ask, range(400)))
    text = httpx.get(f"{serving.url}/metrics").text
    batches = float(re.search(r"^airloom_serving_batch_size_count (\S+)$", text, re.MULTILINE)[1])  # type: ignore[index]
    rows = float(re.search(r"^airloom_serving_batch_size_sum (\S+)$", text, re.MULTILINE)[1])  # type: ignore[index]
    assert rows >= batches
    assert json.loads(httpx.get(f"{serving.url}/health").text)["prediction_log"] == "ok"
