"""check-data, --dry-run and train judge data and recipe by one rule and in the same words."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_recipe import tiny_recipe

from d3etr.cli.main import main
from d3etr.detectors.weights import WeightsInfo, save_weights

Answers = Callable[..., list[str]]
NO_OBJECTS: dict[int, int] = {}


def write_split(folder: Path, name: str, images: int, objects: dict[int, int], side: int) -> str:
    """Pictures with so many squares each; the setting that names the split."""
    (folder / name).mkdir()
    random = np.random.default_rng(len(name))
    content: dict[str, Any] = {"images": [], "annotations": []}
    content["categories"] = [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}]
    for number in range(1, images + 1):
        pixels = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name / f"{number}.png")
        entry = {"id": number, "file_name": f"{number}.png", "width": side, "height": side}
        content["images"].append(entry)
        for k in range(objects.get(number, 0)):
            box = {"id": len(content["annotations"]), "image_id": number, "category_id": 1 + k % 2}
            size = 10 + 2 * (k % 3)
            content["annotations"].append(box | {"bbox": [k, 2 * k % 20, size, size]})
    (folder / f"{name}.json").write_text(json.dumps(content))
    return f"data.{name}={{images: {folder / name}, annotations: {folder / name}.json}}"


@pytest.fixture
def answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Answers:
    """What the three commands say of a data set and a recipe: ``ok``, ``refused``, and texts."""
    monkeypatch.chdir(tmp_path)

    def run(
        *settings: str,
        train: dict[int, int] | None = None,
        validation: dict[int, int] | None = None,
        side: int = 40,
    ) -> list[str]:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(tiny_recipe(data={"digit_scenes": None}))
        objects = {1: 2, 3: 1}
        places = [
            write_split(tmp_path, "train", 8, objects if train is None else train, side),
            write_split(
                tmp_path, "validation", 4, objects if validation is None else validation, side
            ),
        ]
        sets = [f"--set={text}" for text in (*places, "optimisation.epochs=1", *settings)]
        found = []
        for command in (["check-data"], ["train", "--dry-run"], ["train", "--launcher=local"]):
            code = main([command[0], str(recipe), *command[1:], *sets])
            output = capsys.readouterr()
            said = " ".join((output.out + output.err).split())
            found.append(("ok: " if code == 0 else "refused: ") + said)
        return found

    return run


def assert_all(answers: list[str], verdict: str, *words: str) -> None:
    assert len(answers) == 3
    for answer in answers:
        assert answer.startswith(verdict), answer
        for word in words:
            assert word in answer, answer


def test_background_images_are_fine_in_every_split(answers: Answers) -> None:
    found = answers(train={2: 2}, validation={4: 2})
    assert_all(found, "ok")
    assert not any("warning" in answer.lower() for answer in found)


def test_training_images_without_any_object_are_refused(answers: Answers) -> None:
    words = "train.json: no image has an object: there is nothing to learn from"
    assert_all(answers(train=NO_OBJECTS), "refused", "data.train.annotations", words)


def test_validation_without_any_object_chooses_no_best_weights(answers: Answers) -> None:
    words = "validation.json: no image has an object: there is nothing to measure"
    found = answers(validation=NO_OBJECTS)
    assert_all(found, "refused", "data.validation.annotations", words, "evaluation.keep")


def test_validation_without_any_object_will_do_where_the_last_weights_are_kept(
    answers: Answers,
) -> None:
    found = answers("evaluation.keep=last", validation=NO_OBJECTS)
    assert_all(found, "ok", "no image has an object: there is nothing to measure")


@pytest.mark.parametrize("length", ["epochs=2", "epochs=null optimisation.steps=4"])
def test_a_warm_up_longer_than_the_run_is_refused(answers: Answers, length: str) -> None:
    found = answers(*f"optimisation.{length} optimisation.schedule.warmup_steps=100".split())
    assert_all(found, "refused", "schedule.warmup_steps (100) is above the run's 4 steps")


def test_a_distillation_warm_up_longer_than_the_run_is_refused(
    answers: Answers, tmp_path: Path
) -> None:
    settings = teacher(tmp_path, "red", "blue")
    found = answers(*settings, "optimisation.epochs=2", "distillation.warmup_steps=100")
    assert_all(found, "refused", "distillation.warmup_steps (100) is above the run's 4 steps")


def test_a_teacher_of_other_classes_is_refused(answers: Answers, tmp_path: Path) -> None:
    found = answers(*teacher(tmp_path, "red", "green"))
    assert_all(found, "refused", "teacher.weights", "only the teacher has 'green'")


def test_more_objects_than_queries_or_detections_are_counted(answers: Answers) -> None:
    found = answers("evaluation.maximum_detections=8", train={1: 9, 2: 6}, validation={1: 10})
    queries = "3 of 15 objects, in 1 images (image ids 1), are beyond the first 6"
    detections = "2 of 10 objects, in 1 images (image ids 1), are beyond the first 8"
    words = ("student.detector.queries (6)", "evaluation.maximum_detections (8)")
    assert_all(found, "ok", queries, detections, *words)


def test_objects_that_resizing_makes_too_small_are_counted(answers: Answers) -> None:
    size = "data.preprocessing={normalisation: per_image, shortest_side: 64, longest_side: 64}"
    found = answers(size, side=400)
    assert_all(found, "ok", "3 of 3 objects have less than 4 pixels after resizing")


def test_fewer_images_than_a_batch_are_refused(answers: Answers) -> None:
    found = answers("optimisation.batch_size=16")
    assert_all(
        found, "refused", "has 8 images, fewer than one batch", "optimisation.batch_size (16)"
    )


def teacher(folder: Path, *classes: str) -> list[str]:
    """Settings of an untrained teacher."""
    import torch

    from d3etr.config.load import load_config
    from d3etr.detectors.build import build_detector

    recipe = folder / "teacher.yaml"
    recipe.write_text(tiny_recipe())
    config = load_config(recipe)
    torch.manual_seed(0)
    info = WeightsInfo(
        detector=config.student.detector,
        categories=tuple(enumerate(classes)),
        preprocessing=config.data.preprocessing,
    )
    weights = folder / "teacher.safetensors"
    save_weights(weights, build_detector(config.student.detector, len(classes)), info)
    return [f"teacher.weights={weights}", "distillation.method=d3etr"]


def test_a_sweeps_dry_run_names_the_trials_that_cannot_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(tiny_recipe())
    missing = tmp_path / "missing.safetensors"
    cases = {"whole": {}, "broken": {"set": [f"student.backbone_weights={missing}"]}}
    (tmp_path / "sweep.yaml").write_text(
        json.dumps({"name": "tried", "recipe": "recipe.yaml", "cases": cases})
    )
    assert main(["sweep", "sweep.yaml", "--dry-run", "--json"]) == 2
    whole, broken = json.loads(capsys.readouterr().out)["trials"]
    assert whole["problem"] is None and str(missing) in broken["problem"]
    assert main(["sweep", "sweep.yaml", "--dry-run"]) == 2
    assert "cannot begin: student.backbone_weights" in capsys.readouterr().out
