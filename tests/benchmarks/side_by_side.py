"""Contenders measured in turns, and what came out as a table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

Action = Callable[[], object]


@dataclass(frozen=True)
class Scale:
    """How large the problems are.

    Attributes:
        device: where models run.
        image: pixels of a square image's side.
        batch: B.
        queries: N and M.
        backbone: of the student.
        teacher_backbone: of the teacher.
        rounds: turns that every contender takes.
        precision: of both models on this device.
        smoke: everything is so small that it only shows that the benchmark works.
        larger: a second side, for steps.
    """

    device: torch.device
    image: int
    batch: int
    queries: int
    backbone: str
    teacher_backbone: str
    rounds: int
    precision: torch.dtype = torch.float32
    smoke: bool = False
    larger: int | None = None

    @property
    def sides(self) -> tuple[Scale, ...]:
        """This scale, and the one with larger images."""
        if self.larger is None:
            return (self,)
        return self, replace(self, image=self.larger, larger=None)

    @staticmethod
    def of(device: str, smoke: bool = False) -> Scale:
        """What suits a device: a GPU's is that of a real run, a CPU's is over in minutes."""
        place = torch.device(device)
        if smoke:
            return Scale(place, 64, 2, 8, "resnet18", "resnet18", 2, smoke=True, larger=96)
        if place.type == "cuda":
            sizes = (640, 16, 300, "resnet50", "resnet101", 15)
            return Scale(place, *sizes, precision=torch.bfloat16, larger=800)
        return Scale(place, 512, 2, 300, "resnet50", "resnet101", 5)


@dataclass(frozen=True)
class Comparison:
    """One table.

    Attributes:
        title: what is compared, sizes included.
        unit: of the values.
        values: contender to its value in every round.
        baseline: the contender that ratios are to; None where rows are no rivals.
        aim: what was asked of which ratio, in words.
        notes: sentences below the table.
    """

    title: str
    unit: str
    values: dict[str, list[float]]
    baseline: str | None = None
    aim: str = ""
    notes: tuple[str, ...] = ()

    def ratios(self, name: str) -> list[float]:
        """A contender's values over the baseline's, round by round."""
        if self.baseline is None:
            return []
        pairs = zip(self.values[name], self.values[self.baseline], strict=True)
        return [value / base for value, base in pairs]

    def table(self) -> str:
        """Markdown."""
        lines = [f"### {self.title}", ""]
        head = f"| | {self.unit}, median (lowest to highest) |"
        if self.baseline is None:
            lines += [head, "| --- | ---: |"]
        else:
            lines += [f"{head} ratio to '{self.baseline}' |", "| --- | ---: | ---: |"]
        for name, values in self.values.items():
            cells = [name, _spread(values)]
            if self.baseline is not None:
                cells.append("" if name == self.baseline else _spread(self.ratios(name)))
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", f"Asked: {self.aim}."] if self.aim else []
        for note in self.notes:
            lines += ["", note]
        return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    middle = f"**{_short(statistics.median(values))}**"
    if len(values) == 1:
        return middle
    return f"{middle} ({_short(min(values))} to {_short(max(values))})"


def _short(value: float) -> str:
    """Three digits that count."""
    digits = max(0, 2 - (len(str(int(abs(value)))) - 1)) if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"


def seconds(action: Action, device: torch.device) -> float:
    """What an action takes, the device's own work included."""
    wait(device)
    begun = time.perf_counter()
    action()
    wait(device)
    return time.perf_counter() - begun


def wait(device: torch.device) -> None:
    """Until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(
    contenders: Mapping[str, Action],
    rounds: int,
    device: torch.device,
    repeat: int = 1,
    *,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after one that does not count.

    In a round all take their turn, so that a machine that is slower for a while is slower for all;
    each round begins with another one.

    Args:
        contenders: name to what is measured.
        rounds: how many.
        device: is waited for before and after.
        repeat: runs of a contender in its turn; the mean counts.
        warm_up: whether there is a run that does not count.
    """
    names = list(contenders)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for name in names if warm_up else ():
        contenders[name]()
    for number in range(rounds):
        turn = number % len(names)
        for name in (*names[turn:], *names[:turn]):

            def run(action: Action = contenders[name]) -> None:
                for _ in range(repeat):
                    action()

            taken[name].append(seconds(run, device) / repeat)
    return taken


def scaled(taken: Mapping[str, Sequence[float]], factor: float) -> dict[str, list[float]]:
    """Seconds in another unit: 1000 for milliseconds."""
    return {name: [factor * value for value in values] for name, values in taken.items()}


def per_second(taken: Mapping[str, Sequence[float]], count: float) -> dict[str, list[float]]:
    """How many of ``count`` things are done in a second."""
    return {name: [count / value for value in values] for name, values in taken.items()}


def memory_growth(action: Action, device: torch.device) -> int:
    """Bytes that the device's allocator needed for an action beyond what it held before."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    action()
    wait(device)
    return torch.cuda.max_memory_allocated(device) - before
