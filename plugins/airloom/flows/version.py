"""Make a data version: data first, verified, then the tag."""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from airloom.contract import DataCard, DataVersion, RunPlan, Stage, StageOutcome, VersionTag
from airloom.contract.card import CARD_FILE
from airloom.errors import ConflictError, ContractError, NotFoundError
from airloom.flows import cache
from airloom.flows.resolve import PLAN_COPY, plan_uri
from airloom.hooks.connect import Hooks
from airloom.hooks.dvc import DatasetListing, DvcStore, pointer, remote_config
from airloom.hooks.git_tags import TagInfo

log = logging.getLogger(__name__)

DATASET_OUTPUT = "dataset"
MESSAGE_SCHEMA = 1
_MOST_TAGS_AT_ONCE = 1000
_DVC_IGNORED = ("/config.local", "/tmp", "/cache")  # noqa: S108 - lines of a .gitignore


def version_dataset(hooks: Hooks, *, plan: RunPlan, outcome: StageOutcome) -> DataVersion:
    """Version what `preprocess` wrote, and note it for later runs with the same code, parameters and source.

    The dataset goes to the DVC remote and is checked there; only then one atomic push writes the tag. It can be
    killed anywhere and run again: a run finds its own tag, and where another run holds the name, takes the next.

    Returns:
        The data version; with `created=False` where `preprocess` was a cache hit and wrote nothing new.

    Raises:
        ContractError: the dataset is missing, or is not what the stage said that it wrote.
        StorageFullError, AuthError, UnavailableError: the object store or the git server; no tag was written.
    """
    if outcome.cache == "hit" and outcome.data_version is not None:
        return outcome.data_version.model_copy(update={"created": False})
    output = outcome.result.outputs.get(DATASET_OUTPUT)
    if output is None:
        raise ContractError(
            f"stage {outcome.stage.value!r} has no output {DATASET_OUTPUT!r}",
            hint=f"it wrote: {', '.join(outcome.result.outputs) or 'nothing'}",
        )
    remote = DvcStore.from_settings(hooks.settings, hooks.store)
    with ThreadPoolExecutor(1) as pool:  # the store looks while this process hashes
        looking = pool.submit(remote.present, plan.pipeline, output.files)
        listing = remote.hash_folder(output.path)
    if (len(listing.files), listing.size_bytes) != (output.files, output.size_bytes):
        raise ContractError(
            f"{output.path} holds {len(listing.files)} files, {listing.size_bytes} bytes, but the stage wrote "
            f"{output.files} files, {output.size_bytes} bytes",
            hint="clear the preprocess task, so that it makes the dataset again",
        )
    pushed = remote.push(listing, output.path, plan.pipeline, present=looking.result())
    log.info("dataset %s: %d objects uploaded, %d there already", listing.md5, pushed.uploaded, pushed.present)
    card_path = output.path / CARD_FILE
    card = card_path.read_bytes() if card_path.is_file() else b""
    version = _write_tag(hooks, plan, listing, output.digest, card)

    cache.record(hooks, plan, outcome.model_copy(update={"data_version": version}))
    return version


def verify_remote(hooks: Hooks, data_version: DataVersion) -> None:
    """Check that the tag exists and that everything it points at is in the object store.

    Raises:
        NotFoundError: names the tag and the first object that is missing.
    """
    pipeline = VersionTag.parse(data_version.tag).pipeline
    hooks.git.read_tag(data_version.repo, data_version.tag)
    missing = DvcStore.from_settings(hooks.settings, hooks.store).missing(pipeline, data_version.md5)
    if missing is not None:
        raise NotFoundError(
            f"the data version {data_version.tag} is not whole: {missing} is missing",
            hint="restore the object store from a backup, or run the pipeline with force to make the data again",
        )


def _write_tag(hooks: Hooks, plan: RunPlan, listing: DatasetListing, digest: str, card: bytes) -> DataVersion:
    code = plan.code_of(Stage.PREPROCESS)
    path = f"data/{plan.pipeline}"
    message = _message(hooks, plan, listing, digest, card)
    files = _files(hooks, plan, listing, path, card)
    tag = VersionTag.make(pipeline=plan.pipeline, commit=code.commit, message=code.message, time=plan.created_at)
    for _ in range(_MOST_TAGS_AT_ONCE):
        name = str(tag)
        try:
            commit = hooks.git.write_version(
                code.repo,
                parent=code.commit,
                files=files,
                tag=name,
                message=json.dumps(message, indent=1, ensure_ascii=False),
                commit_message=f"Data version {name}\n\n{len(listing.files)} files, {listing.size_bytes} bytes",
                when=plan.created_at,
            )
        except ConflictError:
            held = hooks.git.read_tag(code.repo, name)
            if _is_ours(held, message):
                commit = held.commit
            else:
                tag = tag.next()
                continue
        return DataVersion(
            tag=name,
            repo=code.repo,
            commit=commit,
            code_commit=code.commit,
            path=path,
            md5=listing.md5,
            files=len(listing.files),
            size_bytes=listing.size_bytes,
            digest=digest,
        )
    raise ConflictError(f"{_MOST_TAGS_AT_ONCE} tags from {tag} on are taken by other runs")


def _is_ours(held: TagInfo, message: dict[str, Any]) -> bool:
    """Whether an earlier try of this run wrote the tag, for this data."""
    try:
        found = json.loads(held.message)
        return bool((found["run_id"], found["md5"]) == (message["run_id"], message["md5"]))
    except (ValueError, KeyError, TypeError):
        return False


def _message(hooks: Hooks, plan: RunPlan, listing: DatasetListing, digest: str, card: bytes) -> dict[str, Any]:
    """What the tag says. Only facts of the run stand here: a second try says the same."""
    return {
        "schema_version": MESSAGE_SCHEMA,
        "pipeline": plan.pipeline,
        "run_id": plan.run_id,
        "created_at": plan.created_at.isoformat(),
        "code_commit": plan.code_of(Stage.PREPROCESS).commit,
        "code": {repo: pin.commit for repo, pin in sorted(plan.code.items())},
        "path": f"data/{plan.pipeline}",
        "md5": listing.md5,
        "digest": digest,
        "files": len(listing.files),
        "size_bytes": listing.size_bytes,
        "rows": DataCard.model_validate_json(card).rows if card else {},
        "plan": plan_uri(hooks, plan),
        "source": {"uri": plan.source.uri, "manifest": plan.source.manifest, "digest": plan.source.digest},
        "environment": plan.stages[Stage.PREPROCESS].environment,
    }


def _files(hooks: Hooks, plan: RunPlan, listing: DatasetListing, path: str, card: bytes) -> dict[str, bytes]:
    """What the commit adds to the code: all that stock DVC needs, and what people want to read."""
    folder, name = path.rsplit("/", 1)
    settings, code = hooks.settings, plan.code_of(Stage.PREPROCESS)
    ignored = {".dvc/.gitignore": _DVC_IGNORED, f"{folder}/.gitignore": (f"/{name}",)}
    present = hooks.git.read_files(code.repo, code.commit, ignored)
    files = {
        ".dvc/config": remote_config(settings.bucket_dvc, plan.pipeline, settings.s3_endpoint_url),
        **{file: _with_lines(present.get(file, b""), lines) for file, lines in ignored.items()},
        f"{path}.dvc": pointer(listing, name),
        PLAN_COPY: (plan.model_dump_json(indent=1) + "\n").encode(),
    }
    if card:
        files[f"{folder}/{CARD_FILE}"] = card
    return files


def _with_lines(content: bytes, lines: tuple[str, ...]) -> bytes:
    """A file's content with these lines added, where it lacks them."""
    present = content.decode().splitlines()
    added = [line for line in lines if line not in present]
    return "".join(f"{line}\n" for line in (*present, *added)).encode()
