"""Compare: ``python trainers/study.py STUDY [--parallel N]``.

Trains every row of a study with every seed, two at a time, and writes its table. ``--help``
says more.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

if __name__ == "__main__":
    if find_spec("d3etr") is None:  # not installed: take the checkout that this file is in
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "platform"))
    from d3etr.cli import main

    sys.exit(main(["study", *sys.argv[1:]]))
