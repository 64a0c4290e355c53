"""Freed memory stays in the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

MEASURE = """
import gc, sys, torch
from d3etr.data.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def held():
    blocks = [torch.ones(1_000_000) for _ in range(40)]
    return resident()

before = resident()
full = held()
gc.collect()
print((resident() - before) / (full - before))
"""
"""Prints the share of freed memory that the process still holds."""


def _share_kept(mode: str) -> float:
    command = [sys.executable, "-c", MEASURE, mode]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_waits_for_the_next_step() -> None:
    assert _share_kept("keep") > 0.9
    assert _share_kept("default") < 0.5
