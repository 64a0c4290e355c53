"""A cache of its own for every test, and storages to fetch from."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from file_server import FileServer, serving


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("D3ETR_CACHE", str(folder))
    return folder


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """The folder that ``server`` serves."""
    folder = tmp_path / "served"
    folder.mkdir()
    return folder


@pytest.fixture
def server(served: Path) -> Iterator[FileServer]:
    """``served`` over HTTP."""
    with serving(served) as running:
        yield running


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    """The storage behind ``memory://``, empty."""
    storage = fsspec.filesystem("memory")
    yield storage
    storage.store.clear()
    storage.pseudo_dirs[:] = [""]
