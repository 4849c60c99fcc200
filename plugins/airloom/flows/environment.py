"""What stage code runs in with runner `process`: this Python and the packages installed beside it."""

from __future__ import annotations

import platform
import re
import sysconfig
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airloom.contract.digest import sha256_bytes, sha256_file, sha256_json
from airloom.errors import ConflictError

if TYPE_CHECKING:
    from airloom.hooks.connect import Hooks

_INFO_FOLDER = re.compile(r"(?P<name>.+?)-(?P<version>[^-]+)(?:-py[\d.]+)?\.(?:dist-info|egg-info)")


@lru_cache(maxsize=1)
def environment() -> dict[str, Any]:
    """Python, machine and installed distributions, sorted.

    Read from the names of the folders that installers leave: asking each distribution's metadata takes
    a second for some hundred of them. The contract's own code is in it, because stages import it and its
    version stays the same while it is worked on.
    """
    folders = {Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib"))}
    found = {match for folder in folders for path in folder.iterdir() if (match := _INFO_FOLDER.fullmatch(path.name))}
    names = {f"{re.sub(r'[-_.]+', '-', match['name']).lower()}=={match['version']}" for match in found}
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "machine": f"{platform.system()} {platform.machine()}",
        "contract": contract_digest(),
        "distributions": sorted(names),
    }


@lru_cache(maxsize=1)
def environment_digest() -> str:
    """SHA-256 of `environment()`."""
    return sha256_json(environment())


def store_environment(hooks: Hooks) -> str:
    """Keep the list as `environments/<digest>.json` in the store, once, and return the digest."""
    digest = environment_digest()
    key = f"environments/{digest}.json"
    bucket = hooks.settings.bucket_airloom
    if not hooks.store.exists(bucket, key):
        with suppress(ConflictError):  # another run was faster with the same list
            hooks.store.put_json(bucket, key, environment(), if_none_match=True)
    return digest


def contract_digest() -> str:
    """Digest of the contract's own code."""
    from airloom import contract

    folder = Path(contract.__path__[0])
    files = sorted((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*.py"))
    return sha256_bytes("".join(f"{sha256_file(path)}  {name}\n" for name, path in files).encode())
