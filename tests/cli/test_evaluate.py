"""What ``d3etr evaluate`` answers for annotation files that say the same in odd ways."""

import contextlib
import io
import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from format_writers import WRITERS
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from d3etr.cli.main import main
from d3etr.config.data import DigitScenesConfig, SplitConfig
from d3etr.data.digit_scenes import write_digit_scenes
from d3etr.inference import load

WEIGHTS = Path(__file__).parents[2] / "trainers" / "weights" / "digits-teacher.safetensors"

Content = dict[str, Any]
Change = Callable[[Content], None]
Evaluate = Callable[[Change], dict[str, float]]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Content]:
    """Twelve scenes with digits of all ten classes: a folder and the annotation file's content."""
    root = tmp_path_factory.mktemp("scenes")
    config = DigitScenesConfig(root=root, train_images=1, validation_images=12, test_images=1)
    place = write_digit_scenes(config)["validation"]
    return Path(str(place.images)), json.loads(Path(str(place.annotations)).read_text())


@pytest.fixture(scope="module")
def plain_mAP(scenes: tuple[Path, Content]) -> float:
    """By pycocotools itself on what ``predict`` detects, which cuts boxes at the borders."""
    images, content = deepcopy(scenes)
    order = {image["id"]: number for number, image in enumerate(content["images"], 1)}
    rows = []
    for image in content["images"]:
        [found] = load(WEIGHTS, "cpu").predict(images / image["file_name"], threshold=0.0)
        image["id"] = order[image["id"]]
        for x1, y1, x2, y2, score, label in zip(
            *found.boxes_xyxy.astype(float).T, found.scores.astype(float), found.labels, strict=True
        ):
            row = {"image_id": image["id"], "category_id": int(label), "score": float(score)}
            rows.append(row | {"bbox": [x1, y1, x2 - x1, y2 - y1]})
    for number, entry in enumerate(content["annotations"], 1):
        entry |= {"id": number, "image_id": order[entry["image_id"]]}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = content
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(rows), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


@pytest.fixture
def evaluate(
    scenes: tuple[Path, Content], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Evaluate:
    """The metrics of the scenes after a change to their annotation file."""

    def run(change: Change) -> dict[str, float]:
        images, content = deepcopy(scenes)
        change(content)
        file = tmp_path / "annotations.json"
        file.write_text(json.dumps(content))
        options = ["--images", str(images), "--annotations", str(file), "--workers", "0"]
        assert main(["evaluate", str(WEIGHTS), *options, "--device", "cpu", "--json"]) == 0
        metrics: dict[str, float] = json.loads(capsys.readouterr().out)["metrics"]
        return metrics

    return run


def renumber(start: int, step: int) -> Change:
    def change(content: Content) -> None:
        numbers = {image["id"]: start + step * k for k, image in enumerate(content["images"])}
        for image in content["images"]:
            image["id"] = numbers[image["id"]]
        for entry in content["annotations"]:
            entry["image_id"] = numbers[entry["image_id"]]

    return change


def add_boxes(*box: float) -> Change:
    """One for each image."""

    def change(content: Content) -> None:
        category = content["categories"][0]["id"]
        for number, image in enumerate(content["images"], start=10_000):
            entry = {"id": number, "image_id": image["id"], "category_id": category}
            content["annotations"].append(entry | {"bbox": list(box), "iscrowd": 0})

    return change


def repeat_annotation_ids(content: Content) -> None:
    for number, entry in enumerate(content["annotations"]):
        entry["id"] = number % 3


def write_areas(area: float | None) -> Change:
    def change(content: Content) -> None:
        for entry in content["annotations"]:
            entry["area"] = area

    return change


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(renumber(20240131123456781, 1), id="image ids of 17 digits"),
        pytest.param(renumber(2**63 - 13, 1), id="image ids of 63 bits"),
        pytest.param(renumber(-(2**62), 1), id="negative image ids"),
        pytest.param(renumber(1000, -7), id="falling image ids"),
        pytest.param(repeat_annotation_ids, id="annotation ids that repeat"),
        pytest.param(add_boxes(5, 5, 0, 9), id="boxes without width"),
        pytest.param(add_boxes(30, 30, -9, 9), id="boxes drawn backwards"),
        pytest.param(add_boxes(500, 5, 9, 9), id="boxes outside of the image"),
        pytest.param(write_areas(None), id="no areas"),
        pytest.param(write_areas(-1), id="negative areas"),
        pytest.param(write_areas(0), id="areas of 0"),
        pytest.param(write_areas(1e11), id="areas above any image"),
        pytest.param(write_areas(10**400), id="areas that no float holds"),
        pytest.param(write_areas(float("nan")), id="areas that are no number"),
    ],
)
def test_mAP_depends_on_images_and_boxes_alone(  # noqa: N802
    evaluate: Evaluate, change: Change
) -> None:
    assert evaluate(change) == evaluate(lambda content: None)


def test_mAP_is_that_of_pycocotools(  # noqa: N802
    evaluate: Evaluate,
    plain_mAP: float,
) -> None:
    assert plain_mAP > 0.5
    assert evaluate(lambda content: None)["mAP"] == pytest.approx(plain_mAP, abs=0.01)


def test_dropped_boxes_are_gone_from_training_and_evaluation_alike(
    evaluate: Evaluate,
) -> None:
    def turn_around(content: Content) -> None:
        for entry in content["annotations"][::3]:
            x, y, width, height = entry["bbox"]
            entry["bbox"] = [x + width, y + height, -width, -height]

    def remove(content: Content) -> None:
        del content["annotations"][::3]

    assert evaluate(turn_around) == evaluate(remove)


def test_errors_name_the_flags_of_the_command(
    scenes: tuple[Path, Content], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(scenes[1]))
    nowhere = tmp_path / "nowhere"
    evaluate = ["evaluate", str(WEIGHTS), "--images", str(tmp_path), "--annotations", str(file)]
    assert main(evaluate) == 2
    said = capsys.readouterr().err
    assert "--annotations" in said and "correct --images" in said and "data." not in said
    place = [str(nowhere), str(file)]
    assert main(["check-data", "--train", *place, "--validation", *place]) == 1
    said = capsys.readouterr().out
    assert f"--train IMAGES: {nowhere} is not a folder" in " ".join(said.split())


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_the_same_scenes_reach_the_same_metrics_in_every_format(
    scenes: tuple[Path, Content],
    evaluate: Evaluate,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    images, content = scenes
    file = tmp_path / "coco.json"
    file.write_text(json.dumps(content))
    coco = {"validation": SplitConfig(images=images, annotations=file)}
    place = WRITERS[name](coco, tmp_path / name)["validation"].annotations
    expected = evaluate(lambda content: None)
    options = ["--annotations", str(place), "--workers", "0", "--device", "cpu", "--json"]
    assert main(["evaluate", str(WEIGHTS), *options]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == expected


def test_a_coco_file_without_its_images_is_refused(
    scenes: tuple[Path, Content], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "coco.json"
    file.write_text(json.dumps(scenes[1]))
    assert main(["evaluate", str(WEIGHTS), "--annotations", str(file), "--device", "cpu"]) == 2
    assert "--images is missing: expected the folder" in capsys.readouterr().err


def test_workers_that_an_onnx_file_has_no_use_for_are_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["evaluate", "nowhere.onnx", "--annotations", "nowhere.json", "--workers"]
    assert main([*command, "2"]) == 2
    said = capsys.readouterr().err
    assert "warning: --workers has no effect on an ONNX file" in said and "nowhere.onnx" in said
