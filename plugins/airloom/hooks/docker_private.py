"""How a container of any image gets its private environment: in a file that its first program, a shell, deletes."""

from __future__ import annotations

import io
import re
import shlex
import tarfile
from collections.abc import Mapping
from typing import Any

from airloom.errors import ConfigError
from airloom.hooks.docker_engine import engine_errors

# Made in the container: for the result, and for the private environment until the shell has read it.
FOLDER = "/airloom"
_PRIVATE = f"{FOLDER}/environment.sh"
_BOOT = f'set -a && . {_PRIVATE} && rm -f {_PRIVATE} && set +a && exec "$@"; exit 125'
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def with_boot(api: Any, creation: Mapping[str, Any]) -> dict[str, Any]:
    """The same command, after a shell that reads the private environment and deletes it."""
    from docker.utils import split_command

    def words(value: Any) -> list[str]:
        return split_command(value) if isinstance(value, str) else list(value or [])

    with engine_errors():
        image = api.inspect_image(creation["image"])["Config"] or {}
    entrypoint, command = words(creation.get("entrypoint")), words(creation.get("command"))
    if not entrypoint:
        entrypoint = words(image.get("Entrypoint"))
        command = command or words(image.get("Cmd"))
    if not entrypoint and not command:
        raise ConfigError(f"neither the image {creation['image']} nor the task says what to run", hint="set command")
    return {"entrypoint": ["/bin/sh", "-c", _BOOT, "sh"], "command": [*entrypoint, *command]}


def folder_archive(private: Mapping[str, str] | None) -> bytes:
    """`/airloom`, with the private environment. All may read and delete it: the image's user is not known here."""
    folder = tarfile.TarInfo(FOLDER.lstrip("/"))
    folder.type, folder.mode = tarfile.DIRTYPE, 0o777
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(folder)
        if private:
            content = shell_variables(private).encode()
            info = tarfile.TarInfo(_PRIVATE.lstrip("/"))
            info.size, info.mode = len(content), 0o644
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def shell_variables(variables: Mapping[str, Any]) -> str:
    """Lines that a shell reads as these variables, whatever stands in them.

    Raises:
        ConfigError: a name that no shell takes, or a value with a zero byte.
    """
    for name, value in variables.items():
        if not _NAME.fullmatch(name):
            raise ConfigError(f"private_environment has the name {name!r}", hint="letters, digits and '_' alone")
        if "\0" in str(value):
            raise ConfigError(f"private_environment[{name!r}] holds a zero byte", hint="encode it, as base64 perhaps")
    return "".join(f"{name}={shlex.quote(str(value))}\n" for name, value in variables.items())
