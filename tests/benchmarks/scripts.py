"""Runs the repository's scripts as a user does, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

from benchmarks.machine import ROOT
from d3etr.launch.ray_environment import package_environment


def run_script(script: str, *arguments: str) -> None:
    """Run a script of the repository, with a Ray of its own where it starts one.

    Raises:
        CalledProcessError: it failed; what it said has been shown.
    """
    settings = os.environ | package_environment() | {"RAY_ADDRESS": "local"}
    line = [sys.executable, str(ROOT / script), *arguments, "--quiet"]
    done = subprocess.run(line, cwd=ROOT, env=settings, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr, flush=True)
    done.check_returncode()
