"""What an engine has of images, and their way between it and a registry."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from airloom.errors import UnavailableError
from airloom.hooks.docker_engine import auth_of, connect, engine_errors, login_of, pull_image, transfer_failure
from airloom.settings import Settings


class EngineImages:
    """The images of one engine: the one that stages run on, unless another client is given.

    Args:
        api: a client of another engine.
        builds: it is the one of AIRLOOM_BUILD_HOST, which may call the registry by a name of its own.
    """

    def __init__(self, settings: Settings, api: Any = None, *, builds: bool = False) -> None:
        self._settings = settings
        self._api = api or connect(settings)
        self._builds = builds

    def called(self, reference: str) -> str:
        """What this engine calls an image of the installation's registry; others as they are."""
        here, prefix = self._settings.build_registry.strip("/"), f"{self._settings.registry.strip('/')}/"
        if self._builds and here and reference.startswith(prefix):
            return f"{here}/{reference.removeprefix(prefix)}"
        return reference

    def find(self, reference: str) -> dict[str, Any] | None:
        """What the engine knows of an image, if it has it."""
        from docker.errors import ImageNotFound

        with self._errors():
            try:
                facts: dict[str, Any] = self._api.inspect_image(self.called(reference))
            except ImageNotFound:
                return None
        return facts

    def pull(self, reference: str) -> None:
        """Fetch an image from its registry, even if the engine has one of that name; raises as `pull_image` does."""
        # Whose login it takes is told by the registry's own name.
        pull_image(self._api, self.called(reference), auth_of(self._settings, reference), builds=self._builds)

    def tag(self, image: str, name: str, tag: str) -> None:
        """Have `name:tag` name an image of the engine."""
        with self._errors():
            self._api.tag(image, self.called(name), tag)

    def push(self, name: str, tag: str) -> str:
        """Push an image; the digest of its manifest in the registry.

        Raises:
            ServiceError: the registry refused.
            UnavailableError: it does not answer, or the push broke off. Nothing of it can be pulled.
        """
        digest, here = "", self.called(name)
        with self._errors():
            for line in self._api.push(here, tag=tag, auth_config=login_of(self._settings), stream=True, decode=True):
                if "error" in line:
                    user = self._settings.registry_user
                    raise transfer_failure("push", f"{here}:{tag}", user, str(line["error"]))
                digest = line.get("aux", {}).get("Digest", digest)
        if not digest:
            raise UnavailableError(f"the push of {here}:{tag} ended without the registry's digest")
        return digest

    def _errors(self) -> AbstractContextManager[None]:
        return engine_errors(builds=self._builds)
