"""Sweep: ``python sweeps/run.py SWEEP [--set KEY=VALUE ...] [--dry-run] [--resume NAME]``.

Trains many settings of one recipe on Ray Tune and writes a table. ``--help`` says more.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

if __name__ == "__main__":
    if find_spec("d3etr") is None:  # not installed: take the checkout that this file is in
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "platform"))
    from d3etr.cli import program

    program(["sweep", *sys.argv[1:]])
