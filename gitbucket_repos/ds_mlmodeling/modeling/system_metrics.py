"""What a training uses of its machine, under the names that MLflow's system metrics page shows."""

from __future__ import annotations

import psutil
import torch


class SystemMetrics:
    """Reads this process's use; the first reading of the processor counts from the construction."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._process.cpu_percent()

    def read(self) -> dict[str, float]:
        """Percent of one processor, megabytes of resident memory, and megabytes on the GPU where there is one."""
        found = {
            "system/cpu_utilization_percentage": self._process.cpu_percent(),
            "system/process_memory_megabytes": self._process.memory_info().rss / 1e6,
            "system/system_memory_usage_percentage": psutil.virtual_memory().percent,
        }
        if torch.cuda.is_available():
            found["system/gpu_0_memory_usage_megabytes"] = torch.cuda.memory_reserved() / 1e6
        return found
