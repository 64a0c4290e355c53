"""The guide's commands, word for word and in their order, with shorter training."""

import os
import re
import subprocess
import sys
from pathlib import Path

import guide_picture
import numpy as np
import pytest
from PIL import Image

SHORT = (
    *("optimisation.steps=4", "optimisation.schedule.warmup_steps=1", "data.workers=0"),
    *("student.detector.queries=12", "evaluation.every_steps=4", "tracking.enabled=false"),
    "run.checkpoint_every_steps=4",
)
SHORTER = f"""#!/bin/sh
case "$1" in
  train) set -- "$@" --launcher local {" ".join(f"--set {text}" for text in SHORT)} ;;
  benchmark) set -- "$@" --rounds 2 ;;
esac
exec "{sys.executable}" -m d3etr "$@"
"""
NOT_RUN = re.compile(
    r"^## [^\n]*\n\n<!-- not run by tests/test_guide\.py.*?(?=^## |\Z)", re.M | re.S
)


def script(guide: str) -> str:
    """Blocks of sh as they are, blocks of Python as programs of their own."""
    lines = ["set -euo pipefail"]
    for language, block in re.findall(r"```(sh|python)\n(.*?)```", NOT_RUN.sub("", guide), re.S):
        lines.append(block if language == "sh" else f"python - <<'END'\n{block}END")
    return "\n".join(lines)


def test_what_is_marked_is_left_out() -> None:
    marked = "## Serve\n\n<!-- not run by tests/test_guide.py: x -->\n```sh\nb\n```\n"
    text = f"```sh\na\n```\n{marked}## Next\n```sh\nc\n```\n"
    assert script(text).split() == ["set", "-euo", "pipefail", "a", "c"]


def test_the_pictures_are_what_the_code_draws(repository: Path, tmp_path: Path) -> None:
    guide_picture.main(tmp_path)
    drawn = sorted(tmp_path.glob("*.png"))
    kept = repository / "docs" / "images"
    assert [file.name for file in drawn] == sorted(file.name for file in kept.glob("guide-*.png"))
    for file in drawn:
        assert f"(images/{file.name})" in (repository / "docs" / "guide.md").read_text()
        assert (kept / file.name).stat().st_size <= guide_picture.MOST_BYTES
        ours, theirs = (
            np.asarray(Image.open(place / file.name).convert("RGB"), float)
            for place in (tmp_path, kept)
        )
        assert np.abs(ours - theirs).mean() < 3, "python tests/guide_picture.py docs/images"


@pytest.mark.slow
def test_the_guide_runs_as_it_is_written(repository: Path, tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in {
        "d3etr": SHORTER,
        "python": f'#!/bin/sh\nexec "{sys.executable}" "$@"\n',
    }.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    paths = f"{programs}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": paths, "PYTHONPATH": str(repository / "platform")}
    done = subprocess.run(
        ["bash", "-c", script((repository / "docs" / "guide.md").read_text())],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    project = tmp_path / "shop-project"
    assert (project / "student.onnx").is_file()
    assert len([*(project / "drawn").glob("*.png")]) == 40
    assert all(name in done.stdout for name in ("plain", "inherited", "distilled", "student.onnx"))
