"""The driver of a sweep: room, concurrency, Ray Tune, resume, results."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
from ray import tune

from d3etr.config.sweep import SweepConfig
from d3etr.engine.provenance import ensure_inputs_answer
from d3etr.engine.run_folder import CONFIG_FILE
from d3etr.errors import RunFailedError, UserError
from d3etr.launch.driver import RunInterrupted
from d3etr.launch.lock import RunLock
from d3etr.launch.process import terminable
from d3etr.launch.ray_cluster import cluster_nodes, connected
from d3etr.launch.ray_environment import ensure_lasting, environment, joined_address
from d3etr.launch.ray_failures import user_error
from d3etr.launch.resources import Demand, Node, demand_of, describe, ensure_room, room
from d3etr.launch.sweeps.observer import Observer, ResourceTimeout
from d3etr.launch.sweeps.plan import Plan
from d3etr.launch.sweeps.results import TrialResult, best, ended_before, write_results, write_sweep
from d3etr.launch.sweeps.search import METRIC, MODE, Pruning, TrialSource, known_trials, open_study
from d3etr.launch.sweeps.trainable import run_trial
from d3etr.launch.sweeps.trial_tracking import SweepTracking
from d3etr.launch.sweeps.trials import NUMBER, Trial
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
TUNE_FOLDER = "ray-tune"
"""Ray Tune's own files; made anew by each start."""


@dataclass(frozen=True)
class SweepResult:
    """What a sweep hands over.

    Attributes:
        folder: of the sweep.
        trials: in order; a failed one has the reason.
        best: the finished trial with the highest validation mAP, None if none finished.
    """

    folder: Path
    trials: tuple[TrialResult, ...]
    best: TrialResult | None


def run_sweep(plan: Plan, *, command: str, on_progress: OnProgress) -> SweepResult:
    """Run a sweep to its end: start it, or go on where it stopped.

    Args:
        plan: what to train.
        command: what repeats it, for the record.
        on_progress: takes lines for a person.

    Returns:
        Every trial; a failed one does not stop the others.

    Raises:
        UserError: something that the user can fix.
        RunInterrupted: Ctrl-C or a termination signal.
    """
    ensure_lasting(plan.base)
    ensure_inputs_answer(plan.config(trial) for trial in plan.examples())
    if next(plan.folder.glob(f"*/{CONFIG_FILE}"), None) is not None:
        on_progress(f"going on with {plan.folder.name}")
    plan.folder.mkdir(parents=True, exist_ok=True)
    try:
        with terminable(), RunLock(plan.folder), environment(TUNE_SETTINGS):
            write_sweep(plan)
            results = _locked_sweep(plan, command, on_progress)
    except KeyboardInterrupt:
        raise RunInterrupted(plan.folder, "sweeps/run.py") from None
    return SweepResult(plan.folder, tuple(results), best(results))


def _locked_sweep(plan: Plan, command: str, on_progress: OnProgress) -> list[TrialResult]:
    """Run all trials, then write and send what they found; Ray is left after that."""
    cluster = plan.base.cluster
    study = open_study(plan)
    ended = ended_before(plan, known_trials(plan, study))
    source = TrialSource(plan, study, ended.values())
    joins = ray.is_initialized() or joined_address(cluster) is not None
    with connected(cluster, on_progress):
        nodes = cluster_nodes()
        demand = demand_of(cluster, nodes)
        at_a_time = trials_at_a_time(plan.sweep, demand, nodes)
        count = f"{source.remaining} trials" + (f", {len(ended)} have ended" if ended else "")
        on_progress(f"{count}, {at_a_time} at a time, each {demand} ({describe(nodes)})")
        with _tracked(plan) as tracking:
            # Nobody else uses a cluster that was started here.
            timeout = ResourceTimeout(cluster, demand, on_progress) if joins else None
            observer = Observer(plan, ended, on_progress, tracking, timeout, at_a_time)
            failure = None
            if source.remaining:
                failure = _fit(_tuner(plan, source, ended, observer, demand, at_a_time))
            results = _results(known_trials(plan, study), ended, failure)
            files = write_results(plan, results, command)
            if tracking is not None:
                on_progress("sending results to MLflow")
                tracking.finish(results, files)
                for line in tracking.how_to_open():
                    on_progress(line)
    return results


@contextmanager
def _tracked(plan: Plan) -> Iterator[SweepTracking | None]:
    """The sweep in MLflow, where it is tracked; closed there also after a failure."""
    tracking = SweepTracking(plan) if plan.base.tracking.enabled else None
    try:
        yield tracking
    except BaseException as error:
        if tracking is not None:
            tracking.stopped("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise


def trials_at_a_time(sweep: SweepConfig, demand: Demand, nodes: Sequence[Node]) -> int:
    """How many trials the cluster has room for, at most what the sweep wants.

    Raises:
        UserError: there is no room for one, or the size of a trial is not fixed.
    """
    if demand.elastic:
        raise UserError(
            "cluster.minimum_workers is for single runs: how many trials fit would be open. Leave "
            "it out; a lost worker or node is replaced within its trial"
        )
    ensure_room(demand, nodes)
    fitting = room(nodes, demand.cpus, demand.gpus) // demand.workers
    return min(fitting, sweep.maximum_concurrent or fitting)


def _tuner(
    plan: Plan,
    source: TrialSource,
    ended: dict[int, TrialResult],
    observer: Observer,
    demand: Demand,
    at_a_time: int,
) -> tune.Tuner:
    place = plan.folder / TUNE_FOLDER
    shutil.rmtree(place, ignore_errors=True)
    resources = {"CPU": demand.cpus} | ({"GPU": demand.gpus} if demand.gpus else {})
    return tune.Tuner(
        tune.with_resources(
            tune.with_parameters(run_trial, plan=plan),
            SUPERVISOR if demand.workers > 1 else resources,
        ),
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode=MODE,
            num_samples=source.remaining,
            max_concurrent_trials=at_a_time,
            search_alg=source,
            scheduler=None if plan.sweep.pruning is None else Pruning(plan, [*ended.values()]),
            trial_dirname_creator=lambda trial: f"{trial.config[NUMBER]:05d}",
            reuse_actors=False,
        ),
        run_config=tune.RunConfig(
            name=place.name,
            storage_path=str(place.parent),
            verbose=0,
            stop={"final": True},  # a scheduler may stop a trial at any other report
            callbacks=[observer],
            failure_config=tune.FailureConfig(max_failures=plan.base.cluster.maximum_failures),
        ),
    )


def _fit(tuner: tune.Tuner) -> Exception | None:
    """Run Ray Tune without its log, which has the stack of every failure; what it raised."""
    log = logging.getLogger("ray.tune")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        tuner.fit()
    except Exception as error:
        return error
    finally:
        log.setLevel(before)
    return None


def _results(
    trials: Sequence[Trial], ended: dict[int, TrialResult], failure: Exception | None
) -> list[TrialResult]:
    """Every trial's end, in order; that all have finished counts more than how Ray Tune ended."""
    results = [ended.get(trial.number) or TrialResult(trial, "unfinished") for trial in trials]
    if failure is None:
        return results
    mistake = user_error(failure)
    if mistake is not None:
        raise mistake from None
    if not results or any(result.state != "finished" for result in results):
        raise RunFailedError(
            f"Ray Tune failed: {type(failure).__name__}: {failure}\n"
            "The same command goes on with the sweep."
        ) from failure
    logger.warning("all trials are finished, though Ray Tune did not end well: %r", failure)
    return results
