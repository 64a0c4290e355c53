"""The student as an MLflow model, loaded in a process that knows nothing else."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pytest
from PIL import Image

from d3etr.config.tree import Config
from d3etr.tracking.model import ALLOW_PATHS
from d3etr.tracking.runs import replay

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


def test_it_detects_on_base64_arrays_and_allowed_paths_alike(registry: str, tmp_path: Path) -> None:
    picture().save(tmp_path / "picture.png")
    model = mlflow.pyfunc.load_model("models:/tiny@champion", model_config={ALLOW_PATHS: True})
    images = [as_base64(picture()), np.asarray(picture()).tolist(), str(tmp_path / "picture.png")]
    answers = model.predict([{"image": image, "threshold": 0.0} for image in images])
    assert [answer["error"] for answer in answers] == [None] * 3
    # Five queries, two classes: ten detections.
    assert np.asarray(answers[0]["boxes_xyxy"]).shape == (10, 4)
    assert answers[0]["scores"] == answers[1]["scores"] == answers[2]["scores"]
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
        answers, ("allow_paths", "cannot be decoded", "not in [0, 1]", "neither"), strict=True
    ):
        assert expected in answer["error"] and answer["boxes_xyxy"] == []


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
