"""GPUs of containers: how they are asked for, and what an engine means that refuses them.

Which driver an engine has for GPUs stands nowhere in its API: NVIDIA's hook need only be on dockerd's PATH. So the
engine decides when a container starts, and nothing is refused before but what surely cannot work.
"""

from __future__ import annotations

import io
import tarfile
from contextlib import suppress
from typing import Any
from uuid import uuid4

from airloom.errors import AirloomError, ConfigError, UnavailableError

_CDI_KIND = "nvidia.com/gpu="
_SAID_CHARACTERS = 300
_TOOL = "nvidia-container-cli"
_INSTALL = "install the NVIDIA container toolkit on dockerd's machine and PATH, and restart dockerd"
_LIST = "`nvidia-ctk cdi list` on the engine's machine shows what there is"
_SHOW = "`nvidia-smi` on the engine's machine says more"
# What engine and toolkit say, what to do, and whether a person has to do it; the first that is found counts.
_REFUSALS = (
    ("could not select device driver", _INSTALL, True),
    ("AMD CDI spec not found", _INSTALL, True),  # Docker 29 takes any GPU for AMD's where it lacks NVIDIA's hook
    ("unresolvable CDI devices", f"{_LIST}; `nvidia-ctk cdi generate` renews the list", True),
    ("CDI device injection failed", _LIST, True),
    (f"{_TOOL}: device error", "`nvidia-smi -L` on the engine's machine shows which GPUs there are", True),
    (f"{_TOOL}: requirement error", "the image wants a newer driver: update it on the engine's machine", True),
    ("nvml error", f"{_SHOW}; an updated driver needs a restart of it", True),
    ("libnvidia-ml.so", "install NVIDIA's driver on the engine's machine", True),
    (_TOOL, _SHOW, False),
    ("nvidia-container-runtime", _INSTALL, True),
)


def gpu_requests(info: dict[str, Any], gpus: int, gpu_key: str) -> list[Any] | None:
    """What a container's configuration takes; None for no GPUs.

    Args:
        info: what the engine says of itself.
        gpu_key: what people set the number of GPUs by, for the error.

    Raises:
        ConfigError: the engine knows its GPUs, and has fewer.
    """
    from docker.types import DeviceRequest

    if not gpus:
        return None
    devices = _cdi_devices(info)
    if not devices or "nvidia" in (info.get("Runtimes") or {}):
        return [DeviceRequest(count=gpus, capabilities=[["gpu"]])]
    # Only named devices: engines before 29 don't find them by a number.
    if gpus > len(devices):
        raise ConfigError(
            f"{gpus_needed(gpus)}, but the engine has {', '.join(devices)}", hint=f"set {gpu_key}: {len(devices)}"
        )
    return [DeviceRequest(driver="cdi", device_ids=devices[:gpus], capabilities=[["gpu"]])]


def gpus_needed(gpus: int) -> str:
    return "1 GPU is needed" if gpus == 1 else f"{gpus} GPUs are needed"


def gpu_refusal(said: str, info: dict[str, Any], wanted: str, gpu_key: str) -> AirloomError | None:
    """The error for a container that the engine did not start for its GPUs; None where that was not the reason.

    Args:
        said: by the engine.
        wanted: how the message begins.
        gpu_key: as for `gpu_requests`; empty: nobody sets it.
    """
    for sign, hint, for_people in _REFUSALS:
        place = said.find(sign)
        if place < 0:
            continue
        begin = min(at for at in (place, said.find(_TOOL)) if at >= 0)
        words = " ".join(said[begin:].split())[:_SAID_CHARACTERS]
        runtimes = ", ".join(name for name in info.get("Runtimes") or {} if not name.startswith("io.containerd."))
        message = f"{wanted}, but the engine (runtimes: {runtimes}) said: {words}"
        kind = ConfigError if for_people else UnavailableError
        return kind(message, hint=f"{hint}; or set {gpu_key}: 0" if gpu_key else hint)
    return None


def probe_gpus(api: Any, driver: str = "") -> AirloomError | None:
    """Have the engine start an empty container with all its GPUs: what it says against them, or None.

    The container has no program to run, so that its start fails anyhow, but for that reason.
    """
    from docker.errors import APIError
    from docker.types import DeviceRequest

    buffer, name = io.BytesIO(), "airloom-probe"
    with tarfile.open(fileobj=buffer, mode="w"):
        pass
    tag, container = uuid4().hex, ""
    api.import_image_from_data(buffer.getvalue(), repository=name, tag=tag)
    try:
        request = DeviceRequest(driver=driver, count=-1, capabilities=[["gpu"]])
        host = api.create_host_config(device_requests=[request], network_mode="none")
        container = str(api.create_container(f"{name}:{tag}", command=["/nothing"], host_config=host)["Id"])
        api.start(container)
    except APIError as error:
        return gpu_refusal(str(error.explanation or error), api.info(), "GPUs are needed", "")
    finally:
        with suppress(APIError):
            api.remove_container(container, force=True)
        with suppress(APIError):
            api.remove_image(f"{name}:{tag}", force=True)
    return None


def _cdi_devices(info: dict[str, Any]) -> list[str]:
    """The GPUs that the engine lists, each once; they have names by number, by UUID, or both, and one for all."""
    found = [str(device.get("ID", "")) for device in info.get("DiscoveredDevices") or []]
    names = [name.removeprefix(_CDI_KIND) for name in found if name.startswith(_CDI_KIND) and name != f"{_CDI_KIND}all"]
    numbers = sorted((name for name in names if name.isdigit()), key=int)
    return [f"{_CDI_KIND}{name}" for name in numbers or names]
