"""The site of ``make docs``: docstrings, links, and a build without a warning."""

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import d3etr

MISSING = "the site's packages are missing: pip install -c constraints.txt -e '.[docs]'"


@pytest.fixture(scope="module")
def hooks(repository: Path) -> ModuleType:
    """``docs/site_hooks.py``, which mkdocs loads by its path."""
    pytest.importorskip("mkdocs", reason=MISSING)
    spec = importlib.util.spec_from_file_location("hooks", repository / "docs" / "site_hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_docstring_is_read_without_a_warning(
    repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as an argument that is documented and does not exist."""
    griffe = pytest.importorskip("griffe", reason="griffelib is missing: pip install -e '.[dev]'")

    def docstrings(parent: object) -> Iterator[object]:
        for member in parent.members.values():  # type: ignore[attr-defined]
            if not member.is_alias:
                yield member.docstring
                yield from docstrings(member)

    package = griffe.load(
        "d3etr",
        search_paths=[repository / "platform"],
        docstring_parser=griffe.Parser.google,
    )
    with caplog.at_level(logging.WARNING):
        sections = [found.parsed for found in docstrings(package) if found is not None]
    assert len(sections) > 1000
    assert not caplog.messages


@pytest.mark.parametrize(
    ("source", "link", "shown"),
    [
        ("docs/data.md", "[x](method.md#images)", '<a href="method.md#images">x</a>'),
        ("docs/results/judge.md", "[x](../data.md)", '<a href="../data.md">x</a>'),
        ("docs/data.md", "[x](../README.md)", '<a href="index.md">x</a>'),
        ("README.md", "[x](docs/data.md)", '<a href="data.md">x</a>'),
        ("README.md", "![x](docs/images/m.png)", '<img alt="x" src="images/m.png" />'),
        ("docs/data.md", "[x](https://semver.org)", '<a href="https://semver.org">x</a>'),
        ("docs/data.md", "[x](#formats)", '<a href="#formats">x</a>'),
        (
            "docs/data.md",
            "[its `setup`](../setup.py)",
            "<span>its <code>setup</code><span> (<code>setup.py</code>)</span></span>",
        ),
        (
            "docs/data.md",
            "[`methods/base.py`](../platform/d3etr/methods/base.py)",
            "<span><code>platform/d3etr/methods/base.py</code></span>",
        ),
        # What is nowhere is left for mkdocs to warn of.
        ("docs/data.md", "[x](../none.py)", '<a href="../none.py">x</a>'),
        ("docs/data.md", "`[x](../setup.py)`", "<code>[x](../setup.py)</code>"),
    ],
)
def test_links_of_the_repository_are_links_of_the_site_or_code(
    source: str, link: str, shown: str, hooks: ModuleType
) -> None:
    import markdown

    extension = hooks.RepositoryLinksExtension()
    extension.links.source = source
    assert markdown.markdown(link, extensions=[extension]) == f"<p>{shown}</p>"


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(repository: Path, tmp_path: Path) -> None:
    for package in ("material", "mkdocstrings"):
        pytest.importorskip(package, reason=MISSING)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=repository,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    python = (tmp_path / "api" / "python.html").read_text()
    assert all(f'id="d3etr.{name}"' in python for name in d3etr.__all__)
    assert 'id="d3etr.methods.base.Method.losses"' in (tmp_path / "api/methods.html").read_text()
    assert "registry.py" in (tmp_path / "extending.html").read_text()
