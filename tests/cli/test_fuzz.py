"""Whatever is in a file or argument, a command ends with 0 or with one clear text.

``make fuzz`` tries ten times as many changes, with another seed at each call.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from mutations import Mutation, of_bytes, of_header, of_json, of_lines, of_values
from PIL import Image
from safetensors.torch import save_file
from tiny_recipe import tiny_recipe

from d3etr.cli.main import main
from d3etr.config.load import load_config, plain_tree, to_yaml
from d3etr.detectors.build import build_detector
from d3etr.detectors.weights import WeightsInfo, save_weights

MUTATIONS = int(os.environ.get("D3ETR_FUZZ", "500"))
SEED = int(os.environ.get("D3ETR_FUZZ_SEED", "0"))
SECONDS = 60
MEMORY = 3 * 2**30
"""Bytes that commands may take beside what this process has."""


@dataclass(frozen=True)
class Target:
    """A file that is changed, and the command that reads it.

    Attributes:
        file: below the folder of seeds.
        command: arguments, run in that folder.
        how: changes of its content.
        share: of all mutations.
        unchanged: exit code of the command with the file as it is.
    """

    file: str
    command: str
    how: tuple[Mutation, ...]
    share: int = 1
    unchanged: int = 0


CHECK = "check-data --train images coco.json --validation images own.json"
CHECK_ALL = "check-data --set data.dataset={}"
IMPORT = "import-weights {} out.safetensors"
HUGGING_FACE = "import-weights hf out.safetensors"  # too few tensors: always refused in the end
START = "student.initialise_from.weights={}"
TEACHER = "teacher.weights={}"
PARTS = "student.initialise_from.parts=[decoder]"
DRY = "train recipe.yaml --dry-run --set"
TARGETS = {
    "recipe": Target("recipe.yaml", "train {} --dry-run", (of_lines, of_lines, of_bytes), 4),
    "sweep": Target("sweep.yaml", "sweep {} --dry-run", (of_lines, of_bytes), 3),
    "annotations": Target("coco.json", CHECK, (of_json, of_json, of_bytes), 4),
    "annotations in training": Target("own.json", "train own.yaml --dry-run", (of_json,), 2),
    "YOLO's data.yaml": Target("yolo/data.yaml", CHECK_ALL, (of_lines, of_lines, of_bytes), 2),
    "YOLO's labels": Target(
        "yolo/labels/train/a.txt",
        "check-data --set data.dataset=yolo",
        (of_lines, of_bytes),
    ),
    "YOLO's list": Target(
        "yolo/val.txt", "check-data --set data.dataset=yolo", (of_lines, of_bytes)
    ),
    "VOC's XML": Target(
        "voc/Annotations/a.xml",
        "check-data --set data.dataset=voc",
        (of_lines, of_bytes, of_bytes),
        2,
    ),
    "VOC's list": Target(
        "voc/ImageSets/Main/train.txt",
        "check-data --set data.dataset=voc",
        (of_lines, of_bytes),
    ),
    "image folder": Target(
        "hub/train/metadata.jsonl",
        "check-data --set data.dataset=hub",
        (of_lines, of_json, of_bytes),
        2,
    ),
    "PNG": Target("images/a.png", CHECK, (of_bytes,)),
    "JPEG": Target("images/b.jpg", CHECK, (of_bytes,)),
    "DDS": Target("images/c.dds", CHECK, (of_bytes,)),
    "weights": Target("ours.safetensors", IMPORT, (of_header, of_bytes), 2),
    "teacher": Target(
        "ours.safetensors",
        f"{DRY} distillation.method=d3etr --set {TEACHER}",
        (of_header,),
    ),
    "start": Target("ours.safetensors", f"{DRY} {START} --set {PARTS}", (of_header,)),
    "checkpoint": Target("few.pth", IMPORT, (of_bytes,), 2, 2),
    "old checkpoint": Target("old.pth", IMPORT, (of_bytes,), 2, 2),
    "their config": Target("hf/config.json", HUGGING_FACE, (of_json,), 2, 2),
    "their preprocessing": Target(
        "hf/preprocessor_config.json", HUGGING_FACE, (of_json,), unchanged=2
    ),
    "their tensors": Target("hf/model.safetensors", HUGGING_FACE, (of_header,), 1, 2),
    "a run's configuration": Target("runs/r/config.yaml", "compare runs/r", (of_lines,)),
    "a run's summary": Target("runs/r/summary.json", "compare runs/r", (of_json, of_bytes)),
    "a run's journal": Target("runs/r/journal.jsonl", "compare runs/r", (of_lines, of_bytes)),
    "a run's MLflow state": Target("runs/r/mlflow_run.json", "compare runs/r --json", (of_json,)),
    "a run to resume": Target("runs/r/config.yaml", "train --resume runs/r --dry-run", (of_lines,)),
}
TOTAL = sum(target.share for target in TARGETS.values())
ARGUMENTS = MUTATIONS // 8


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one small good file of each kind."""
    folder = tmp_path_factory.mktemp("seeds")
    (folder / "images").mkdir()
    entries = []
    for index, name in enumerate(("a.png", "b.jpg", "c.dds")):
        Image.linear_gradient("L").convert("RGB").resize((24, 16)).save(folder / "images" / name)
        entries.append({"id": index, "file_name": name, "width": 24, "height": 16})
    boxes = [[1, 2, 9, 8], [4.5, 4, 10, 6]]
    content = {
        "images": entries,
        "annotations": [
            {"id": i, "image_id": i, "category_id": 7, "bbox": box, "area": 60, "iscrowd": 0}
            for i, box in enumerate(boxes)
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
    }
    for name in ("coco.json", "own.json"):
        (folder / name).write_text(json.dumps(content, indent=0))
    (folder / "recipe.yaml").write_text(tiny_recipe(optimisation={"epochs": None, "steps": 3}))
    tree = yaml.safe_load(tiny_recipe(optimisation={"batch_size": 1}))
    split = {"images": "images", "annotations": "own.json"}
    tree["data"] = {"train": split, "validation": split}
    (folder / "own.yaml").write_text(yaml.safe_dump(tree))
    sweep = {
        "name": "s",
        "recipe": "recipe.yaml",
        "set": ["run.seed=1"],
        "seeds": [0, 1],
        "space": {"optimisation.learning_rate": {"grid": [1e-4, 1e-3]}},
        "search": {"method": "grid"},
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    _other_formats(folder)
    _weights(folder)
    _run_folder(folder)
    return folder


def _other_formats(folder: Path) -> None:
    """The picture a.png in a small data set of each format, for training and validation."""
    places = [folder / "yolo/images/train", folder / "yolo/images/val", folder / "voc/JPEGImages"]
    places += [folder / "hub/train", folder / "hub/validation"]
    for place in (*places, folder / "yolo/labels/train", folder / "voc/Annotations"):
        place.mkdir(parents=True)
    (folder / "voc/ImageSets/Main").mkdir(parents=True)
    for place in places:
        shutil.copy(folder / "images/a.png", place)
    (folder / "yolo/data.yaml").write_text(
        "path: .\ntrain: images/train\nval: val.txt\nnc: 2\nnames:\n  0: cat\n  1: dog\n"
    )
    (folder / "yolo/val.txt").write_text("./images/train/a.png\nimages/train/a.png\n")
    (folder / "yolo/labels/train/a.txt").write_text(
        "0 0.5 0.5 0.25 0.5\n1 0.1 0.1 0.4 0.1 0.4 0.6\n"
    )
    corners = "<xmin>2</xmin><ymin>2</ymin><xmax>10</xmax><ymax>9</ymax>"
    (folder / "voc/Annotations/a.xml").write_text(
        "<annotation>\n<filename>a.png</filename>\n<size><width>24</width><height>16</height></size>"
        f"\n<object><name>cat</name><difficult>0</difficult><bndbox>{corners}</bndbox></object>\n"
        "</annotation>\n"
    )
    for name in ("train", "val"):
        (folder / f"voc/ImageSets/Main/{name}.txt").write_text("a\n")
    objects = {"bbox": [[1, 2, 9, 8]], "categories": ["cat"], "area": [60], "iscrowd": [0]}
    for name in ("train", "validation"):
        (folder / f"hub/{name}/metadata.jsonl").write_text(
            json.dumps({"file_name": "a.png", "objects": objects})
        )


def _weights(folder: Path) -> None:
    torch.manual_seed(0)
    config = load_config(folder / "recipe.yaml")
    detector = build_detector(config.student.detector, 2)
    info = WeightsInfo(
        detector=config.student.detector,
        categories=((7, "cat"), (9, "dog")),
        preprocessing=config.data.preprocessing,
    )
    save_weights(folder / "ours.safetensors", detector, info)
    tensors = {f"class_embed.{name}": torch.zeros(3, 4) for name in ("weight", "bias")}
    tensors |= {"query_embed.weight": torch.ones(5, 8), "input_proj.weight": torch.ones(4, 4, 1, 1)}
    # Few tensors: the reader is what is tried; a whole network takes seconds to build each time.
    state = {"model": tensors, "args": {"nheads": 2, "dilation": False}, "epoch": 3}
    torch.save(state, folder / "few.pth")
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    (folder / "hf").mkdir()
    save_file(tensors, folder / "hf" / "model.safetensors")
    theirs = {
        "model_type": "conditional_detr",
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "dilation": False,
        "backbone": "resnet50",
        "id2label": {"0": "cat", "1": "dog"},
        "auxiliary_loss": False,
    }
    (folder / "hf" / "config.json").write_text(json.dumps(theirs, indent=0))
    theirs = {
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "size": {"shortest_edge": 32, "longest_edge": 64},
    }
    (folder / "hf" / "preprocessor_config.json").write_text(json.dumps(theirs, indent=0))


def _run_folder(folder: Path) -> None:
    run = folder / "runs" / "r"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(load_config(folder / "recipe.yaml")))
    shutil.copy(folder / "ours.safetensors", run / "weights.safetensors")
    metrics = {"mAP": 0.5, "AP50": 0.7, "step": 3}
    (run / "summary.json").write_text(json.dumps({"metrics": metrics, "inputs": {}} | metrics))
    records = [
        {"kind": "start", "step": 0, "time": 1.0, "steps": 3, "steps_per_epoch": 6},
        {"kind": "step", "step": 1, "time": 2.0, "metrics": {"train/loss": 3.0}},
        {"kind": "evaluation", "step": 3, "time": 3.0, "metrics": {"val/mAP": 0.5, "epoch": 0.5}},
        {"kind": "end", "step": 3, "time": 4.0},
    ]
    (run / "journal.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in records))
    state = {"tracking_uri": "sqlite:///x.db", "experiment_id": "1", "run_id": "ab"}
    (run / "mlflow_run.json").write_text(json.dumps(state, indent=0))


@pytest.mark.parametrize("name", TARGETS)
def test_no_file_content_ends_a_command_in_a_traceback(
    name: str,
    seeds: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(seeds)
    target = TARGETS[name]
    file = seeds / target.file
    good = file.read_bytes()
    arguments = [part.replace("{}", target.file) for part in target.command.split()]
    # Else no change would reach beyond what stops every file.
    assert main(arguments) == target.unchanged, capsys.readouterr().err
    try:
        for count in range(max(1, (MUTATIONS - ARGUMENTS) * target.share // TOTAL)):
            draw = random.Random(f"{SEED} {name} {count}")
            bad = draw.choice(target.how)(good, draw)
            file.write_bytes(bad)
            _ends_clearly(arguments, capsys, f"{target.file} as {_kept(bad)}")
    finally:
        file.write_bytes(good)


def test_no_argument_ends_a_command_in_a_traceback(
    seeds: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(seeds)
    tree = plain_tree(load_config(seeds / "recipe.yaml"))
    values = [f"{path}={value}" for path, value in _leaves(tree)]
    for count in range(ARGUMENTS):
        draw = random.Random(f"{SEED} arguments {count}")
        override = of_values(values, draw)
        _ends_clearly(["train", "recipe.yaml", "--dry-run", "--set", override], capsys, override)


def _leaves(tree: dict[str, object], at: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{at}{key}.")
        yield f"{at}{key}", value


def _kept(content: bytes) -> str:
    """Where the content was kept for a person, if it is asked for."""
    folder = os.environ.get("D3ETR_FUZZ_KEEP")
    if folder is None:
        return f"{len(content)} bytes (set D3ETR_FUZZ_KEEP to a folder to keep it)"
    place = Path(folder) / f"{zlib.crc32(content):08x}"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    return str(place)


def _ends_clearly(arguments: list[str], capsys: pytest.CaptureFixture[str], what: str) -> None:
    """Run a command; it must end within bounds with 0, or with an error's text."""
    allowed = (0, 1, 2) if arguments[0] == "check-data" else (0, 2)
    try:
        with _bounds():
            code = main(arguments)
    except SystemExit as end:
        code = int(str(end.code))
    except BaseException as error:
        raise AssertionError(f"{' '.join(arguments)[:200]}: {what}: {error!r:.300}") from error
    said = capsys.readouterr()
    assert code in allowed, f"{what}: exit code {code}"
    assert code != 2 or "error: " in said.err, what
    for text in (said.out, said.err):
        assert "Traceback" not in text, what
        assert "\x1b" not in text and "\u202e" not in text and "me:pass" not in text, what


@contextmanager
def _bounds() -> Iterator[None]:
    """``SECONDS`` and ``MEMORY``, and an exception beyond."""

    def late(*_: object) -> None:
        raise TimeoutError(f"longer than {SECONDS} seconds")

    before, limits = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_DATA)
    held = 0
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        held = 1024 * int(next(line for line in lines if line.startswith("VmData")).split()[1])
    if held:
        resource.setrlimit(resource.RLIMIT_DATA, (held + MEMORY, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_DATA, limits)
