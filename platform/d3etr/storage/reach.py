"""Whether storage answers and has what a run names, found out within seconds."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from d3etr.config.location import Url
from d3etr.errors import UserError
from d3etr.storage.problems import MissingFileError
from d3etr.storage.remote import Remote

AT_ONCE = 32


def ensure_reachable(files: Iterable[tuple[str, Url]], folders: Iterable[tuple[str, Url]]) -> None:
    """Ask for every file and folder at once; nothing is fetched.

    Folders that only HTTP leads to cannot be asked for without the name of a file.

    Args:
        files: configuration key and URL of each.
        folders: configuration key and URL of each.

    Raises:
        UserError: what is not there or does not answer, every one of them.
    """
    asked = [(key, url, True) for key, url in files] + [(key, url, False) for key, url in folders]
    if not asked:
        return
    asked.sort(key=lambda one: (one[0], one[1].text))
    # The answers have a time limit each; they are waited for together.
    with ThreadPoolExecutor(min(AT_ONCE, len(asked))) as pool:
        found = pool.map(lambda one: _problem(one[1], single=one[2]), asked)
        answers = zip((key for key, _, _ in asked), found, strict=True)
        problems = [f"{key}: {text}" for key, text in answers if text is not None]
    if problems:
        raise UserError("\n".join(problems))


def _problem(url: Url, *, single: bool) -> str | None:
    try:
        remote = Remote(url, single=single)
        if single:
            remote.ensure_answer(url.name)
        elif not remote.folder_exists():
            raise MissingFileError(f"{url.shown} is no folder with files in it: check the URL")
    except UserError as error:
        return str(error)
    return None
