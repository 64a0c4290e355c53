"""The notebook's cells, in their order, with shorter training."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FEW = {"digit_scenes": {"train_images": 16, "validation_images": 8, "test_images": 8}}


def cells(notebook: Path) -> list[str]:
    """The sources of its code cells."""
    found = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


def as_program(sources: list[str]) -> str:
    """What the cells do, one after the other, in a notebook's folder."""
    lines = ["import subprocess, matplotlib", "matplotlib.use('agg')"]
    for source in sources:
        magic, _, rest = source.partition("\n")
        if magic == "%%sh":
            lines.append(f"subprocess.run({rest!r}, shell=True, check=True)")
        else:
            lines.append(source)
    return "\n".join(lines)


def test_cells_of_a_shell_run_as_commands() -> None:
    program = as_program(["x = 1", "%%sh\nls a\nls b"])
    assert program.splitlines()[2:] == [
        "x = 1",
        "subprocess.run('ls a\\nls b', shell=True, check=True)",
    ]


@pytest.mark.slow
def test_the_tour_runs_as_it_is_written(repository: Path, tmp_path: Path) -> None:
    program = as_program(cells(repository / "docs" / "tour.ipynb"))
    for long, short in {
        "STEPS = 300": "STEPS = 4",
        '{"steps": STEPS}': '{"steps": STEPS, "schedule": {"warmup_steps": 1}}',
        'tracking={"enabled": False}': f'tracking={{"enabled": False}}, data={FEW}',
        '"../trainers': f'"{repository}/trainers',
        "d3etr ": f"{sys.executable} -m d3etr ",
    }.items():
        assert long in program
        program = program.replace(long, short)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "student.onnx").is_file()
