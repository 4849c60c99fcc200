"""Copies of all external images in the installation's registry, for networks without internet."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from airloom.errors import AirloomError, ConfigError
from airloom.settings import Settings

_SUFFIX = "_IMAGE"


def external_images(settings: Settings) -> dict[str, str]:
    """Variable -> image, for every image in `.env` and `.env.local` that Airloom does not build itself."""
    from dotenv import dotenv_values

    found: dict[str, str] = {}
    for name in (".env", ".env.local"):
        path = settings.project / name
        if path.exists():
            values = dotenv_values(path)
            found |= {key: value for key, value in values.items() if key.endswith(_SUFFIX) and value}
    return {key: value for key, value in sorted(found.items()) if not value.startswith("airloom/")}


def mirrored_name(registry: str, reference: str) -> str:
    """What an image is called in the registry: its own registry's host gives way, path and tag stay.

    >>> mirrored_name("127.0.0.1:5050", "quay.io/minio/minio:1")
    '127.0.0.1:5050/minio/minio:1'
    >>> mirrored_name("127.0.0.1:5050", "mysql:8.4.11")
    '127.0.0.1:5050/library/mysql:8.4.11'
    """
    first, _, rest = reference.partition("/")
    if rest and ("." in first or ":" in first or first == "localhost"):
        return f"{registry}/{rest}"
    return f"{registry}/{reference if rest else f'library/{reference}'}"


def mirror(
    settings: Settings, images: Mapping[str, str], on_progress: Callable[[str], None]
) -> tuple[dict[str, str], list[str]]:
    """Pull each image and push it to AIRLOOM_REGISTRY. One that fails keeps no other from being copied.

    Returns:
        variable -> reference by digest in the registry; one sentence for each image that was not copied.

    Raises:
        ConfigError: the installation has no registry.
    """
    from airloom.hooks.engine_images import EngineImages

    if not settings.registry:
        raise ConfigError("AIRLOOM_REGISTRY is empty, so there is nowhere to copy to", hint="set it in .env.local")
    engine = EngineImages(settings)
    copied: dict[str, str] = {}
    failed: list[str] = []
    by_image: dict[str, str] = {}
    for variable, reference in images.items():
        if reference not in by_image:
            name, _, tag = mirrored_name(settings.registry, reference.partition("@")[0]).rpartition(":")
            on_progress(f"{reference} -> {name}:{tag}")
            try:
                if engine.find(reference) is None:
                    engine.pull(reference)
                engine.tag(reference, name, tag)
                by_image[reference] = f"{name}:{tag}@{engine.push(name, tag)}"
            except AirloomError as error:
                failed.append(f"{variable}: {error.message}")
                continue
        copied[variable] = by_image[reference]
    return copied, failed
