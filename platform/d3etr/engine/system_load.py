"""How busy the machine of the first worker is, under the names that MLflow's pages know."""

from __future__ import annotations

import time
from contextlib import suppress

import psutil  # type: ignore[import-untyped]
import torch

SECONDS = 10.0
"""Between two looks, as MLflow itself does it."""
_MEGABYTE = 1e6


class SystemLoad:
    """Looks at processors, memory and the device of training, at most every ``SECONDS``.

    Args:
        device: of training.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._looked = device, time.monotonic()
        psutil.cpu_percent()  # the first answer has no time to be about

    def look(self) -> dict[str, float]:
        """Metrics ``system/...`` since the last look; none where that was just now."""
        now = time.monotonic()
        if now - self._looked < SECONDS:
            return {}
        self._looked = now
        memory = psutil.virtual_memory()
        found = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MEGABYTE,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
        }
        if self._device.type == "cuda":
            found |= _gpu(self._device)
        return {f"system/{name}": value for name, value in found.items()}


def _gpu(device: torch.device) -> dict[str, float]:
    free, total = torch.cuda.mem_get_info(device)
    name = f"gpu_{device.index or 0}"
    found = {
        f"{name}_memory_usage_megabytes": (total - free) / _MEGABYTE,
        f"{name}_memory_usage_percentage": 100 * (total - free) / total,
    }
    with suppress(Exception):  # needs nvidia-ml-py, and the right to ask the driver
        found[f"{name}_utilization_percentage"] = float(torch.cuda.utilization(device))
    return found
