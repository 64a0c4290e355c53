"""A package of somebody else with a method, a detector, a format and a hook: the guide's."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow


def blocks(guide: str) -> dict[str, str]:
    """The code blocks of the guide by the file name in their first line; ``sh`` is the commands."""
    found = {}
    for kind, text in re.findall(r"```(\w+)\n(.*?)```", guide, re.S):
        first, _, rest = text.partition("\n")
        found["sh" if kind == "sh" else first.removeprefix("# ")] = text if kind == "sh" else rest
    return found


def write_pictures(folder: Path) -> None:
    """Bright boxes on dark pictures, two classes, in the guide's format."""
    generator = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for split, count in (("train", 6), ("validation", 3)):
        lines = []
        for index in range(count):
            pixels = generator.integers(0, 60, (48, 64, 3), dtype=np.uint8)
            name, x, y = f"{split}{index}.png", 4 + 3 * index, 6 + 2 * index
            pixels[y : y + 16, x : x + 20] = (250, 80 * (index % 2), 40)
            Image.fromarray(pixels).save(folder / "pictures" / name)
            lines.append(f"{name} 64 48 {'cat' if index % 2 else 'dog'} {x} {y} 20 16")
        (folder / f"{split}.txt").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> tuple[Path, str]:
    """A folder with the guide's files, and a path on which its package is installed."""
    folder = tmp_path_factory.mktemp("stranger")
    files = blocks((repository / "docs/extending.md").read_text(encoding="utf-8"))
    package, site = folder / "package", folder / "site"
    package.mkdir()
    for name, text in files.items():
        if name != "sh":
            (package / name).write_text(text, encoding="utf-8")
    (package / "recipe.yaml").rename(folder / "recipe.yaml")
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation")
    where = ("--no-index", "--disable-pip-version-check", "--target", str(site), str(package))
    subprocess.run([sys.executable, *install, *where], check=True, cwd=folder)
    write_pictures(folder)
    (folder / "commands.sh").write_text(files["sh"], encoding="utf-8")
    return folder, os.pathsep.join([str(site), str(repository / "platform")])


def test_the_guides_commands_train_and_evaluate(installed: tuple[Path, str]) -> None:
    folder, path = installed
    # The command as installed; in this process's environment, without Ray and MLflow.
    (folder / "bin").mkdir()
    command = folder / "bin" / "d3etr"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m d3etr "$@"\n')
    command.chmod(0o755)
    train = "d3etr train recipe.yaml"
    commands = (folder / "commands.sh").read_text(encoding="utf-8")
    assert commands.count(train) == 2
    commands = commands.replace(train, f"{train} --launcher local --set tracking.enabled=false")
    environment = os.environ | {
        "PYTHONPATH": path,
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["sh", "-e", "-c", commands],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (taught,) = folder.glob("runs/taught-*")
    assert (taught / "my_log.txt").read_text().splitlines()[-1] == "end 4"
    journal = [json.loads(line) for line in (taught / "journal.jsonl").read_text().splitlines()]
    losses = [
        record["metrics"]["train/adaptive/l2"] for record in journal if record["kind"] == "step"
    ]
    assert len(losses) == 4 and all(loss > 0 for loss in losses)
    assert "mAP" in done.stdout


def test_their_keys_are_explained_and_checked(installed: tuple[Path, str]) -> None:
    folder, path = installed
    environment = os.environ | {"PYTHONPATH": path}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "d3etr", *arguments]
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )

    explained = run("explain", "student.detector.start_size")
    assert explained.returncode == 0 and "untrained boxes" in explained.stdout
    wrong = run("train", "recipe.yaml", "--dry-run", "--set", "student.detector.start_sise=2")
    assert wrong.returncode != 0 and "start_size" in wrong.stderr
    foreign = run("train", "recipe.yaml", "--dry-run", "--set", "student.detector.levels=2")
    assert "no effect on detector 'wide_detr', only on 'deformable_detr'" in foreign.stderr
