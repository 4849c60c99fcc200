"""Run git the same way everywhere: no user or system configuration, no prompts, errors sorted by what helps."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from airloom.errors import AuthError, ConfigError, NotFoundError, ServiceError, StorageFullError, UnavailableError

# Everything else that the caller's environment holds could change what git does.
_INHERITED = (
    "PATH",
    "TMPDIR",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "GIT_SSL_CAINFO",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
)
_LOCAL_HOSTS = "127.0.0.1,localhost,::1"

_AUTH = ("authentication failed", "could not read username", "could not read password", "returned error: 403")
_FULL = ("no space left on device", "disk quota exceeded", "returned error: 507")
_UNAVAILABLE = (
    "could not resolve host",
    "failed to connect",
    "couldn't connect",
    "connection refused",
    "connection reset",
    "connection timed out",
    "operation timed out",
    "empty reply from server",
    "unexpected disconnect",
    "hung up unexpectedly",
    "early eof",
    "rpc failed",
    "returned error: 429",
    "returned error: 5",
)
_MISSING = ("not found", "returned error: 404", "couldn't find remote ref", "does not appear to be a git repository")


def git_environment(config: Mapping[str, str] | None = None, **variables: str) -> dict[str, str]:
    """The environment of a git process; `config` holds settings that stay out of its arguments."""
    environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    no_proxy = environment.get("no_proxy") or environment.get("NO_PROXY")
    environment["no_proxy"] = f"{no_proxy},{_LOCAL_HOSTS}" if no_proxy else _LOCAL_HOSTS
    # Folders may belong to another user than this process when it runs in a container.
    settings = {"safe.directory": "*", **(config or {})}
    environment.update(
        {
            "LC_ALL": "C",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_OPTIONAL_LOCKS": "0",
            "GIT_CONFIG_COUNT": str(len(settings)),
        }
    )
    for number, (key, value) in enumerate(settings.items()):
        environment[f"GIT_CONFIG_KEY_{number}"] = key
        environment[f"GIT_CONFIG_VALUE_{number}"] = value
    environment.update(variables)
    return environment


def run_git(
    arguments: Sequence[str],
    *,
    git_dir: Path | None = None,
    environment: Mapping[str, str] | None = None,
    stdin: bytes = b"",
    timeout_seconds: float = 300.0,
    check: bool = True,
    pass_fds: Sequence[int] = (),
) -> subprocess.CompletedProcess[bytes]:
    """Run one git command to its end.

    Raises:
        ServiceError: it failed; a subclass where the reason is known.
        ConfigError: there is no git.
    """
    command = ["git", *([f"--git-dir={git_dir}"] if git_dir else []), *arguments]
    try:
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            env=dict(environment) if environment is not None else git_environment(),
            timeout=timeout_seconds,
            check=False,
            pass_fds=tuple(pass_fds),
        )
    except FileNotFoundError:
        raise ConfigError("there is no git in PATH", hint="install git 2.30 or newer") from None
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"git {arguments[0]} did not end within {timeout_seconds:.0f} s") from None
    if check and done.returncode != 0:
        raise git_error(arguments[0], done.stderr.decode(errors="replace"), done.returncode)
    return done


def git_error(command: str, stderr: str, code: int) -> ServiceError | NotFoundError:
    """The error that fits what git wrote when it failed."""
    # Relayed server messages ("remote: …") are for people; git's own last lines say what happened.
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    said = " ".join(lines[-3:]) or f"exit code {code}"
    low = stderr.lower()
    message = f"git {command}: {said}"
    if any(part in low for part in _FULL):
        return StorageFullError(message, hint="free some space for the git server")
    if any(part in low for part in _AUTH):
        return AuthError(message, hint="the secret git_password is not what the git server expects")
    if any(part in low for part in _UNAVAILABLE):
        return UnavailableError(message, hint="is the git server running? see: airloom status")
    if any(part in low for part in _MISSING):
        return NotFoundError(message)
    return ServiceError(message)
