"""Files from storage: fetched once, found again, noticed when they change."""

import errno
import logging
import signal
import threading
import time
from pathlib import Path

import fsspec
import pytest
from file_server import FileServer, fetching

from d3etr.config.location import Url
from d3etr.errors import UserError
from d3etr.files import sha256
from d3etr.storage import remote
from d3etr.storage.fetch import fetch_file, fetch_folder, local_file
from d3etr.storage.problems import MissingFileError, UnreachableError
from d3etr.storage.remote import Version


def write(folder: Path, count: int, size: int = 100) -> list[str]:
    """Files of different content; returns their names."""
    names = [f"{number}.bin" for number in range(count)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(bytes([number % 256]) * size)
    return names


def copies(cache: Path) -> list[Path]:
    """Every copy in the cache."""
    return [path for path in cache.rglob("*-*") if path.is_file() and "partial" not in path.name]


def content(url: str) -> bytes:
    with local_file(Url(url)) as file:
        return file.read_bytes()


@pytest.mark.parametrize(
    ("said", "asked_again", "changed"),
    [
        ({"ETag": "1", "url": "https://h/a?signed=x"}, {"url": "https://h/a?signed=y"}, "ETag"),
        ({"mtime": 1, "time": 5, "uid": 0}, {"time": 6}, "mtime"),
        ({"modificationTime": 1, "accessTime": 5}, {"accessTime": 6}, "modificationTime"),
        ({"etag": "1", "last_accessed_on": 5}, {"last_accessed_on": 6}, "etag"),
    ],
)
def test_a_version_is_of_the_file_not_of_the_question(
    said: dict[str, object], asked_again: dict[str, object], changed: str
) -> None:
    said = {"name": "a", "size": 7, "type": "file"} | said
    assert Version.of(said) == Version.of(said | asked_again)
    assert Version.of(said) != Version.of(said | {changed: "other"})
    assert Version.of(said) != Version.of(said | {"size": 8})


def test_a_path_is_given_back_and_makes_no_cache(tmp_path: Path, cache: Path) -> None:
    with local_file(tmp_path / "anything") as file:
        assert file == tmp_path / "anything"
    assert not cache.exists()


def test_a_file_is_fetched_once(server: FileServer, served: Path, cache: Path) -> None:
    (served / "a.bin").write_bytes(b"abc")
    for _ in range(3):
        with local_file(Url(f"{server.url}/a.bin")) as file:
            assert file.read_bytes() == b"abc"
            assert cache in file.parents
    assert server.asked["GET", "/a.bin"] == 1
    assert not list(cache.rglob("partial-*"))


@pytest.mark.parametrize("kind", ["memory", "file", "http"])
def test_every_kind_of_storage_notices_a_change(
    kind: str,
    memory: fsspec.AbstractFileSystem,
    server: FileServer,
    served: Path,
) -> None:
    places = {"memory": "memory://place", "file": f"file://{served}", "http": server.url}
    url = f"{places[kind]}/a.bin"

    def put(what: bytes) -> None:
        if kind == "memory":
            memory.pipe("/place/a.bin", what)
        else:
            time.sleep(1.1)  # the resolution of Last-Modified
            (served / "a.bin").write_bytes(what)

    put(b"one")
    assert content(url) == b"one"
    with local_file(Url(url)) as old:
        put(b"two")
    assert content(url) == b"two"
    assert old.read_bytes() == b"one", "who reads the old content goes on reading it"


def test_a_folder_gives_what_is_asked_for_and_leaves_the_rest(
    server: FileServer, served: Path, cache: Path
) -> None:
    write(served, 5)
    (served / "below").mkdir()
    (served / "below" / "with space #1.bin").write_bytes(b"deep")
    names = ["1.bin", "below/with space #1.bin", "nowhere.bin"]
    fetched = fetch_folder(Url(server.url), names)
    assert set(fetched) == set(names[:2])
    assert fetched["below/with space #1.bin"].read_bytes() == b"deep"
    assert server.fetched() == 2 + 1, "HTTP looks for what is missing by HEAD and then by GET"
    assert len(copies(cache)) == 2


def test_a_folder_is_looked_up_with_what_is_below_it(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe({f"/place/below/{n}.bin": bytes([n]) for n in range(5)})
    memory.pipe("/place/top.bin", b"t")
    names = ["below/3.bin", "top.bin", "below/9.bin", "other/1.bin"]
    fetched = fetch_folder(Url("memory://place"), names)
    assert set(fetched) == {"below/3.bin", "top.bin"}
    assert fetched["below/3.bin"].read_bytes() == bytes([3])


def test_who_waited_for_another_does_not_fetch_again(server: FileServer, served: Path) -> None:
    names = write(served, 12)
    server.delay = 0.05
    together = threading.Barrier(4)

    def fetch() -> None:
        together.wait()
        assert len(fetch_folder(Url(server.url), names)) == 12

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fetch_folder(Url(server.url), names)
    assert server.fetched() == 12


@pytest.mark.parametrize("damage", ["cut off", "removed"])
def test_a_damaged_copy_is_fetched_again(damage: str, server: FileServer, served: Path) -> None:
    names = write(served, 2)
    copy = fetch_folder(Url(server.url), names)["1.bin"]
    copy.chmod(0o644)
    copy.unlink() if damage == "removed" else copy.write_bytes(b"x" * 40)
    assert fetch_folder(Url(server.url), names)["1.bin"].read_bytes() == bytes([1]) * 100
    assert server.asked["GET", "/1.bin"] == 2
    assert server.asked["GET", "/0.bin"] == 1


@pytest.mark.slow
def test_processes_that_ask_at_once_fetch_once(
    server: FileServer, served: Path, cache: Path
) -> None:
    names = write(served, 20, size=3000)
    server.delay = 0.01
    processes = [fetching(server.url, names, cache) for _ in range(3)]
    for process in processes:
        said, errors = process.communicate(timeout=60)
        assert said == "20\n", errors
    assert server.fetched() == 20


@pytest.mark.slow
def test_a_fetch_that_was_killed_goes_on_where_it_was(
    server: FileServer, served: Path, cache: Path
) -> None:
    names = write(served, 60, size=4000)
    server.delay = 0.1
    killed = fetching(server.url, names, cache)
    deadline = time.monotonic() + 60
    while len(copies(cache)) < 10:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    complete = len(copies(cache))
    assert list(cache.rglob("partial-*")), "it was in the middle of something"
    assert complete < 60
    before, server.delay = server.fetched(), 0.0
    fetched = fetch_folder(Url(server.url), names)
    assert [sha256(fetched[name]) for name in names] == [sha256(served / n) for n in names]
    assert server.fetched() - before == 60 - complete, "what was complete is kept"
    assert not list(cache.rglob("partial-*"))


def test_short_answers_are_tried_again_and_then_an_error(
    memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PAUSES_SECONDS", (0.0, 0.0))
    memory.pipe("/place/a.bin", b"abcdef")
    attempts: list[str] = []

    def cut_off(self: object, rpath: str, lpath: str, callback: object = None) -> None:
        attempts.append(rpath)
        Path(lpath).write_bytes(b"abcdef"[: 2 * len(attempts)])

    monkeypatch.setattr(type(memory), "get_file", cut_off)
    assert content("memory://place/a.bin") == b"abcdef"
    assert len(attempts) == 3
    memory.pipe("/place/b.bin", b"0123456789")
    with pytest.raises(UnreachableError, match="bytes arrived of 10"):
        content("memory://place/b.bin")


def test_without_an_answer_the_copy_of_before_is_used_and_that_is_said(
    served: Path, server: FileServer, caplog: pytest.LogCaptureFixture
) -> None:
    names = write(served, 1)
    url = f"{server.url}/{names[0]}"
    assert content(url) == bytes(100)
    server.shutdown()
    server.server_close()
    assert content(url) == bytes(100)
    assert "going on with the copy that was fetched before" in caplog.text
    with pytest.raises(UnreachableError, match="cannot be read"):
        content(f"{server.url}/other.bin")


def test_a_missing_file_is_one_sentence(server: FileServer) -> None:
    with pytest.raises(MissingFileError) as caught:
        fetch_file(Url(f"{server.url}/none.json?key=hidden"))
    assert str(caught.value) == f"{server.url}/none.json does not exist: check the URL"


def test_a_file_that_went_away_is_not_served_from_the_cache(
    server: FileServer, served: Path
) -> None:
    names = write(served, 1)
    fetch_file(Url(f"{server.url}/{names[0]}"))
    (served / names[0]).unlink()
    with pytest.raises(MissingFileError):
        fetch_file(Url(f"{server.url}/{names[0]}"))


def test_errors_about_the_copy_name_the_url(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe("/place/a.bin", b"x")
    with (
        pytest.raises(UserError, match=r"^memory://place/a\.bin: broken$"),
        local_file(Url("memory://place/a.bin")) as file,
    ):
        raise UserError(f"{file}: broken")


def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    memory: fsspec.AbstractFileSystem, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe("/place/a.bin", b"x")

    def fill(self: object, rpath: str, lpath: str, callback: object = None) -> None:
        Path(lpath).write_bytes(b"x")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(memory), "get_file", fill)
    with pytest.raises(UserError, match=r"cannot be used \(No space left.*set D3ETR_CACHE"):
        content("memory://place/a.bin")
    assert not copies(cache) and not list(cache.rglob("partial-*"))


def test_a_cache_that_cannot_be_made_is_one_sentence(
    tmp_path: Path, memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("D3ETR_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"cannot be used \(Not a directory\): set D3ETR_CACHE"):
        content("memory://place/a.bin")


def test_progress_is_told(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe({f"/place/{n}": bytes(10) for n in range(3)})
    memory.pipe("/place/large", bytes(2_500_000))
    told: list[tuple[str, int, int]] = []

    def tell(what: str, done: int, total: int) -> None:
        told.append((what, done, total))

    fetch_folder(Url("memory://place"), ["0", "1", "2"], tell)
    fetched = [(done, total) for what, done, total in told if what.startswith("fetching")]
    assert fetched == [(1, 3), (2, 3), (3, 3)]
    told.clear()
    fetch_file(Url("memory://place/large"), tell)
    assert told[-1][1:] == (2, 3)
    assert logging.getLogger("d3etr").level == logging.NOTSET


def test_a_clock_that_was_ahead_hides_no_change(
    memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe("/place/a.bin", b"one")
    now = time.time()
    with monkeypatch.context() as ahead:
        ahead.setattr(time, "time", lambda: now + 1e6)
        assert content("memory://place/a.bin") == b"one"
    memory.pipe("/place/a.bin", b"two")
    assert content("memory://place/a.bin") == b"two"
