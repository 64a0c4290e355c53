"""gs:// URLs: understood without gcsfs; with it (``pip install .[gcs]``) read, or refused."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from google_store import google_store

from d3etr.config.location import Url
from d3etr.errors import UserError
from d3etr.storage import remote
from d3etr.storage.fetch import fetch_file, fetch_folder
from d3etr.storage.problems import MissingFileError, UnreachableError
from d3etr.storage.remote import ensure_reachable

with_gcsfs = pytest.mark.skipif(find_spec("gcsfs") is None, reason="needs gcsfs")


@pytest.fixture
def buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose folders are buckets; nobody has credentials."""
    import gcsfs

    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    gcsfs.GCSFileSystem.clear_instance_cache()
    folder = tmp_path / "buckets"
    folder.mkdir()
    with google_store(folder) as address:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
        monkeypatch.setenv("FSSPEC_GS_TOKEN", "anon")
        yield folder
    gcsfs.GCSFileSystem.clear_instance_cache()


def test_a_gs_url_has_a_bucket_and_a_name() -> None:
    url = Url("gs://bucket/folder/teacher.safetensors")
    assert (url.protocol, url.name) == ("gs", "teacher.safetensors")
    assert url.path.parts[0] == "bucket"


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["gs", "gcs"])
def test_without_gcsfs_the_text_says_what_to_install(protocol: str) -> None:
    code = (
        "import sys; sys.modules['gcsfs'] = None\n"
        "from d3etr.config.location import Url; from d3etr.storage.fetch import fetch_file\n"
        f"fetch_file(Url('{protocol}://bucket/weights'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "needs a package that is not installed here (Please install gcsfs" in done.stderr


@with_gcsfs
def test_files_and_folders_are_fetched(buckets: Path) -> None:
    folder = buckets / "bucket" / "photos"
    folder.mkdir(parents=True)
    names = [f"{number:03d}.png" for number in range(65)]
    for name in names:
        (folder / name).write_bytes(name.encode())
    fetched = fetch_folder(Url("gs://bucket/photos"), [*names, "missing.png"])
    assert set(fetched) == set(names)
    assert fetched["007.png"].read_bytes() == b"007.png"
    (folder / "007.png").write_bytes(b"changed")
    url = Url("gs://bucket/photos/007.png")
    assert fetch_file(url).read_bytes() == b"changed"
    ensure_reachable([("x", url)], [("y", Url("gs://bucket/photos"))])


@with_gcsfs
def test_what_is_missing_or_refused_is_one_text(buckets: Path) -> None:
    (buckets / "bucket").mkdir()
    with pytest.raises(MissingFileError, match="gs://bucket/a does not exist"):
        fetch_file(Url("gs://bucket/a"))
    with pytest.raises(UserError, match=r"access refused .*GOOGLE_APPLICATION_CREDENTIALS"):
        fetch_file(Url("gs://private/a"))


@with_gcsfs
def test_without_credentials_and_network_the_wait_has_an_end(
    buckets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "ANSWER_SECONDS", 2.0)
    monkeypatch.delenv("FSSPEC_GS_TOKEN")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"127.0.0.1:{silent.getsockname()[1]}")
        begun = time.monotonic()
        with pytest.raises(
            UnreachableError, match=r"no answer within 2 seconds.*GOOGLE_APPLICATION"
        ):
            fetch_file(Url("gs://bucket/a"))
    assert time.monotonic() - begun < 10
