"""Tags, as a mirror has them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from airloom.errors import ContractError
from airloom.hooks.git_command import run_git

_FORMAT = "%00".join(
    ("%(refname:strip=2)", "%(objectname)", "%(*objectname)", "%(creatordate:unix)", "%(contents)", "")
)


@dataclass(frozen=True)
class TagInfo:
    """An annotated or light tag. `commit` is what it points at in the end, `message` is empty for a light one."""

    name: str
    commit: str
    message: str
    object_id: str
    created_at: datetime


def read_tags(mirror: Path, pattern: str) -> list[TagInfo]:
    """The tags that are, or stand below, a ref."""
    listed = run_git(("for-each-ref", f"--format={_FORMAT}", pattern), git_dir=mirror).stdout
    fields = listed.decode(errors="replace").split("\0")
    records = [fields[start : start + 5] for start in range(0, len(fields) - 1, 5)]
    return [
        TagInfo(
            name=name.lstrip("\n"),
            commit=target or object_id,
            message=contents.strip() if target else "",
            object_id=object_id,
            created_at=datetime.fromtimestamp(int(created or 0), UTC),
        )
        for name, object_id, target, created, contents in records
    ]


def check_tag(tag: str) -> None:
    """Raises ContractError for what cannot be a tag's name."""
    done = run_git(("check-ref-format", f"refs/tags/{tag}"), check=False)
    if done.returncode != 0 or tag.startswith("-"):
        raise ContractError(f"{tag!r} cannot be a tag's name", hint="see: git help check-ref-format")
