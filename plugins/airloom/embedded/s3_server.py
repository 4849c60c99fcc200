"""SeaweedFS as the embedded object store: `weed mini`, every part of it on loopback and on ports of `.env`."""

from __future__ import annotations

import json
import os
import secrets
import sysconfig
from pathlib import Path

from airloom.embedded.service import Service
from airloom.errors import PlatformError
from airloom.hooks.s3_room import STATUS_PORT
from airloom.settings import Settings

NAME = "s3"

# Offsets in AIRLOOM_INTERNAL_PORTS. Left to itself, weed takes well-known ports and those + 10000 for gRPC, and
# two installations would meet there.
_PORTS = {
    "s3.port.grpc": 0,
    "master.port": STATUS_PORT,
    "master.port.grpc": 2,
    "volume.port": 3,
    "volume.port.grpc": 4,
    "filer.port": 5,
    "filer.port.grpc": 6,
    "metricsPort": 7,
    "admin.port": 8,
    "admin.port.grpc": 9,
}

# weed's parts talk to each other over sockets in /tmp that are named after these ports.
_GRPC_SOCKETS = {
    "master": "master.port.grpc",
    "volume": "volume.port.grpc",
    "filer": "filer.port.grpc",
    "s3": "s3.port.grpc",
    "admin": "admin.port.grpc",
}


def service(settings: Settings) -> Service:
    """The object store: S3 on `s3_port`, keys of `admin`, `airloom` and `mlflow`.

    Raises:
        ConfigError: a secret is missing, or AIRLOOM_INTERNAL_PORTS is too short.
    """
    data, identities = settings.data_dir / "s3", settings.run_dir / "s3.json"
    ports = {flag: settings.internal_port(number) for flag, number in _PORTS.items()}
    host = settings.bind_host
    flags = {
        "dir": str(data),
        "ip": host,
        "ip.bind": host,
        "metricsIp": host,
        "s3.port": settings.s3_port,
        **ports,
        "s3.config": str(identities),
        "s3.localSocket": str(settings.socket_path("s3.sock")),
        "filer.localSocket": str(settings.socket_path("s3-filer.sock")),
        "s3.autoCreateBucket": "false",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "master.telemetry": "false",
        "webdav": "false",
        "admin.ui": "false",
        **_quota_flags(settings.s3_quota_mib),
    }
    # Without these keys whoever reaches a volume's or the filer's HTTP port reads and writes everything.
    key = settings.secret("s3_jwt_secret")
    guards = ("SIGNING_KEY", "SIGNING_READ_KEY", "FILER_SIGNING_KEY", "FILER_SIGNING_READ_KEY")

    def prepare() -> None:
        data.mkdir(parents=True, exist_ok=True, mode=0o700)
        # weed keeps the flags of its first start there and would take them for later ones.
        (data / "mini.options").unlink(missing_ok=True)
        for name, flag in _GRPC_SOCKETS.items():
            _clear_socket(Path(f"/tmp/seaweedfs-{name}-grpc-{ports[flag]}.sock"))  # noqa: S108 - fixed in weed
        _write_private(identities, json.dumps(s3_identities(settings), indent=2))

    return Service(
        name=NAME,
        command=(_program(), "-logtostderr=true", "mini", *(f"-{flag}={value}" for flag, value in flags.items())),
        cwd=data,
        env={
            "GOMEMLIMIT": "400MiB",
            **{f"WEED_JWT_{guard}": key for guard in guards},
        },
        ports=(settings.s3_port, *ports.values()),
        prepare=prepare,
        probe=lambda: _probe(settings),
        start_timeout_seconds=60,
        grace_seconds=15,
        urls={"S3": settings.s3_endpoint_url},
        metrics_url=f"http://{host}:{ports['metricsPort']}/metrics",
    )


def _program() -> str:
    beside = Path(sysconfig.get_path("scripts")) / "weed"
    return str(beside) if beside.exists() else "weed"


def _quota_flags(quota_mib: int) -> dict[str, int]:
    """Room is given out in volumes; small ones let every bucket have some."""
    if not quota_mib:
        return {}
    volume_mib = max(1, min(1024, quota_mib // 32))
    return {"master.volumeSizeLimitMB": volume_mib, "volume.max": max(1, quota_mib // volume_mib)}


def s3_identities(settings: Settings) -> dict[str, object]:
    def identity(name: str, actions: list[str]) -> dict[str, object]:
        secret = settings.secret(f"s3_{name}_secret")
        return {"name": name, "credentials": [{"accessKey": name, "secretKey": secret}], "actions": actions}

    def on(*buckets: str) -> list[str]:
        return [f"{action}:{bucket}" for bucket in buckets for action in ("Read", "Write", "List")]

    return {
        "identities": [
            identity("admin", ["Admin"]),
            identity("airloom", on(settings.bucket_raw, settings.bucket_dvc, settings.bucket_airloom)),
            identity("mlflow", on(settings.bucket_mlflow)),
        ]
    }


def _clear_socket(path: Path) -> None:
    """Remove what a killed weed left: with another user's left there, weed would wait for ever."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise PlatformError(
            f"the object store cannot start: {path} is in its way and cannot be removed: {error.strerror}",
            hint="have its owner remove it, or set AIRLOOM_INTERNAL_PORTS to another range",
        ) from error


def _write_private(path: Path, text: str) -> None:
    """Write a file that only this user can read, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    temporary.replace(path)


def _probe(settings: Settings) -> None:
    """Write on a condition, read and delete: weed's own /healthz is green when nothing can be written."""
    from airloom.hooks.object_store import ObjectStore

    store = ObjectStore.from_settings(settings, user="admin", retry_seconds=0)
    bucket, key, content = settings.bucket_airloom, f".probe/{secrets.token_hex(8)}", b"ready?"
    store.ensure_bucket(bucket)
    store.put_bytes(bucket, key, content, if_none_match=True)
    try:
        if store.get_bytes(bucket, key) != content:
            raise RuntimeError(f"the object store gave back other bytes than were written to {bucket}/{key}")
    finally:
        store.remove(bucket, key)
