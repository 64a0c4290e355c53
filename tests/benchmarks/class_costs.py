"""How often Adaptive Matching pairs queries of the same object, across class losses and costs.

    PYTHONPATH=platform:tests python -m benchmarks.class_costs [--steps 400] [--images 200]
        [--table FOLDER]

Scores of the varifocal loss tell how well a box fits, those of the focal loss do not: a teacher and
a student that learn by different ones may be sure to different degrees of the same object. Teachers
are a small RT-DETR that learns digit scenes by the varifocal loss and the shipped Conditional DETR,
which learned by the focal one; students are RT-DETRs of half the steps, by either, early and late.
Ground truth says which queries correspond: the teacher's query and the student's that each match an
object best. Counted is how many of these the class cost finds.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d3etr.config.data import DigitScenesConfig, PreprocessingConfig
from d3etr.config.detector import DetectorConfig
from d3etr.config.distillation import MatchingCostConfig, MethodConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.data.digit_scenes.drawing import Scene, draw_scene, load_divided_digits
from d3etr.data.transforms import normalise
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.build import build_detector
from d3etr.detectors.weights import load_weights
from d3etr.distiller import Distiller
from d3etr.files import write_text
from d3etr.losses.set_criterion import detection_problem
from d3etr.matching.assignment import CostBlock, Solver, matched_objects
from d3etr.matching.boxes import cxcywh_to_xyxy, iou
from d3etr.matching.costs import distillation_costs
from d3etr.methods.qskd import queries_of_objects
from d3etr.methods.selection import map_layers, teacher_layers
from d3etr.structures import DecoderOutputs, ImageBatch, Targets

SHIPPED = Path(__file__).parents[2] / "trainers" / "weights" / "digits-teacher.safetensors"
CLASSES, BATCH, SIDE = 10, 8, 64
SCENES = DigitScenesConfig(image_size=SIDE)
PREPROCESSING = PreprocessingConfig(normalisation="per_image")
PARTS = (0.25, 1.0)
"""Of its training that a student has behind it."""
DETECTOR = {
    "name": "rt_detr",
    "backbone": {"name": "small", "stem_width": 16, "stage_widths": [16, 32, 48, 64]},
    "width": 64,
    "heads": 4,
    "encoder_width": 64,
    "encoder_feedforward": 128,
    "expansion": 0.5,
    "levels": 2,
    "decoder_layers": 2,
    "feedforward": 128,
    "queries": 16,
    "denoising": {"queries": 10},
}

Batch = tuple[ImageBatch, Targets]
Costs = Callable[[DecoderOutputs, DecoderOutputs], Tensor]


def _boxes_only(student: DecoderOutputs, teacher: DecoderOutputs) -> Tensor:
    return distillation_costs(student, teacher, MatchingCostConfig(class_cost=0.0))


def _with(classes: Callable[[Tensor], Tensor]) -> Costs:
    """Boxes, and twice the distance of what ``classes`` makes of logits [L, B, N, C]."""

    def costs(student: DecoderOutputs, teacher: DecoderOutputs) -> Tensor:
        distance = torch.cdist(classes(student.logits), classes(teacher.logits))
        return _boxes_only(student, teacher) + 2 * distance

    return costs


def _configured(**settings: object) -> Costs:
    config = MatchingCostConfig.model_validate(settings)
    return lambda student, teacher: distillation_costs(student, teacher, config)


def _scaled(logits: Tensor) -> Tensor:
    """Probabilities over the mean of each image's surest query."""
    probability = logits.sigmoid()
    return probability / probability.amax((2, 3)).mean(1)[:, None, None, None]


COSTS: Mapping[str, Costs] = {
    "l2 of probabilities, weight 2 (default)": _configured(),
    "l2, weight 1": _configured(class_cost=1.0),
    "l2, weight 5": _configured(class_cost=5.0),
    "bce, weight 2": _configured(class_distance="bce"),
    "l2 of scaled probabilities": _with(_scaled),
    "l2 of a softmax over classes": _with(lambda logits: logits.softmax(-1)),
    "boxes alone": _boxes_only,
}


@dataclass(frozen=True)
class Found:
    """Of one teacher, student and cost.

    Attributes:
        teacher: what it is.
        student: its class loss and how far it is.
        cost: name in ``COSTS``.
        same: share of objects whose queries of both are a pair, over layers.
        overlap: IoU of an object with the student's box that the teacher's query of it is paired
            with, the mean.
    """

    teacher: str
    student: str
    cost: str
    same: float
    overlap: float


def scenes(split: str, count: int) -> list[Batch]:
    """Batches of digit scenes."""
    digits, drawn = load_divided_digits()[split], []
    for index in range(count):
        scene = draw_scene(SCENES, split, index, digits)
        pixels = torch.from_numpy(scene.pixels.copy()).permute(2, 0, 1)
        drawn.append((normalise(pixels, PREPROCESSING), scene))
    return [_batch(drawn[n : n + BATCH], n) for n in range(0, count - BATCH + 1, BATCH)]


def _batch(part: Sequence[tuple[Tensor, Scene]], first: int) -> Batch:
    shown = [scene for _, scene in part]
    counts = tuple(len(scene.boxes_xyxy) for scene in shown)
    labels = torch.zeros(len(part), max(counts), dtype=torch.int64)
    boxes = torch.zeros(len(part), max(counts), 4)
    for n, scene in enumerate(shown):
        corners = torch.from_numpy(np.array(scene.boxes_xyxy, np.float32)) / SIDE
        labels[n, : counts[n]] = torch.tensor([digit.label for digit in scene.digits])
        boxes[n, : counts[n]] = torch.cat(
            [(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1
        )
    sizes = ((SIDE, SIDE),) * len(part)
    ids = tuple(range(first, first + len(part)))
    targets = Targets(labels, boxes, counts, ids, sizes, torch.tensor(counts))
    return ImageBatch(torch.stack([pixels for pixels, _ in part])), targets


def trained(
    loss: str, seed: int, steps: int, batches: Sequence[Batch]
) -> list[DetectionTransformer]:
    """A detector after each of ``PARTS`` of its training."""
    torch.manual_seed(seed)
    detector = build_detector(DetectorConfig.parse(DETECTOR), CLASSES).train()
    criterion = SetCriterionConfig.model_validate(
        {"class_loss": loss, "class_weight": 1.0 if loss == "varifocal" else 2.0}
    )
    module = Distiller(detector, None, MethodConfig.parse({"method": "none"}), criterion, seed=seed)
    optimiser = torch.optim.AdamW(module.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, steps, pct_start=0.1)
    ends, kept = [round(part * steps) for part in PARTS], []
    for step in range(steps):
        images, targets = batches[(step + 37 * seed) % len(batches)]
        losses = module(images, targets, None, module.normalisers(targets, None), step=step)
        total = torch.stack([*losses.values()]).sum()
        optimiser.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            print(f"{loss} {seed}: step {step}, loss {total.item():.2f}", file=sys.stderr)
        if step + 1 in ends:
            kept.append(copy.deepcopy(detector).eval())
    return kept


@torch.no_grad()
def outputs_of(detector: DetectionTransformer, images: ImageBatch, layers: int) -> DecoderOutputs:
    """Of its own queries, so many layers."""
    memory = detector.encode(images)
    [found] = detector.decode(memory, [detector.object_queries(memory)])
    return map_layers(found, teacher_layers("uniform", layers, found.layers))


class Comparison:
    """Pairs of one teacher and student over all batches.

    Args:
        batches: of the validation split.
    """

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches, self.solver, self.criterion = batches, Solver(), SetCriterionConfig()

    def of_objects(self, outputs: DecoderOutputs, targets: Targets) -> Tensor:
        """[L, B, T] the query that matches each object best."""
        problem = detection_problem("queries against objects", outputs, targets, self.criterion)
        [assignment] = self.solver.start([problem]).result()
        return queries_of_objects(assignment, targets.labels.shape[1])[0]

    def run(
        self, teacher: DetectionTransformer, student: DetectionTransformer
    ) -> dict[str, tuple[float, float]]:
        """(same, overlap) by cost, as of ``Found``."""
        sums = {name: torch.zeros(2, dtype=torch.float64) for name in COSTS}
        objects = 0
        for images, targets in self.batches:
            layers = student.config.decoder_layers
            ours, theirs = (outputs_of(x, images, layers) for x in (student, teacher))
            mine, other = (self.of_objects(x, targets) for x in (ours, theirs))
            slots = torch.arange(targets.labels.shape[1])
            used = (slots < targets.num_objects[:, None]).expand_as(mine)
            objects += int(used.sum())
            for name, costs in COSTS.items():
                partner = self.partners(costs(ours, theirs), theirs.queries).gather(2, other)
                same = ((partner == mine) & used).sum()
                index = partner.clamp(min=0)[..., None].expand(-1, -1, -1, 4)
                boxes, truth = ours.boxes_cxcywh.gather(2, index), targets.boxes_cxcywh[None]
                overlap = iou(*(cxcywh_to_xyxy(x) for x in (boxes, truth.expand_as(boxes))))
                overlap = (overlap * ((partner >= 0) & used)).sum()
                sums[name] += torch.stack([same, overlap]).double()
        return {name: tuple((total / objects).tolist()) for name, total in sums.items()}

    def partners(self, costs: Tensor, queries: int) -> Tensor:
        """[L, B, M] the student's query that each of the teacher's is paired with, or -1."""
        [found] = self.solver.start([CostBlock("student against teacher", costs)]).result()
        return matched_objects(replace(found, rows=found.columns, columns=found.rows), queries)


def measure(steps: int, images: int, drawn: int) -> list[Found]:
    """Both teachers against all students."""
    batches = scenes("train", drawn)
    few = steps // 2
    students = {loss: trained(loss, 1, few, batches) for loss in ("varifocal", "focal")}
    teachers = {
        "varifocal (RT-DETR)": trained("varifocal", 0, steps, batches)[-1],
        "focal (Conditional DETR)": load_weights(SHIPPED)[0].eval(),
    }
    comparison, found = Comparison(scenes("validation", images)), []
    for teacher, network in teachers.items():
        for loss, stages in students.items():
            for part, student in zip(PARTS, stages, strict=True):
                name = f"{loss}, {round(part * few)} steps"
                result = comparison.run(network, student)
                found += [Found(teacher, name, cost, *pair) for cost, pair in result.items()]
    return found


def as_table(found: Sequence[Found], command: str) -> str:
    """Markdown: a row for each cost, a column for each teacher and student."""
    pairs = list(dict.fromkeys((each.teacher, each.student) for each in found))
    lines = ["# Class costs of Adaptive Matching across class losses", "", f"`{command}`", ""]
    for title, key in (
        ("Share of objects whose queries of teacher and student are a pair", "same"),
        ("Mean IoU of an object with the box paired with the teacher's query of it", "overlap"),
    ):
        lines += [f"{title}, in %:", ""]
        lines += ["| teacher | student | " + " | ".join(COSTS) + " |"]
        lines += ["| --- | --- |" + " ---: |" * len(COSTS)]
        for pair in pairs:
            of = {x.cost: getattr(x, key) for x in found if (x.teacher, x.student) == pair}
            best = max(of.values())
            cells = [f"**{100 * x:.1f}**" if x == best else f"{100 * x:.1f}" for x in of.values()]
            lines.append(f"| {' | '.join(pair)} | {' | '.join(cells)} |")
        rows = [np.mean([getattr(x, key) for x in found if x.cost == cost]) for cost in COSTS]
        lines += [f"| mean | | {' | '.join(f'{100 * x:.1f}' for x in rows)} |", ""]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, match and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400, help="of the teacher's training")
    parser.add_argument("--images", type=int, default=200, help="that are matched")
    parser.add_argument("--scenes", type=int, default=1600, help="that are trained on")
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="write class-costs.md, .json")
    options = parser.parse_args(arguments)
    found = measure(options.steps, options.images, options.scenes)
    command = "PYTHONPATH=platform:tests python -m benchmarks.class_costs"
    command += f" --steps {options.steps} --images {options.images} --scenes {options.scenes}"
    table = as_table(found, command)
    print(table)
    if options.table is not None:
        options.table.mkdir(parents=True, exist_ok=True)
        write_text(options.table / "class-costs.md", table)
        rows = json.dumps([asdict(each) for each in found], indent=1)
        write_text(options.table / "class-costs.json", rows + "\n")


if __name__ == "__main__":
    main()
