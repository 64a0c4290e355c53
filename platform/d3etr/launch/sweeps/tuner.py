"""A sweep in Ray Tune: begun, or restored from what Tune keeps, which is checked first."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search import BasicVariantGenerator
from ray.tune.search.search_generator import SearchGenerator
from ray.tune.utils.util import _load_newest_checkpoint

from d3etr.config.sweep import SweepConfig
from d3etr.engine.results import Inputs
from d3etr.engine.run_folder import RunFolder
from d3etr.errors import UserError
from d3etr.launch.resources import Demand
from d3etr.launch.sweeps.history import curves
from d3etr.launch.sweeps.observer import Observer
from d3etr.launch.sweeps.plan import Plan
from d3etr.launch.sweeps.search import METRIC, MODE, Pruning, parameters, scheduler, searcher
from d3etr.launch.sweeps.trainable import failure_file, run_trial
from d3etr.launch.sweeps.trial_ids import make_trial_folder, number_in
from d3etr.logs import get_logger
from d3etr.progress import OnProgress

logger = get_logger(__name__)

TUNE_SETTINGS = {
    # Ctrl-C is the driver's to handle; Tune would save and go on to the results.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # Journals and MLflow hold the metrics.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Its new output prints to standard output even where it should be quiet.
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
}
SUPERVISOR = {"memory": 1.0}
"""A trial whose workers are processes of their own only waits: a byte, as nothing is refused."""
TUNE_FOLDER = "tune"


def fit(
    plan: Plan, observer: Observer, demand: Demand, at_a_time: int, on_progress: OnProgress
) -> tune.ResultGrid:
    """Run all trials; begin, or go on where Tune's own folder has it that it stopped.

    Args:
        plan: the sweep.
        observer: takes Tune's events.
        demand: of one trial.
        at_a_time: trials that the cluster has room for.
        on_progress: takes lines for a person.

    Raises:
        UserError: results would belong to other trials or files; or what Tune keeps of a search is
            damaged.
        Exception: Tune's own.
    """
    function = tune.with_parameters(run_trial, plan=plan, at_a_time=at_a_time)
    trainable = tune.with_resources(function, _resources(demand))
    place = plan.folder / TUNE_FOLDER / plan.folder.name
    tuner = _restored(plan, trainable, place)
    if tuner is not None:
        on_progress(f"going on with {plan.folder.name}")
        for file in failure_file(plan, 0).parent.glob("*.txt"):
            file.unlink()
        _attach(tuner, observer, searcher(plan.sweep, at_a_time))
    else:
        shutil.rmtree(place, ignore_errors=True)
        tuner = _tuner(plan, trainable, place, observer, at_a_time)
    with _silenced("ray.tune"):
        return tuner.fit()


@contextmanager
def _silenced(name: str) -> Iterator[None]:
    """Nothing from a logger: Tune prints the stack of every failed trial, we say why it failed."""
    silenced = logging.getLogger(name)
    before = silenced.level
    silenced.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        silenced.setLevel(before)


def _resources(demand: Demand) -> dict[str, float]:
    if demand.workers > 1:
        return SUPERVISOR
    return {"CPU": demand.cpus} | ({"GPU": demand.gpus} if demand.gpus else {})


def _attach(tuner: tune.Tuner, observer: Observer, search: Any) -> None:
    """Give a restored tuner what it lacks: callbacks, room as it is now, what was reported before.

    Ray Tune then puts its saved state into ``search``.
    """
    ours = tuner._local_tuner
    ours._run_config.callbacks = [observer]
    ours._tune_config.search_alg = search
    if isinstance(ours._tune_config.scheduler, Pruning):
        ours._tune_config.scheduler.recall(curves(tuner.get_results()))


def _tuner(
    plan: Plan, trainable: Any, place: Path, observer: Observer, at_a_time: int
) -> tune.Tuner:
    return tune.Tuner(
        trainable,
        param_space=parameters(plan),
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode=MODE,
            num_samples=plan.sweep.search.trials if plan.searched else 1,
            search_alg=searcher(plan.sweep, at_a_time),
            scheduler=scheduler(plan.sweep),
            trial_dirname_creator=partial(make_trial_folder, place),
            reuse_actors=False,
        ),
        run_config=tune.RunConfig(
            name=place.name,
            storage_path=str(place.parent),
            verbose=0,
            stop={"final": True},  # a scheduler may pause a trial at any other report
            callbacks=[observer],
            failure_config=tune.FailureConfig(max_failures=plan.base.cluster.maximum_failures),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=_kept(plan.sweep)),
        ),
    )


def _kept(sweep: SweepConfig) -> int | None:
    """Checkpoints of a trial that stay: until the last of those that copy one has begun."""
    if sweep.search.method != "population":
        return None
    return sweep.search.perturb_every_epochs + 2


def _restored(plan: Plan, trainable: Any, place: Path) -> tune.Tuner | None:
    """Ray Tune as it was when the sweep stopped; None where it begins, or begins anew."""
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
                f"what Ray Tune keeps of the sweep in {place} is damaged, or another version of "
                f"d3etr wrote it ({_first_line(error)}). Remove that folder to begin the search "
                "anew; the runs beside it stay"
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
        trial = plan.trial(result.config or {}, number_in(result.path))
        plan.ensure_result_is_of(trial, run_dir, inputs)
        if metrics["final"] and RunFolder(run_dir).read_summary() is None:
            lost.append(run_dir.name)
    return lost


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
