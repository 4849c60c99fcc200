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


def owned(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """A filter of archives: the container's user may read it, whoever's it is here."""
    info.uid = info.gid = USER
    info.uname = info.gname = ""
    info.mode |= 0o700 if info.isdir() else 0o400
    return info


def send(  # noqa: PLR0917 - one call
    api: Any,
    container: str,
    job: StageJob,
    environment: bytes,
    cached: Mapping[str, str] | None = None,
    ca_bundle: str = "",
) -> None:
    """Fill the volume of a container that has not started. The archive is made on disk, never in memory.

    Args:
        cached: where the container has the job's objects, by MD5; links lead there.
    """
    import io

    request = StageRequest.read(job.request_file)
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
                target = f"work/inputs/{name}/{path.name}"
                if cached and name in job.objects:
                    _add_links(archive, target, {file: cached[md5] for file, md5 in job.objects[name].items()})
                else:
                    archive.add(path, target, filter=owned)
            for name, path in request.outputs.items():
                path.mkdir(parents=True, exist_ok=True)
                archive.add(path, f"work/outputs/{name}", filter=owned)
        file.seek(0)
        api.put_archive(container, str(VOLUME), file)


def objects_of(job: StageJob) -> dict[str, Path]:
    """A file here for each object of the job's inputs, by MD5."""
    inputs = StageRequest.read(job.request_file).inputs
    return {md5: inputs[name] / file for name, files in job.objects.items() for file, md5 in files.items()}


def _add_links(archive: tarfile.TarFile, root: str, links: Mapping[str, str]) -> None:
    """A folder with a link for each file, and its folders."""
    parents = {parent for file in links for parent in PurePosixPath(file).parents}
    for folder in sorted(parents | {PurePosixPath()}):
        info = tarfile.TarInfo(str(root / folder))
        info.type, info.mode = tarfile.DIRTYPE, 0o700
        archive.addfile(owned(info))
    for file, target in links.items():
        info = tarfile.TarInfo(f"{root}/{file}")
        info.type, info.linkname = tarfile.SYMTYPE, target
        archive.addfile(owned(info))


def fetch(api: Any, container: str, workspace: Path) -> dict[str, Any] | None:
    """Bring the outputs, then the result, here: whoever finds a result finds what it speaks of.

    Returns:
        what the container's first program noted of the end; None if it did not live to.
    """
    request = fetch_outputs(api, container, workspace)
    carried = workspace / CARRIED
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


def fetch_outputs(api: Any, container: str, workspace: Path) -> StageRequest:
    """Bring the outputs that the request names, as far as there are any; the request."""
    request = StageRequest.read(workspace / "request.json")
    for name, path in request.outputs.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        _get(api, container, f"outputs/{name}", path.parent)
    return request


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
