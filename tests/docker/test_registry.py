"""Pushes and pulls between the engine and a real registry with a login, and a registry that dies in between."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from docker.errors import APIError

from airloom.contract import CodePin
from airloom.errors import AuthError, NotFoundError, ServiceError, UnavailableError
from airloom.flows import images
from airloom.flows.mirror import mirror
from airloom.hooks.docker_engine import connect, ensure_image
from airloom.hooks.image_builder import ImageBuilder
from airloom.hooks.registry import Registry
from airloom.settings import Settings
from tests.fixtures.image_registry import USER, ImageRegistry
from tests.fixtures.stage_image import BASE
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
    with pytest.raises(ServiceError, match=f"refuses the push of {engine.name}:one to user {USER}") as caught:
        ImageBuilder(stranger).push(engine.name, "one")
    assert "wrong-one" not in str(caught.value)
    assert Registry(engine.settings, engine.registry.host).tags(REPOSITORY) == []


def test_a_wrong_password_pulls_nothing(engine: Engine, stranger: Settings) -> None:
    engine.image("one", 1000)
    digest = engine.builder.push(engine.name, "one")
    engine.api.remove_image(f"{engine.name}:one", force=True)
    with pytest.raises(ServiceError, match="refuses the pull"):
        ensure_image(engine.api, stranger, f"{engine.name}@{digest}")


def killed_in_a_push(engine: Engine, tag: str) -> bool:
    """Push a new image and kill the registry meanwhile; False where the push was over before."""
    engine.image(tag, 64 * MEBIBYTE)
    with ThreadPoolExecutor(1) as threads:
        push = threads.submit(engine.builder.push, engine.name, tag)
        wait_until(lambda: engine.registry.uploaded_bytes() > 0 or push.done(), "the upload's first bytes")
        if push.done():
            push.result()  # a push that fails by itself is no success
        engine.registry.kill()
        if push.exception(400) is None:
            return False
        with pytest.raises(UnavailableError, match=f"{engine.name}:{tag} could not be pushed"):
            push.result()
    return True


def test_a_registry_killed_in_the_middle_of_a_push(engine: Engine) -> None:
    """The push fails once the engine has tried five times, the tag is not there, and the next push works."""
    client = Registry(engine.settings, engine.registry.host)
    over: list[str] = []  # where the machine was so busy that the kill came too late
    for tag in ("one", "two", "three"):
        killed = killed_in_a_push(engine, tag)
        engine.registry.start()
        if killed:
            break
        over.append(tag)
    assert len(over) < 3, "each push was over before the kill"
    assert client.digest_of(REPOSITORY, tag) is None
    assert sorted(client.tags(REPOSITORY)) == sorted(over)
    digest = engine.builder.push(engine.name, tag)
    assert client.digest_of(REPOSITORY, tag) == digest


def test_a_pull_that_fails_says_why(engine: Engine, stranger: Settings) -> None:
    engine.image("one", 1000)
    digest = engine.builder.push(engine.name, "one")
    engine.api.remove_image(f"{engine.name}:one", force=True)
    with pytest.raises(NotFoundError, match=f"{engine.name}:two cannot be pulled: .*unknown"):
        engine.builder.pull(f"{engine.name}:two")
    wrong = stranger.model_copy(update={"registry": engine.registry.host})
    with pytest.raises(AuthError, match=f"refuses the pull of {engine.name}:one to user {USER}") as caught:
        ImageBuilder(wrong).pull(f"{engine.name}:one")
    assert "wrong-one" not in str(caught.value)
    engine.registry.kill()
    with pytest.raises(UnavailableError, match=f"{engine.name}:one could not be pulled"):
        engine.builder.pull(f"{engine.name}:one")
    engine.registry.start()
    engine.builder.pull(f"{engine.name}@{digest}")
    engine.made.add(f"{engine.name}@{digest}")


def test_a_mirror_says_why_an_image_is_not_copied(engine: Engine) -> None:
    settings = engine.settings.model_copy(update={"registry": engine.registry.host})
    copied, failed = mirror(settings, {"A_IMAGE": f"{engine.name}:none"}, lambda line: None)
    assert copied == {}
    assert failed[0].startswith(f"A_IMAGE: {engine.name}:none cannot be pulled: ")
    assert "unknown" in failed[0]


def test_a_mirror_holds_a_copy_that_can_be_pulled(engine: Engine) -> None:
    """Of an image that the engine has not: it is pulled first."""
    image = engine.image("one", 1000)
    engine.builder.push(engine.name, "one")
    engine.api.remove_image(f"{engine.name}:one", force=True)
    host = engine.registry.host
    settings = engine.settings.model_copy(update={"registry": f"{host}/mirror"})
    copied, failed = mirror(settings, {"A_IMAGE": f"{engine.name}:one", "B_IMAGE": f"{engine.name}:one"}, print)
    name = f"{host}/mirror/{REPOSITORY}"
    engine.made |= {f"{engine.name}:one", f"{name}:one"}
    digest = Registry(engine.settings, host).digest_of(f"mirror/{REPOSITORY}", "one")
    assert failed == []
    assert copied == dict.fromkeys(("A_IMAGE", "B_IMAGE"), f"{name}:one@{digest}")
    for reference in (f"{engine.name}:one", f"{name}:one"):
        engine.api.remove_image(reference, force=True)
    assert engine.builder.find(image) is None
    engine.builder.pull(copied["A_IMAGE"])  # as the line for .env.local has it
    assert engine.builder.find(f"{name}@{digest}")["Id"] == image  # type: ignore[index]
    engine.made.add(f"{name}@{digest}")


def test_whether_an_image_is_there_is_asked_and_not_pulled(engine: Engine, tmp_path: Path) -> None:
    """The registry answers under a name that the engine does not know, as in a container of the stack."""
    host = engine.registry.host
    port = host.rpartition(":")[2]
    settings = engine.settings.model_copy(
        update={"registry": host, "registry_url": f"localhost:{port}", "python_image": BASE, "torch_backend": ""}
    )
    name, tag = images.runtime_reference(settings, "preprocessing")
    engine.api.tag(BASE, name, tag)
    engine.made.add(f"{name}:{tag}")
    engine.builder.push(name, tag)

    # The engine has lost the runtime: it comes from the registry, and nothing is built.
    engine.api.remove_image(f"{name}:{tag}", force=True)
    said: list[str] = []
    assert images.ensure_runtime(settings, "preprocessing", said.append) == f"{name}:{tag}"
    assert said == [f"pulling {name}:{tag}"]
    assert engine.builder.find(f"{name}:{tag}") is not None

    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "main.py").touch()
    (checkout / "Dockerfile").write_text("ARG RUNTIME_IMAGE\nFROM ${RUNTIME_IMAGE}\nRUN echo asked >/tmp/asked\n")
    (checkout / "stages.yaml").write_text("runtime: preprocessing\nstages: {preprocess: {paths: [main.py]}}\n")
    pin = CodePin(repo="asked_repo", commit="a" * 40, message="m", author="a")
    built = images.build_stage_image(settings, pin, checkout, lambda line: None)
    assert not built.pushed
    engine.api.tag(f"{name}:{tag}", built.name, built.tag)
    image = images.push_stage_image(settings, built)
    assert image.pushed
    facts = engine.builder.find(image.pull_ref)
    assert facts is not None
    assert facts["Id"] == built.digest, "what was built is pushed, whatever the tag has come to name"
    engine.api.remove_image(f"{image.name}:{image.tag}", force=True)
    assert images.is_current(settings, image, checkout)
    assert engine.builder.find(image.pull_ref) is None, "it was not pulled to find that out"
    # Who chooses another registry, or none any more, wants it built again.
    assert not images.is_current(settings.model_copy(update={"registry": ""}), image, checkout)
    assert not images.is_current(settings.model_copy(update={"registry": "r.org"}), image, checkout)
    gone = image.model_copy(update={"digest": "sha256:" + "0" * 64})
    assert not images.is_current(settings, gone, checkout)
    engine.registry.kill()
    with pytest.raises(UnavailableError, match="does not answer"):
        images.is_current(settings, image, checkout)
    engine.registry.start()
