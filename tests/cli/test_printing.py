"""Names from files of others: shown as what they are, never as what they would do."""

import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from test_links import data_set  # type: ignore[import-not-found]

from d3etr.cli.main import main
from d3etr.cli.progress import progress_bar
from d3etr.text import printable
from d3etr.tracking.compare.tables import Table

EVIL = "cat\x1b[2J\x9b31m\u202egnp.exe\x85"
SHOWN = "cat\\u001b[2J\\u009b31m\\u202egnp.exe\\u0085"


@pytest.mark.parametrize(
    "text",
    [
        "Katze",
        "猫",
        "\u06af\u0631\u0628\u0647\u200c\u0647\u0627",
        "قط",
        "chat d\u2019été",
        "🐈\u200d⬛",
    ],
)
def test_names_of_any_script_stay_as_they_are(text: str) -> None:
    assert printable(text) == text


def test_characters_that_act_are_spelled_out() -> None:
    assert printable(EVIL) == SHOWN
    assert printable("a\nerror: b") == "a\\u000aerror: b"
    assert json.loads(f'"{printable(EVIL)}"') == EVIL, "in JSON it means the same"


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_category_cannot_act_on_the_terminal(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = data_set(tmp_path, "a.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "images" / "a.png")
    file = tmp_path / "a.json"
    content = json.loads(file.read_text())
    content["categories"][0]["name"] = EVIL
    file.write_text(json.dumps(content))
    for command in (["check-data", *options], ["train", "--dry-run", *options]):
        main([*command, *overrides])
        said = "".join(capsys.readouterr())
        assert not set(said) & set("\x1b\x9b\u202e\x85")


@pytest.mark.parametrize("place", [("images", "file_name"), ("categories", "name")])
def test_half_a_character_in_a_name_is_one_problem_of_the_file(
    place: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = data_set(tmp_path, "a.png")
    file = tmp_path / "a.json"
    content = json.loads(file.read_text())
    content[place[0]][0][place[1]] = "\ud800.png"
    file.write_text(json.dumps(content))
    assert main(["check-data", *overrides]) == 1
    assert f"{place[0]}[0]" in capsys.readouterr().out


def test_brackets_in_names_are_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    table = Table("on [a]", ("class", "with [views]", "[/x]"), (("[cat]", "1", "2"),))
    Console(file=shown, width=80).print(table.as_rich())
    assert all(text in shown.getvalue() for text in ("on [a]", "with [views]", "[/x]", "[cat]"))
    monkeypatch.setattr(shown, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", shown)
    with progress_bar() as progress:
        progress("fetching s3://photos/[/a]", 1, 3)
        progress("fetching s3://photos/[/a]", 3, 3)
    assert "s3://photos/[/a]" in shown.getvalue()
