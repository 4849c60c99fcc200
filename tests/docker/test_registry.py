"""Pushes and pulls between the engine and a real registry with a login, and a registry that dies in between."""

# ruff: noqa: F811
from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from docker.errors import APIError

from airloom.errors import ServiceError, UnavailableError
from airloom.hooks.docker_engine import connect, ensure_image
from airloom.hooks.image_builder import ImageBuilder
from airloom.hooks.registry import Registry
from airloom.settings import Settings
from tests.fixtures.image_registry import USER, ImageRegistry, login_registry, login_settings  # noqa: F401
from tests.fixtures.stage_repo import wait_until

REPOSITORY = "airloom/test-registry"
MEBIBYTE = 2**20


class Engine:
    """The engine, with images that this test made."""

    def __init__(self, settings: Settings, registry: ImageRegistry) -> None:
        self.settings, self.registry = settings, registry
        self.api = connect(settings)
        self.builder = ImageBuilder(settings)
        self.name = f"{registry.host}/{REPOSITORY}"
        self.made: set[str] = set()

    def image(self, tag: str, size_bytes: int) -> str:
        """Import an image of one file that doesn't compress, and tag it for the registry; its id."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            member = tarfile.TarInfo("content")
            member.size = size_bytes
            archive.addfile(member, io.BytesIO(os.urandom(size_bytes)))
        self.api.import_image_from_data(buffer.getvalue(), repository=self.name, tag=tag)
        self.made.add(f"{self.name}:{tag}")
        return str(self.api.inspect_image(f"{self.name}:{tag}")["Id"])

    def close(self) -> None:
        for reference in self.made:
            with suppress(APIError):
                self.api.remove_image(reference, force=True)
        self.api.close()


@pytest.fixture
def engine(login_settings: Settings, login_registry: ImageRegistry) -> Iterator[Engine]:
    found = Engine(login_settings, login_registry)
    yield found
    found.close()


@pytest.fixture
def stranger(settings: Settings) -> Settings:
    """The registry's user with another password."""
    (settings.secrets_dir / "registry_password").write_text("wrong-one")
    return settings.model_copy(update={"registry_user": USER})


def test_pushed_and_pulled_by_digest(engine: Engine) -> None:
    image = engine.image("one", 1000)
    digest = engine.builder.push(engine.name, "one")
    assert Registry(engine.settings, engine.registry.host).digest_of(REPOSITORY, "one") == digest
    engine.api.remove_image(f"{engine.name}:one", force=True)
    reference = f"{engine.name}@{digest}"
    ensure_image(engine.api, engine.settings, reference)
    engine.made.add(reference)
    found = engine.api.inspect_image(reference)
    assert (found["Id"], found["RepoDigests"]) == (image, [reference])


def test_a_wrong_password_pushes_nothing(engine: Engine, stranger: Settings) -> None:
    engine.image("one", 1000)
    with pytest.raises(ServiceError, match=f"refuses {engine.name}:one from user {USER}") as caught:
        ImageBuilder(stranger).push(engine.name, "one")
    assert "wrong-one" not in str(caught.value)
    assert Registry(engine.settings, engine.registry.host).tags(REPOSITORY) == []


def test_a_wrong_password_pulls_nothing(engine: Engine, stranger: Settings) -> None:
    engine.image("one", 1000)
    digest = engine.builder.push(engine.name, "one")
    engine.api.remove_image(f"{engine.name}:one", force=True)
    with pytest.raises(ServiceError, match="refused"):
        ensure_image(engine.api, stranger, f"{engine.name}@{digest}")


def test_a_registry_killed_in_the_middle_of_a_push(engine: Engine) -> None:
    """The push fails once the engine has tried five times, the tag is not there, and the next push works."""
    engine.image("one", 64 * MEBIBYTE)
    registry, client = engine.registry, Registry(engine.settings, engine.registry.host)
    with ThreadPoolExecutor(1) as threads:
        push = threads.submit(engine.builder.push, engine.name, "one")
        wait_until(lambda: any(path.stat().st_size for path in registry.uploads()), "the upload's first bytes")
        registry.kill()
        with pytest.raises(UnavailableError, match=f"{engine.name}:one could not be pushed"):
            push.result(180)
    registry.start()
    assert client.digest_of(REPOSITORY, "one") is None
    assert client.tags(REPOSITORY) == []
    digest = engine.builder.push(engine.name, "one")
    assert client.digest_of(REPOSITORY, "one") == digest
