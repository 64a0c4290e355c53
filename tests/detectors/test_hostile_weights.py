"""Weights files made to fill memory: refused by what their bytes can hold."""

import json
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

MEMORY = 1_300 * 2**20
"""Bytes beyond what the imports take: the reader's reserve, and some room."""


def archive(path: Path, data: bytes) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", data)
        file.writestr("a/version", b"3\n")


def packed(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", pickle.dumps({}))
        file.writestr("a/data/0", bytes(200_000_000))


def called(path: Path) -> None:
    size = (6 * 10**9).to_bytes(5, "little")
    archive(path, b"\x80\x02cbuiltins\nbytearray\n\x8a\x05" + size + b"\x85R.")


def repeated(path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(2 * 10**9)}, path)


def of_the_old_format(path: Path) -> None:
    torch.save({"a": torch.zeros(4)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    place = content.index(b"K\x04N")
    path.write_bytes(content[:place] + b"J" + struct.pack("<i", 2**31 - 1) + content[place + 2 :])


def described(path: Path) -> None:
    """A file of ours whose tiny tensors belong to a detector of terabytes, it says."""
    detector = {"width": 16_384, "feedforward": 65_536, "encoder_layers": 64}
    info = {"detector": detector, "categories": [[1, "a"]], "preprocessing": {}}
    tensor = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    metadata = {"d3etr_format": "1", "d3etr_info": json.dumps(info)}
    header = json.dumps({"__metadata__": metadata, "a": tensor}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


BOMBS = {
    "packed.pth": (packed, "no whole checkpoint of torch.save"),
    "called.pth": (called, "asks for far more memory than a file of"),
    "repeated.pth": (repeated, "are larger than the file"),
    "old.pth": (of_the_old_format, "asks for far more memory than a file of"),
    "described.safetensors": (described, "the weights do not fit the configured network"),
}
CODE = """
import resource, sys
from d3etr.cli.main import main
main(["import-weights", "missing.pth", "out.safetensors"])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    assert main(["import-weights", path, "out.safetensors"]) == 2, path
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_DATA"), reason="no such limit here")
def test_no_weights_file_takes_memory_that_its_bytes_cannot_fill(tmp_path: Path) -> None:
    for name, (make, _) in BOMBS.items():
        make(tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", CODE, *BOMBS], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < MEMORY
    assert "Traceback" not in done.stderr
    for name, (_, problem) in BOMBS.items():
        assert f"error: {name}: " in done.stderr and problem in done.stderr
