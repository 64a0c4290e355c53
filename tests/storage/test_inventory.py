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
    """A folder of two files and a file with the content of one of them."""
    memory.pipe({"/place/a": b"a" * 1000, "/place/b": b"b" * 500, "/place/c": b"c"})
    memory.pipe("/other/same-as-a", b"a" * 1000)
    fetch_folder(Url("memory://place"), ["a", "b"])
    fetch_file(Url("memory://other/same-as-a"))


def listed(capsys: pytest.CaptureFixture[str]) -> dict[str, int]:
    assert main(["cache", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    return {one["url"]: one["size"] for one in content["urls"]} | {"all": content["bytes"]}


def test_the_list_has_urls_and_sizes(capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    both = {"memory://place": 1500, "memory://other/same-as-a": 1000}
    assert listed(capsys) == both | {"all": 1500}, "equal content is kept once"
    assert main(["cache"]) == 0
    said = capsys.readouterr().out
    assert "2 files  memory://place" in said
    assert str(cache) in said


def test_one_url_is_cleared_and_what_others_need_stays(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["cache", "--clear", "memory://place", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"freed_bytes": 500}
    assert listed(capsys) == {"memory://other/same-as-a": 1000, "all": 1000}
    assert main(["cache", "--clear", "memory://place"]) == 2
    assert "nothing was fetched from memory://place" in capsys.readouterr().err
    assert main(["cache", "--clear", "everything"]) == 0
    capsys.readouterr()
    assert listed(capsys) == {"all": 0}


def test_what_is_no_url_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "--clear", "memory:/place"]) == 2
    assert "did you mean 'memory://place'?" in capsys.readouterr().err
    assert main(["cache", "--clear", "place"]) == 2
    assert "expected a URL" in capsys.readouterr().err


def test_damaged_files_are_found_removed_and_fetched_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["cache", "--verify"]) == 0
    copy = fetch_folder(Url("memory://place"), ["a", "b"]).path("b")
    copy.chmod(0o644)
    copy.write_bytes(b"x" * 500)
    assert main(["cache", "--verify"]) == 1
    assert str(copy) in capsys.readouterr().out
    again = fetch_folder(Url("memory://place"), ["a", "b"])
    assert again.path("b").read_bytes() == b"b" * 500
