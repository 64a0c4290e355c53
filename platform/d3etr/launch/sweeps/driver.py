"""The driver of a sweep: room, concurrency, Ray Tune, resume, results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
from ray import tune

from d3etr.config.sweep import SweepConfig
from d3etr.engine.find_run import folder_of
from d3etr.engine.provenance import ensure_inputs_answer
from d3etr.engine.results import Inputs
from d3etr.engine.run_folder import RunFolder, is_number
from d3etr.errors import RunFailedError, UserError
from d3etr.launch.lock import RunLock
from d3etr.launch.ray_cluster import cluster_nodes, connected
from d3etr.launch.ray_environment import ensure_lasting, environment, joined_address
from d3etr.launch.ray_failures import user_error
from d3etr.launch.resources import Demand, Node, demand_of, describe, ensure_room, room
from d3etr.launch.signals import terminable
from d3etr.launch.sweeps.observer import Observer
from d3etr.launch.sweeps.plan import Plan
from d3etr.launch.sweeps.resource_timeout import ResourceTimeout
from d3etr.launch.sweeps.results import State, TrialResult, best, write_results, write_sweep
from d3etr.launch.sweeps.search import METRIC
from d3etr.launch.sweeps.trainable import failure_reason
from d3etr.launch.sweeps.trial_ids import number_in
from d3etr.launch.sweeps.trial_tracking import SweepTracking
from d3etr.launch.sweeps.trials import Trial
from d3etr.launch.sweeps.tuner import TUNE_SETTINGS, fit
from d3etr.logs import get_logger
from d3etr.progress import OnProgress

logger = get_logger(__name__)


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


class SweepInterrupted(KeyboardInterrupt):
    """A sweep was stopped from outside; the same command goes on with it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            f"interrupted; {folder} keeps what was trained. The same command goes on with it, and "
            f"so does: python sweeps/run.py --resume {folder}"
        )


def run_sweep(
    plan: Plan,
    *,
    command: str,
    on_progress: OnProgress,
) -> SweepResult:
    """Run a sweep to its end: start it, or go on where it stopped.

    Args:
        plan: what to train.
        command: what repeats it, for the record.
        on_progress: takes lines for a person.

    Returns:
        Every trial; a failed one does not stop the others.

    Raises:
        UserError: something that the user can fix.
        SweepInterrupted: Ctrl-C or a termination signal.
    """
    ensure_lasting(plan.base)
    ensure_inputs_answer(plan.config(trial) for trial in plan.examples())
    plan.folder.mkdir(parents=True, exist_ok=True)
    try:
        with terminable(), RunLock(plan.folder), environment(TUNE_SETTINGS):
            write_sweep(plan)
            results = _locked_sweep(plan, command, on_progress)
    except KeyboardInterrupt:
        raise SweepInterrupted(plan.folder) from None
    return SweepResult(plan.folder, tuple(results), best(results))


def _locked_sweep(plan: Plan, command: str, on_progress: OnProgress) -> list[TrialResult]:
    """Run all trials, then write and send what they found; Ray is left after that."""
    cluster = plan.base.cluster
    joins = ray.is_initialized() or joined_address(cluster) is not None
    with connected(cluster, on_progress):
        nodes = cluster_nodes()
        demand = demand_of(cluster, nodes)
        at_a_time = trials_at_a_time(plan.sweep, demand, nodes)
        count = len(plan.trials) or plan.sweep.search.trials
        on_progress(f"{count} trials, {at_a_time} at a time, each {demand} ({describe(nodes)})")
        with _tracked(plan) as tracking:
            children = None if tracking is None else tracking.children
            # Nobody else uses a cluster that was started here.
            timeout = ResourceTimeout(cluster, demand, on_progress) if joins else None
            observer = Observer(plan, on_progress, children, timeout)
            results = _results(plan, observer, demand, at_a_time, on_progress)
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
        UserError: there is no room for one, or trials would take each other's room.
    """
    if demand.elastic:
        raise UserError(
            "cluster.minimum_workers is for single runs: trials of a sweep that grew would take "
            "the room of others. Leave it out; a lost worker or node is replaced within its trial"
        )
    ensure_room(demand, nodes)
    fitting = room(nodes, demand.cpus, demand.gpus) // demand.workers
    if sweep.search.method == "population" and demand.workers > 1 and fitting < sweep.search.trials:
        raise UserError(
            f"the cluster has {describe(nodes)}, room for {fitting} trials of {demand}: a "
            f"population of {sweep.search.trials} (search.trials) whose members have several "
            "workers must train all at once. Ask for fewer, or for cluster.workers=1"
        )
    return min(fitting, sweep.maximum_concurrent or fitting)


def _results(
    plan: Plan, observer: Observer, demand: Demand, at_a_time: int, on_progress: OnProgress
) -> list[TrialResult]:
    """Every trial's end; that all have finished counts more than how Ray Tune ended."""
    try:
        return collect(plan, fit(plan, observer, demand, at_a_time, on_progress))
    except Exception as error:
        mistake = user_error(error)
        if mistake is not None:
            raise mistake from None
        results = collect(plan, ())
        if not results or any(result.state != "finished" for result in results):
            raise RunFailedError(
                f"Ray Tune failed: {type(error).__name__}: {error}\n"
                "The same command goes on with the sweep."
            ) from error
        logger.warning("all trials are finished, though Ray Tune did not end well: %r", error)
        return results


def collect(plan: Plan, grid: Iterable[tune.Result]) -> list[TrialResult]:
    """Every trial's end, in order.

    Planned ones that Ray Tune does not know of are finished if their folders say so.
    """
    found: dict[int, TrialResult] = {}
    inputs = Inputs()
    for result in grid:
        trial = plan.trial(result.config or {}, number_in(result.path))
        found[trial.number] = _ended(plan, trial, result)
    for trial in plan.trials:
        if trial.number not in found:
            # Perhaps in another sweep.
            twin = plan.finished_twin(plan.config(trial), inputs)
            found[trial.number] = _finished(trial, twin) or TrialResult(trial, "unfinished")
    return [found[number] for number in sorted(found)]


def _finished(trial: Trial, run_dir: Path | None, epoch: int | None = None) -> TrialResult | None:
    summary = None if run_dir is None else RunFolder(run_dir).read_summary()
    if summary is None:
        return None
    mAP = summary.get("mAP")
    known = float(mAP) if is_number(mAP) else None
    return TrialResult(trial, "finished", run_dir, summary, known, epoch)


def _ended(plan: Plan, trial: Trial, result: tune.Result) -> TrialResult:
    metrics = result.metrics or {}
    folder = metrics.get("run_dir")
    run_dir = Path(folder) if folder else folder_of(plan.config(trial)).path
    finished = _finished(trial, run_dir, metrics.get("epoch"))
    if finished is not None:
        return finished
    reason = failure_reason(plan, trial.number)
    if result.error is not None:
        reason = reason or str(result.error).strip().splitlines()[-1]
    state: State = "failed" if reason is not None else "pruned" if metrics else "unfinished"
    return TrialResult(
        trial, state, run_dir, None, metrics.get(METRIC), metrics.get("epoch"), reason
    )
