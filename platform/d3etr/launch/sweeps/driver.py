"""The driver of a sweep: room, concurrency, Ray Tune, resume, results."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune

from d3etr.config.infrastructure import ClusterConfig
from d3etr.config.sweep import SweepConfig
from d3etr.errors import UserError
from d3etr.launch.environment import environment
from d3etr.launch.folder import folder_of
from d3etr.launch.lock import RunLock
from d3etr.launch.ray_cluster import cluster_nodes, connected, joined_address
from d3etr.launch.resources import Demand, Node, demand_of, describe, ensure_room, room
from d3etr.launch.signals import terminable
from d3etr.launch.sweeps.actor import failure_note, run_trial
from d3etr.launch.sweeps.children import SweepTracking
from d3etr.launch.sweeps.folder import write_results, write_sweep
from d3etr.launch.sweeps.leaks import free_leaked_groups
from d3etr.launch.sweeps.numbers import Numbers
from d3etr.launch.sweeps.observer import Children, Observer
from d3etr.launch.sweeps.outcome import State, TrialResult, best, read_summary
from d3etr.launch.sweeps.plan import Plan
from d3etr.launch.sweeps.search import METRIC, MODE, parameters, scheduler, searcher
from d3etr.launch.sweeps.trials import Trial
from d3etr.training.inputs import ensure_inputs_answer

TUNE_SETTINGS = {
    # Ctrl-C is the driver's to handle; Tune would save and go on to the results.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # Journals and MLflow hold the metrics.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Its new output prints to standard output even when it is told to be quiet.
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
}
SUPERVISOR = {"memory": 1.0}
"""A trial whose workers are processes of their own only waits: a byte, as nothing is refused."""
TUNE_FOLDER = "tune"


@dataclass(frozen=True)
class SweepResult:
    """What a sweep hands over.

    Attributes:
        folder: of the sweep.
        trials: in order; what failed says why.
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
    tell: Callable[[str], None],
) -> SweepResult:
    """Run a sweep to its end: start it, or go on where it stopped.

    Args:
        plan: what to train.
        command: what repeats it, for the record.
        tell: takes a line for a person.

    Returns:
        Every trial; a failed one does not stop the others.

    Raises:
        UserError: something that the user can fix.
        SweepInterrupted: Ctrl-C or a termination signal.
    """
    ensure_inputs_answer(plan.config(trial) for trial in plan.examples())
    plan.folder.mkdir(parents=True, exist_ok=True)
    tracking: SweepTracking | None = None
    try:
        with terminable(), RunLock(plan.folder), environment(TUNE_SETTINGS):
            write_sweep(plan)
            tracking = SweepTracking(plan) if plan.base.tracking.enabled else None
            results = _trials(plan, tell, None if tracking is None else tracking.children)
            files = write_results(plan, results, command)
            if tracking is not None:
                tell("sending results to MLflow")
                tracking.finish(results, files)
                for line in tracking.how_to_open():
                    tell(line)
    except KeyboardInterrupt:
        if tracking is not None:
            tracking.interrupted()
        raise SweepInterrupted(plan.folder) from None
    return SweepResult(plan.folder, tuple(results), best(results))


def _trials(
    plan: Plan, tell: Callable[[str], None], children: Children | None
) -> list[TrialResult]:
    """Run all trials on the cluster."""
    cluster = plan.base.cluster
    joins = ray.is_initialized() or joined_address(cluster) is not None
    with connected(cluster, tell):
        if joins:
            free_leaked_groups()
        return collect(plan, _fit(plan, cluster, tell, children))


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


def _fit(
    plan: Plan, cluster: ClusterConfig, tell: Callable[[str], None], children: Children | None
) -> tune.ResultGrid:
    nodes = cluster_nodes()
    demand = demand_of(cluster, nodes)
    at_a_time = trials_at_a_time(plan.sweep, demand, nodes)
    count = len(plan.trials) or plan.sweep.search.trials
    tell(f"{count} trials, {at_a_time} at a time, each {demand} ({describe(nodes)})")
    observer = Observer(plan, tell, children)
    trainable = tune.with_resources(tune.with_parameters(run_trial, plan=plan), _resources(demand))
    place = plan.folder / TUNE_FOLDER / plan.folder.name
    if tune.Tuner.can_restore(str(place)):
        tell(f"going on with {plan.folder.name}")
        for note in failure_note(plan, 0).parent.glob("*.txt"):
            note.unlink()
        tuner = tune.Tuner.restore(
            str(place), trainable, resume_unfinished=True, restart_errored=True
        )
        _attach(tuner, observer)
    else:
        shutil.rmtree(place, ignore_errors=True)
        tuner = _tuner(plan, trainable, observer, at_a_time, cluster)
    with _silenced("ray.tune"):
        return tuner.fit()


@contextmanager
def _silenced(name: str) -> Iterator[None]:
    """No word from a logger: Tune prints the stack of every failed trial, we say why it failed."""
    ours = logging.getLogger(name)
    before = ours.level
    ours.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        ours.setLevel(before)


def _resources(demand: Demand) -> dict[str, float]:
    if demand.workers > 1:
        return SUPERVISOR
    return {"CPU": demand.cpus} | ({"GPU": demand.gpus} if demand.gpus else {})


def _attach(tuner: tune.Tuner, observer: Observer) -> None:
    """A restored tuner lacks its callbacks, which are not saved."""
    tuner._local_tuner._run_config.callbacks = [observer]


def _tuner(
    plan: Plan, trainable: Any, observer: Observer, at_a_time: int, cluster: ClusterConfig
) -> tune.Tuner:
    method = plan.sweep.search.method
    return tune.Tuner(
        trainable,
        param_space=parameters(plan),
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode=MODE,
            num_samples=plan.sweep.search.trials if plan.searched else 1,
            # A population takes turns: who has paused must not keep others from beginning.
            max_concurrent_trials=None if method == "population" else at_a_time,
            search_alg=searcher(plan.sweep),
            scheduler=scheduler(plan.sweep),
            trial_dirname_creator=Numbers(plan.folder / TUNE_FOLDER / plan.folder.name),
            reuse_actors=False,
        ),
        run_config=tune.RunConfig(
            name=plan.folder.name,
            storage_path=str(plan.folder / TUNE_FOLDER),
            verbose=0,
            stop={"final": True},  # a scheduler may pause a trial at any other report
            callbacks=[observer],
            failure_config=tune.FailureConfig(max_failures=cluster.maximum_failures),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=_kept(plan.sweep)),
        ),
    )


def _kept(sweep: SweepConfig) -> int | None:
    """Checkpoints of a trial that stay: until the last of those that copy one has begun."""
    if sweep.search.method != "population":
        return None
    return sweep.search.perturb_every_epochs + 2


def collect(plan: Plan, grid: tune.ResultGrid) -> list[TrialResult]:
    """Every trial's end, in order; planned trials that never began are unfinished."""
    found: dict[int, TrialResult] = {}
    for result in grid:
        trial = plan.trial(result.config or {}, int(Path(result.path).name))
        found[trial.number] = _ended(plan, trial, result)
    for trial in plan.trials:
        found.setdefault(trial.number, TrialResult(trial, "unfinished"))
    return [found[number] for number in sorted(found)]


def _ended(plan: Plan, trial: Trial, result: tune.Result) -> TrialResult:
    metrics = result.metrics or {}
    folder = metrics.get("run_dir")
    run_dir = Path(folder) if folder else folder_of(plan.config(trial)).path
    summary = read_summary(run_dir)
    if summary is not None:
        return TrialResult(
            trial, "finished", run_dir, summary, float(summary["mAP"]), metrics.get("epoch")
        )
    note = failure_note(plan, trial.number)
    reason = note.read_text(encoding="utf-8") if note.exists() else None
    if result.error is not None:
        reason = reason or str(result.error).strip().splitlines()[-1]
    state: State = "failed" if reason is not None else "pruned" if metrics else "unfinished"
    return TrialResult(
        trial, state, run_dir, None, metrics.get(METRIC), metrics.get("epoch"), reason
    )
