"""Deploy target `process`: a release answers from a process that the embedded platform's supervisor keeps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from airloom.contract import Release, Stage, StageRequest
from airloom.errors import ConflictError, NotFoundError
from airloom.hooks.supervisor import SECRET_PREFIX
from airloom.spec.pipeline import PipelineSpec

if TYPE_CHECKING:
    from airloom.hooks.supervisor import Supervisor
    from airloom.settings import Settings

START_TIMEOUT_SECONDS = 120.0
GRACE_SECONDS = 40.0  # longer than a serving process needs to finish what it has and to empty its journal


class ProcessTarget:
    """Starts and stops serving processes; each runs from its release's bundle alone."""

    def __init__(self, settings: Settings, supervisor: Supervisor) -> None:
        self._settings = settings
        self._supervisor = supervisor

    def start(self, release: Release, bundle: Path, spec: PipelineSpec) -> str:
        """Have a release answer beside whatever else does; the URL of its process, which is ready.

        Raises:
            PlatformError: it did not become ready; the message holds its last log lines.
        """
        name = service_name(release.pipeline, release.version)
        request = self._write_request(release, bundle, spec)
        arguments = ["--request", str(request), "--result", str(request.with_name("result.json"))]

        def start() -> None:
            self._supervisor.start(
                name,
                command=[sys.executable, "main.py", Stage.SERVE.value, *arguments],
                cwd=str(bundle / "serving"),
                env={
                    "AIRLOOM_PREDICTION_DB": self._settings.database,
                    "AIRLOOM_SERVING_ADMIN_TOKEN": f"{SECRET_PREFIX}serving_admin_token",
                    "PYTHONDONTWRITEBYTECODE": "1",
                },
                grace_seconds=GRACE_SECONDS,
            )

        try:
            start()
        except ConflictError:
            # It was started otherwise: from another folder, with another database, by another version of Airloom.
            self.stop(release.pipeline, release.version)
            start()
        state = self._supervisor.wait_ready(name, START_TIMEOUT_SECONDS)
        return f"http://{self._settings.bind_host}:{state.port}"

    def url(self, pipeline: str, version: str) -> str | None:
        """Where a release answers, if its process is ready."""
        try:
            state = self._supervisor.service(service_name(pipeline, version))
        except NotFoundError:
            return None
        return f"http://{self._settings.bind_host}:{state.port}" if state.ready else None

    def running(self, pipeline: str) -> list[str]:
        """The versions of a pipeline that have a process."""
        # All before the version: another pipeline's name may begin with this one's.
        parts = [state.name.rpartition("-") for state in self._supervisor.services() if state.dynamic]
        return [version for name, _, version in parts if service_name(pipeline, "") == f"{name}-"]

    def stop(self, pipeline: str, version: str) -> None:
        """Let a release finish what it has, and end it. Not running: no change."""
        try:
            self._supervisor.stop(service_name(pipeline, version))
        except NotFoundError:
            return

    def _write_request(self, release: Release, bundle: Path, spec: PipelineSpec) -> Path:
        settings, stage = self._settings, spec.stages[Stage.SERVE]
        path = settings.home_dir / "serving" / f"{release.pipeline}-{release.version}" / "request.json"
        StageRequest(
            pipeline=release.pipeline,
            run_id=release.run_id,
            stage=Stage.SERVE,
            commit=release.serving_commit,
            params={
                "host": settings.bind_host,
                "max_upload_bytes": spec.deploy.max_upload,
                "journal_dir": str(settings.home_dir / "journal" / release.pipeline),
                "releases_root": str(settings.releases_dir),
                **stage.params,
            },
            inputs={"model": bundle / "model", "release": bundle / "release.json"},
            seed=stage.seed,
        ).write(path)
        return path


def service_name(pipeline: str, version: str) -> str:
    """What the supervisor calls a release's process."""
    return f"serving-{pipeline.replace('_', '-')}-{version}"
