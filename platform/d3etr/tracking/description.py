"""How a run presents itself in MLflow: name, tags, note, params."""

from __future__ import annotations

import getpass
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import d3etr
from d3etr.config.detector import DetectorConfig
from d3etr.config.location import Url
from d3etr.config.tree import Config
from d3etr.errors import UserError
from d3etr.logs import get_logger
from d3etr.text import bare_url, redacted
from d3etr.tracking.state import read_state

logger = get_logger(__name__)

METHOD_TITLES = {"none": "plain", "d3etr": "D3ETR", "kd_detr": "KD-DETR"}
_GIT_SECONDS = 5


def title(config: Config) -> str:
    """What the run is, in two words: teacher, plain, inherited or D3ETR student.

    An inherited student is a plain one that starts from another detector's decoder.
    """
    if config.run.role == "teacher":
        return "teacher"
    method, start = config.distillation.method, config.student.initialise_from
    if method == "none" and start is not None and "decoder" in start.parts:
        return "inherited student"
    return f"{METHOD_TITLES.get(method, method)} student"


def run_name(config: Config) -> str:
    """Name in MLflow's table: the title, what the run's own name adds to it, the seed.

    ``digits-plain`` becomes ``plain student · digits · seed 0``.
    """
    return f"{recipe_name(config)} · seed {config.run.seed}"


def recipe_name(config: Config) -> str:
    """A run's name without its seed: ``plain student · digits``."""
    known = {*title(config).lower().split(), config.run.role, config.distillation.method}
    words = [word for word in re.split(r"[-_.]+", config.run.name) if word.lower() not in known]
    return " · ".join([title(config), *filter(None, ["-".join(words)])])


def params(config: Config) -> dict[str, str]:
    """The whole configuration with dotted keys; addresses lose their credentials."""
    return dict(_flatten("", config.model_dump(mode="json")))


def chosen_keys(config: Config) -> set[str]:
    """Dotted keys whose values are not their defaults."""
    return {key for key, _ in _flatten("", config.model_dump(mode="json", exclude_defaults=True))}


def tags(config: Config, run_dir: Path) -> dict[str, str]:
    """What runs are filtered and grouped by."""
    detector = config.student.detector
    named = {
        "role": config.run.role,
        "title": title(config),
        "method": config.distillation.method,
        "detector": detector.name,
        "backbone": backbone_title(detector),
        "seed": str(config.run.seed),
        "run_folder": run_dir.name,
        "mlflow.user": _user(),
        "mlflow.source.name": _program(),
        "mlflow.source.type": "LOCAL",
    }
    commit = git_commit()
    if commit:
        named |= {"git_commit": commit, "mlflow.source.git.commit": commit}
    return named | teacher_tags(config)


def teacher_tags(config: Config) -> dict[str, str]:
    """The teacher's weights and, if they lie in a run folder, the run that made them."""
    if config.teacher is None:
        return {}
    weights = config.teacher.weights
    if config.teacher.features is not None:
        return {"teacher_features": config.teacher.features.name}
    if weights is None:
        return {"teacher_detections": ", ".join(x.name for x in config.teacher.detections or ())}
    found = {"teacher_weights": weights.name}
    if isinstance(weights, Url):
        return found
    try:
        state = read_state(weights.parent)
    except UserError as error:  # what another run's folder holds stops none
        logger.warning("the teacher's run is not named: %s", error)
        return found
    if state is not None:
        found |= {"teacher_weights": weights.parent.name, "teacher_run": state.run_id}
    return found


def backbone_title(detector: DetectorConfig) -> str:
    """``resnet50``, ``resnet50-dc5``, ``small-24-48-64``."""
    backbone = detector.backbone
    if backbone.name == "small":
        return "small-" + "-".join(str(width) for width in backbone.stage_widths)
    return backbone.name + ("-dc5" if backbone.dilation else "")


def git_commit() -> str | None:
    """Commit of the code that runs, with ``-dirty`` if files were changed since; else None."""
    package = Path(d3etr.__file__).resolve()
    if _git(package, "ls-files", "--error-unmatch", package.name) is None:
        return None  # installed: a repository around it is not its own
    commit = _git(package, "rev-parse", "HEAD")
    changed = _git(package, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if commit and changed else commit


def _git(package: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(package.parent), *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, part in value.items():
            yield from _flatten(f"{prefix}.{key}" if prefix else str(key), part)
    elif isinstance(value, str):
        yield prefix, redacted(bare_url(value) if "://" in value else value)
    elif isinstance(value, bool) or value is None:
        yield prefix, {True: "true", False: "false", None: "null"}[value]
    else:
        yield prefix, str(value)


def _program() -> str:
    """``trainers/run.py``, or d3etr where the package itself was started."""
    script = Path(sys.argv[0])
    return "d3etr" if script.stem in ("__main__", "d3etr", "") else "/".join(script.parts[-2:])


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"
