"""Ray Tune's memory of a sweep that was stopped, checked before it is relied on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search import BasicVariantGenerator
from ray.tune.search.search_generator import SearchGenerator
from ray.tune.utils.util import _load_newest_checkpoint

from d3etr.engine.run_folder import RunFolder
from d3etr.errors import UserError
from d3etr.launch.sweeps.plan import Plan
from d3etr.logs import get_logger
from d3etr.training.results import Inputs

logger = get_logger(__name__)


def restored(plan: Plan, trainable: Any, place: Path) -> tune.Tuner | None:
    """Ray Tune as it was when the sweep stopped; None where it begins, or begins anew.

    Raises:
        UserError: results would belong to other trials or files; or what Tune keeps of a search is
            damaged.
    """
    if not tune.Tuner.can_restore(str(place)):
        return None
    try:
        _ensure_search_state(place)
        tuner = tune.Tuner.restore(
            str(place), trainable, resume_unfinished=True, restart_errored=True
        )
        known = list(tuner.get_results())
    except Exception as error:  # whatever reading a damaged file raises
        if plan.searched:
            raise UserError(
                f"what Ray Tune keeps of the sweep in {place} is damaged ({_first_line(error)}). "
                "Remove that folder to begin the search anew; the runs beside it stay"
            ) from error
        logger.warning("%s is damaged (%s): trials are begun anew", place, _first_line(error))
        return None
    lost = _without_result(plan, known)
    if lost and not plan.searched:
        logger.warning("trials without a usable result are resumed: %s", ", ".join(lost))
        return None
    return tuner


def _ensure_search_state(place: Path) -> None:
    """Make sure that Tune knows which trials it gave out: else it would make up others.

    Raises:
        Exception: whatever reading a damaged file raises.
    """
    for kind in (BasicVariantGenerator, SearchGenerator):
        state = _load_newest_checkpoint(str(place), kind.CKPT_FILE_TMPL.format("*"))
        if isinstance(state, dict):
            return
    raise ValueError("the state of the search is missing")


def _without_result(plan: Plan, known: Sequence[tune.Result]) -> list[str]:
    """Names of the runs that Ray Tune takes for finished and whose folders say otherwise.

    Raises:
        UserError: a trial was trained under other values, or from other files.
    """
    inputs, lost = Inputs(), list[str]()
    for result in known:
        metrics = result.metrics or {}
        if "run_dir" not in metrics:
            continue
        run_dir = Path(metrics["run_dir"])
        trial = plan.trial(result.config or {}, int(Path(result.path).name))
        plan.ensure_result_is_of(trial, run_dir, inputs)
        if metrics["final"] and RunFolder(run_dir).read_summary() is None:
            lost.append(run_dir.name)
    return lost


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
