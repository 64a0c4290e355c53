"""What must not change: losses, gradients, detections, a short run, a sweep, a tracked run.

Each subject is a function that gives numbers by name. Weights are made from the names of their
tensors, so that they do not depend on the order in which a detector is put together.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from official_checkpoints import HEADS, official_state
from tiny import FAMILY, tiny_detector_config
from tiny_recipe import tiny_recipe
from torch import Tensor, nn

from d3etr.config.distillation import MethodConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.build import build_detector
from d3etr.distiller import Distiller
from d3etr.structures import ImageBatch, Targets

ROOT = Path(__file__).resolve().parents[2]
CLASSES = 3
SEEDS = (0, 1, 2)
STEPS = (1, 5)
"""Optimiser steps before which losses and gradients are kept, counted from 1."""

METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "d3etr": {},
    "kd_detr": {"general_points": {"count": 4}},
    "detrdistill": {},
}
OFF = {"weight": 0.0}
NO_TERMS = {"prediction": OFF, "self_attention": OFF, "cross_attention": OFF}
VARIANTS: dict[str, dict[str, Any]] = {
    "adaptive only": {"adaptive_ratio": 1.0},
    "fixed only": {"adaptive_ratio": 0.0},
    "ratios": {"adaptive_ratio": 0.25, "teacher_query_ratio": 0.5, "matched_pair_ratio": 0.5},
    "teacher's queries, nothing distilled": NO_TERMS,
    "random queries": {
        **NO_TERMS,
        "auxiliary_group": {"queries": "random", "assignment": "own"},
    },
    "own assignment": {"auxiliary_group": {"assignment": "own"}},
    "no ground truth": {"auxiliary_group": {"ground_truth": False}},
    "bce, last layers": {"prediction": {"class_loss": "bce"}, "layer_map": "last"},
    "kl, uniform": {
        "prediction": {
            "class_loss": "kl",
            "temperature": 2.0,
            "pair_weights": "uniform",
            "class_pair_weights": "uniform",
            "layers": "mean",
        }
    },
    "averaged heads, squared distance": {
        "self_attention": {"heads": "mean", "layers": "sum"},
        "cross_attention": {"distance": "mse", "pair_weights": "confidence"},
    },
    "points and features too": {"general_points": {"count": 4}, "features": {"weight": 1.0}},
    "cost: bce": {"matching_cost": {"class_distance": "bce", "giou_cost": 0.0}},
}
"""Settings of D3ETR on a Conditional DETR."""

OTHER_KINDS = (
    ("conditional_detr", "dab_detr"),
    ("dab_detr", "detr"),
    ("detr-softmax", "conditional_detr"),
    ("deformable-two-stage", "conditional_detr"),
    ("conditional_detr", "deformable-two-stage"),
    ("deformable_detr", "deformable-refined"),
)
"""Students and teachers of different kinds."""


def batches() -> list[tuple[ImageBatch, Targets]]:
    """Two batches of three images: padded ones, one without objects."""
    return [_batch(3, (2, 0, 1)), _batch(4, (1, 3, 0))]


def _batch(seed: int, counts: tuple[int, ...]) -> tuple[ImageBatch, Targets]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(3, 3, 32, 40, generator=generator)
    padding = torch.zeros(3, 32, 40, dtype=torch.bool)
    padding[1, :, 24:] = True
    padding[2, 16:] = True
    slots = max(counts)
    centres = 0.3 + 0.4 * torch.rand(3, slots, 2, generator=generator)
    sizes = 0.1 + 0.3 * torch.rand(3, slots, 2, generator=generator)
    used = torch.arange(slots)[None] < torch.tensor(counts)[:, None]
    labels = torch.randint(CLASSES, (3, slots), generator=generator) * used
    boxes = torch.cat([centres, sizes], -1) * used[..., None]
    sides = ((32, 40),) * 3
    targets = Targets(labels, boxes, counts, (10, 11, 12), sides, torch.tensor(counts))
    return ImageBatch(pixels.masked_fill(padding[:, None], 0.0), padding), targets


def fill(module: nn.Module, seed: int) -> None:
    """Give every parameter and norm statistic numbers that depend on its name and ``seed``."""
    tensors = dict(module.named_parameters())
    tensors |= {k: v for k, v in module.named_buffers() if "running" in k}
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(_numbers(name, tensor, seed))


def _numbers(name: str, tensor: Tensor, seed: int) -> Tensor:
    # Of modules that only training has, their place in the distiller is no part of the name.
    short = ".".join(name.split(".")[-2:]) if not name.startswith("student.") else name
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {short}".encode()))
    drawn = torch.randn(tensor.shape, generator=generator)
    if "running_var" in name:
        return 1 + 0.1 * drawn.abs()
    if tensor.dim() > 1:
        return drawn / math.sqrt(tensor[0].numel())
    return drawn * 0.1 + (1.0 if name.endswith("weight") else 0.0)


def training_steps() -> dict[str, Any]:
    """Losses and gradient norms of the first and the fifth step, of every pair that trains."""
    found: dict[str, Any] = {}
    for kind in FAMILY:
        for method, settings in METHODS.items():
            for seed in SEEDS:
                found[f"{kind}, {method}, seed {seed}"] = _train(kind, kind, method, settings, seed)
    for name, settings in VARIANTS.items():
        kind = "conditional_detr"
        found[f"{kind}, d3etr: {name}"] = _train(kind, kind, "d3etr", settings, 0)
    for student, teacher in OTHER_KINDS:
        for method, settings in METHODS.items():
            if method == "none":
                continue
            more = {"cross_attention": OFF} if method == "d3etr" else {}
            name = f"{student} from {teacher}, {method}"
            found[name] = _train(student, teacher, method, settings | more, 0)
    return found


def _train(
    student_kind: str, teacher_kind: str, method: str, settings: dict[str, Any], seed: int
) -> dict[str, Any]:
    student = _detector(student_kind, 2 * seed, width=32, queries=6).train()
    teacher = _detector(teacher_kind, 2 * seed + 1, width=64, queries=8)
    distillation = MethodConfig.parse({"method": method, **settings})
    distiller = Distiller(
        student,
        None if method == "none" else teacher,
        distillation,
        SetCriterionConfig(),
        seed=seed,
    )
    fill(distiller, 2 * seed)
    return _follow(distiller)


def _detector(kind: str, seed: int, **sizes: int) -> Any:
    config = tiny_detector_config(**(FAMILY[kind] | sizes), heads=4, feedforward=32)
    detector = build_detector(config, CLASSES).eval()
    fill(detector, seed)
    return detector


def _follow(distiller: Distiller) -> dict[str, Any]:
    parameters = [p for p in distiller.parameters() if p.requires_grad]
    # No AdamW: its first steps follow the signs of gradients, which rounding decides near 0.
    optimiser = torch.optim.SGD(parameters, lr=0.01)
    data, kept = batches(), {}
    for step in range(1, STEPS[-1] + 1):
        images, targets = data[step % 2]
        taught = distiller.run_teacher(images, step)
        losses = distiller(images, targets, taught, distiller.normalisers(targets, taught))
        optimiser.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        if step in STEPS:
            kept[f"step {step}"] = {
                "losses": {name: float(loss.detach()) for name, loss in losses.items()},
                "gradients": _gradient_norms(distiller),
            }
        torch.nn.utils.clip_grad_norm_(parameters, 0.1)
        optimiser.step()
    return kept


def _gradient_norms(distiller: Distiller) -> dict[str, float]:
    """L2 norm by part of the student, and of what only training has."""
    squares: defaultdict[str, float] = defaultdict(float)
    for name, parameter in distiller.named_parameters():
        part = name.split(".")[1] if name.startswith("student.") else "training only"
        if parameter.grad is not None:
            squares[part] += float(parameter.grad.double().square().sum())
    return {part: math.sqrt(value) for part, value in sorted(squares.items())}


def detections(folder: Path) -> dict[str, Any]:
    """What detectors detect whose random weights were imported under the official names."""
    import d3etr
    from d3etr.cli.main import main

    pictures = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 64, 80, 3), generator=pictures, dtype=torch.uint8).numpy()
    found = {}
    for kind in ("detr", "conditional_detr", "dab_detr", "deformable_detr"):
        given, weights = folder / f"{kind}.pth", folder / f"{kind}.safetensors"
        torch.save({"model": official_state(kind, 91)}, given)
        heads = ["--heads", str(HEADS)]
        _ensure(main(["import-weights", str(given), str(weights), *heads]) == 0, kind)
        found[kind] = [
            {
                "labels": [int(label) for label in one.labels[:10]],
                "scores": [float(score) for score in one.scores[:10]],
                "boxes": [[float(side) for side in box] for box in one.boxes_xyxy[:10]],
            }
            for one in d3etr.load(weights).predict(list(pixels), threshold=0.0)
        ]
    return found


def digits_run(folder: Path) -> dict[str, Any]:
    """Sixty steps of D3ETR on digit scenes: losses on the way, and the mAP at the end."""
    sets = {
        "run.output": folder / "runs",
        "data.digit_scenes.root": folder / "data",
        "data.digit_scenes.train_images": 480,
        "data.digit_scenes.validation_images": 40,
        "data.digit_scenes.test_images": 40,
        "data.workers": 0,
        "evaluation.every_epochs": 100,
        "evaluation.every_steps": "null",
        "optimisation.steps": 60,
        "optimisation.schedule.warmup_steps": 10,
        "teacher.minimum_mAP": 0,
        "tracking.enabled": "false",
    }
    recipe = ROOT / "trainers/recipes/digits/d3etr.yaml"
    summary = _trained(recipe, sets, folder)
    return {
        "mAP": summary["metrics"]["mAP"],
        "teacher": summary["metrics"]["teacher/mAP"],
        "steps": _journal(Path(summary["run_dir"])),
    }


def sweep_table(folder: Path) -> list[dict[str, Any]]:
    """The trials of a sweep over two learning rates and two seeds."""
    recipe = folder / "tiny.yaml"
    recipe.write_text(_tiny(folder), encoding="utf-8")
    sweep = folder / "sweep.yaml"
    space = {"optimisation.learning_rate": {"grid": [1e-3, 1e-4]}}
    sweep.write_text(
        json.dumps({"name": "golden", "recipe": str(recipe), "seeds": [0, 1], "space": space}),
        encoding="utf-8",
    )
    done = _run([ROOT / "sweeps/run.py", sweep, "--json"], folder)
    return [
        {key: trial[key] for key in ("number", "point", "seed", "state", "mAP", "epoch")}
        for trial in json.loads(done)["trials"]
    ]


def tracked_run(folder: Path) -> dict[str, Any]:
    """What MLflow holds of a run whose journal was sent to it."""
    from mlflow.tracking import MlflowClient

    recipe = folder / "tiny.yaml"
    recipe.write_text(_tiny(folder, tracking={"enabled": True, "figures": False}), encoding="utf-8")
    _trained(recipe, {}, folder)
    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'd3etr'")
    (run,) = client.search_runs([experiment.experiment_id])
    names = [name for name in run.data.metrics if not name.startswith(("time/", "system/"))]
    timed = ("seconds", "per_second")
    return {
        "status": run.info.status,
        "metrics": {
            name: [[m.step, m.value] for m in client.get_metric_history(run.info.run_id, name)]
            for name in sorted(names)
            if not name.endswith(timed)
        },
        "tags": {k: v for k, v in run.data.tags.items() if k in ("role", "method", "detector")},
        "artifacts": sorted(a.path for a in client.list_artifacts(run.info.run_id)),
    }


def _tiny(folder: Path, **sections: dict[str, Any]) -> str:
    run = {"name": "golden", "output": str(folder / "runs")}
    scenes = {
        "root": str(folder / "data"),
        "train_images": 24,
        "validation_images": 8,
        "test_images": 4,
        "image_size": 32,
        "minimum_scale": 8,
        "maximum_scale": 16,
    }
    return tiny_recipe(run=run, data={"digit_scenes": scenes}, **sections)


def _trained(recipe: Path, sets: dict[str, Any], folder: Path) -> Any:
    given = [text for key, value in sets.items() for text in ("--set", f"{key}={value}")]
    launcher = ("--launcher", "local", "--json")
    return json.loads(_run([ROOT / "trainers/run.py", recipe, *given, *launcher], folder))


def _run(command: list[str | Path], folder: Path) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=(folder / "log").open("w"),
        text=True,
        check=False,
    )
    _ensure(done.returncode == 0, (folder / "log").read_text(encoding="utf-8")[-2000:])
    return done.stdout


def _journal(run_dir: Path) -> Iterator[dict[str, Any]] | list[dict[str, Any]]:
    lines = (run_dir / "journal.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [
        {"step": r["step"]} | {k: v for k, v in r["metrics"].items() if k.startswith("train/")}
        for r in records
        if r["kind"] == "step"
    ]


def _ensure(holds: bool, text: str) -> None:
    if not holds:
        raise RuntimeError(text)


SUBJECTS: dict[str, Callable[[Path], Any]] = {
    "training_steps": lambda _: training_steps(),
    "detections": detections,
    "digits_run": digits_run,
    "sweep_table": sweep_table,
    "tracked_run": tracked_run,
}
"""By the name of their file of numbers."""
