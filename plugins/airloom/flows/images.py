"""The images that stages run from: runtimes, which change rarely, and stage images, one for each commit."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from airloom.contract import CodePin, ImageRef, Runner
from airloom.contract.digest import sha256_file, sha256_json
from airloom.errors import BuildFailedError, ConfigError
from airloom.flows.environment import contract_digest
from airloom.settings import Settings
from airloom.spec.stage_repo import Runtime, StageRepo

if TYPE_CHECKING:
    from airloom.hooks.image_builder import ImageBuilder

RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)
BASE = "base"
RUNTIME_LABEL = "airloom.runtime"
COMMIT_LABEL = "org.opencontainers.image.revision"
_TAG_CHARACTERS = 12

Progress = Callable[[str], None]


def makes_images(settings: Settings) -> bool:
    """Whether builds of this installation make images: some stage of it runs in containers."""
    if settings.runner:
        return settings.runner == Runner.DOCKER
    from airloom.spec.load import load_pipelines

    return any(spec.runner is Runner.DOCKER for spec in load_pipelines(settings.configs_dir)[0])


def runtime_digest(settings: Settings, runtime: str) -> str:
    """Digest of what a runtime image is made from: equal ones hold the same packages and contract.

    Known without an engine, and the same on every machine with this version of Airloom and these settings.
    """
    project = settings.project
    with (project / "pyproject.toml").open("rb") as file:
        about = tomllib.load(file)["project"]
    packages = about["dependencies"] + about["optional-dependencies"].get(runtime, [])
    made_from = {
        "python": _python_image(settings, runtime),
        "dockerfiles": [sha256_file(_dockerfile(settings, name)) for name in dict.fromkeys((BASE, runtime))],
        "packages": sorted(packages),
        "lock": sha256_file(project / "requirements" / "lock.txt"),
        "contract": contract_digest(),
    }
    if runtime in {"training", "serving"}:
        made_from["torch"] = settings.torch_backend
    return sha256_json(made_from)


def runtime_reference(settings: Settings, runtime: str) -> tuple[str, str]:
    """Name and tag of a runtime image."""
    return image_name(settings, f"runtime-{runtime}"), runtime_digest(settings, runtime)[:_TAG_CHARACTERS]


def image_name(settings: Settings, name: str) -> str:
    """`<registry>/<namespace>/<name>`."""
    return "/".join(part for part in (settings.registry.strip("/"), settings.image_namespace, name) if part)


def ensure_runtime(
    settings: Settings, runtime: str, on_progress: Progress, *, rebuild: bool = False, pushed: bool = False
) -> str:
    """The reference of a runtime image that the engine that builds has: as it is, from the registry, or built now.

    Args:
        pushed: whether the registry is to have it too, where there is one; one that is built is pushed anyway.

    Raises:
        BuildFailedError: it cannot be built.
        ServiceError: the engine or the registry refused or did not answer.
    """
    from airloom.hooks.image_builder import ImageBuilder
    from airloom.hooks.registry import find_image

    name, tag = runtime_reference(settings, runtime)
    reference = f"{name}:{tag}"
    builder = ImageBuilder(settings)
    with _one_at_a_time(settings, f"{runtime}-{tag}"):
        if not rebuild and builder.find(reference):
            if pushed and settings.registry and not find_image(settings, name, tag):
                on_progress(f"pushing {reference}")
                builder.push(name, tag)
            return reference
        if not rebuild and find_image(settings, name, tag):
            on_progress(f"pulling {reference}")
            builder.pull(reference)
            return reference
        if runtime == BASE:
            _build_runtime(settings, builder, BASE, "", on_progress)
        elif _python_image(settings, runtime) == settings.python_image:
            base = ensure_runtime(settings, BASE, on_progress, rebuild=rebuild)
            _build_runtime(settings, builder, runtime, base, on_progress)
        else:
            # A base of its own, which is of use to nobody else and has no name in the registry.
            base = f"{settings.image_namespace}/runtime-{runtime}-base:{tag}"
            _build_runtime(settings, builder, BASE, base, on_progress, python=_python_image(settings, runtime))
            _build_runtime(settings, builder, runtime, base, on_progress)
        if settings.registry:
            on_progress(f"pushing {reference}")
            builder.push(name, tag)
    return reference


def build_stage_image(settings: Settings, pin: CodePin, checkout: Path, on_progress: Progress) -> ImageRef:
    """Build the image of a commit, which then stands in the engine alone.

    Raises:
        BuildFailedError: the repo names no runtime or has no Dockerfile, or the build failed; says why.
        ServiceError: the engine or the registry refused or did not answer.
    """
    from airloom.hooks.image_builder import ImageBuilder

    runtime = StageRepo.load(checkout).runtime
    what = f"{pin.repo}@{pin.commit[:8]}"
    if runtime is None:
        raise BuildFailedError(
            f"{what}: stages.yaml names no runtime", hint=f"add `runtime:` with one of {', '.join(RUNTIMES)}"
        )
    dockerfile = checkout / "Dockerfile"
    if not dockerfile.is_file():
        raise BuildFailedError(f"{what}: there is no Dockerfile", hint="start from another stage repo's")
    base = ensure_runtime(settings, runtime, on_progress)
    digest = runtime_digest(settings, runtime)
    name, tag = image_name(settings, pin.repo), pin.commit
    builder = ImageBuilder(settings)
    labels = {
        RUNTIME_LABEL: digest,
        COMMIT_LABEL: pin.commit,
        "org.opencontainers.image.source": f"{settings.git_page_url}/{settings.git_owner}/{pin.repo}",
    }
    if settings.build_url:
        labels["org.opencontainers.image.url"] = settings.build_url
    try:
        image = builder.build(
            context=checkout,
            dockerfile=dockerfile,
            reference=f"{name}:{tag}",
            arguments={"RUNTIME_IMAGE": builder.called(base), "COMMIT": pin.commit},
            labels=labels,
            on_progress=lambda line: on_progress(f"{what}: {line}"),
        )
    except BuildFailedError as error:
        raise BuildFailedError(f"{what}: {error.message}", hint=error.hint) from error
    facts = builder.find(image) or {}
    return ImageRef(
        name=name,
        tag=tag,
        digest=image,
        pushed=False,
        runtime=sha256_json([digest, sha256_file(dockerfile)]),
        size_bytes=int(facts.get("Size", 0)),
    )


def push_stage_image(settings: Settings, image: ImageRef) -> ImageRef:
    """Push an image of the engine to its registry, whatever its tag has come to name; as the registry holds it.

    Raises:
        ServiceError: the engine or the registry refused or did not answer.
    """
    from airloom.hooks.image_builder import ImageBuilder

    builder = ImageBuilder(settings)
    builder.tag(image.digest, image.name, image.tag)
    digest = builder.push(image.name, image.tag)
    return image.model_copy(update={"digest": digest, "pushed": True})


def is_current(settings: Settings, image: ImageRef | None, checkout: Path) -> bool:
    """Whether an image that was built before is where this installation's are, and stands on today's runtime.

    Raises:
        ServiceError: the engine or the registry refused or did not answer.
    """
    runtime = StageRepo.load(checkout).runtime
    dockerfile = checkout / "Dockerfile"
    if image is None or runtime is None or not dockerfile.is_file():
        return False
    # Since it was built, a registry may have been chosen, or another one: it is to be there.
    if image.name != image_name(settings, image.name.rpartition("/")[2]):
        return False
    if image.runtime != sha256_json([runtime_digest(settings, runtime), sha256_file(dockerfile)]):
        return False
    return is_there(settings, image)


def is_there(settings: Settings, image: ImageRef) -> bool:
    """Whether the engine or the registry has an image; raises as `is_current` does."""
    from airloom.hooks.image_builder import ImageBuilder
    from airloom.hooks.registry import find_image

    # What the engine that builds still has is of no use to the one that runs.
    elsewhere = settings.build_host and image.pushed
    if not elsewhere and ImageBuilder(settings).find(image.pull_ref) is not None:
        return True
    return image.pushed and find_image(settings, image.name, image.digest) is not None


def _build_runtime(
    settings: Settings, builder: ImageBuilder, runtime: str, base: str, on_progress: Progress, *, python: str = ""
) -> None:
    """Build one runtime; `base` is what it stands on, or for `base` itself another name to give it."""
    name, tag = runtime_reference(settings, runtime)
    reference = base if runtime == BASE and base else f"{name}:{tag}"
    on_progress(f"building {reference}; the first time takes minutes")
    arguments = {"AIRLOOM_RUNTIME": tag}
    if runtime == BASE:
        arguments["AIRLOOM_PYTHON_IMAGE"] = python or settings.python_image
    else:
        arguments |= {"BASE_IMAGE": builder.called(base), "AIRLOOM_TORCH_BACKEND": settings.torch_backend}
    with _context(settings) as context:
        builder.build(
            context=context,
            dockerfile=_dockerfile(settings, runtime),
            reference=reference,
            arguments=arguments,
            labels={RUNTIME_LABEL: runtime_digest(settings, runtime)},
            on_progress=on_progress,
        )


@contextmanager
def _context(settings: Settings) -> Iterator[Path]:
    """A folder with what the runtimes' Dockerfiles copy: nothing of the platform but the contract."""
    import airloom

    package = Path(airloom.__file__).parent
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="images-", dir=settings.run_dir) as folder:
        context = Path(folder)
        target = context / "package" / "plugins" / "airloom"
        target.mkdir(parents=True)
        for file in ("__init__.py", "errors.py"):
            shutil.copy2(package / file, target / file)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(package / "contract", target / "contract", ignore=ignored)
        shutil.copy2(settings.project / "pyproject.toml", context)
        shutil.copy2(settings.project / "pyproject.toml", context / "package")
        for text in ("README.md", "LICENSE"):  # which the package names; what they say is no part of a runtime
            (context / "package" / text).write_text("Airloom's contract with stages.\n")
        shutil.copy2(settings.project / "requirements" / "lock.txt", context)
        wheels = context / "wheels"
        wheels.mkdir()
        if settings.wheels:
            given = Path(settings.wheels)
            if not given.is_dir():
                raise ConfigError(f"AIRLOOM_WHEELS is {settings.wheels!r}, which is no folder")
            for wheel in sorted(given.glob("*.whl")):
                shutil.copy2(wheel, wheels)
        yield context


def _dockerfile(settings: Settings, runtime: str) -> Path:
    return settings.project / "images" / runtime / "Dockerfile"


def _python_image(settings: Settings, runtime: str) -> str:
    if runtime == "training" and settings.training_base_image:
        return settings.training_base_image
    return settings.python_image


@contextmanager
def _one_at_a_time(settings: Settings, name: str) -> Iterator[None]:
    """Who needs the same runtime meanwhile waits, and then finds it."""
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    with (settings.run_dir / f"image-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def images_here(settings: Settings) -> list[dict[str, Any]]:
    """The installation's images in the engine, newest first: name, tag, digest, size and time of making.

    The digest is the registry's, as receipts have it, where the image was pushed or pulled; else the engine's.
    """
    from airloom.hooks.docker_engine import connect, engine_errors

    prefix = image_name(settings, "") + "/"
    rows = []
    with engine_errors():
        for image in connect(settings).images():
            digests = dict(reference.split("@", 1) for reference in image.get("RepoDigests") or [])
            for reference in image.get("RepoTags") or []:
                name, _, tag = reference.rpartition(":")
                if name.startswith(prefix):
                    rows.append(
                        {
                            "name": name,
                            "tag": tag,
                            "digest": digests.get(name, image["Id"]),
                            "pushed": name in digests,
                            "size_bytes": image["Size"],
                            "created": image["Created"],
                            "runtime": (image.get("Labels") or {}).get(RUNTIME_LABEL, ""),
                        }
                    )
    return sorted(rows, key=lambda row: (-row["created"], row["name"]))
