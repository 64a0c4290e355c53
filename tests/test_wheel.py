"""The wheel, installed where no checkout is: recipes, sweeps and weights are inside."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import d3etr

BUILT_FROM = (
    "LICENSE",
    "README.md",
    "platform",
    "pyproject.toml",
    "setup.py",
    "sweeps",
    "trainers",
)
SMALL = (
    "data.digit_scenes.train_images=16",
    "data.digit_scenes.validation_images=40",
    "data.digit_scenes.test_images=8",
    "optimisation.steps=2",
    "optimisation.schedule.warmup_steps=1",
    "evaluation.every_steps=null",
    "tracking.figures=false",
)
WATCH = """
import os, sys

def watch(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if path.startswith({repository!r} + os.sep) and not path.startswith({packages!r}):
            with open({log!r}, "a") as log:
                log.write(path + "\\n")

sys.addaudithook(watch)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """Built from a copy, so that nothing is left in the checkout."""
    pytest.importorskip("pip", reason="pip builds the wheel")
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    unneeded = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in BUILT_FROM:
        source = repository / name
        if source.is_dir():
            shutil.copytree(source, folder / "source" / name, ignore=unneeded)
        else:
            shutil.copy(source, folder / "source" / name)
    pip("wheel", "--no-build-isolation", "--wheel-dir", folder, folder / "source")
    (built,) = folder.glob("*.whl")
    return built


def pip(command: str, *arguments: str | Path) -> None:
    """Installs and builds from this machine alone."""
    given = [command, "--no-index", "--no-deps", "--disable-pip-version-check", *arguments]
    subprocess.run([sys.executable, "-m", "pip", *given], check=True)


class Installation:
    """A fresh environment that has d3etr from the wheel and this one's other packages."""

    def __init__(self, folder: Path, wheel: Path, repository: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        (packages,) = folder.glob("lib/python*/site-packages")
        pip("install", "--target", packages, wheel)
        others = [
            path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")
        ]
        (packages / "others.pth").write_text("\n".join(others))
        self.log = folder / "read-from-the-repository"
        # This environment may lie in the repository; whatever lies in it is no part of that.
        own = os.path.realpath(sys.prefix)
        watch = WATCH.format(repository=str(repository), packages=own, log=str(self.log))
        (packages / "sitecustomize.py").write_text(watch)
        self.packages = packages
        self.python = folder / "bin" / "python"

    def run(self, where: Path, *arguments: str) -> str:
        """What a command prints."""
        kept = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [self.python, *arguments], cwd=where, env=kept, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(
    tmp_path_factory: pytest.TempPathFactory, wheel: Path, repository: Path
) -> Installation:
    return Installation(tmp_path_factory.mktemp("fresh"), wheel, repository)


def sets() -> list[str]:
    return [part for value in SMALL for part in ("--set", value)]


@pytest.mark.slow
def test_the_wheel_holds_what_is_shipped_and_nothing_else(wheel: Path, repository: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        about = archive.read(metadata).decode()
        licences = [name for name in archive.namelist() if name.endswith("/LICENSE")]
    recipes = {
        f"d3etr/shipped/{path.relative_to(repository).as_posix()}"
        for pattern in ("trainers/recipes/**/*.yaml", "sweeps/*.yaml")
        for path in repository.glob(pattern)
    }
    assert recipes <= inside
    others = {name for name in inside if name.startswith("d3etr/shipped/")} - recipes
    assert {Path(name).name for name in others} == {
        "README.md",
        "digits-student-backbone.safetensors",
        "digits-teacher.safetensors",
    }
    assert {name.split("/")[0] for name in inside} == {"d3etr"}
    assert "d3etr/py.typed" in inside
    assert "License-Expression: Apache-2.0" in about
    assert f"Version: {d3etr.__version__}" in about
    assert len(licences) == 1


@pytest.mark.slow
def test_recipes_and_the_demonstration_run_without_a_checkout(
    installed: Installation, tmp_path: Path, repository: Path
) -> None:
    licence = repository / "LICENSE"
    installed.run(tmp_path, "-c", f"open({str(licence)!r})")
    assert installed.log.read_text().splitlines() == [str(licence)], "what is read is watched"
    installed.log.unlink()

    place = installed.run(tmp_path, "-c", "import d3etr; print(d3etr.__file__)")
    assert Path(place.strip()).is_relative_to(installed.packages)
    local = ["--launcher", "local"]
    command = ["-m", "d3etr", "train", "digits/plain", *local, *sets()]
    assert "finished" in installed.run(tmp_path, *command, "--set", "tracking.enabled=false")
    (run,) = (tmp_path / "runs").glob("digits-plain-*")
    weights = "shipped/trainers/weights/digits-student-backbone.safetensors"
    assert str(installed.packages / "d3etr" / weights) in (run / "config.yaml").read_text()

    table = installed.run(tmp_path, "-m", "d3etr", "demo", *local, *sets())
    assert "D3ETR student" in table
    assert "d3etr train own/teacher" in table
    trials = installed.run(tmp_path, "-m", "d3etr", "sweep", "matching_ratios", "--dry-run")
    assert "matching-ratios" in trials
    read = installed.log.read_text() if installed.log.exists() else ""
    assert not read, f"read from the checkout:\n{read}"
