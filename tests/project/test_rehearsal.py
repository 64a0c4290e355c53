"""A project from ``d3etr init`` to the comparison: its README's commands, with a few steps each."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from format_writers import WRITERS

from d3etr.cli.main import main
from d3etr.config.data import DigitScenesConfig
from d3etr.config.load import load_config
from d3etr.data.digit_scenes import write_digit_scenes
from d3etr.project.recipes import ROLES

SCENES = {"train_images": 20, "validation_images": 4, "test_images": 4, "image_size": 48}
SHORT = (
    *("optimisation.steps=4", "optimisation.schedule.warmup_steps=1", "data.workers=0"),
    *("student.detector.queries=12", "evaluation.every_steps=2", "tracking.enabled=false"),
    "run.checkpoint_every_steps=4",
)


def shell(text: str) -> list[list[str]]:
    """The commands of a README, ``$(ls ...)`` replaced by what it would print."""
    (block,) = re.findall(r"```sh\n(.*?)```", text, re.S)
    lines = []
    for line in block.splitlines():
        for pattern in re.findall(r"\$\(ls -t (\S+) \| head -n 1\)", line):
            line = re.sub(r"\$\([^)]*\)", f"newest:{pattern}", line, count=1)
        lines.append(shlex.split(line, comments=True))
    return [words for words in lines if words]


def newest(word: str) -> str:
    name, _, pattern = word.partition(":")
    return str(next(Path().glob(pattern))) if name == "newest" else word


@pytest.mark.slow
def test_the_commands_of_a_project_work_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = DigitScenesConfig(root=tmp_path, minimum_scale=16, maximum_scale=40, **SCENES)
    scenes = write_digit_scenes(config)
    WRITERS["yolo"]({"train": scenes["train"]}, tmp_path / "photos")
    assert main(["init", "photos", "--minutes", "60"]) == 0
    project = tmp_path / "photos-project"
    for role in ROLES:
        checked = load_config(project / f"{role}.yaml")
        assert checked.data.train is not None
        assert Path(str(checked.data.train.annotations)).is_file()
    text = (project / "README.md").read_text()
    assert "images of 'train' were divided" in text and "measured on this machine" in text
    with pytest.raises(FileExistsError):
        project.mkdir()
    monkeypatch.chdir(project)
    photo = next((tmp_path / "photos").rglob("*.png"))
    for words in shell(text):
        assert words[0] == "d3etr"
        more = []
        if words[1] == "train":
            more = ["--launcher", "local", *(f"--set={text}" for text in SHORT)]
        arguments = [newest(word).replace("PHOTO.jpg", str(photo)) for word in words[1:]]
        assert main([*arguments, *more]) == 0, (words, capsys.readouterr().err)
    compared = capsys.readouterr().out
    assert all(name in compared for name in ("plain", "inherited", "distilled"))
    assert yaml.safe_load((project / "distilled.yaml").read_text())["extends"] == "base.yaml"
