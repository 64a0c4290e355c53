"""``d3etr pseudo-label``: detections as annotations, thresholds, and what trains on them."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import save_untrained, tiny_detector_config
from tiny_recipe import SECTIONS, tiny_recipe

from d3etr.cli.main import main
from d3etr.config.data import DataConfig, SplitConfig
from d3etr.config.load import load_config, validate
from d3etr.data.images import load_image
from d3etr.data.splits import open_split, read_split
from d3etr.evaluation.coco_metrics import GroundTruth, SplitDetections
from d3etr.inference import load
from d3etr.pseudo_labels import pseudo_labels


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    settings = SECTIONS["data"] | {
        "digit_scenes": SECTIONS["data"]["digit_scenes"] | {"root": str(tmp_path / "scenes")}
    }
    tree = {"data": settings, "optimisation": {"steps": 1}}
    return validate(tree, "the test", []).data


@pytest.fixture
def weights(tmp_path: Path, data: DataConfig) -> Path:
    path = tmp_path / "teacher.safetensors"
    save_untrained(path, tiny_detector_config(queries=6), data)
    return path


def written(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_bytes())
    return content


def test_a_folder_becomes_a_file_to_train_on(
    data: DataConfig, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = open_split(data, "validation").images.location
    assert isinstance(folder, Path)
    output = tmp_path / "out.json"
    assert (
        main(["pseudo-label", str(weights), str(folder), str(output), "--threshold", "0.01"]) == 0
    )
    content = written(output)
    assert len(content["images"]) == 8 and content["annotations"]
    names = [image["file_name"] for image in content["images"]]
    found = load(weights).predict([folder / name for name in names], 0.01)
    scores = [entry["score"] for entry in content["annotations"]]
    assert min(scores) >= 0.01 and len(scores) <= sum(map(len, found))
    first = [e for e in content["annotations"] if e["image_id"] == 1]
    assert [e["category_id"] for e in first] == found[0].labels.tolist()[: len(first)]
    split = read_split("train", SplitConfig(images=folder, annotations=output))
    assert len(split.objects.labels) == len(scores)
    (override,) = shlex.split(capsys.readouterr().out.splitlines()[-1].partition("--set ")[2])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(tiny_recipe(data=data.model_dump(mode="json")))
    train = open_split(load_config(recipe, [override]).data, "train")
    assert len(train.records) == 24 + 8
    assert len(train.parts[1].objects.labels) == len(scores)


@pytest.mark.parametrize(
    ("more", "override"),
    [
        ({}, 'data.unlabelled={"rest_of_train": true, "labels": "OUT"}'),
        ({"unlabelled": {"rest_of_train": True}}, "data.unlabelled.labels=OUT"),
        (
            {"unlabelled": {"rest_of_train": True, "share": 0.25}},
            'data.unlabelled={"rest_of_train": true, "labels": "OUT"}',
        ),
        (
            {"unlabelled": {"rest_of_train": True, "labels": "made-later.json"}},
            "data.unlabelled.labels=OUT",
        ),
    ],
)
def test_a_recipe_labels_its_images_without(
    more: dict[str, Any],
    override: str,
    data: DataConfig,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tmp_path / "recipe.yaml"
    settings = data.model_dump(mode="json") | {"labelled_share": 0.25} | more
    taught = {"teacher": {"weights": str(weights)}, "distillation": {"method": "d3etr"}}
    recipe.write_text(tiny_recipe(data=settings, **taught))
    output = tmp_path / "out.json"
    arguments = ["pseudo-label", str(weights), str(output), "--recipe", str(recipe)]
    assert main([*arguments, "--threshold", "0.01", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == 18 and result["override"] == override.replace("OUT", str(output))
    own = open_split(data.model_copy(update={"labelled_share": 0.25}), "train")
    train = open_split(load_config(recipe, [result["override"]]).data, "train")
    assert len(train.records) == 24 and len(train.parts[0].records) == 6
    assert len(train.objects.labels) == len(own.objects.labels) + result["pseudo_labels"]


def test_a_rotation_that_annotations_rule_out_is_not_applied(
    data: DataConfig, weights: Path, tmp_path: Path
) -> None:
    """Annotated as stored, 40 x 20, though EXIF says that the picture stands upright."""
    exif, pixels = Image.Exif(), np.random.default_rng(0).integers(0, 256, (20, 40, 3), np.uint8)
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    categories = [{"id": c.id, "name": c.name} for c in open_split(data, "train").categories]
    about = {"id": 1, "file_name": "a.jpg", "width": 40, "height": 20}
    annotations = tmp_path / "a.json"
    annotations.write_text(
        json.dumps({"images": [about], "categories": categories, "annotations": []})
    )
    split = read_split("train", SplitConfig(images=tmp_path, annotations=annotations))
    predictor = load(weights)
    content = pseudo_labels(predictor, split, 0.0)
    [stored] = predictor.predict(np.asarray(load_image(tmp_path / "a.jpg", (40, 20))), 0.0)
    left, top, width, height = np.array([e["bbox"] for e in content["annotations"]]).T
    corners = np.stack([left, top, left + width, top + height], 1)
    np.testing.assert_allclose(corners, stored.boxes_xyxy, atol=1e-4)


def test_the_best_threshold_has_the_highest_f1(data: DataConfig) -> None:
    """Beside a slow loop over every threshold, with its own greedy matching."""
    split, generator = open_split(data, "validation"), np.random.default_rng(0)
    rows: list[tuple[int, int, float, Any]] = []
    for record in split.records:
        for label, box in zip(record.labels, record.boxes_xyxy, strict=True):
            for _ in range(3):
                noise = generator.normal(0, 2, 4)
                score = round(float(np.exp(-np.abs(noise).mean())), 1)
                rows.append((record.id, int(label), score, box + noise))
        rows.append((record.id, 0, round(float(generator.uniform()), 1), np.array([0, 0, 6, 6.0])))
    ids, labels, scores, boxes = zip(*rows, strict=True)
    detections = SplitDetections(
        np.array(ids), np.array(labels), np.array(scores), np.stack(boxes).astype(np.float64)
    )
    found = GroundTruth(split).best_threshold(detections, 100)
    assert found is not None
    slow = {threshold: slow_f1(split, rows, threshold) for threshold in set(scores)}
    assert found[1] == pytest.approx(max(slow.values()))
    assert slow[found[0]] == pytest.approx(found[1])
    nothing = SplitDetections(*(np.zeros((0, *d)) for d in ((), (), (), (4,))))  # type: ignore[arg-type]
    assert GroundTruth(split).best_threshold(nothing, 100) is None


def slow_f1(split: Any, rows: list[Any], threshold: float) -> float:
    right = wrong = objects = 0
    for record in split.records:
        free = [*range(len(record.labels))]
        objects += len(free)
        mine = [row for row in rows if row[0] == record.id and row[2] >= threshold]
        for _, label, _, box in sorted(mine, key=lambda row: -row[2]):
            overlaps = {
                index: iou(box, record.boxes_xyxy[index])
                for index in free
                if record.labels[index] == label
            }
            best = max(overlaps, key=lambda index: overlaps[index], default=None)
            if best is not None and overlaps[best] >= 0.5:
                free.remove(best)
                right += 1
            else:
                wrong += 1
    return 2 * right / (right + wrong + objects)


def iou(a: Any, b: Any) -> float:
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    shared = float(np.prod(np.clip(high - low, 0, None)))
    return shared / (float(np.prod(a[2:] - a[:2])) + float(np.prod(b[2:] - b[:2])) - shared)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{weights}", "{out}"], "expected either IMAGES or --recipe"),
        (["{weights}", "a", "{out}", "--recipe", "r.yaml"], "expected either IMAGES or --recipe"),
        (["{weights}", "a", "{out}", "--threshold", "best"], "needs --validation"),
        (
            ["{weights}", "a", "{out}", "--validation", "b", "c"],
            "no effect without --threshold best",
        ),
        (["{weights}", "a", "{out}", "--set", "run.seed=1"], "no effect without --recipe"),
        (["{weights}", "nowhere", "{out}"], "nowhere is not a folder"),
    ],
)
def test_what_contradicts_is_one_error(
    arguments: list[str],
    message: str,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"weights": str(weights), "out": str(tmp_path / "out.json")}
    given = [argument.format(**places) for argument in arguments]
    assert main(["pseudo-label", *given]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_best_is_chosen_on_the_validation_images(
    data: DataConfig, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    validation = open_split(data, "validation")
    place = [str(validation.images), str(validation.annotations)]
    arguments = ["pseudo-label", str(weights), place[0], str(tmp_path / "out.json"), "--json"]
    code = main([*arguments, "--threshold", "best", "--validation", *place])
    shown = capsys.readouterr()
    if code:  # an untrained detector may find nothing
        assert "no detection is right" in shown.err
        return
    result = json.loads(shown.out)
    assert result["f1"] > 0 and result["pseudo_labels"] > 0
