"""``python -m d3etr.tracking RUN_DIR...``: send to MLflow what it missed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from d3etr.errors import UserError
from d3etr.tracking.runs import replay


def main() -> int:
    """Replay each run folder; 0 if MLflow has everything, 2 if not."""
    parser = argparse.ArgumentParser(prog="python -m d3etr.tracking", description=__doc__)
    parser.add_argument("run_dir", type=Path, nargs="+", help="folder of a run that ended")
    missing = [_replay(folder) for folder in parser.parse_args().run_dir]
    return 2 if any(missing) else 0


def _replay(folder: Path) -> bool:
    """Whether something is still missing."""
    try:
        missing = replay(folder, report=print)
    except UserError as error:
        missing = str(error)
    if missing is not None:
        print(missing, file=sys.stderr)
    return missing is not None


if __name__ == "__main__":
    sys.exit(main())
