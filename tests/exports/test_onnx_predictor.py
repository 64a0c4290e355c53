"""ONNX files run by d3etr: the same detections, and without PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_exports import untrained

import d3etr
from d3etr.cli.main import main
from d3etr.config.data import SplitConfig
from d3etr.data.splits import read_split
from d3etr.detectors.weights import save_weights
from d3etr.errors import UserError
from d3etr.exports.description import ImageSettings
from d3etr.exports.inputs import prepared
from d3etr.exports.measuring import measure
from d3etr.exports.onnx_predictor import OnnxPredictor
from d3etr.progress import no_progress

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

SIZES = ((60, 84), (84, 60), (60, 84), (97, 64))
BLOCKED = (
    *("torch", "torchvision", "scipy", "timm", "safetensors", "ray", "mlflow", "onnx"),
    *("onnxscript", "sklearn"),
)
ALONE = (*BLOCKED, "pydantic", "pydantic_core", "yaml", "fsspec", "pycocotools", "matplotlib")


class Files(dict[str, Path]):
    """A weights file, its ONNX file, pictures and their annotations, by name."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("onnx")
    detector, info = untrained(
        "conditional_detr", normalisation="imagenet", shortest_side=64, longest_side=96
    )
    save_weights(folder / "w.safetensors", detector, info)
    command = ["export", str(folder / "w.safetensors"), str(folder / "w.onnx"), "--format", "onnx"]
    assert main(command) == 0
    (folder / "pictures").mkdir()
    rng, images, annotations = np.random.default_rng(0), [], []
    for number, (height, width) in enumerate(SIZES, start=1):
        pixels = rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((width, height))
        picture.save(folder / "pictures" / f"{number}.png")
        images.append(
            {"id": number, "file_name": f"{number}.png", "width": width, "height": height}
        )
        for category, side in ((3, 20), (7, 30), (90, 40)):
            box = {"id": len(annotations) + 1, "image_id": number, "category_id": category}
            annotations.append(box | {"bbox": [9, 9, side, side], "area": side**2, "iscrowd": 0})
    names = ((3, "tree"), (7, "cat"), (90, "dog"))
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in names],
    }
    (folder / "a.json").write_text(json.dumps(content))
    return Files(
        weights=folder / "w.safetensors",
        model=folder / "w.onnx",
        pictures=folder / "pictures",
        annotations=folder / "a.json",
    )


def test_predictions_are_those_of_the_weights(files: Files) -> None:
    pictures = sorted(files["pictures"].iterdir())
    model = d3etr.load(files["model"], "cpu")
    assert isinstance(model, OnnxPredictor)
    options = model.session.get_session_options()
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    expected = d3etr.load(files["weights"], "cpu").predict(pictures, 0.0)
    for one, other in zip(expected, model.predict(pictures, 0.0), strict=True):
        assert one.names == other.names and len(one) == 15
        assert np.array_equal(one.labels, other.labels)
        np.testing.assert_allclose(other.boxes_xyxy, one.boxes_xyxy, atol=1e-3)
        np.testing.assert_allclose(other.scores, one.scores, atol=1e-5)
    assert model.predict([]) == []


def test_commands_print_the_same(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(command: str, name: str, *more: str) -> Any:
        capsys.readouterr()
        assert main([command, str(files[name]), *more, "--device", "cpu", "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    pictures = str(files["pictures"])
    expected, found = (
        printed("predict", name, pictures, "--threshold", "0") for name in ("weights", "model")
    )
    assert [x["image"] for x in expected] == [x["image"] for x in found]
    for one, other in zip(expected, found, strict=True):
        for wanted, detection in zip(one["detections"], other["detections"], strict=True):
            assert wanted["name"] == detection["name"]
            assert wanted["box_xyxy"] == pytest.approx(detection["box_xyxy"], abs=0.11)
    places = ["--annotations", str(files["annotations"]), "--images", pictures]
    # Without padding: pictures of a batch that differ in size would have some in PyTorch.
    one = printed("evaluate", "weights", *places, "--batch-size", "1", "--workers", "0")
    other = printed("evaluate", "model", *places, "--batch-size", "3")
    assert one["metrics"] == pytest.approx(other["metrics"], abs=1e-9)
    assert one["data_digest"] == other["data_digest"] and other["images"] == len(SIZES)


def _without(blocked: tuple[str, ...], code: str) -> str:
    head = f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
    command = [sys.executable, "-c", head + code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_loading_takes_numpy_pillow_and_onnxruntime_alone(files: Files) -> None:
    picture = files["pictures"] / "1.png"
    code = f"import d3etr; print(d3etr.load({str(files['model'])!r}).predict({str(picture)!r}, 0))"
    [expected] = d3etr.load(files["model"]).predict(picture, 0)
    assert _without(ALONE, code).strip() == str([expected])


def test_commands_run_where_pytorch_cannot_be_imported(files: Files, tmp_path: Path) -> None:
    model, pictures = str(files["model"]), str(files["pictures"])
    written = tmp_path / "found.json"
    drawn, places = tmp_path / "p", ["--annotations", str(files["annotations"])]
    commands = [
        ["predict", model, pictures, "--json", "--threshold", "0", "--output", str(drawn)],
        ["evaluate", model, *places, "--images", pictures, "--json"],
    ]
    commands[1] += ["--write-detections", str(written)]
    code = f"from d3etr.cli.main import main\nfor c in {commands!r}: assert main(c) == 0"
    assert '"mAP"' in _without(BLOCKED, code)
    assert len([*drawn.iterdir()]) == len(SIZES)
    assert len(json.loads(written.read_text())) == 15 * len(SIZES)


def test_a_replica_of_a_service_needs_no_pytorch(files: Files) -> None:
    code = f"""
from d3etr.serving.replica import Replica
from d3etr.serving.settings import ServeSettings
print(Replica(ServeSettings({str(files["model"])!r})).about())"""  # it has detected once
    assert "'classes': ['tree', 'cat', 'dog']" in _without(("torch", "torchvision"), code)


def test_a_gpu_that_was_asked_for_and_cannot_be_used_is_an_error(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    cuda, cpu = "CUDAExecutionProvider", "CPUExecutionProvider"
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [cuda, cpu])
    opened = onnxruntime.InferenceSession

    def without_gpu(*arguments: Any, providers: Any) -> Any:  # as where CUDA's libraries are not
        assert [providers[0][0], providers[1]] == [cuda, cpu]
        return opened(*arguments, providers=[cpu])

    monkeypatch.setattr(onnxruntime, "InferenceSession", without_gpu)
    for device in ("cuda", "cuda:0"):
        with pytest.raises(UserError, match=rf"device '{device}': ONNX Runtime cannot load"):
            d3etr.load(files["model"], device)
    assert d3etr.load(files["model"]).predict(files["pictures"] / "1.png", 0)


def test_mistakes_are_one_clear_line(files: Files, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.onnx does not exist: give the path of"):
        d3etr.load(tmp_path / "nowhere.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(files["model"].read_bytes()[:2000])
    with pytest.raises(UserError, match=r"broken\.onnx: ONNX Runtime cannot read it"):
        d3etr.load(broken)
    foreign = onnx.load(files["model"])
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    with pytest.raises(UserError, match=r"foreign\.onnx: its metadata has no 'd3etr\.version'"):
        d3etr.load(tmp_path / "foreign.onnx")
    with pytest.raises(UserError, match=r"device 'tpu' cannot be used here by ONNX Runtime"):
        d3etr.load(files["model"], "tpu")
    with pytest.raises(UserError, match=r"x\.pt2 is for torch\.export\.load"):
        d3etr.load("x.pt2")
    with pytest.raises(UserError, match="weights is the URL s3://b/x"):
        d3etr.load("s3://b/x.onnx")


def test_an_image_that_the_graph_does_not_take_is_named_with_what_to_do(
    files: Files, tmp_path: Path
) -> None:
    model = d3etr.load(files["model"])
    assert isinstance(model, OnnxPredictor)
    narrow = "takes sides from 16 pixels on: it is too narrow for its length, cut it into pieces"
    with pytest.raises(UserError, match=f"^the image is shown .* as 90 x 4 pixels, .*{narrow}"):
        model.predict(np.zeros((4, 90, 3), dtype=np.uint8))
    Image.new("RGB", (90, 4)).save(tmp_path / "flat.png")
    with pytest.raises(UserError, match=rf"flat\.png: the image is shown .*{narrow}"):
        model.predict(tmp_path / "flat.png")
    record = {"id": 1, "file_name": "flat.png", "width": 90, "height": 4}
    categories = json.loads(files["annotations"].read_text())["categories"]
    content = {"images": [record], "annotations": [], "categories": categories}
    (tmp_path / "a.json").write_text(json.dumps(content))
    config = SplitConfig(images=tmp_path, annotations=tmp_path / "a.json", format="coco")
    split = read_split("validation", config)
    with pytest.raises(UserError, match=rf"flat\.png: the image is shown .*{narrow}"):
        measure(model, split, 1, 100, no_progress)
    unsized = replace(model.description, preprocessing=ImageSettings("imagenet", None, None, None))
    with pytest.raises(UserError, match=r"as 90 x 4 pixels, .* from 16 pixels on: enlarge it"):
        prepared(unsized, Image.new("RGB", (90, 4)))
