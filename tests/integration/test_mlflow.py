"""Runs, models and versions in a real MLflow."""

from __future__ import annotations

import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from airloom.contract import sha256_tree
from airloom.errors import ConflictError, ContractError, NotFoundError, ServiceError, StorageFullError, UnavailableError
from airloom.hooks.mlflow import ModelRegistry
from airloom.hooks.mlflow_api import MlflowApi
from tests.fixtures.mlflow import runs_with
from tests.fixtures.services import free_port

if TYPE_CHECKING:
    from tests.fixtures.registry import RegistryFixture

ARTIFACT = {
    "model.json": b'{"entry": "toy:load"}',
    "code/toy/__init__.py": b"def load(folder): ...\n",
    "weights/network.pt": bytes(range(256)) * 40,
    "weights/empty": b"",
}


# Runs


def test_a_run_is_found_by_its_key(models: RegistryFixture) -> None:
    registry = models.registry
    first = registry.start_run(models.name, "digits/run:1+00:00", {"airloom.run_id": "run:1+00:00"})
    other = registry.start_run(models.name, "digits/run:2+00:00")
    assert registry.start_run(models.name, "digits/run:1+00:00") == first != other
    registry.finish_run(first, "FAILED")
    assert registry.run_info(first).status == "FAILED"
    assert registry.start_run(models.name, "digits/run:1+00:00") == first
    assert registry.run_info(first).status == "RUNNING"
    assert [run.run_id for run in runs_with(registry, "airloom.key", "digits/run:2+00:00")] == [other]


def test_eight_threads_start_one_run_in_one_new_experiment(models: RegistryFixture) -> None:
    clients = [models.client() for _ in range(8)]
    barrier = threading.Barrier(8)

    def start(client: ModelRegistry) -> str:
        barrier.wait()
        return client.start_run(models.name, "same")

    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(start, clients))
    assert len(found) == 1
    assert len(runs_with(models.registry, "airloom.key", "same")) == 1


def test_clients_without_a_lock_in_common_agree_in_the_end(models: RegistryFixture, tmp_path: Path) -> None:
    """As on two machines: whoever finds an earlier run than its own gives its own up."""
    names = [f"{models.name}-{number}" for number in range(5)]
    for name in names:
        barrier = threading.Barrier(2)

        def start(home: Path, barrier: threading.Barrier = barrier, name: str = name) -> str:
            client = models.client(home)
            barrier.wait()
            return client.start_run(name, f"key of {name}")

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(start, [tmp_path / "a", tmp_path / "b"]))
        # A later try of either finds the same run.
        again = {models.client(tmp_path / home).start_run(name, f"key of {name}") for home in ("a", "b")}
        assert len(again) == 1


def test_a_run_keeps_figures_tags_and_artifacts(models: RegistryFixture, tmp_path: Path) -> None:
    registry = models.registry
    run_id = registry.start_run(models.name, "log")
    picture = tmp_path / "plot.png"
    picture.write_bytes(b"\x89PNG" + bytes(3000))
    for _ in range(2):
        registry.log(
            run_id,
            metrics={"accuracy": 0.97, "log_loss": math.inf, "auc": math.nan, **{f"m{i}": i / 3 for i in range(130)}},
            tags={"airloom.gate": "promoted", "long": "é" * 9000},
            artifacts={"gate.json": {"verdict": "promoted"}, "a b/ü.txt": "text", "plot.png": picture, "raw": b"\x00"},
        )
    run = registry.run_info(run_id)
    assert run.metrics["accuracy"] == 0.97
    assert run.metrics["m129"] == 43
    assert run.metrics["log_loss"] > 1e300
    assert math.isnan(run.metrics["auc"])
    assert run.tags["airloom.gate"] == "promoted"
    assert len(run.tags["long"]) == 5000
    files = models.api.list_files(run.artifact_uri)
    assert files == {"gate.json": 27, "a b/ü.txt": 4, "plot.png": 3004, "raw": 1}
    assert models.api.read_file(run.artifact_uri, "plot.png") == picture.read_bytes()
    assert models.api.read_file(run.artifact_uri, "a b/ü.txt") == b"text"


def test_a_run_that_is_not_there_is_named(models: RegistryFixture) -> None:
    for call in (models.registry.run_info, models.registry.finish_run, models.registry.log):
        with pytest.raises(NotFoundError, match="0000"):
            call("0" * 32)


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../b", ""])
def test_artifacts_stay_in_their_run(models: RegistryFixture, path: str) -> None:
    run_id = models.registry.start_run(models.name, "paths")
    with pytest.raises(ContractError, match="relative path"):
        models.registry.log(run_id, artifacts={path: "text"})


def test_run_addresses_open_in_mlflow(models: RegistryFixture) -> None:
    run_id = models.registry.start_run(models.name, "url")
    experiment = models.registry.run_info(run_id).experiment_id
    assert models.registry.run_url(run_id).endswith(f"/#/experiments/{experiment}/runs/{run_id}")
    assert models.registry.run_url("0" * 32) == f"{models.settings.mlflow_api_url}/"


# Models


def test_a_model_exists_once_it_is_whole(models: RegistryFixture) -> None:
    whole = models.log_model(ARTIFACT, key="whole")
    pending = models.log_model(ARTIFACT, key="pending", ready=False)
    empty = models.log_model({}, key="empty")
    found = [models.registry.model_exists(model.uri) for model in (whole, pending, empty)]
    assert found == [True, False, False]
    assert not models.registry.model_exists(f"models:/m-{'0' * 32}")
    assert models.registry.source_run(whole.uri) == whole.run_id
    assert models.registry.model_digest(whole.uri) == whole.digest


def test_a_model_is_downloaded_once_read_only_and_whole(models: RegistryFixture, tmp_path: Path) -> None:
    model = models.log_model(ARTIFACT)
    folder = models.registry.download_model(model.uri, model.digest)
    assert folder == models.home / "models" / model.digest
    assert sha256_tree(folder) == model.digest
    modes = {oct(path.stat().st_mode & 0o777) for path in [folder, *folder.rglob("*")]}
    assert modes <= {"0o555", "0o444"}
    assert [path.name for path in folder.parent.iterdir()] == [model.digest]
    # Now without MLflow.
    offline = ModelRegistry(url=f"http://127.0.0.1:{free_port()}", home=models.home, patience_seconds=0)
    assert offline.download_model(model.uri, model.digest) == folder
    assert models.registry.download_model(model.uri) == folder


def test_eight_threads_download_one_model(models: RegistryFixture) -> None:
    model = models.log_model(ARTIFACT)
    barrier = threading.Barrier(8)

    def download(_: int) -> Path:
        client = models.client()
        barrier.wait()
        return client.download_model(model.uri, model.digest)

    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(download, range(8)))
    assert folders == {models.home / "models" / model.digest}
    assert sha256_tree(folders.pop()) == model.digest
    assert [path.name for path in (models.home / "models").iterdir()] == [model.digest]


def test_other_bytes_than_expected_are_refused_and_leave_nothing(models: RegistryFixture) -> None:
    model = models.log_model(ARTIFACT)
    models.api.upload_file(model.location, "weights/network.pt", b"tampered")
    with pytest.raises(ContractError, match=model.digest):
        models.registry.download_model(model.uri, model.digest)
    assert list((models.home / "models").iterdir()) == []


def test_a_copy_that_was_changed_on_disk_is_fetched_again(models: RegistryFixture) -> None:
    model = models.log_model(ARTIFACT)
    folder = models.registry.download_model(model.uri, model.digest)
    (folder / "weights").chmod(0o755)
    (folder / "weights" / "empty").unlink()
    assert sha256_tree(models.registry.download_model(model.uri, model.digest)) == model.digest


def test_a_download_that_breaks_off_leaves_nothing(models: RegistryFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.log_model(ARTIFACT)

    def full(self: MlflowApi, location: str, path: str, target: Path) -> None:
        target.write_bytes(b"part")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowApi, "download_file", full)
        with pytest.raises(StorageFullError, match="no room"):
            models.registry.download_model(model.uri, model.digest)
    assert list((models.home / "models").iterdir()) == []
    assert sha256_tree(models.registry.download_model(model.uri, model.digest)) == model.digest


def test_leftovers_of_killed_downloads_go(models: RegistryFixture) -> None:
    old, new = (models.home / "models" / f".download-{age}" for age in ("old", "new"))
    for folder in (old, new):
        (folder / "code").mkdir(parents=True)
        (folder / "code" / "half").write_bytes(b"x")
    (old / "code").chmod(0o555)
    os.utime(old, (1, 1))
    model = models.log_model(ARTIFACT)
    models.registry.download_model(model.uri, model.digest)
    assert not old.exists()
    assert new.exists()


def test_an_artifact_may_lie_in_a_folder_of_the_model(models: RegistryFixture) -> None:
    inner = models.log_model({"MLmodel": b"x", **{f"artifacts/toy/{path}": data for path, data in ARTIFACT.items()}})
    plain = models.log_model(ARTIFACT, key="plain")
    assert models.registry.download_model(inner.uri, plain.digest).name == plain.digest


@pytest.mark.parametrize(
    ("files", "said"),
    [({"MLmodel": b"x"}, "no files model.json"), ({"a/model.json": b"x", "b/model.json": b"y"}, "2 files model.json")],
)
def test_what_holds_no_artifact_is_refused(models: RegistryFixture, files: dict[str, bytes], said: str) -> None:
    model = models.log_model(files)
    with pytest.raises(ContractError, match=said):
        models.registry.download_model(model.uri)


@pytest.mark.parametrize("uri", ["", "models:/digits/3", "runs:/abc/model", "models:/m-1/x", "s3://bucket/model"])
def test_what_is_no_logged_model_is_refused(models: RegistryFixture, uri: str) -> None:
    with pytest.raises(ContractError, match="no address of a logged model"):
        models.registry.download_model(uri)


# Versions


def test_eight_threads_register_one_version(models: RegistryFixture) -> None:
    model = models.log_model(ARTIFACT)
    barrier = threading.Barrier(8)

    def register(_: int) -> str:
        client = models.client()
        barrier.wait()
        return client.register(models.name, model.uri, model.run_id, {"airloom.run_id": "r"})

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(register, range(8))) == {"1"}
    versions = models.registry.versions(models.name)
    assert [(version.version, version.run_id, version.model_uri) for version in versions] == [
        ("1", model.run_id, model.uri)
    ]


def test_eight_runs_get_eight_versions(models: RegistryFixture) -> None:
    logged = [models.log_model(ARTIFACT, key=f"run {number}") for number in range(8)]

    def register(number: int) -> str:
        return models.client().register(models.name, logged[number].uri, logged[number].run_id)

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(register, range(8))) == [str(number) for number in range(1, 9)]


def test_a_version_keeps_the_tags_of_its_origin(models: RegistryFixture) -> None:
    model = models.log_model(ARTIFACT)
    version = models.registry.register(models.name, model.uri, model.run_id, {"airloom.run_id": "first"})
    assert models.registry.register(models.name, model.uri, model.run_id, {"airloom.run_id": "second"}) == version
    models.registry.set_version_tags(models.name, version, {"airloom.gate": "rejected"})
    models.registry.set_version_tags(models.name, version, {"airloom.gate": "promoted"})
    assert models.registry.version(models.name, version).tags == {
        "airloom.run_id": "first",
        "airloom.gate": "promoted",
    }


def test_a_model_that_is_not_there_is_not_registered(models: RegistryFixture) -> None:
    pending = models.log_model(ARTIFACT, ready=False)
    for uri in (f"models:/m-{'0' * 32}", pending.uri):
        with pytest.raises(NotFoundError, match=uri):
            models.registry.register(models.name, uri, pending.run_id)
    assert models.registry.versions(models.name) == []


def test_a_run_has_one_model(models: RegistryFixture) -> None:
    first, second = models.log_model(ARTIFACT), models.log_model({**ARTIFACT, "more": b"1"})
    assert first.run_id == second.run_id
    models.registry.register(models.name, first.uri, first.run_id)
    with pytest.raises(ConflictError, match="a run has one model"):
        models.registry.register(models.name, second.uri, second.run_id)


def test_aliases_move_and_name_one_version(models: RegistryFixture) -> None:
    registry = models.registry
    assert registry.alias(models.name, "champion") is None
    for number in (1, 2):
        model = models.log_model(ARTIFACT, key=str(number))
        registry.register(models.name, model.uri, model.run_id)
    assert registry.alias(models.name, "champion") is None
    for version in ("1", "2", "2"):
        registry.set_alias(models.name, "champion", version)
        found = registry.alias(models.name, "champion")
        assert found is not None
        assert found.version == version
    registry.set_alias(models.name, "candidate", "2")
    aliases = [(version.version, version.aliases) for version in registry.versions(models.name)]
    assert aliases == [("2", ("candidate", "champion")), ("1", ())]
    with pytest.raises(NotFoundError):
        registry.set_alias(models.name, "champion", "99")
    with pytest.raises(NotFoundError, match="no version 99"):
        registry.version(models.name, "99")


# Outages


def test_a_server_that_is_down_is_named_within_the_patience(tmp_path: Path) -> None:
    port = free_port()
    registry = ModelRegistry(url=f"http://127.0.0.1:{port}", home=tmp_path, patience_seconds=0.5)
    calls = [
        lambda: registry.start_run("x", "y"),
        lambda: registry.run_info("x"),
        lambda: registry.alias("x", "champion"),
        registry.versions,
        lambda: registry.download_model("models:/m-1", "0" * 64),
        lambda: registry.register("x", "models:/m-1", "r"),
        lambda: registry.model_exists("models:/m-1"),
    ]
    for call in calls:
        with pytest.raises(UnavailableError, match=f"127.0.0.1:{port} does not answer: connection refused"):
            call()


def test_a_server_that_comes_back_is_waited_for(models: RegistryFixture, tmp_path: Path) -> None:
    """The address answers only after some tries, as after a restart."""
    import socket

    port = free_port()
    registry = ModelRegistry(url=f"http://127.0.0.1:{port}", home=tmp_path, patience_seconds=30)
    found: list[str] = []
    asking = threading.Thread(target=lambda: found.append(registry.start_run(models.name, "late")))
    asking.start()
    threading.Event().wait(0.6)  # the first tries are refused
    server = socket.create_server(("127.0.0.1", port))
    stop = threading.Event()

    def forward() -> None:
        server.settimeout(0.2)
        while not stop.is_set():
            try:
                client, _ = server.accept()
            except TimeoutError:
                continue
            upstream = socket.create_connection(("127.0.0.1", models.settings.mlflow_port))
            for source, target in ((client, upstream), (upstream, client)):
                threading.Thread(target=_pump, args=(source, target), daemon=True).start()

    forwarding = threading.Thread(target=forward)
    forwarding.start()
    asking.join(timeout=30)
    stop.set()
    forwarding.join()
    server.close()
    assert found == [models.registry.start_run(models.name, "late")]


def _pump(source: object, target: object) -> None:
    try:
        while block := source.recv(65536):  # type: ignore[attr-defined]
            target.sendall(block)  # type: ignore[attr-defined]
    except OSError:
        pass


def test_somebody_else_at_the_address_is_told(models: RegistryFixture, tmp_path: Path) -> None:
    import http.server

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        registry = ModelRegistry(url=f"http://127.0.0.1:{server.server_port}", home=tmp_path, patience_seconds=0)
        with pytest.raises(ServiceError, match="not JSON"):
            registry.alias("x", "champion")
        server.shutdown()


def test_a_host_that_mlflow_does_not_expect_is_explained(models: RegistryFixture, tmp_path: Path) -> None:
    api = MlflowApi(models.settings.mlflow_api_url, patience_seconds=0)
    api._session.headers["Host"] = "elsewhere.example.org"
    with pytest.raises(ServiceError, match="refused") as caught:
        api.get("registered-models/search")
    assert "allowed-hosts" in str(caught.value)
