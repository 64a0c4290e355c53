"""The comparison's page: whole, self-contained, escaped, with everything that is there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tracked_folders import write_weights

from d3etr.config.tree import Config
from d3etr.data.digit_scenes.folder import scenes_folder, write_digit_scenes
from d3etr.tracking.compare import compare
from d3etr.tracking.compare.page import as_page, curves_of, write_page
from d3etr.tracking.compare.pictures import Pictures, look_at_pictures
from d3etr.tracking.figures.images import Objects, Scene
from d3etr.tracking.figures.look import which_are_right

MakeConfig = Callable[..., Config]
MakeRun = Callable[..., Path]
DIGITS = tuple((digit, str(digit)) for digit in range(10))
DISTILLED: dict[str, Any] = {
    "teacher": {"weights": "teacher.safetensors"},
    "distillation": {"method": "d3etr"},
}
VOID = {"meta", "img"}


class Elements(HTMLParser):
    """Names and attributes of a page's elements; complains about wrong nesting."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def runs(make_config: MakeConfig, make_run: MakeRun, tmp_path: Path) -> Path:
    """Two seeds of a plain student, one of a D3ETR student, and a teacher."""
    for config, mAP in (
        (make_config("digits-plain", 0), 0.20),
        (make_config("digits-plain", 1), 0.22),
        (make_config("digits-d3etr", 0, **DISTILLED), 0.35),
        (
            make_config("digits-teacher", 0, run={"role": "teacher"}, optimisation={"steps": 90}),
            0.60,
        ),
    ):
        folder = make_run(config, mAP, config.optimisation.steps)
        summary = {"mAP": mAP, "AP50": mAP, "AP/0": mAP, "AP/<7>": mAP / 2, "steps": 20}
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        write_weights(folder / "weights.safetensors", mAP, classes=DIGITS)
    return tmp_path / "runs"


LABELS = ("plain student · digits", "D3ETR student · digits", "teacher · digits")


def picture(*detections: Objects | None) -> Scene:
    truth = Objects(((1.0, 2.0, 9.0, 12.0),), ("<b>7</b>",))
    found = dict(zip(LABELS, detections, strict=False))
    return Scene(np.full((32, 32, 3), 99, np.uint8), truth, found, "a&b.png")


def test_the_page_has_every_part_and_loads_nothing(runs: Path, tmp_path: Path) -> None:
    comparison = compare(["digits-plain", "digits-d3etr", "digits-teacher"], runs)
    found = Objects(((1.0, 2.0, 9.0, 12.0),), ("<b>7</b>",), (0.61,), (True,))
    pictures = Pictures((picture(found, None, found),), ("No images: of <x>",))
    path = write_page(comparison, tmp_path / "page" / "compare.html", pictures)
    page = path.read_text(encoding="utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["compare.html"]
    for part in (
        "21.0 ± 1.4",
        "Validation mAP during training",
        "The same validation images",
        "Each class",
        "Settings that differ",
        "distillation",
        "digits-plain-00000001",
        "No images: of &lt;x&gt;",
    ):
        assert part in page
    assert "distillation.method" in page
    text = re.sub(r"data:image/[a-z+]+;base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.search(r"https?://|//[a-z]|<script|<link|@import|@font-face|url\(", text)
    elements = Elements(page).found
    for _, attributes in elements:
        assert "href" not in attributes and not any(name.startswith("on") for name in attributes)
        assert (attributes.get("src") or "data:image/").startswith("data:image/")
    policy = [a["content"] for name, a in elements if name == "meta" and "http-equiv" in a]
    assert policy and "default-src 'none'" in str(policy[0])


def test_what_cannot_be_seen_can_be_heard(runs: Path) -> None:
    found = Objects(((1.0, 2.0, 9.0, 12.0),) * 2, ("7", "7"), (0.61, 0.4), (True, False))
    comparison = compare(["digits-plain", "digits-d3etr"], runs)
    page = as_page(comparison, Pictures((picture(found, None),), ()))
    elements = Elements(page).found
    spoken = [a.get("alt") for name, a in elements if name == "img"]
    assert "plain student · digits: 7 0.61, (7 0.40)" in spoken and all(spoken)
    assert {a.get("scope") for name, a in elements if name == "th"} == {"row", "col"}
    assert ("html", {"lang": "en"}) in elements
    assert "1 of 1 found, 1 wrong" in page and "no weights" in page


def test_names_of_classes_files_and_settings_are_escaped(runs: Path) -> None:
    comparison = compare(["digits-plain", "digits-d3etr"], runs)
    evil = replace(picture(None, None), title="a&b.png\x1b[2J\u202e<i>")
    page = as_page(comparison, Pictures((evil,), ()))
    assert "a&amp;b.png\\u001b[2J\\u202e&lt;i&gt;" in page and not {"\x1b", "\u202e"} & set(page)
    assert "&lt;7&gt;" in page and "<7>" not in page
    assert "&lt;b&gt;7&lt;/b&gt;" in page and "<b>" not in page


def test_a_teacher_is_a_level_among_its_students_and_a_curve_alone(runs: Path) -> None:
    together = compare(["digits-teacher", "digits-plain"], runs)
    teacher, plain = curves_of(together)
    assert teacher.level and teacher.values[-1] == 0.6 and not plain.level
    assert plain.steps == [10, 20] and any(plain.deviations)
    page = as_page(together)
    assert "A teacher is the level that it reached" in page
    assert "The band is one deviation" in page
    alone = compare(["digits-teacher"], runs)
    [teacher] = curves_of(alone)
    assert not teacher.level and teacher.steps[-1] == 90 and not any(teacher.deviations)
    assert "A teacher is the level" not in as_page(alone) and "The band" not in as_page(alone)


def test_a_page_without_measurements_says_so(runs: Path) -> None:
    (runs / "digits-d3etr-00000000" / "journal.jsonl").write_text("", encoding="utf-8")
    page = as_page(compare(["digits-d3etr"], runs))
    assert "No run was measured on the validation split while it trained" in page


def test_the_same_images_are_shown_to_every_run(
    runs: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d3etr.tracking.figures.look.THRESHOLD", 0.0)
    scenes = make_config().data.digit_scenes
    assert scenes is not None
    write_digit_scenes(scenes)
    comparison = compare(["digits-plain", "digits-d3etr"], runs)
    pictures = look_at_pictures(comparison, 2)
    assert not pictures.missing and len(pictures.pictures) == 2
    for shown in pictures.pictures:
        assert shown.image.shape == (32, 32, 3)
        assert shown.truth.names and len(shown.detections) == 2
        assert all(found is not None and found.names for found in shown.detections.values())
    page = as_page(comparison, pictures)
    assert page.count("<figure>") == 6 and "The same validation images" in page


def test_what_is_not_there_is_said_and_nothing_is_made(runs: Path, make_config: MakeConfig) -> None:
    config = make_config()
    scenes = config.data.digit_scenes
    assert scenes is not None
    comparison = compare(["digits-plain", "digits-d3etr"], runs)
    pictures = look_at_pictures(comparison, 2)
    [missing] = pictures.missing
    assert "the digit scenes are not in" in missing and "render-digit-scenes" in missing
    assert not pictures.pictures and not scenes.root.exists()
    assert "the digit scenes are not in" in as_page(comparison, pictures)

    write_digit_scenes(scenes)
    (runs / "digits-d3etr-00000000" / "weights.safetensors").unlink()
    first = sorted((scenes_folder(scenes) / "images" / "validation").iterdir())[0]
    first.write_bytes(b"broken")
    pictures = look_at_pictures(comparison, 4)
    assert [shown.detections[LABELS[1]] for shown in pictures.pictures] == [None] * 3
    assert any("No detections of D3ETR student" in sentence for sentence in pictures.missing)
    assert any(first.name in sentence for sentence in pictures.missing)


def test_a_detection_is_right_once_per_object() -> None:
    truth = Objects(((0.0, 0.0, 10.0, 10.0), (20.0, 0.0, 30.0, 10.0)), ("3", "5"))
    boxes = ((0.0, 0.0, 10.0, 9.0), (0.0, 1.0, 10.0, 10.0), (20.0, 0.0, 30.0, 10.0))
    assert which_are_right(boxes, ("3", "3", "3"), truth) == (True, False, False)
    assert which_are_right(boxes, ("5", "3", "5"), truth) == (False, True, True)
    assert which_are_right(((8.0, 0.0, 18.0, 10.0),), ("3",), truth) == (False,)
    assert which_are_right((), (), truth) == () and which_are_right(
        boxes[:1], ("3",), Objects((), ())
    ) == (False,)
