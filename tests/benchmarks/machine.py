"""What a benchmark ran on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "torchvision", "numpy", "scipy", "ray", "mlflow", "transformers")


def machine() -> dict[str, Any]:
    """Processor, memory, GPU, versions, commit and how busy the machine is."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "load_average": [round(value, 1) for value in os.getloadavg()],
    }


def described(found: dict[str, Any]) -> str:
    """One line for people."""
    parts = [f"{found['processor']}, {found['cores']} cores, {found['memory_gib']} GiB"]
    parts += [found["gpu"]] if found["gpu"] else []
    parts += [f"{name} {found['packages'][name]}" for name in ("torch", "torchvision")]
    parts.append(f"commit {(found['commit'] or 'unknown')[:9]}{' + changes' * found['changed']}")
    parts.append(f"load average at the start {found['load_average'][0]}")
    return " · ".join(parts)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        line = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
