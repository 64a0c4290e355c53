import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from d3etr.config.data import SplitConfig
from d3etr.data.splits import parse_split
from d3etr.evaluation.coco_metrics import COCO_NAMES, CocoMetrics, GroundTruth, SplitDetections

CATEGORIES = ((3, "cat"), (7, "dog"), (12, "cow"))
IMAGES = 9


def annotations(random: np.random.Generator) -> list[dict[str, Any]]:
    """Objects of every size, some crowds, no cows, no objects in the last image."""
    entries = []
    for number in range(1, 41):
        width, height = random.uniform(8, 150, 2)
        entries.append(
            {
                "id": number,
                "image_id": int(random.integers(100, 100 + IMAGES - 1)),
                "category_id": int(random.choice([3, 7])),
                "bbox": [*random.uniform(0, 60, 2), width, height],
                "area": width * height * 0.7,
                "iscrowd": int(random.uniform() < 0.15),
            }
        )
    return entries


def write(path: Path, entries: list[dict[str, Any]]) -> Path:
    images = [
        {"id": 100 + i, "width": 256, "height": 256, "file_name": f"{i}.png"} for i in range(IMAGES)
    ]
    categories = [{"id": identity, "name": name} for identity, name in CATEGORIES]
    path.write_text(
        json.dumps({"images": images, "annotations": entries, "categories": categories})
    )
    return path


def truth_of(path: Path) -> GroundTruth:
    return GroundTruth(parse_split("test", SplitConfig(images=path.parent, annotations=path)))


def measure(truth: GroundTruth, rows: np.ndarray, maximum: int = 100) -> CocoMetrics:
    """Rows of image id, label, score, x1, y1, x2, y2."""
    ids, labels = rows[:, :2].astype(np.int64).T
    return truth.measure(SplitDetections(ids, labels, rows[:, 2], rows[:, 3:]), maximum)


def detections(random: np.random.Generator, entries: list[dict[str, Any]]) -> np.ndarray:
    """Jittered objects and false alarms, images in order."""
    labels = {identity: label for label, (identity, _) in enumerate(CATEGORIES)}
    rows = []
    for entry in entries * 3:
        x, y, width, height = np.array(entry["bbox"]) + random.normal(0, 4, 4)
        label = labels[entry["category_id"]] if random.uniform() < 0.9 else 2
        score = random.choice([0.25, 0.5, random.uniform()])  # with ties
        rows.append([entry["image_id"], label, score, x, y, x + abs(width), y + abs(height)])
    rows.sort(key=lambda row: row[0])
    return np.array(rows).round(random.choice([0, 3]))  # whole pixels make equal overlaps


def plain_pycocotools(annotation_file: Path, rows: np.ndarray) -> COCOeval:
    results = [
        {
            "image_id": int(row[0]),
            "category_id": CATEGORIES[int(row[1])][0],
            "score": row[2],
            "bbox": [row[3], row[4], row[5] - row[3], row[6] - row[4]],
        }
        for row in rows.tolist()
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotation_file))
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("seed", range(6))
def test_metrics_equal_plain_use_of_pycocotools(
    tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(seed)
    entries = annotations(random)
    path, rows = write(tmp_path / "truth.json", entries), detections(random, entries)
    metrics = measure(truth_of(path), rows)
    assert capsys.readouterr().out == ""
    plain = plain_pycocotools(path, rows)
    found = [metrics.values[name] for name in COCO_NAMES]
    assert found == [None if value == -1 else value for value in plain.stats.tolist()]
    assert np.array_equal(metrics.precision, plain.eval["precision"][:, :, :, 0, 2])
    assert metrics.objects == sum(not entry["iscrowd"] for entry in entries)


def test_measuring_twice_gives_the_same(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    entries = annotations(random)
    truth = truth_of(write(tmp_path / "truth.json", entries))
    rows = detections(random, entries)
    first, second = measure(truth, rows), measure(truth, rows)
    assert first.as_dict() == second.as_dict()


def test_classes_and_sizes_without_objects_are_left_out(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    entries = [e for e in annotations(random) if e["area"] >= 32**2]
    metrics = measure(
        truth_of(write(tmp_path / "truth.json", entries)), detections(random, entries)
    )
    assert metrics.values["AP_small"] is None and metrics.per_class["cow"] is None
    assert {"mAP", "AP/cat", "AP/dog"} <= metrics.as_dict().keys()
    assert not {"AP_small", "AR_small", "AP/cow"} & metrics.as_dict().keys()


def test_no_objects_at_all_give_no_numbers(tmp_path: Path) -> None:
    truth = truth_of(write(tmp_path / "truth.json", []))
    metrics = measure(truth, np.array([[100, 0, 0.9, 0, 0, 5, 5]]))
    assert (metrics.values["mAP"], metrics.objects, metrics.images) == (None, 0, IMAGES)
    assert metrics.as_dict() == {}


def test_no_detections_are_worth_nothing(tmp_path: Path) -> None:
    entries = annotations(np.random.default_rng(0))
    truth = truth_of(write(tmp_path / "truth.json", entries))
    assert measure(truth, np.zeros((0, 7))).values["mAP"] == 0.0


def test_perfect_detections_are_worth_everything(tmp_path: Path) -> None:
    entry = {"image_id": 100, "category_id": 7, "bbox": [10, 10, 40, 40]}  # id, area, iscrowd lack
    truth = truth_of(write(tmp_path / "truth.json", [entry]))
    rows = np.array([[100, 1, 0.9, 10, 10, 50, 50]])
    assert measure(truth, rows).values["mAP"] == pytest.approx(1.0)


def test_an_annotation_numbered_zero_is_found_like_any_other(tmp_path: Path) -> None:
    entry = {"id": 0, "image_id": 100, "category_id": 7, "bbox": [10, 10, 40, 40]}
    truth = truth_of(write(tmp_path / "truth.json", [entry]))
    assert measure(truth, np.array([[100, 1, 0.9, 10, 10, 50, 50]])).values["mAP"] == pytest.approx(
        1.0
    )


def test_only_the_best_detections_of_an_image_count(tmp_path: Path) -> None:
    entry = {"image_id": 100, "category_id": 7, "bbox": [10, 10, 40, 40]}
    truth = truth_of(write(tmp_path / "truth.json", [entry]))
    rows = np.array([[100, 1, 0.9, 90, 90, 99, 99], [100, 1, 0.8, 10, 10, 50, 50]])
    assert measure(truth, rows, maximum=1).values["mAP"] == 0.0
    both = measure(truth, rows, maximum=2)
    assert both.values["mAP"] == pytest.approx(0.5)
    assert tuple(both.values[name] for name in ("AR1", "AR10", "AR")) == (0.0, 1.0, 1.0)


def test_a_byte_order_mark_is_no_obstacle(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    entries = annotations(random)
    plain = write(tmp_path / "plain.json", entries)
    marked = tmp_path / "marked.json"
    marked.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes())
    rows = detections(random, entries)
    measured = [measure(truth_of(file), rows) for file in (plain, marked)]
    assert measured[0].as_dict() == measured[1].as_dict()
