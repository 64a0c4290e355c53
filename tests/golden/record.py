"""Record the golden numbers anew, or compare those of two versions of the code.

    python tests/golden/record.py FOLDER [SUBJECT ...]    write FOLDER/SUBJECT.json
    python tests/golden/record.py --compare OLD NEW       every number that differs; exit code 1

A change that must not change a number: record with the old commit and with the new tree on one
machine, and compare. They are equal to the last bit, or the difference has a reason. A change that
is meant to: record into ``tests/golden/numbers`` in a commit of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ONE_KIND = {
    "OMP_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
"""Wider vector instructions round otherwise, which decides near ties of a matching."""
for _key, _value in ONE_KIND.items():
    os.environ.setdefault(_key, _value)
sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "platform")]
sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

NUMBERS = Path(__file__).resolve().parent / "numbers"


def differences(
    expected: Any, found: Any, tolerance: float, place: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Where two trees of numbers differ by more than ``tolerance`` times max(1, |expected|)."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in expected | found:
            inside = expected.get(key, "nothing"), found.get(key, "nothing")
            yield from differences(*inside, tolerance, f"{place}/{key}")
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for index, inside in enumerate(zip(expected, found, strict=True)):
            yield from differences(*inside, tolerance, f"{place}/{index}")
    elif isinstance(expected, float) and isinstance(found, int | float):
        if not math.isclose(expected, found, rel_tol=0, abs_tol=tolerance * max(1, abs(expected))):
            yield place, expected, found
    elif expected != found:
        yield place, expected, found


def instructions() -> str:
    """The vector instructions that PyTorch computes with on this processor."""
    import torch

    return torch.backends.cpu.get_cpu_capability()


def record(folder: Path, names: list[str]) -> None:
    """Write the numbers of some subjects, all without a name."""
    from golden.subjects import SUBJECTS

    folder.mkdir(parents=True, exist_ok=True)
    for name in names or SUBJECTS:
        with tempfile.TemporaryDirectory() as temporary:
            numbers = SUBJECTS[name](Path(temporary))
        (folder / f"{name}.json").write_text(json.dumps(numbers, indent=0) + "\n")
        print(f"{folder / name}.json", file=sys.stderr)
    (folder / "instructions.txt").write_text(f"{instructions()}\n")


def compare(old: Path, new: Path, tolerance: float) -> int:
    """Print what differs; the number of differences."""
    count = 0
    for file in sorted(new.glob("*.json")):
        pair = (json.loads((folder / file.name).read_text()) for folder in (old, new))
        for place, before, after in differences(*pair, tolerance):
            count += 1
            print(f"{file.stem}{place}: {before!r} became {after!r}")
    print(f"{count} differences beyond {tolerance:g}")
    return count


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=NUMBERS)
    parser.add_argument("subjects", nargs="*", help="all without one")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"))
    parser.add_argument("--tolerance", type=float, default=0.0)
    given = parser.parse_args()
    if given.compare:
        return 1 if compare(*given.compare, given.tolerance) else 0
    record(given.folder, given.subjects)
    return 0


if __name__ == "__main__":
    sys.exit(_main())
