"""Ways to solve Adaptive Matching's problems, and what matching adds to a D3ETR step.

Tried on the same costs and left out (one thread of a busy CPU, 300 x 300):

- An auction on the device (Bertsekas 1988; all problems at a time, epsilon scaling). It is within
  N epsilon of the optimum, which at epsilon 0.01 is 3 of about 1,500 (found: 0 to 0.2 off): 500 to
  1,200 rounds of about twelve kernels each, 260 to 2,200 when it starts from the prices. A run on
  untrained decoders down to epsilon 0.001 was given up unfinished: queries that nearly agree
  outbid each other in the smallest steps.
- Prices of the layer before: scipy takes 0.5 to 1 of its time, and layers wait for each other.
- Transposing, float64 instead of float32, lowest costs of rows or columns taken off: 0.9 to 1.1
  (one kind of random heads: 0.4 with columns').
- Prices by entropic transport taken off the columns before scipy solves: exact, and a twelfth of
  the search on untrained decoders, but on two cores never faster than threads alone (0.57 of the
  loop's time beside 0.50; on trained decoders 2.6 beside 0.53). The GPU's kernel starts from them.
- lapx's other solvers: lapjvh as lapjvr; lapjvx and lapjvs 0.2 to 4 times scipy's time, slowest on
  trained decoders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from benchmarks.distilled_step import Case, conditional, kinds, titled
from benchmarks.matching_problems import problems
from benchmarks.problems import Step, random_batch
from benchmarks.side_by_side import Action, Comparison, Scale, alternate, scaled
from d3etr.engine.optimiser import set_learning_rates
from d3etr.kernels.availability import runs_kernels
from d3etr.matching.assignment import Assignment, CostBlock, Solver, Solving, spare_threads

LOOP = "common pattern: layer by layer, scipy in a loop"
THREADS = "one copy, scipy in threads"
DEVICE = "on the device"
KNOWN, WAITING = "pairs known before", "pairs waited for"
BESIDE, BEHIND = "pairs by the device", "pairs by threads"
MOST_ROUNDS = 5
"""A batch of a GPU's size takes scipy's loop seconds."""


def compare(scale: Scale) -> list[Comparison]:
    """Solvers on costs of untrained and of trained decoders, and the exposed share of a step."""
    tables = [_solvers(scale, name, block) for name, block in problems(scale).items()]
    own = conditional(scale, dropout=0.0)
    pairs = [(scale, own), *kinds(scale)]
    recorded = [_exposed_recorded(scale, own)] if runs_kernels(scale.device) else []
    return [*tables, *(_exposed(*pair) for pair in pairs), *recorded]


def layer_by_layer(block: CostBlock) -> None:
    """As public DETR-type code matches: each layer's costs are fetched, then solved one by one."""
    for layer in block.costs:
        for problem in layer.cpu():
            rows, columns = linear_sum_assignment(problem)
            torch.as_tensor(rows).to(layer.device)
            torch.as_tensor(columns).to(layer.device)


def _solvers(scale: Scale, name: str, block: CostBlock) -> Comparison:
    layers, batch, queries, _ = block.costs.shape
    threads, device = Solver(spare_threads(scale.device)), Solver()
    kernel = runs_kernels(scale.device)
    contenders: dict[str, Action] = {
        LOOP: lambda: layer_by_layer(block),
        "one copy, scipy in a loop": lambda: Solver(0).start([block]).result(),
        THREADS: lambda: threads.start([block]).result(),
    }
    if kernel:
        contenders[DEVICE] = lambda: device.start([block]).result()
    if find_spec("lap") is not None:
        contenders["one copy, lapx's lapjvr in a loop"] = _lapx(block, 1)
        contenders["one copy, lapx's lapjvr in threads"] = _lapx(block, 0)
    rounds = min(MOST_ROUNDS, max(2, scale.rounds - 2))
    taken = alternate(contenders, rounds, scale.device)
    return Comparison(
        f"Adaptive Matching, {name} decoders: {layers} layers, {batch} images, "
        f"{queries} x {queries}",
        "ms an image",
        scaled(taken, 1000 / batch),
        baseline=LOOP,
        notes=(_agreement(block),) if kernel else (),
    )


def _lapx(block: CostBlock, threads: int) -> Action:
    solve: Callable[..., object] = import_module("lap").lapjvr_batch

    def run() -> object:
        costs = block.costs.flatten(0, 1).cpu().numpy()
        return solve(costs, return_cost=False, n_threads=threads)

    return run


def _agreement(block: CostBlock) -> str:
    """What the device's solver changes: nothing but the choice among equally cheap assignments."""
    costs = block.costs.cpu().double().numpy()
    (found,) = Solver().start([block]).result()
    rows, columns = found.rows.cpu().numpy(), found.columns.cpu().numpy()
    same, excess = [], []
    for layer, image in np.ndindex(costs.shape[:2]):
        problem = costs[layer, image]
        reference = linear_sum_assignment(problem)
        pairs = rows[layer, image], columns[layer, image]
        same.append(np.array_equal(pairs[1], reference[1]))
        excess.append(problem[pairs].sum() - problem[reference].sum())
    return (
        f"On the device, {sum(same)} of {len(same)} assignments are scipy's own; their total costs "
        f"differ by at most {max(map(abs, excess)):.1e}."
    )


def _step(scale: Scale, case: Case, solver: Solver, graphs: bool = False) -> Step:
    """A D3ETR step of an untrained pair; its learning rate of 0 keeps the costs as they are."""
    student, teacher = case.build(scale, 0, case.student), case.build(scale, 1, case.teacher)
    step = Step(student, teacher, scale, random_batch(scale), graphs=graphs)
    set_learning_rates(step.optimiser, 0.0)
    _use(step, solver)
    return step


def _use(step: Step, solver: Solver) -> None:
    step.distiller.supervision = replace(step.distiller.supervision, solver=solver)


def _exposed(scale: Scale, case: Case) -> Comparison:
    known = Known.of(scale, case)
    step = _step(scale, case, known)
    solvers = {KNOWN: known, BEHIND: Solver(spare_threads(scale.device)), WAITING: Waiting(0)}
    if runs_kernels(scale.device):
        solvers[BESIDE] = Solver()

    def action(solver: Solver) -> Action:
        def run() -> None:
            _use(step, solver)
            step()

        return run

    taken = alternate(
        {name: action(solver) for name, solver in solvers.items()},
        2 if scale.smoke else min(MOST_ROUNDS, max(3, scale.rounds - 4)),
        scale.device,
    )
    limit = 2 if scale.device.type == "cuda" else 10
    product = BESIDE if BESIDE in solvers else BEHIND
    return Comparison(
        f"Exposed matching in a D3ETR step, untrained: {titled(scale, case)}",
        "ms a step",
        scaled(taken, 1000),
        baseline=KNOWN,
        aim=f"'{product}' at most {1 + limit / 100} of '{KNOWN}': {limit} % exposed",
    )


def _exposed_recorded(scale: Scale, case: Case) -> Comparison:
    """The same of a step that replays CUDA graphs, where nothing waits for the host."""
    steps = {
        KNOWN: _step(scale, case, Known.of(scale, case), graphs=True),
        BESIDE: _step(scale, case, Solver(), graphs=True),
    }
    return Comparison(
        f"Exposed matching in a recorded D3ETR step (cuda_graphs): {titled(scale, case)}",
        "ms a step",
        scaled(alternate(steps, scale.rounds, scale.device), 1000),
        baseline=KNOWN,
        aim=f"'{BESIDE}' at most 1.02 of '{KNOWN}': 2 % exposed",
    )


class Waiting(Solver):
    """Everything stands still until one thread of the host has solved everything."""

    def start(self, blocks: Sequence[CostBlock]) -> Solving:
        solving = super().start(blocks)
        return Done(solving.result())


class Known(Solver):
    """Knows the pairs of a step that it has seen: costs are computed, not copied and not solved."""

    def __init__(self) -> None:
        super().__init__()
        self.learning = False
        self._found: dict[tuple[str, ...], list[Assignment]] = {}

    @staticmethod
    def of(scale: Scale, case: Case) -> Known:
        """Has seen the step."""
        known = Known()
        known.learning = True
        _step(scale, case, known)()
        known.learning = False
        return known

    def start(self, blocks: Sequence[CostBlock]) -> Solving:
        names = tuple(block.name for block in blocks)
        if self.learning:
            self._found[names] = super().start(blocks).result()
        return Done(self._found[names])


class Done:
    """Problems that are solved already."""

    def __init__(self, found: list[Assignment]) -> None:
        self._found = found

    def result(self) -> list[Assignment]:
        return self._found
