"""The command line: what it says, what it prints, how it ends."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from d3etr.cli.main import COMMANDS, main
from d3etr.errors import RunFailedError, UserError

SCENES = ("train_images=4", "validation_images=3", "test_images=3")


def picture(path: Path, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def coco_set(folder: Path, names: tuple[str, ...] = ("tree", "cat", "dog")) -> tuple[Path, Path]:
    """Two pictures with one object each; returns (images, annotations)."""
    images = folder / "images"
    images.mkdir()
    entries = []
    for index in (1, 2):
        picture(images / f"{index}.png", index)
        entries.append({"id": index, "file_name": f"{index}.png", "width": 56, "height": 40})
    ids = {"cat": 7, "dog": 90, "tree": 3, "car": 4}
    content = {
        "images": entries,
        "categories": [{"id": ids[name], "name": name} for name in names],
        "annotations": [
            {
                "id": index,
                "image_id": index,
                "category_id": ids[names[0]],
                "bbox": [4, 4, 20, 20],
                "area": 400,
                "iscrowd": 0,
            }
            for index in (1, 2)
        ],
    }
    (folder / "annotations.json").write_text(json.dumps(content))
    return images, folder / "annotations.json"


def test_help_is_instant_and_lists_every_command(repository: Path) -> None:
    slow = ["torch", "numpy", "ray", "mlflow", "pydantic", "rich"]
    code = (
        "import sys; from d3etr.cli.main import build_parser; build_parser().format_help(); "
        f"assert not [name for name in {slow} if name in sys.modules]"
    )
    subprocess.run([sys.executable, "-c", code], cwd=repository / "platform", check=True)


def test_python_m_runs_the_commands(repository: Path) -> None:
    command = [sys.executable, "-m", "d3etr", "--help"]
    done = subprocess.run(
        command, cwd=repository / "platform", check=True, capture_output=True, text=True
    )
    assert all(command.name in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_explains_itself(command: object, capsys: pytest.CaptureFixture[str]) -> None:
    name = command.name  # type: ignore[attr-defined]
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: d3etr {name}" in text
    assert "JSON" in text, "every command can talk to a machine"


def test_a_user_mistake_is_one_text_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "nowhere.safetensors", "picture.png"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert "nowhere.safetensors" in said.err
    assert "Traceback" not in said.err
    assert said.out == ""


def test_predict_finds_pictures_in_folders_and_draws_them(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        picture(tmp_path / name / "same.png")
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    output = tmp_path / "out"
    arguments = [tiny_weights, tmp_path / "a", tmp_path / "b" / "same.png"]
    options = ["--output", str(output), "--threshold", "0", "--json"]
    assert main(["predict", *map(str, arguments), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [Path(entry["image"]).parent.name for entry in found] == ["a", "b"]
    assert len(found[0]["detections"]) == 15
    drawn = [Path(entry["picture"]) for entry in found]
    assert sorted(output.iterdir()) == sorted(drawn), "one picture each, nothing half-written"
    assert all(Image.open(path).format == "PNG" for path in drawn)


def test_predict_prints_a_line_per_object(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = picture(tmp_path / "a.png")
    assert main(["predict", str(tiny_weights), str(path), "--threshold", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{path}: 15 objects"
    assert len(lines) == 16


def test_predict_says_when_a_folder_has_no_pictures(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(tiny_weights), str(tmp_path)]) == 2
    assert "no pictures in this folder" in capsys.readouterr().err


def test_predict_says_when_it_cannot_write(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = picture(tmp_path / "a.png")
    assert main(["predict", str(tiny_weights), str(path), "--output", str(path)]) == 2
    assert f"cannot write {path}" in capsys.readouterr().err


def folder_of_pictures(folder: Path) -> Path:
    """Two pictures, and what else lies in folders under names of pictures."""
    folder.mkdir()
    for index in (1, 2):
        picture(folder / f"{index}.png", index)
    (folder / "._1.png").write_bytes(b"\x00\x05\x16\x07" + bytes(60))
    (folder / "Thumbs.db").write_bytes(b"x")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    return folder


def test_predict_leaves_out_what_is_no_picture_in_a_folder_and_says_so(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of_pictures(tmp_path / "mac")
    assert main(["predict", str(tiny_weights), str(folder), "--json"]) == 0
    output = capsys.readouterr()
    entries = json.loads(output.out)
    assert [Path(entry["image"]).name for entry in entries] == ["1.png", "2.png"]
    assert all(entry["error"] is None for entry in entries)
    assert "left out 1 files that macOS stores" in output.err
    assert "left out 2 folders or devices" in output.err


def test_predict_takes_every_kind_of_picture_that_data_sets_may_have(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = Image.open(picture(tmp_path / "a.png"))
    for name in ("b.gif", "c.avif", "d.jfif", "e.jp2", "f.ppm"):
        image.save(tmp_path / name)
    assert main(["predict", str(tiny_weights), str(tmp_path), "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [Path(entry["image"]).name[0] for entry in entries] == [*"abcdef"]


def test_predict_answers_the_good_pictures_and_names_the_bad_ones(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of_pictures(tmp_path / "some")
    (folder / "0.png").write_bytes((folder / "1.png").read_bytes()[:900])
    (folder / "3.png").symlink_to("nowhere")
    (tmp_path / "empty").mkdir()
    given: list[object] = [folder, folder / "1.png", tmp_path / "empty", tmp_path / "none.png"]
    given.append("https://u:secret@h.invalid/a.png")
    arguments = ["predict", str(tiny_weights), *map(str, given), "--threshold", "0"]
    output = tmp_path / "drawn"
    assert main([*arguments, "--json", "--output", str(output)]) == 2
    said = capsys.readouterr()
    entries = json.loads(said.out)
    assert len(entries) == 7, "one that is given twice is answered twice"
    found = {entry["image"]: entry for entry in entries}
    assert len(found[str(folder / "1.png")]["detections"]) == 15
    assert len(found[str(folder / "2.png")]["detections"]) == 15
    assert {path.name for path in output.iterdir()} == {"1.png", "2.png"}
    for name, text in (("0.png", "truncated"), ("3.png", "no such image file")):
        assert text in found[str(folder / name)]["error"]
        assert f"{folder / name}: " in said.err
    assert f"{tmp_path / 'empty'}: no pictures in this folder" in said.err
    assert "image is the URL https://h.invalid/a.png" in said.err
    assert "5 of those named above could not be used" in said.err
    assert main(arguments) == 2, "as text too"
    assert f"{folder / '2.png'}: 15 objects" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_predict_prints_names_that_are_no_text(
    encoding: str, tiny_weights: Path, tmp_path: Path, repository: Path
) -> None:
    names = [os.fsdecode(b"\xff\xfe.png"), "\u00e9\u4e09.png"]
    for name in names:
        picture(tmp_path / name)
    command = [sys.executable, "-m", "d3etr", "predict", str(tiny_weights), str(tmp_path)]
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"}
    for options in ([], ["--json"]):
        done = subprocess.run(
            [*command, *options],
            cwd=repository / "platform",
            env=environment,
            capture_output=True,
            check=True,
        )
    assert {Path(entry["image"]).name for entry in json.loads(done.stdout)} == set(names)


def test_warnings_of_libraries_come_without_their_path(
    tiny_weights: Path, tmp_path: Path, repository: Path
) -> None:
    Image.new("RGB", (20, 16)).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\0x")
    done = subprocess.run(
        [sys.executable, "-m", "d3etr", "predict", str(tiny_weights), str(tmp_path / "a.jpg")],
        cwd=repository / "platform",
        check=True,
        capture_output=True,
        text=True,
    )
    assert "warning: Corrupt EXIF data" in done.stderr
    assert ".py" not in done.stderr


def test_predict_never_writes_over_a_picture_that_it_reads(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = picture(tmp_path / "a.png")
    before = path.read_bytes()
    assert main(["predict", str(tiny_weights), str(tmp_path), "--output", str(tmp_path)]) == 2
    assert "a.png is a picture that is read; choose another folder" in capsys.readouterr().err
    assert path.read_bytes() == before


@pytest.mark.parametrize("threshold", ["50", "-0.1", "nan", "half", "inf", ""])
def test_predict_wants_a_threshold_from_0_to_1(
    threshold: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["predict", "w.safetensors", "a.png", f"--threshold={threshold}"])
    assert stop.value.code == 2
    assert "--threshold: found" in capsys.readouterr().err


def attention(weights: Path, folder: Path) -> list[str]:
    """The command on a run of ``weights`` whose validation images are in ``folder``."""
    images, annotations = coco_set(folder)
    split = {"images": str(images), "annotations": str(annotations)}
    preprocessing = {"normalisation": "per_image", "shortest_side": None, "longest_side": None}
    data = {"train": split, "validation": split, "preprocessing": preprocessing}
    run = folder / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump({"data": data, "optimisation": {"steps": 9}}))
    shutil.copy(weights, run / "weights.safetensors")
    return ["attention", str(run), "--output", str(folder / "attention.png"), "--json"]


def test_attention_draws_readable_images_and_names_the_others(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = attention(tiny_weights, tmp_path)
    assert main(command) == 0
    assert len(json.loads(capsys.readouterr().out)["objects"]) == 2
    damaged = tmp_path / "images" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:500])
    assert main(command) == 2
    said = capsys.readouterr()
    assert [entry["name"] for entry in json.loads(said.out)["objects"]] == ["tree"]
    assert f"{damaged}: cannot be decoded: it is truncated" in said.err
    assert (tmp_path / "attention.png").is_file()
    (tmp_path / "images" / "2.png").write_bytes(damaged.read_bytes())
    assert main(command) == 2
    assert "no readable image with an object" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["export", "w.safetensors", "x.onnx"], "expected a name that ends with .safetensors"),
        (["export", "w.safetensors", "s3://b/x.safetensors"], "expected a file on this machine"),
        (["export", "w.safetensors", "x"], "no other format is written"),
        (["import-weights", "w.pth", "x.pth"], "expected a name that ends with .safetensors"),
        (["import-weights", "w.pth", "x.safetensors", "--temperature", "nan"], "above 0"),
        (["import-weights", "w.pth", "x.safetensors", "--heads", "9" * 5000], "of at least 1"),
        (["compare", "a", "--html", "x.pdf"], "expected a name that ends with .html or .htm"),
        (["compare", "a", "--html", "https://h.invalid/x.html"], "expected a file on this"),
        (["attention", "a", "--output", "x.jpg"], "expected a name that ends with .png"),
        (["evaluate", "w", "--annotations", "a", "--images", "i", "--workers", "65"], "0 to 64"),
        (["evaluate", "w", "--annotations", "a", "--images", "i", "--workers=-1"], "0 to 64"),
        (["evaluate", "w", "--annotations", "a", "--images", "i", "--batch-size", "0"], "at least"),
    ],
)
def test_arguments_are_judged_before_anything_is_read(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert text in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("command", ["export", "import-weights"])
def test_weights_are_not_written_over_those_that_are_read(
    command: str, tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "weights.safetensors"
    shutil.copy(tiny_weights, weights)
    (tmp_path / "link.safetensors").symlink_to(weights)
    assert main([command, str(weights), str(tmp_path / "link.safetensors")]) == 2
    assert "is the file that is read" in capsys.readouterr().err
    assert weights.read_bytes() == tiny_weights.read_bytes()


def test_a_figure_that_cannot_be_written_is_a_user_mistake(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = attention(tiny_weights, tmp_path)
    (tmp_path / "file").write_text("")
    command[3] = str(tmp_path / "file" / "attention.png")
    assert main(command) == 2
    assert f"cannot write {command[3]}" in capsys.readouterr().err


def test_predict_prints_no_character_that_acts_on_a_terminal(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = picture(tmp_path / "a\x1b[31m\u202e\n.png")
    for options in ([], ["--json"]):
        assert main(["predict", str(tiny_weights), str(path), *options]) == 0
        text = capsys.readouterr().out
        assert "\x1b" not in text and "\u202e" not in text
    assert json.loads(text)[0]["image"] == str(path)


def evaluation(weights: Path, images: Path, annotations: Path) -> list[str]:
    places = ["--images", str(images), "--annotations", str(annotations), "--workers", "0"]
    return ["evaluate", str(weights), *places]


def test_evaluate_gives_cocos_numbers(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, annotations = coco_set(tmp_path)
    assert main([*evaluation(tiny_weights, images, annotations), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == 2
    assert 0 <= result["metrics"]["mAP"] <= 1
    assert main(evaluation(tiny_weights, images, annotations)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("mAP ")
    assert "AP_large    no such objects" in lines, "a value of 0 would be another statement"


@pytest.mark.parametrize("names", [("cat", "dog"), ("tree", "car", "dog")])
def test_evaluate_refuses_other_categories(
    names: tuple[str, ...], tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, annotations = coco_set(tmp_path, names)
    assert main(evaluation(tiny_weights, images, annotations)) == 2
    assert "Expected the same categories in the same order" in capsys.readouterr().err


def test_render_digit_scenes_says_where_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [part for value in SCENES for part in ("--set", value)]
    arguments = ["render-digit-scenes", "--root", str(tmp_path), *settings, "--json"]
    assert main(arguments) == 0
    splits = json.loads(capsys.readouterr().out)["splits"]
    assert set(splits) == {"train", "validation", "test"}
    assert len(list(Path(splits["train"]["images"]).iterdir())) == 4


def test_render_digit_scenes_refuses_settings_that_are_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["render-digit-scenes", "--set", "trian_images=3"]) == 2
    assert "did you mean 'train_images'?" in capsys.readouterr().err


def test_check_data_ends_with_1_when_training_would_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, annotations = coco_set(tmp_path)
    place = [str(images), str(annotations)]
    arguments = ["check-data", "--train", *place, "--validation", *place]
    assert main([*arguments, "--json"]) == 0
    json.loads(capsys.readouterr().out)
    (images / "2.png").unlink()
    assert main(arguments) == 1
    assert "ERROR" in capsys.readouterr().out


def test_check_data_wants_to_know_what(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-data"]) == 2
    assert "nothing to check: name a recipe" in capsys.readouterr().err


def test_a_dry_run_prints_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sets = ["--set", "data.digit_scenes={}", "--set", "optimisation.steps=5"]
    sets += ["--set", "student.detector.backbone.norm=group"]  # needs no weights
    assert main(["train", *sets, "--dry-run"]) == 0
    assert "5 steps" in capsys.readouterr().out
    assert main(["train", *sets, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 5
    assert list(tmp_path.iterdir()) == []


def test_train_lists_every_mistake_in_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("data: {digit_scene: {}}\noptimisation: {stepz: 3}\n")
    assert main(["train", str(recipe)]) == 2
    said = capsys.readouterr().err
    assert "did you mean 'digit_scenes'?" in said
    assert "did you mean 'steps'?" in said


def test_resuming_a_run_that_is_not_there_names_those_that_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine-0123abcd").mkdir()
    (tmp_path / "mine-0123abcd" / "config.yaml").write_text("")
    arguments = ["train", "--resume", "mein", "--set", f"run.output={tmp_path}"]
    assert main(arguments) == 2
    assert "mine-0123abcd" in capsys.readouterr().err


def test_comparing_nothing_that_exists_is_a_user_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "nothing", "--output-root", str(tmp_path)]) == 2
    assert "no run 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("fix this"), 2, "error: fix this\n"),
        (RunFailedError("worker 1 died"), 1, "error: worker 1 died\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (KeyboardInterrupt("go on with --resume"), 130, "go on with --resume\n"),
    ],
)
def test_every_end_has_its_exit_code_and_text(
    error: BaseException,
    code: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("d3etr.data.checks.check_data", fail)
    sets = ["--set", "data.digit_scenes={}"]
    assert main(["check-data", *sets]) == code
    assert capsys.readouterr().err == text


def test_errors_of_the_program_itself_keep_their_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("d3etr.data.checks.check_data", fail)
    with pytest.raises(ZeroDivisionError):
        main(["check-data", "--set", "data.digit_scenes={}"])


WAITS = """
import os, sys
from d3etr.cli import program
try:
    program(["--version"])
except SystemExit:
    sys.exit(f"{os.environ['GOMP_SPINCOUNT']} {'torch' in sys.modules}")
"""


@pytest.mark.parametrize("own", [None, "0"])
def test_waiting_threads_leave_their_core_to_other_programs(own: str | None) -> None:
    """OpenMP reads this when PyTorch is imported; the user's own value stays."""
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    environment |= {} if own is None else {"GOMP_SPINCOUNT": own}
    line = [sys.executable, "-c", WAITS]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == f"{own or '20000'} False"
