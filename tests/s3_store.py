"""An S3 store on this machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from urllib.request import Request, urlopen

import fsspec
import pytest


@contextmanager
def s3_store(monkeypatch: pytest.MonkeyPatch, bucket: str) -> Iterator[fsspec.AbstractFileSystem]:
    """A store with one empty bucket, found by everything that starts within."""
    if find_spec("s3fs") is None or find_spec("moto") is None:
        pytest.skip("s3fs or moto, the stand-in for the store, is missing: pip install -e '.[dev]'")
    from moto.server import ThreadedMotoServer

    store = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    store.start()
    try:
        host, port = store.get_host_and_port()
        # What moto holds is the process's, not the server's: other tests' buckets are there still.
        urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        files = fsspec.filesystem("s3", skip_instance_cache=True)
        files.mkdir(bucket)
        yield files
    finally:
        store.stop()
