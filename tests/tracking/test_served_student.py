"""The student as an MLflow model, loaded in a process that knows nothing else."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pytest
from mlflow.models import Model
from PIL import Image
from tracked_folders import write_weights

from d3etr.config.backbone import BackboneConfig
from d3etr.config.tree import Config
from d3etr.detectors.weights import read_info
from d3etr.structures import ImageBatch
from d3etr.tracking import model
from d3etr.tracking.runs import replay
from d3etr.tracking.served_student import ServedStudent

MakeConfig = Callable[..., Config]
MakeRun = Callable[..., Path]


@pytest.fixture
def registry(make_config: MakeConfig, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> str:
    """Address of an MLflow that has a student registered as ``tiny``."""
    config = make_config(tracking={"register_as": "tiny"})
    assert replay(make_run(config)) is None
    uri = f"sqlite:///{config.run.output / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", uri)
    return uri


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 48, 3), np.uint8))


def as_base64(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_it_detects_on_base64_and_arrays_alike(registry: str) -> None:
    model = mlflow.pyfunc.load_model("models:/tiny@champion")
    images = [as_base64(picture()), np.asarray(picture()).tolist()]
    answers = model.predict([{"image": image, "threshold": 0.0} for image in images])
    assert [answer["error"] for answer in answers] == [None] * 2
    # Five queries, two classes: ten detections.
    assert np.asarray(answers[0]["boxes_xyxy"]).shape == (10, 4)
    assert answers[0]["scores"] == answers[1]["scores"]
    assert set(answers[0]["labels"]) <= {1, 3} and set(answers[0]["names"]) <= {"cat", "dog"}
    strict = model.predict([{"image": images[0], "threshold": 1.0}])
    assert strict[0]["scores"] == [] and strict[0]["error"] is None


def test_it_answers_bad_input_with_a_sentence(registry: str, tmp_path: Path) -> None:
    picture().save(tmp_path / "picture.png")
    model = mlflow.pyfunc.load_model("models:/tiny@newest")
    rows = [
        {"image": str(tmp_path / "picture.png"), "threshold": 0.5},
        {"image": base64.b64encode(b"no picture").decode(), "threshold": 0.5},
        {"image": as_base64(picture()), "threshold": 3.0},
        {"image": [1, 2, 3], "threshold": 0.5},
    ]
    answers = model.predict(rows)
    for answer, expected in zip(
        answers, ("not base64 text", "cannot be decoded", "not in [0, 1]", "neither"), strict=True
    ):
        assert expected in answer["error"] and answer["boxes_xyxy"] == []


def test_a_bad_row_of_any_kind_leaves_the_others_their_answers(registry: str) -> None:
    model = mlflow.pyfunc.load_model("models:/tiny@newest")
    good = {"image": as_base64(picture()), "threshold": 0}
    bad: list[dict[str, Any]] = [
        {"image": as_base64(picture()), "threshold": "half"},
        {"image": None},
        {"threshold": 0.5},
        {"image": [*np.asarray(picture()).tolist(), []], "threshold": 0.5},
        {"image": [[[300, -1, 0.5]]]},
    ]
    answers = model.predict([good, *bad, good])
    assert all(isinstance(answer["error"], str) for answer in answers[1:-1])
    assert "threshold 'half'" in answers[1]["error"] and "image is missing" in answers[2]["error"]
    for answer in (answers[0], answers[-1]):
        assert answer["error"] is None and len(answer["scores"]) == 10


@pytest.fixture(scope="module")
def served(tiny_weights: Path) -> Iterator[ServedStudent]:
    student = ServedStudent()
    student.load_context(SimpleNamespace(artifacts={"weights": str(tiny_weights)}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("d3etr.tracking.served_student.LARGEST_BYTES", 100_000)
        yield student


def test_a_batch_is_one_pass_for_each_size_with_the_detections_of_single_images(
    served: ServedStudent, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    encode = served._predictor.detector.encode

    def counted(images: ImageBatch) -> object:
        passes.append(len(images.pixels))
        return encode(images)

    monkeypatch.setattr(served._predictor.detector, "encode", counted)
    noise = np.random.default_rng(0).integers(0, 255, (8, 40, 48, 3), np.uint8)
    rows = [{"image": pixels, "threshold": 0.0} for pixels in noise]
    rows[2]["image"], rows[5]["image"] = noise[2, :, :30], "neither?"
    together = served.predict(None, rows)
    assert sorted(passes) == [1, 6]
    assert "not base64" in together[5]["error"]
    for row, answer in zip(rows[:5] + rows[6:], together[:5] + together[6:], strict=True):
        [alone] = served.predict(None, [row])
        assert answer["names"] == alone["names"] and len(answer["names"]) > 5
        np.testing.assert_allclose(answer["scores"], alone["scores"], atol=1e-6)
        np.testing.assert_allclose(answer["boxes_xyxy"], alone["boxes_xyxy"], atol=1e-4)


def one_pixel(*values: object) -> list[object]:
    return [[list(values)] * 8] * 8


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (one_pixel(300, 0, 0), "values from 0 to 300; expected whole numbers 0..255"),
        (one_pixel(-1, 0, 0), "values from -1 to 0"),
        (one_pixel(0.5, 1.0, 0.0), "values from 0.0 to 1.0.*255 times"),
        (one_pixel(float("nan"), 0, 0), "values from nan"),
        (one_pixel(float("inf"), 0, 0), "values from 0.0 to inf"),
        (one_pixel(10**30, 0, 0), "neither base64 text nor an array"),
        (one_pixel("1", "2", "3"), "neither"),
        (one_pixel(True, False, True), "neither"),
        (one_pixel(1, 2, 3, 4), "neither"),
        (np.zeros((0, 5, 3), np.uint8), "no pixels"),
        (np.zeros((5, 5, 3), np.complex64), "neither"),
        (7, "neither"),
        ({"a": 1}, "neither"),
        ("", "it is empty"),
        ("data:image/png;base64,", "it is empty"),
        ("A" * 200_000, "image has 0.1 megabytes; expected at most 0.1"),
        (base64.b64encode(b"<html>404</html>").decode(), "no picture"),
        ("\ud800", "not base64 text"),
    ],
)
def test_values_that_are_no_image_are_refused(
    served: ServedStudent, image: object, text: str
) -> None:
    [answer] = served.predict(None, [{"image": image, "threshold": 0.0}])
    assert re.search(text, answer["error"]) and answer["scores"] == []


@pytest.mark.parametrize("threshold", [-0.1, 1.1, 10**40, float("inf"), "0.5", True, [0.5]])
def test_thresholds_that_are_none_are_refused(served: ServedStudent, threshold: object) -> None:
    row = {"image": as_base64(picture())}
    answers = served.predict(None, [row | {"threshold": threshold}, row], {"threshold": 0})
    assert "is not in [0, 1]" in answers[0]["error"] and answers[1]["error"] is None
    [answer] = served.predict(None, [row], {"threshold": threshold})
    assert "is not in [0, 1]" in answer["error"]


def test_an_image_of_too_many_pixels_is_not_decoded(
    served: ServedStudent, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*arguments: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    file = io.BytesIO()
    Image.new("1", (13_000, 13_000)).save(file, format="PNG")
    [answer] = served.predict(None, [base64.b64encode(file.getvalue()).decode()])
    assert "169.0 megapixels, the limit is 90" in answer["error"]


def test_whole_numbers_are_pixels_whatever_their_type(served: ServedStudent) -> None:
    pixels = np.asarray(picture())
    kinds = [pixels, pixels.astype(float), pixels.astype(np.int64).tolist()]
    kinds.append("\n".join(re.findall(".{1,76}", as_base64(picture()))))
    first, *others = served.predict(None, [{"image": kind, "threshold": 0.0} for kind in kinds])
    assert first["error"] is None and first["scores"]
    for answer in others:  # they share a pass, where the last digit depends on the place
        assert answer["error"] is None and answer["names"] == first["names"]
        np.testing.assert_allclose(answer["scores"], first["scores"], atol=1e-6)
        np.testing.assert_allclose(answer["boxes_xyxy"], first["boxes_xyxy"], atol=1e-4)


@pytest.mark.parametrize(("backbone", "needed"), [("small", False), ("timm/resnet18", True)])
def test_its_environment_has_timm_where_its_backbone_is_timms(
    backbone: str, needed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_weights(tmp_path / "weights.safetensors")
    info = read_info(tmp_path / "weights.safetensors")
    detector = info.detector.model_copy(update={"backbone": BackboneConfig(name=backbone)})
    monkeypatch.setattr(
        model, "read_info", lambda _: info.model_copy(update={"detector": detector})
    )
    monkeypatch.setattr(model, "_pack", lambda package, archive: archive.touch())
    model._save(tmp_path, tmp_path / "weights.safetensors", Model())
    needs = (tmp_path / "model" / "requirements.txt").read_text().split()
    assert f"torch=={version('torch').partition('+')[0]}" in needs
    assert (f"timm=={version('timm')}" in needs) is needed


@pytest.mark.slow
def test_it_serves_without_ray_from_the_code_stored_with_it(registry: str, tmp_path: Path) -> None:
    program = """
import json, sys
class NoRay:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "pycocotools"):
            raise ImportError(name + " is not there")
sys.meta_path.insert(0, NoRay())
import mlflow
model = mlflow.pyfunc.load_model("models:/tiny@champion")
answers = model.predict([json.loads(sys.stdin.read())])
import d3etr
print(json.dumps({"answers": answers, "code": d3etr.__file__}))
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps({"image": as_base64(picture()), "threshold": 0.0}),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["answers"][0]["error"] is None and len(found["answers"][0]["scores"]) == 10
