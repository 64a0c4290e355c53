"""Hooks of mkdocs: pages that docs/ does not have, and links that leave the site.

Pages are written for GitHub, where they may link to any file of the repository. What the site does
not have is shown there as code.
"""

import posixpath
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from xml.etree.ElementTree import Element, SubElement

from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
ROOT_PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
"""Files beside docs/ -> pages of the site."""


class RepositoryLinks(Treeprocessor):
    """Changes links of the repository into links of the site, or code; broken ones stay."""

    source = "README.md"
    """The page's file, from the repository's root."""

    def run(self, root: Element) -> None:
        """Change the links of a page in place."""
        for element in root.iter():
            key = {"a": "href", "img": "src"}.get(element.tag)
            address = urlsplit(element.get(key, "")) if key else None
            if key is None or not address or address.scheme or not address.path:
                continue
            folder = posixpath.dirname(self.source)
            target = posixpath.normpath(posixpath.join(folder, address.path))
            if (place := place_of(target)) is not None:
                here = posixpath.dirname(place_of(self.source) or "") or "."
                path = posixpath.relpath(place, here)
                element.set(key, address._replace(path=path).geturl())
            elif element.tag == "a" and (ROOT / target).exists():
                show_as_code(element, target)


def place_of(file: str) -> str | None:
    """Where the site has a file of the repository; None: nowhere."""
    if file in ROOT_PAGES:
        return ROOT_PAGES[file]
    return file.removeprefix("docs/") if file.startswith("docs/") else None


def show_as_code(link: Element, target: str) -> None:
    """Make a link its text, and the file that it leads to as code."""
    text = "".join(link.itertext()).rstrip("/")
    link.tag = "span"
    del link.attrib["href"]
    if target.endswith(text):
        for child in list(link):
            link.remove(child)
        link.text = ""
        SubElement(link, "code").text = target
        return
    behind = SubElement(link, "span")
    behind.text = " ("
    code = SubElement(behind, "code")
    code.text, code.tail = target, ")"


class RepositoryLinksExtension(Extension):
    """``RepositoryLinks`` before mkdocs' own look at links."""

    def __init__(self) -> None:
        super().__init__()
        self.links = RepositoryLinks()

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        """Register the processor; mkdocs' own has priority 0."""
        md.treeprocessors.register(self.links, "repository_links", 5)


EXTENSION = RepositoryLinksExtension()


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the extension."""
    config.markdown_extensions.append(EXTENSION)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that docs/ does not have."""
    for file, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / file)))
    for name, page in config.extra["api"].items():
        files.append(File.generated(config, f"api/{name}.md", content=api_page(page)))
    return files


def api_page(page: Mapping[str, Any]) -> str:
    """An entry of ``extra.api`` as Markdown: title, text, and objects to document."""
    objects = [f"::: {name}" for name in page["objects"]]
    return "\n\n".join([f"# {page['title']}", page["text"], *objects]) + "\n"


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Note whose links come next."""
    files = {place: file for file, place in ROOT_PAGES.items()}
    source = page.file.src_uri
    EXTENSION.links.source = files.get(source, f"docs/{source}")
    return markdown
