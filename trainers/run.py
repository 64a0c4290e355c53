"""Train: ``python trainers/run.py [RECIPE] [--set KEY=VALUE ...] [--dry-run] [--resume NAME]``.

Without a recipe, the demonstration. ``--help`` says more.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

if __name__ == "__main__":
    if find_spec("d3etr") is None:  # not installed: take the checkout that this file is in
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "platform"))
    from d3etr.cli import program

    program(["train", *sys.argv[1:]])
