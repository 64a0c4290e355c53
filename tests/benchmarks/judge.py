"""Whether the judge of `d3etr verdict` is right as often as it says, on simulated detections.

    PYTHONPATH=platform:tests python -m benchmarks.judge [--draws 2000] [--jobs 2] [--table FOLDER]

Each draw has new images, new seeds and new detections of two contenders, of which one is better by
so many points of mAP. The true gain is the mean over all draws.
"""

import argparse
import itertools
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from simulated_detections import contender, draw_scenes, mean_map

from d3etr.evaluation.judge import DRAWS, Difference, judge
from d3etr.evaluation.resampling import Interval
from d3etr.files import write_text

QUALITY, SEED_SPREAD = 1.0, 0.04
"""Of the rival, about 43 mAP; runs of other seeds deviate by 0.7 mAP."""
SCALES = ("seeds", "images", "both")


@dataclass(frozen=True)
class Setting:
    """How large the simulated experiment is.

    Attributes:
        points: of mAP that the distilled contender is better by.
        images: of the split that is judged on.
        seeds: of each contender.
        resamples: of the images, in each draw.
    """

    points: float
    images: int
    seeds: int = 3
    resamples: int = 60


def better_quality(gain: float, sets: int, images: int) -> float:
    """The quality that gives so much mAP more than ``QUALITY``, by measuring."""
    if gain == 0:
        return QUALITY
    step = 0.2
    low, high = (
        mean_map(np.random.default_rng(7), quality, sets, images)
        for quality in (QUALITY, QUALITY + step)
    )
    return QUALITY + step * gain / (high - low)


def simulate(setting: Setting, better: float, draw: int) -> Difference:
    """The gain that is found in one draw of everything."""
    random = np.random.default_rng([draw, setting.images, setting.seeds])
    scenes = draw_scenes(random, setting.images)
    runs = [
        contender(random, scenes, name, quality, setting.seeds, SEED_SPREAD)
        for name, quality in (("plain", QUALITY), ("distilled", better))
    ]
    found = judge(scenes.truth, runs, draws=setting.resamples, seed=draw).of("distilled").gain
    assert found is not None
    return found


@dataclass(frozen=True)
class Tally:
    """What was found in all draws of a setting.

    Attributes:
        setting: of the draws.
        draws: how many.
        true_gain: their mean.
        coverage: share of intervals that hold it, by what they are over.
        half_width: of the interval over both, the mean.
        answers: share of each.
    """

    setting: Setting
    draws: int
    true_gain: float
    coverage: dict[str, float]
    half_width: float
    answers: dict[str, float]


def tally(setting: Setting, found: Sequence[Difference]) -> Tally:
    """Coverage of the intervals and shares of the answers."""
    truth = float(np.mean([gain.both.mean for gain in found]))
    answers = Counter(gain.answer for gain in found)
    return Tally(
        setting,
        len(found),
        truth,
        {scale: covered([getattr(gain, scale) for gain in found], truth) for scale in SCALES},
        float(np.mean([(gain.both.high - gain.both.low) / 2 for gain in found])),
        {answer: answers[answer] / len(found) for answer in ("gain", "open", "loss")},
    )


def covered(intervals: Sequence[Interval], truth: float) -> float:
    """Share of intervals that hold the true value."""
    return float(np.mean([each.low <= truth <= each.high for each in intervals]))


def as_table(tallies: Sequence[Tally], command: str) -> str:
    """Markdown."""
    lines = [
        "# The judge of `d3etr verdict` on simulated detections",
        "",
        f"`{command}`",
        "",
        "Asked: the interval for other seeds and other images (nominally 95 %) holds the true gain "
        "in 92 to 98 % of draws, and a gain of 3 mAP is found in at least 80 %. Intervals for "
        "other seeds alone, or other images alone, are narrower by what they leave out. Every draw "
        f"resamples its images {Setting(0, 0).resamples} times, where the command does "
        f"{DRAWS:,} times.",
        "",
        "| draws | images | seeds | true gain | interval over both holds it | half its width | "
        "gain / open / loss | over seeds | over images |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    for each in tallies:
        shares = " / ".join(f"{100 * share:.1f}" for share in each.answers.values())
        lines.append(
            f"| {each.draws:,} | {each.setting.images} | {each.setting.seeds} | "
            f"{100 * each.true_gain:+.2f} | **{100 * each.coverage['both']:.1f} %** | "
            f"{100 * each.half_width:.2f} | {shares} % | {100 * each.coverage['seeds']:.1f} % | "
            f"{100 * each.coverage['images']:.1f} % |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--points", type=float, nargs="+", default=[3.0, 0.0])
    parser.add_argument("--images", type=int, nargs="+", default=[400])
    parser.add_argument("--seeds", type=int, nargs="+", default=[3])
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="write judge.md and .json")
    options = parser.parse_args(arguments)
    if options.table is not None:
        options.table.mkdir(parents=True, exist_ok=True)
    given = arguments if arguments is not None else sys.argv[1:]
    command = " ".join(["PYTHONPATH=platform:tests python -m benchmarks.judge", *given])
    tallies = list[Tally]()
    for sizes in itertools.product(options.points, options.images, options.seeds):
        setting = Setting(*sizes)
        tallies.append(tally(setting, draw_all(setting, options.draws, options.jobs)))
        if options.table is not None:  # after each, as a setting may take an hour
            write_text(options.table / "judge.md", as_table(tallies, command))
            values = {"command": command, "settings": [asdict(each) for each in tallies]}
            write_text(options.table / "judge.json", json.dumps(values, indent=1) + "\n")
    print(as_table(tallies, command))


def draw_all(setting: Setting, draws: int, jobs: int) -> list[Difference]:
    """The gains of all draws."""
    better = better_quality(setting.points / 100, 40_000 // setting.images, setting.images)
    found = list[Difference]()
    with Pool(jobs) as pool:
        one = partial(simulate, setting, better)
        for gain in pool.imap(one, range(draws), chunksize=5):
            found.append(gain)
            if len(found) % 100 == 0:
                print(f"{setting}: {len(found)}", file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    main()
