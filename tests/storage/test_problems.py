"""Error texts about storage, and how long one waits for them."""

import subprocess
import sys
import time
from collections.abc import Callable

import fsspec
import pytest
from file_server import FileServer

from d3etr.config.location import Url
from d3etr.errors import UserError
from d3etr.storage import remote
from d3etr.storage.fetch import fetch_file, fetch_folder
from d3etr.storage.problems import MissingFileError, UnreachableError, explained
from d3etr.storage.remote import ensure_reachable


def text_of(kind: type[UserError], do: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        do()
    assert type(caught.value) is kind
    return str(caught.value)


def test_an_unknown_kind_of_url_gets_a_suggestion() -> None:
    assert "did you mean 'abfs://'?" in text_of(UserError, lambda: fetch_file(Url("abfss2://a/b")))
    text = text_of(UserError, lambda: fetch_file(Url("s4x://a/b")))
    assert "unknown kind of URL 's4x://'; for example s3://, gs:// or https://" in text


@pytest.mark.slow
def test_a_missing_package_is_named_with_pips_command() -> None:
    code = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from d3etr.config.location import Url; from d3etr.storage.fetch import fetch_file\n"
        "fetch_file(Url('s3://bucket/weights'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "needs a package that is not installed here (Install s3fs" in done.stderr


def test_nobody_at_the_address_is_told_with_the_reason() -> None:
    text = text_of(UnreachableError, lambda: fetch_file(Url("http://127.0.0.1:1/a?sig=hidden")))
    assert text.startswith("http://127.0.0.1:1/a cannot be read (ConnectionRefusedError")
    assert "hidden" not in text


def test_a_silent_storage_is_given_up(
    memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(type(memory), "info", lambda self, path: time.sleep(60))
    begun = time.monotonic()
    text = text_of(UnreachableError, lambda: fetch_file(Url("memory://place/a")))
    assert "memory://place/a: no answer within 0.2 seconds" in text
    assert time.monotonic() - begun < 5


class NoCredentialsError(Exception):
    """Named like botocore's."""


class StatusError(Exception):
    """An HTTP answer, as aiohttp has it."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("url", "error", "kind", "text"),
    [
        ("s3://b/a", NoCredentialsError("none"), UserError, "there are none.*AWS_ACCESS_KEY_ID"),
        ("s3://b/a", PermissionError("Forbidden"), UserError, "access refused .*Forbidden"),
        ("gs://b/a", PermissionError("no"), UserError, "GOOGLE_APPLICATION_CREDENTIALS"),
        ("s3://b/a", FileNotFoundError("b/a"), MissingFileError, "s3://b/a does not exist"),
        ("s3://b/a", TimeoutError("slow"), UnreachableError, "TimeoutError: slow"),
        (
            "https://h/a",
            caused(FileNotFoundError("a"), StatusError(404)),
            MissingFileError,
            "https://h/a does not exist",
        ),
        (
            "https://h/a",
            caused(FileNotFoundError("a"), StatusError(403)),
            UserError,
            "access refused",
        ),
        (
            "https://h/a",
            caused(FileNotFoundError("a"), StatusError(503)),
            UnreachableError,
            "status 503",
        ),
    ],
)
def test_every_failure_says_what_to_do(
    url: str, error: Exception, kind: type[UserError], text: str
) -> None:
    found = explained(Url(url), error)
    assert type(found) is kind
    with pytest.raises(UserError, match=text):
        raise found


def test_a_folder_that_is_not_there_is_told_apart_from_missing_files(
    memory: fsspec.AbstractFileSystem,
) -> None:
    memory.pipe("/place/a", b"a")
    assert fetch_folder(Url("memory://place"), ["b"]) == {}
    text = text_of(MissingFileError, lambda: fetch_folder(Url("memory://plcae"), ["a"]))
    assert text == "memory://plcae is no folder with files in it: check the URL"


def test_everything_out_of_reach_is_listed_at_once(
    memory: fsspec.AbstractFileSystem, server: FileServer
) -> None:
    memory.pipe("/place/a", b"a")
    ensure_reachable([("x", Url("memory://place/a"))], [("y", Url("memory://place"))])
    files = [("w", Url("memory://place/b")), ("x", Url(f"{server.url}/c"))]
    folders = [("y", Url("memory://plcae")), ("z", Url("http://127.0.0.1:1/"))]
    text = text_of(UserError, lambda: ensure_reachable(files, folders))
    assert [line.partition(":")[0] for line in text.splitlines()] == ["w", "x", "y"]
