"""What ``d3etr cache`` shows and removes."""

import json
from pathlib import Path

import fsspec
import pytest

from d3etr.cli.main import main
from d3etr.config.location import Url
from d3etr.storage.fetch import fetch_file, fetch_folder


@pytest.fixture(autouse=True)
def fetched(memory: fsspec.AbstractFileSystem) -> None:
    """A folder of two files and a file alone."""
    memory.pipe({"/place/a": b"a" * 1000, "/place/b": b"b" * 500, "/place/c": b"c"})
    memory.pipe("/other/d", b"d" * 2000)
    fetch_folder(Url("memory://place"), ["a", "b"])
    fetch_file(Url("memory://other/d"))


def size(capsys: pytest.CaptureFixture[str]) -> int:
    assert main(["cache", "--json"]) == 0
    return int(json.loads(capsys.readouterr().out)["bytes"])


def test_the_place_and_its_size_are_shown(capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    assert 3500 < size(capsys) < 6000, "copies, and a list of them for each URL"
    assert main(["cache"]) == 0
    assert f"0.0 MB in {cache} (another folder: D3ETR_CACHE)" in capsys.readouterr().out


def test_it_is_emptied_with_what_earlier_versions_kept_and_nothing_else(
    capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    (cache / "objects" / "ab").mkdir(parents=True)
    (cache / "objects" / "ab" / "abcd").write_bytes(bytes(700))
    (cache / "mine").write_text("not fetched")
    before = size(capsys)
    assert main(["cache", "--clear", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["freed_bytes"] == before > 4200
    assert size(capsys) == 0
    assert [path.name for path in cache.iterdir()] == ["mine"]
    copy = fetch_folder(Url("memory://place"), ["a", "b"])["b"]
    assert copy.path.read_bytes() == b"b" * 500
