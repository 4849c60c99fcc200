"""An engine that is reached over TCP with TLS, as one on another machine is."""

from __future__ import annotations

import ipaddress
import json
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.conftest import ROOT, make_settings
from tests.fixtures.own_engine import Engine, own_engine

ADDRESS = "tcp://127.0.0.1:2376"
USES = {"server": x509.ExtendedKeyUsageOID.SERVER_AUTH, "client": x509.ExtendedKeyUsageOID.CLIENT_AUTH}


class Authority:
    """Signs certificates; its own is `ca.pem` beside each."""

    def __init__(self, name: str) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        self._certificate = self._sign(self._name, self._key).add_extension(constraints, critical=True)

    def issue(self, use: str, folder: Path) -> Path:
        """A folder with ca.pem, cert.pem and key.pem, as DOCKER_CERT_PATH names one."""
        key = ec.generate_private_key(ec.SECP256R1())
        address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        certificate = (
            self._sign(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, use)]), key)
            .add_extension(address, critical=False)
            .add_extension(x509.ExtendedKeyUsage([USES[use]]), critical=False)
        )
        folder.mkdir()
        for name, builder in (("ca.pem", self._certificate), ("cert.pem", certificate)):
            signed = builder.sign(self._key, hashes.SHA256())
            (folder / name).write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        private = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (folder / "key.pem").write_bytes(key.private_bytes(*private))
        return folder

    def _sign(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
        )


class Remote:
    """The engine, and programs that know it by variables alone."""

    def __init__(self, engine: Engine, folder: Path, image: str) -> None:
        self.engine, self.folder, self.image = engine, folder, image

    def ask(self, script: str, **variables: str) -> dict[str, Any]:
        """What a Python program says last, as JSON; `settings` and `image` are known to it."""
        settings = make_settings(self.folder / "home").model_dump_json()
        known = {name: value for name, value in os.environ.items() if not name.startswith("DOCKER_")}
        done = self.engine.inside(
            sys.executable, "-c", PREPARE + script, self.image,
            input=settings, cwd=ROOT, env={**known, "DOCKER_HOST": ADDRESS, **variables}, timeout=400,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return said


PREPARE = """
import json, os, sys
from pathlib import Path
from airloom.errors import AirloomError
from airloom.settings import Settings
settings, image = Settings.model_validate_json(sys.stdin.read()), sys.argv[1]
"""

RUN_STAGE = """
from airloom.hooks.docker_runner import DockerRunner
from tests.fixtures.own_engine import job_of
runner, job, lines = DockerRunner(settings, poll_seconds=0.05), job_of(settings, image, lines=3, pause=0), []
handle = runner.start(job)
ended = runner.wait(handle, lines.append, lambda: False)
runner.mark_collected(handle)
made = (job.workspace / "outputs" / "dataset" / "data.txt").read_text()
print(json.dumps({"reason": ended.reason, "code": ended.exit_code, "lines": lines, "made": made}))
"""

READ_DATASET = """
import hashlib
from dataclasses import replace
from airloom.contract import StageRequest
from airloom.hooks.docker_runner import DockerRunner
from tests.fixtures.own_engine import job_of
runner, job = DockerRunner(settings, poll_seconds=0.05), job_of(settings, image, lines=1, pause=0)
dataset = settings.home_dir / "datasets" / "one"
dataset.mkdir(parents=True, exist_ok=True)
(dataset / "large").write_bytes(os.urandom(2**20) * 8)
md5 = hashlib.md5((dataset / "large").read_bytes()).hexdigest()
StageRequest.read(job.request_file).model_copy(update={"inputs": {"dataset": dataset}}).write(job.request_file)
sent, put_archive = [], runner._api.put_archive
def counted(container, path, data):
    sent.append(path)
    return put_archive(container, path, data)
runner._api.put_archive, codes = counted, []
for number in range(2):
    handle = runner.start(replace(job, objects={"dataset": {"large": md5}}))
    codes.append(runner.wait(handle, lambda line: None, lambda: False).exit_code)
    runner.mark_collected(handle)
print(json.dumps({"codes": codes, "sent": sent, "volume": f"airloom-{settings.instance_id}-dvc-cache"}))
"""

CONNECT = """
from airloom.hooks.docker_engine import connect
try:
    connect(settings).ping()
    print(json.dumps({"error": None}))
except AirloomError as error:
    print(json.dumps({"error": str(error), "type": type(error).__name__}))
"""

CONNECT_TO = """
from airloom.hooks.docker_engine import EngineAddress, connect_to
folder = Path(os.environ["CERTIFICATES"])
files = [str(folder / name) for name in ("ca.pem", "cert.pem", "key.pem")]
address = EngineAddress(("tcp://127.0.0.1:1", os.environ["DOCKER_HOST"]), *files)
print(json.dumps({"named": connect_to(address).info()["DockerRootDir"]}))
"""


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority("this installation's")


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory, stage_image: str, authority: Authority) -> Iterator[Remote]:
    folder = tmp_path_factory.mktemp("remote")
    own = authority.issue("server", folder / "server")
    files = ("--tlscacert", own / "ca.pem", "--tlscert", own / "cert.pem", "--tlskey", own / "key.pem")
    with own_engine(folder, stage_image, "--tlsverify", *map(str, files), "--host", ADDRESS) as engine:
        yield Remote(engine, folder, stage_image)


def test_a_stage_runs_there(remote: Remote, authority: Authority, tmp_path: Path) -> None:
    """Also where a network has an authority of its own, which has not signed the engine's certificate."""
    client, other = authority.issue("client", tmp_path / "client"), Authority("the network's")
    variables = {"DOCKER_TLS_VERIFY": "1", "DOCKER_CERT_PATH": str(client)}
    said = remote.ask(RUN_STAGE, **variables, REQUESTS_CA_BUNDLE=str(other.issue("client", tmp_path / "o") / "ca.pem"))
    assert said == {"reason": "exited", "code": 0, "lines": ["line 0", "line 1", "line 2"], "made": "1"}
    assert remote.engine.run("ps", "-aq").stdout == b""
    assert remote.engine.run("volume", "ls", "-q").stdout == b""


def test_a_dataset_is_sent_there_once(remote: Remote, authority: Authority, tmp_path: Path) -> None:
    """The stage's container itself holds it against its MD5."""
    variables = {"DOCKER_TLS_VERIFY": "1", "DOCKER_CERT_PATH": str(authority.issue("client", tmp_path / "client"))}
    said = remote.ask(READ_DATASET, **variables)
    assert said["codes"] == [0, 0]
    assert said["sent"] == ["/airloom-cache", "/airloom-cache", "/airloom", "/airloom"]
    assert remote.engine.run("ps", "-aq").stdout == b""
    assert remote.engine.run("volume", "ls", "-q").stdout.decode().split() == [said["volume"]]
    assert remote.engine.run("volume", "rm", said["volume"]).returncode == 0


def test_an_engine_that_a_task_names(remote: Remote, authority: Authority, tmp_path: Path) -> None:
    """By the second of its addresses, since the first does not answer."""
    client = authority.issue("client", tmp_path / "client")
    assert remote.ask(CONNECT_TO, CERTIFICATES=str(client)) == {"named": str(remote.folder / "data")}


def test_who_has_no_certificate_of_this_authority_is_refused(
    remote: Remote, authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority("another").issue("client", tmp_path / "stranger")
    (stranger / "ca.pem").write_bytes((authority.issue("client", tmp_path / "own") / "ca.pem").read_bytes())
    (tmp_path / "empty").mkdir()
    for variables in (
        {},  # no TLS at all
        {"DOCKER_TLS_VERIFY": "1", "DOCKER_CERT_PATH": str(tmp_path / "empty")},
        {"DOCKER_TLS_VERIFY": "1", "DOCKER_CERT_PATH": str(stranger)},
    ):
        said = remote.ask(CONNECT, **variables)
        assert said["type"] == "AuthError", (variables, said)
        assert "DOCKER_CERT_PATH with ca.pem, cert.pem and key.pem" in said["error"]
