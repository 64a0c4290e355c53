"""Every benchmark, side by side, as ratios: ``make bench``.

    PYTHONPATH=platform:tests python -m benchmarks [NAME ...] [--output FOLDER] [--device cpu]

Each benchmark runs in a process of its own. Printed: a table for each, medians with the lowest and
highest. ``benchmarks.json`` in the output folder holds every measurement with machine, versions
and commit, ``benchmarks.md`` the tables, ``growth.svg`` how a step grows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.growth_picture import draw
from benchmarks.machine import described, machine
from benchmarks.side_by_side import Comparison, Scale
from d3etr.data.allocator import keep_freed_memory

BENCHMARKS = {
    "plain_step": "a plain training step beside Hugging Face's",
    "kinds_step": "a plain training step of RT-DETR, D-FINE and RF-DETR beside Hugging Face's",
    "distilled_step": "a D3ETR step beside a plain step and the teacher's forward pass",
    "compiled": "torch.compile for student and teacher",
    "growth": "how a D3ETR step grows with its problem",
    "matching": "ways to solve Adaptive Matching, and what matching adds to a D3ETR step",
    "evaluation": "COCO's numbers of detections beside pycocotools used plainly",
    "ray_overhead": "Ray Train beside the bare loop, and what a checkpoint costs",
    "input_pipeline": "images decoded and augmented beside a loop of PIL and torchvision",
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks", description="Benchmarks, side by side.")
    names = [*BENCHMARKS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device)
    parser.add_argument("--smoke", action="store_true", help="tiny, only to see that they work")
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - set(names))
    if unknown:
        parser.error(f"no benchmark '{unknown[0]}'; there are {', '.join(names)}")
    options.names = options.names or names
    return options


def run_here(name: str, options: argparse.Namespace) -> list[Comparison]:
    """One benchmark in this process."""
    keep_freed_memory()  # as training and loading do; all contenders gain by it
    module = import_module(f"benchmarks.{name}")
    found: list[Comparison] = module.compare(Scale.of(options.device, options.smoke))
    return found


def run_apart(name: str, options: argparse.Namespace) -> list[Comparison]:
    """One benchmark in a process of its own.

    Raises:
        CalledProcessError: it failed; its output has been shown.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        line = [sys.executable, "-m", "benchmarks", name, "--alone", str(file)]
        line += ["--device", options.device, *(["--smoke"] if options.smoke else [])]
        subprocess.run(line, check=True)
        return [Comparison(**part) for part in json.loads(file.read_text())]


def write(folder: Path, where: dict[str, Any], found: dict[str, list[Comparison]]) -> None:
    """Both files."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {name: [asdict(part) for part in parts] for name, parts in found.items()}
    content = {"command": "python -m benchmarks", "machine": where, "benchmarks": parts}
    (folder / "benchmarks.json").write_text(json.dumps(content, indent=1) + "\n")
    text = [f"# Benchmarks\n\n{described(where)}\n"]
    for name, tables in found.items():
        text.append(f"## {BENCHMARKS[name][0].upper()}{BENCHMARKS[name][1:]}\n")
        text += [part.table() for part in tables]
    (folder / "benchmarks.md").write_text("\n".join(text))
    if "growth" in found and not draw(found["growth"], folder / "growth.svg"):
        print("no growth.svg: matplotlib is not installed")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; exit code 1 when one of them failed."""
    options = parse(arguments)
    if options.alone is not None:
        found_here = run_here(options.names[0], options)
        options.alone.write_text(json.dumps([asdict(part) for part in found_here]))
        return 0
    where = machine()
    print(described(where), flush=True)
    found: dict[str, list[Comparison]] = {}
    failed = []
    for number, name in enumerate(options.names, 1):
        print(f"\n[{number}/{len(options.names)}] {name}: {BENCHMARKS[name]}", flush=True)
        begun = time.monotonic()
        try:
            found[name] = run_apart(name, options)
        except subprocess.CalledProcessError as error:
            print(f"{name} failed: {error}", file=sys.stderr, flush=True)
            failed.append(name)
            continue
        for part in found[name]:
            print(f"\n{part.table()}", end="", flush=True)
        print(f"({time.monotonic() - begun:.0f} s)", flush=True)
        write(options.output, where, found)
    if found:
        print(f"\nwritten: {options.output / 'benchmarks.json'} and benchmarks.md")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
