"""Google's storage as far as reading goes, on this machine: a folder of buckets over its JSON API.

gcsfs takes it for Google's where STORAGE_EMULATOR_HOST names it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

REFUSES = "private"
"""This bucket gives nothing to anybody."""


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, *arguments: object, buckets: Path) -> None:
        self.buckets = buckets
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        _, _, rest = parts.path.partition("/b/")
        bucket, _, name = rest.partition("/o")
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        file = self.buckets / bucket / unquote(name.lstrip("/"))
        if bucket == REFUSES:
            self.answer(403, {"error": {"code": 403, "message": "no access"}})
        elif "/o" not in rest:
            self.answer(404, {"error": {"code": 404, "message": "not here"}})
        elif not name.strip("/"):
            self.answer(200, self.listing(bucket, query))
        elif not file.is_file():
            self.answer(404, {"error": {"code": 404, "message": "not here"}})
        elif query.get("alt") == "media":
            self.answer(200, file.read_bytes())
        else:
            self.answer(200, self.entry(file))

    def listing(self, bucket: str, query: dict[str, str]) -> dict[str, object]:
        """Everything that begins with the prefix, folders together."""
        prefix, folder = query.get("prefix", ""), self.buckets / bucket
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = {str(path.relative_to(folder)): path for path in files}
        found = {name: path for name, path in names.items() if name.startswith(prefix)}
        if "delimiter" not in query:
            return {"items": [self.entry(path) for path in found.values()]}
        below = {name for name in found if "/" in name[len(prefix) :]}
        prefixes = sorted({prefix + name[len(prefix) :].split("/")[0] + "/" for name in below})
        items = [self.entry(path) for name, path in found.items() if name not in below]
        return {"items": items, "prefixes": prefixes}

    def entry(self, file: Path) -> dict[str, str]:
        content, place = file.read_bytes(), file.relative_to(self.buckets)
        digest = base64.b64encode(hashlib.md5(content).digest()).decode()
        return {
            "kind": "storage#object",
            "bucket": place.parts[0],
            "name": "/".join(place.parts[1:]),
            "size": str(len(content)),
            "md5Hash": digest,
            "etag": digest,
            "generation": "1",
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }

    def answer(self, status: int, content: bytes | dict[str, object] | dict[str, str]) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Stay silent."""


@contextmanager
def google_store(buckets: Path) -> Iterator[str]:
    """The store's address; each folder in ``buckets`` is a bucket."""
    handler = partial(_Handler, buckets=buckets)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
