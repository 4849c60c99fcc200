"""GPUs of containers: what is asked of which engine, and what an engine's refusal means."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from airloom.errors import ConfigError, UnavailableError
from airloom.hooks.docker_container import limits
from airloom.hooks.docker_gpu import gpu_refusal

RUNC: dict[str, Any] = {"Runtimes": {"io.containerd.runc.v2": {}, "runc": {}}}
NVIDIA = {"Runtimes": {"nvidia": {}, "runc": {}}}


def cdi(*names: str) -> list[dict[str, str]]:
    return [{"Source": "cdi", "ID": name} for name in names]


NAMES = ("nvidia.com/gpu=1", "nvidia.com/gpu=0", "nvidia.com/gpu=GPU-9b1c", "nvidia.com/gpu=all", "vendor.com/nic=0")
BY_UUID = ("nvidia.com/gpu=GPU-9b1c", "nvidia.com/gpu=all")


@pytest.mark.parametrize(
    ("info", "driver", "count", "devices"),
    [
        # No runtime is registered: dockerd may have NVIDIA's hook on its PATH all the same.
        (RUNC, "", 1, None),
        (NVIDIA, "", 1, None),
        ({**NVIDIA, "DiscoveredDevices": cdi(*NAMES)}, "", 1, None),
        ({**RUNC, "DiscoveredDevices": cdi(*NAMES)}, "cdi", 0, ["nvidia.com/gpu=0"]),
        ({**RUNC, "DiscoveredDevices": cdi(*BY_UUID)}, "cdi", 0, ["nvidia.com/gpu=GPU-9b1c"]),
        ({**RUNC, "DiscoveredDevices": cdi("vendor.com/nic=0")}, "", 1, None),
        ({**RUNC, "DiscoveredDevices": None}, "", 1, None),
    ],
)
def test_what_is_asked_of_an_engine(info: dict[str, Any], driver: str, count: int, devices: list[str] | None) -> None:
    api = SimpleNamespace(info=lambda: info)
    found = limits(api, memory_bytes=None, cpus=None, shm_bytes=None, gpus=1, gpu_key="gpus")
    (request,) = found["device_requests"]
    assert request["Driver"] == driver
    assert request["Count"] == count
    assert (request["DeviceIDs"] or None) == devices
    assert request["Capabilities"] == [["gpu"]]


def test_more_gpus_than_the_engine_lists() -> None:
    api = SimpleNamespace(info=lambda: {**RUNC, "DiscoveredDevices": cdi(*NAMES)})
    with pytest.raises(ConfigError, match=r"3 GPUs are needed, but the engine has nvidia.com/gpu=0") as caught:
        limits(api, memory_bytes=None, cpus=None, shm_bytes=None, gpus=3, gpu_key="resources.gpus")
    assert "set resources.gpus: 2" in str(caught.value)


def test_the_engine_is_asked_once() -> None:
    asked: list[int] = []

    def info() -> dict[str, Any]:
        asked.append(1)
        return {**NVIDIA, "NCPU": 2}

    limits(SimpleNamespace(info=info), memory_bytes=None, cpus=8, shm_bytes=None, gpus=1, gpu_key="gpus")
    assert asked == [1]


HOOK = (
    "OCI runtime create failed: container_linux.go:380: starting container process caused: process_linux.go:545: "
    "container init caused: Running hook #0:: error running hook: exit status 1, stdout: , stderr: "
)


@pytest.mark.parametrize(
    ("said", "shown", "advice", "kind"),
    [
        (
            'could not select device driver "" with capabilities: [[gpu]]',
            'said: could not select device driver "" with',
            "install the NVIDIA container toolkit",
            ConfigError,
        ),
        ("AMD CDI spec not found", "said: AMD CDI", "install the NVIDIA container toolkit", ConfigError),
        (
            f"{HOOK}nvidia-container-cli: device error: 1: unknown device: unknown",
            "said: nvidia-container-cli: device error: 1: unknown device",
            "nvidia-smi -L",
            ConfigError,
        ),
        (
            f"{HOOK}nvidia-container-cli: initialization error: nvml error: driver/library version mismatch: unknown",
            "said: nvidia-container-cli: initialization error: nvml error",
            "an updated driver needs a restart",
            ConfigError,
        ),
        (
            f"{HOOK}nvidia-container-cli: initialization error: load library failed: libnvidia-ml.so.1: cannot open",
            "load library failed",
            "install NVIDIA's driver",
            ConfigError,
        ),
        (
            f"{HOOK}nvidia-container-cli: requirement error: unsatisfied condition: cuda>=13.0\n: unknown",
            "unsatisfied condition: cuda>=13.0",
            "newer driver",
            ConfigError,
        ),
        (
            f"{HOOK}nvidia-container-cli: ldcache error: process /sbin/ldconfig terminated with signal 9: unknown",
            "terminated with signal 9",
            "nvidia-smi",
            UnavailableError,
        ),
        (
            "CDI device injection failed: unresolvable CDI devices nvidia.com/gpu=3",
            "unresolvable CDI devices nvidia.com/gpu=3",
            "nvidia-ctk cdi generate",
            ConfigError,
        ),
        (
            'cannot retrieve OCI runtime error: exec: "nvidia-container-runtime": executable file not found in $PATH',
            "executable file not found",
            "install the NVIDIA container toolkit",
            ConfigError,
        ),
    ],
)
def test_what_a_refusal_means(said: str, shown: str, advice: str, kind: type[Exception]) -> None:
    found = gpu_refusal(said, RUNC, "1 GPU is needed", "gpus")
    assert type(found) is kind
    assert str(found).startswith("1 GPU is needed, but the engine (runtimes: runc) said: ")
    assert shown in str(found)
    assert advice in str(found)
    assert "or set gpus: 0" in str(found)


@pytest.mark.parametrize("said", ['exec: "/nothing": no such file or directory: unknown', "unknown device", ""])
def test_another_reason_is_not_taken_for_a_refusal(said: str) -> None:
    assert gpu_refusal(said, RUNC, "1 GPU is needed", "gpus") is None
