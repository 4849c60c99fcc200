"""The object store hook against a real server."""

from __future__ import annotations

import hashlib
import subprocess
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from airloom.embedded.s3_server import service
from airloom.errors import (
    AuthError,
    ConfigError,
    ConflictError,
    NotFoundError,
    PlatformError,
    StorageFullError,
    UnavailableError,
)
from airloom.hooks.object_store import SINGLE_PUT_MAX_BYTES, ObjectStore
from airloom.settings import Settings
from tests.conftest import make_settings
from tests.fixtures.s3 import make_buckets
from tests.fixtures.services import running

BUCKET = "airloom"


@pytest.mark.parametrize(
    "key", ["plain.txt", "deep/er/x", "with space + and % and ?&=#.txt", "ümläut-漢字.png", "~tilde*'()!"]
)
@pytest.mark.parametrize("content", [b"", b"x", b"abc" * 100_000], ids=["empty", "one byte", "300 kB"])
def test_bytes_come_back_under_any_name(s3_store: ObjectStore, key: str, content: bytes) -> None:
    key = f"names/{key}"
    written = s3_store.put_bytes(BUCKET, key, content)
    assert s3_store.get_bytes(BUCKET, key) == content
    assert written.etag == hashlib.md5(content).hexdigest()
    assert [info.key for info in s3_store.list(BUCKET, key)] == [key]
    s3_store.remove(BUCKET, key)
    assert not s3_store.exists(BUCKET, key)
    s3_store.remove(BUCKET, key)


def test_json_comes_back_and_other_things_are_refused(s3_store: ObjectStore) -> None:
    s3_store.put_json(BUCKET, "json/a.json", {"b": [1, None, "ä"], "a": 2.5})
    assert s3_store.get_json(BUCKET, "json/a.json") == {"a": 2.5, "b": [1, None, "ä"]}
    s3_store.put_bytes(BUCKET, "json/b.json", b"{")
    with pytest.raises(Exception, match=r"s3://airloom/json/b.json is not valid JSON"):
        s3_store.get_json(BUCKET, "json/b.json")


def test_of_many_conditional_writers_exactly_one_wins(s3_store: ObjectStore) -> None:
    barrier = threading.Barrier(8)

    def write(writer: int) -> list[str]:
        barrier.wait()
        won = []
        for number in range(20):
            try:
                s3_store.put_bytes(BUCKET, f"race/{number}", f"{writer}".encode(), if_none_match=True)
                won.append((number, writer))
            except ConflictError:
                pass
        return won

    with ThreadPoolExecutor(8) as pool:
        winners = [pair for won in pool.map(write, range(8)) for pair in won]
    assert Counter(number for number, _ in winners) == dict.fromkeys(range(20), 1)
    for number, writer in winners:
        assert s3_store.get_bytes(BUCKET, f"race/{number}") == f"{writer}".encode()


def test_files_go_and_come_many_at_a_time(s3_store: ObjectStore, tmp_path: Path) -> None:
    files = []
    for number in range(60):
        path = tmp_path / f"{number}.bin"
        path.write_bytes(bytes([number]) * number * 1000)
        files.append((f"many/{number:02d}", path))
    s3_store.upload_many(BUCKET, files)
    assert [info.size_bytes for info in s3_store.list(BUCKET, "many/")] == [n * 1000 for n in range(60)]
    s3_store.download_many(BUCKET, [(key, None, tmp_path / "back" / key) for key, _ in files])
    for key, path in files:
        assert (tmp_path / "back" / key).read_bytes() == path.read_bytes()
    missing = tmp_path / "back" / "missing"
    with pytest.raises(NotFoundError, match=r"s3://airloom/many/nix does not exist"):
        s3_store.download_many(BUCKET, [("many/nix", None, missing)])
    assert list(missing.parent.glob("*missing*")) == []


def test_a_file_larger_than_one_put_arrives_whole(s3_store: ObjectStore, tmp_path: Path) -> None:
    path, back = tmp_path / "large", tmp_path / "back"
    path.write_bytes(b"0123456789abcdef" * (SINGLE_PUT_MAX_BYTES // 16 + 1))
    s3_store.upload(BUCKET, "large", path)
    s3_store.download(BUCKET, "large", back)
    assert hashlib.md5(back.read_bytes()).digest() == hashlib.md5(path.read_bytes()).digest()
    s3_store.remove(BUCKET, "large")


def test_an_old_version_can_be_read_after_it_was_replaced(s3_store: ObjectStore) -> None:
    assert s3_store.is_versioned("raw")
    assert not s3_store.is_versioned(BUCKET)
    s3_store.put_bytes("raw", "versions/a", b"old")
    [old] = s3_store.list("raw", "versions/", versions=True)
    s3_store.put_bytes("raw", "versions/a", b"newer")
    [new] = s3_store.list("raw", "versions/", versions=True)
    assert (new.size_bytes, new.version_id == old.version_id) == (5, False)
    assert s3_store.get_bytes("raw", "versions/a", version_id=old.version_id) == b"old"
    s3_store.remove("raw", "versions/a")
    assert list(s3_store.list("raw", "versions/", versions=True)) == []
    assert s3_store.get_bytes("raw", "versions/a", version_id=new.version_id) == b"newer"


def test_each_key_reaches_its_own_buckets_only(s3_store: ObjectStore, session_settings: Settings) -> None:
    mlflow = ObjectStore.from_settings(session_settings, user="mlflow")
    mlflow.put_bytes("mlflow", "x", b"x")
    with pytest.raises(AuthError, match="'mlflow' may not do this with s3://airloom/x"):
        mlflow.put_bytes(BUCKET, "x", b"x")
    with pytest.raises(AuthError, match="'airloom' may not do this with s3://mlflow/x"):
        s3_store.get_bytes("mlflow", "x")
    with pytest.raises(AuthError):
        s3_store.ensure_bucket("another")


def test_a_wrong_password_is_named_without_being_shown(s3_store: ObjectStore) -> None:
    wrong = ObjectStore(endpoint_url=s3_store.endpoint_url, access_key="airloom", secret_key="guessed-it")
    for call in (
        lambda: wrong.put_bytes(BUCKET, "x", b"x"),
        lambda: wrong.get_bytes(BUCKET, "x"),
        lambda: wrong.exists(BUCKET, "x"),
        lambda: list(wrong.list(BUCKET)),
    ):
        with pytest.raises(AuthError) as caught:
            call()
        assert "airloom" in str(caught.value)
        assert "guessed-it" not in str(caught.value) + repr(wrong)


def test_a_missing_bucket_is_named(session_settings: Settings, s3_store: ObjectStore) -> None:
    admin = ObjectStore.from_settings(session_settings, user="admin")
    with pytest.raises(NotFoundError, match="has no bucket 'nowhere'"):
        admin.put_bytes("nowhere", "x", b"x")
    with pytest.raises(NotFoundError, match="has no bucket 'nowhere'"):
        list(admin.list("nowhere"))


def test_a_store_that_is_down_is_named_with_its_address(settings: Settings) -> None:
    store = ObjectStore.from_settings(settings, retry_seconds=0.3)
    for call in (
        lambda: store.get_bytes(BUCKET, "x"),
        lambda: list(store.list(BUCKET)),
        lambda: store.exists(BUCKET, "x"),
    ):
        with pytest.raises(UnavailableError, match=f"127.0.0.1:{settings.s3_port} does not answer") as caught:
            call()
        assert caught.value.retryable


def test_a_restart_of_the_store_is_waited_for(settings: Settings, tmp_path: Path) -> None:
    store = ObjectStore.from_settings(settings, retry_seconds=30)
    with running(service(settings), tmp_path):
        make_buckets(settings)
        store.put_bytes(BUCKET, "kept", b"kept")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(store.get_bytes, BUCKET, "kept")
        with running(service(settings), tmp_path):
            assert answer.result(timeout=60) == b"kept"


def test_a_full_store_says_so_and_keeps_what_it_has(tmp_path: Path) -> None:
    settings = make_settings(tmp_path / "home", s3_quota_mib=8)
    with running(service(settings), tmp_path):
        make_buckets(settings)
        store = ObjectStore.from_settings(settings)
        block, written = b"x" * 400_000, []

        def fill() -> None:
            for number in range(100):
                store.put_bytes("dvc", f"fill/{number}", block)
                written.append(number)

        with pytest.raises(StorageFullError, match=r"is full .*was not written") as caught:
            fill()
        assert "AIRLOOM_S3_QUOTA_MIB" in str(caught.value)
        assert 0 < len(written) < 40
        assert all(store.get_bytes("dvc", f"fill/{number}") == block for number in written)


def test_everything_listens_on_loopback_and_secrets_are_private(settings: Settings, tmp_path: Path) -> None:
    unit = service(settings)
    with running(unit, tmp_path) as process:
        listening = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout
        ours = [line.split()[3] for line in listening.splitlines() if f"pid={process.pid}," in line]
        assert ours
        assert {address.rsplit(":", 1)[0] for address in ours} == {"127.0.0.1"}
        assert {int(address.rsplit(":", 1)[1]) for address in ours} <= set(unit.ports)
        assert (settings.run_dir / "s3.json").stat().st_mode & 0o777 == 0o600
        secrets = {path.read_text() for path in settings.secrets_dir.iterdir()}
        assert not any(secret in part for secret in secrets for part in unit.command)
        assert not any(secret in (tmp_path / "s3.log").read_text() for secret in secrets)


def test_what_stands_where_weed_needs_a_socket_is_removed_or_named(settings: Settings, tmp_path: Path) -> None:
    unit = service(settings)
    socket_path = Path(f"/tmp/seaweedfs-master-grpc-{settings.internal_port(2)}.sock")
    socket_path.mkdir()
    try:
        with pytest.raises(PlatformError, match=f"{socket_path} is in its way") as caught:
            unit.prepare()
        assert "AIRLOOM_INTERNAL_PORTS" in str(caught.value)
    finally:
        socket_path.rmdir()
    socket_path.touch()
    with running(unit, tmp_path):
        assert socket_path.is_socket()


def test_a_port_range_that_is_too_short_is_named(tmp_path: Path) -> None:
    settings = make_settings(tmp_path / "home", internal_ports="8130-8132")
    with pytest.raises(ConfigError, match=r"AIRLOOM_INTERNAL_PORTS is '8130-8132'"):
        service(settings)
