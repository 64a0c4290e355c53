"""A folder over HTTP that counts what is asked of it, and processes that fetch from it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FileServer(ThreadingHTTPServer):
    """Serves a folder on a free port of this machine.

    Attributes:
        asked: (method, path) -> how often.
        delays: seconds before each piece of a GET's answer.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
        self.asked: Counter[tuple[str, str]] = Counter()
        self.delay = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fetched(self) -> int:
        """GET requests so far."""
        return sum(count for (method, _), count in self.asked.items() if method == "GET")


class _Handler(SimpleHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        self.server.asked["GET", self.path] += 1
        super().do_GET()

    def do_HEAD(self) -> None:
        self.server.asked["HEAD", self.path] += 1
        super().do_HEAD()

    def copyfile(self, source, outputfile) -> None:  # type: ignore[no-untyped-def]
        while piece := source.read(1000):
            time.sleep(self.server.delay)
            outputfile.write(piece)

    def log_message(self, *arguments: object) -> None:
        """Stay silent."""


@contextmanager
def serving(folder: Path) -> Iterator[FileServer]:
    server = FileServer(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


FETCH = """
import sys
from d3etr.config.location import Url
from d3etr.storage.fetch import fetch_folder
fetched = fetch_folder(Url(sys.argv[1]), sys.argv[2:])
print(len(fetched))
"""


def fetching(url: str, names: list[str], cache: Path) -> subprocess.Popen[str]:
    """A process that fetches files of a folder."""
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, url, *names],
        env=os.environ | {"D3ETR_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
