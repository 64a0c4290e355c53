"""What a training step costs: several configurations in turns, in one process."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from d3etr.config.tree import Config
from d3etr.data.allocator import keep_freed_memory
from d3etr.engine.build import build_models, open_loader, open_splits
from d3etr.engine.distributed import TrainContext
from d3etr.engine.journal import Journal
from d3etr.engine.metric_logger import LOADING, MetricLogger
from d3etr.engine.step import MicroBatch, TrainingStep
from d3etr.engine.views import prepare_views, storing_seconds
from d3etr.errors import UserError

WARM_UP_STEPS = 3
ROUNDS = 3
PLACES = (0.125, 0.375, 0.625, 0.875)
"""Shares of a run at which steps are measured: a method may be another one later in a run."""
STEPS = 12
"""In a row at each place: a method may do something in every second or third step only."""


class StepMaker:
    """One configuration, ready to make training steps that nobody keeps.

    Args:
        config: what is trained.
        context: one worker.
        steps: of the whole run, for what depends on how far it is.

    Attributes:
        device: where it runs.
        distiller: student and teacher.
        steps: of the whole run.
        prepared: seconds that storing the teacher's views takes where nothing is stored yet.
    """

    def __init__(self, config: Config, context: TrainContext, steps: int | None = None) -> None:
        splits = open_splits(config, context)
        models = build_models(config, splits, context)
        self.device, self.distiller = context.device, models.distiller
        self._loader = open_loader(config, splits.train, context, steps)
        self.prepared = storing_seconds(config, splits.train, models, context)
        views = prepare_views(config, splits.train, models, context)
        if views:
            self._loader.use_views(*views)
        self._batches = self._from(0)
        self.steps = steps or config.optimisation.total_steps(self._loader.steps_per_epoch)
        self._made = 0
        nowhere = Journal(Path("unused"), active=False)
        self._log = MetricLogger(nowhere, context, models.optimiser)
        self._step = TrainingStep(config, context, models, self.steps, self._log)

    def epoch(self, number: int) -> Iterator[list[MicroBatch]]:
        """All batches of an epoch."""
        return self._loader.epoch(number)

    def draw(self, steps: int) -> list[list[MicroBatch]]:
        """The next batches."""
        return [next(self._batches) for _ in range(steps)]

    def do(self, batches: Iterable[list[MicroBatch]]) -> None:
        """A step on each of these batches."""
        for batch in batches:
            self._step(self._made, batch)
            self._made += 1

    def cost(self, steps: int, start: int) -> float:
        """Seconds per step by the clock that runs are judged by, input included.

        Args:
            steps: to make, in a row.
            start: number of the first within the run.
        """
        log, batches = self._log, self._from(start)  # what is loaded depends on the step
        before = replace(log.cost)
        log.resume_clock()
        for number in range(start, start + steps):
            with log.timer.phase("data", host=True):
                batch = next(batches)
            log.timer.add(LOADING, self._loader.take_cpu_seconds())
            self._step(number, batch)
        log.write(start + steps)
        return (log.cost.clock - before.clock) / steps

    def close(self) -> None:
        """End the processes that load images and solve matchings."""
        self._loader.close()
        self.distiller.solver.close()

    def _from(self, step: int) -> Iterator[list[MicroBatch]]:
        """The batches of a step and of all after it."""
        epoch, offset = divmod(step, self._loader.steps_per_epoch)
        yield from self._loader.epoch(epoch, offset)
        for number in count(epoch + 1):
            yield from self.epoch(number)


@dataclass(frozen=True)
class StepCosts:
    """What steps of some configurations cost.

    Attributes:
        seconds: name -> of a step.
        prepared: name -> seconds before the first step that a teacher was busy, with views or
            with pseudo-labels.
        refused: name -> why there is none: data or weights are not as they must be.
    """

    seconds: dict[str, float]
    prepared: dict[str, float]
    refused: dict[str, str]


def measure_step_costs(configs: Mapping[str, Config], context: TrainContext) -> StepCosts:
    """Seconds of a step of each configuration: GPU time, without a GPU CPU time.

    They take turns, so that a machine that is slower for a while is slower for all. At each place
    of a run the median over rounds counts, of the places the mean.

    Args:
        configs: by name.
        context: one worker.
    """
    keep_freed_memory()
    makers, refused = dict[str, StepMaker](), dict[str, str]()
    try:
        for name, config in configs.items():
            try:
                makers[name] = StepMaker(config, context)
            except UserError as error:
                refused[name] = str(error)
        taken: dict[str, list[list[float]]] = {name: [[] for _ in PLACES] for name in makers}
        for maker in makers.values():
            maker.cost(WARM_UP_STEPS, 0)
        for _ in range(ROUNDS):
            for index, place in enumerate(PLACES):
                for name, maker in makers.items():
                    seconds = maker.cost(STEPS, int(place * maker.steps))
                    taken[name][index].append(seconds)
    finally:
        for maker in makers.values():
            maker.close()
    means = {
        name: statistics.fmean(statistics.median(each) for each in places)
        for name, places in taken.items()
    }
    prepared = {name: maker.prepared for name, maker in makers.items()}
    return StepCosts(means, prepared, refused)
