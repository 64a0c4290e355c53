"""The demonstration's three runs: same data, same seed, same number of steps for the students."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from d3etr.config.load import load_config
from d3etr.config.tree import Config
from d3etr.data.digit_scenes import write_digit_scenes
from d3etr.data.progress import Progress
from d3etr.demo.shipped import measure_shipped
from d3etr.errors import UserError
from d3etr.launch.api import LauncherName, launch
from d3etr.launch.driver import RunResult
from d3etr.launch.task import Task, train

RECIPES = Path("trainers", "recipes", "digits")
TEACHER_WEIGHTS = Path("trainers", "weights", "digits-teacher.safetensors")


@dataclass(frozen=True)
class DemoRun:
    """One of the three.

    Attributes:
        title: for people.
        config: what was run.
        result: what came out.
    """

    title: str
    config: Config
    result: RunResult

    def metric(self, name: str) -> float | None:
        """A COCO metric on the test split, a fraction; None if there is none."""
        return self.result.metrics.get(f"test/{name}")


def run_demo(
    *,
    train_teacher: bool = False,
    launcher: LauncherName = "ray",
    overrides: Sequence[str] = (),
    stage: Callable[[str], None] = lambda text: None,
) -> list[DemoRun]:
    """Teacher, plain student, D3ETR student; runs that are finished already are not repeated.

    Args:
        train_teacher: train the teacher instead of measuring the shipped one.
        launcher: who trains.
        overrides: ``a.b=c`` texts for all three.
        stage: takes a sentence about what comes next.

    Returns:
        The three runs in that order.

    Raises:
        UserError: recipes or weights are not where they should be, or a run cannot start.
    """
    root = project_root()
    stage(f"1/3  teacher: {'training' if train_teacher else 'measuring the shipped weights'}")
    teacher = _teacher(root, train_teacher, launcher, overrides)
    stage("2/3  plain student")
    plain = _run("plain student", _config(root, "plain", overrides), launcher)
    stage("3/3  D3ETR student")
    taught = [*overrides, f"teacher.weights={teacher.result.weights}"]
    distilled = _run("D3ETR student", _config(root, "d3etr", taught), launcher)
    return [teacher, plain, distilled]


def draw_scenes(overrides: Sequence[str] = (), progress: Progress | None = None) -> None:
    """Write the embedded data, if it is not there, before a run would do it without a word."""
    scenes = _config(project_root(), "teacher", overrides).data.digit_scenes
    assert scenes is not None
    write_digit_scenes(scenes, progress)


def _teacher(
    root: Path, to_train: bool, launcher: LauncherName, overrides: Sequence[str]
) -> DemoRun:
    """Train the teacher, or measure the shipped one; both have a run folder of their own."""
    if to_train:
        return _run("teacher", _config(root, "teacher", overrides), launcher)
    config = _config(root, "teacher", [*overrides, "run.name=digits-teacher-shipped"])
    # No cluster has to start for a few seconds of measuring.
    measure = partial(measure_shipped, weights=root / TEACHER_WEIGHTS)
    return _run("teacher", config, "local", measure)


def project_root() -> Path:
    """The folder that holds ``trainers/``: the working directory, or where this code lies.

    Raises:
        UserError: d3etr was installed without its recipes.
    """
    for root in (Path(), Path(__file__).resolve().parents[3]):
        if (root / RECIPES).is_dir():
            return root
    raise UserError(
        f"{RECIPES} is not here: the demonstration needs the project's folder (recipes and the "
        "teacher's weights). Change to it, or clone the project."
    )


def _run(title: str, config: Config, launcher: LauncherName, task: Task = train) -> DemoRun:
    return DemoRun(title, config, launch(config, launcher=launcher, task=task))


def _config(root: Path, recipe: str, overrides: Sequence[str]) -> Config:
    """A recipe whose weights are found from any working directory."""
    config = load_config(root / RECIPES / f"{recipe}.yaml", overrides)
    weights = config.student.backbone_weights
    if not isinstance(weights, Path) or weights.exists():
        return config
    return load_config(
        root / RECIPES / f"{recipe}.yaml",
        [*overrides, f"student.backbone_weights={root / weights}"],
    )
