"""A stage's files: the workspace here, a volume in the container. They travel through the engine's API."""

from __future__ import annotations

import json
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from airloom.contract import StageRequest, StageResult
from airloom.errors import ContractError
from airloom.hooks.runner import StageJob

VOLUME = PurePosixPath("/airloom")
# The engine leaves the root of a volume to root: the stage owns a folder in it.
MOUNT = VOLUME / "work"
USER = 10001
ENVIRONMENT_FILE = "environment.json"
CA_FILE = "ca.crt"
EXIT_FILE = "exit.json"
CARRIED = "carried"


def request_inside(request: StageRequest) -> StageRequest:
    """The request with the container's paths."""
    inputs = {name: Path(MOUNT / "inputs" / name / path.name) for name, path in request.inputs.items()}
    outputs = {name: Path(MOUNT / "outputs" / name) for name in request.outputs}
    return request.model_copy(update={"inputs": inputs, "outputs": outputs})


def result_outside(result: StageResult, outputs: Mapping[str, Path]) -> StageResult:
    """The result with this machine's paths; what lies elsewhere keeps its path, and is refused later."""
    mapped = {
        name: output.model_copy(update={"path": outputs[name]})
        if name in outputs and output.path == Path(MOUNT / "outputs" / name)
        else output
        for name, output in result.outputs.items()
    }
    return result.model_copy(update={"outputs": mapped})


def send(api: Any, container: str, job: StageJob, environment: bytes, ca_bundle: str = "") -> None:
    """Fill the volume of a container that has not started. The archive is made on disk, never in memory."""
    import io

    request = StageRequest.read(job.request_file)

    def owned(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = USER
        info.uname = info.gname = ""
        info.mode |= 0o700 if info.isdir() else 0o400
        return info

    with tempfile.TemporaryFile() as file:
        with tarfile.open(fileobj=file, mode="w", dereference=True) as archive:

            def text(name: str, content: bytes) -> None:
                info = owned(tarfile.TarInfo(f"work/{name}"))
                info.size, info.mode = len(content), 0o600
                archive.addfile(info, io.BytesIO(content))

            for folder in ("work", "work/inputs", "work/outputs"):
                info = tarfile.TarInfo(folder)
                info.type, info.mode = tarfile.DIRTYPE, 0o700
                archive.addfile(owned(info))
            text("request.json", request_inside(request).model_dump_json().encode())
            text(ENVIRONMENT_FILE, environment)
            if ca_bundle:
                text(CA_FILE, Path(ca_bundle).read_bytes())
            for name, path in request.inputs.items():
                archive.add(path, f"work/inputs/{name}/{path.name}", filter=owned)
            for name, path in request.outputs.items():
                path.mkdir(parents=True, exist_ok=True)
                archive.add(path, f"work/outputs/{name}", filter=owned)
        file.seek(0)
        api.put_archive(container, str(VOLUME), file)


def fetch(api: Any, container: str, workspace: Path) -> dict[str, Any] | None:
    """Bring the outputs, then the result, here: whoever finds a result finds what it speaks of.

    Returns:
        what the container's first program noted of the end; None if it did not live to.
    """
    request = StageRequest.read(workspace / "request.json")
    carried = workspace / CARRIED
    for name, path in request.outputs.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        _get(api, container, f"outputs/{name}", path.parent)
    if _get(api, container, "result.json", carried):
        result = carried / "result.json"
        try:
            result_outside(StageResult.read(result), request.outputs).write(workspace / "result.json")
        except ContractError:  # whoever collects says what is wrong with it
            result.replace(workspace / "result.json")
    if not _get(api, container, EXIT_FILE, carried):
        return None
    note: dict[str, Any] = json.loads((carried / EXIT_FILE).read_bytes())
    return note


def _get(api: Any, container: str, name: str, folder: Path) -> bool:
    """Whether it was there to be brought."""
    from docker.errors import NotFound

    try:
        chunks, _ = api.get_archive(container, str(MOUNT / name), chunk_size=2**20)
    except NotFound:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile() as file:
        for chunk in chunks:
            file.write(chunk)
        file.seek(0)
        with tarfile.open(fileobj=file) as archive:
            for member in archive:
                _extract(archive, member, folder)
    return True


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """Plain files and folders below `folder`, with this user's owner and modes.

    The standard library's own filters came with Python 3.11.4, and Debian 12 has an earlier one.

    Raises:
        ContractError: a stage wrote something else, such as a link that leads out.
    """
    target = (folder / member.name).resolve()
    if not (member.isfile() or member.isdir()) or not target.is_relative_to(folder.resolve()):
        raise ContractError(
            f"the stage's output {member.name!r} is neither a file nor a folder",
            hint="outputs hold plain files and folders: no links, sockets or devices",
        )
    archive.extract(member, folder, set_attrs=False)
