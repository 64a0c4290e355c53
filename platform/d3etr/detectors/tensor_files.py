"""Safetensors files: written whole or not at all, read with errors that name the file."""

from __future__ import annotations

import hashlib
import os
import re
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor, nn

from d3etr.errors import UserError
from d3etr.files import atomic_write

_NAMED = 6
"""Tensors that an error message names before it counts the rest."""
_COPIES = 4
_RESERVE = 512 * 2**20
_THREAD = 16 * 2**20
"""Bytes that reading may take beside ``_COPIES`` of the file: at all, and for each core."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file, replacing ``path`` only once it is complete.

    Args:
        path: where to; its folder is made.
        tensors: by name; moved to the CPU and made contiguous.
        metadata: text by key.

    Raises:
        UserError: the folder can't be written to, or is full.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            safetensors.torch.save_file(plain, temporary, metadata=dict(metadata))
            temporary.chmod(0o644)  # the library writes for the owner only; storage is shared
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"cannot write {path} ({error}): free some space, or choose another folder"
        ) from error


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, without reading tensors.

    Raises:
        UserError: ``path`` is missing, truncated or not a safetensors file.
    """
    _require_file(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        UserError: ``path`` is missing, truncated or not a safetensors file.
    """
    _require_file(path)
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into a module that has exactly these names and shapes.

    Args:
        module: changed in place; values are converted to its data types.
        tensors: by name, as in the module's state dict.
        source: what error messages call the origin of ``tensors``.

    Raises:
        UserError: a tensor is missing, left over or of another shape; nothing is copied then.
    """
    ensure_fit(module.state_dict(), tensors, source)
    module.load_state_dict(dict(tensors))


def ensure_fit(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    """Check that tensors have exactly the names and shapes of others, of any device.

    Raises:
        UserError: see ``load_strictly``.
    """
    problems = [
        _list("missing", [name for name in expected if name not in tensors]),
        _list("left over", [name for name in tensors if name not in expected]),
        _list("of another shape", _shape_differences(expected, tensors)),
    ]
    if any(problems):
        found = "; ".join(problem for problem in problems if problem)
        raise UserError(
            f"{source}: the weights do not fit the configured network. Tensors {found}. "
            "Give the weights of this very architecture, or configure the one they belong to."
        )


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as 64 hex digits."""
    _require_file(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def bounded_memory(path: Path) -> Iterator[None]:
    """Within, this process may take some times the file's size more memory, and a reserve.

    Beyond that Python's or PyTorch's own error for want of memory is raised; where the system has
    no such limit, nothing is.
    """
    try:
        held = int(re.findall(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])
    except (OSError, IndexError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    reserve = _RESERVE + (os.cpu_count() or 1) * _THREAD
    wanted = 1024 * held + _COPIES * path.stat().st_size + reserve
    allowed = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min([wanted, *allowed]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _require_file(path: Path) -> None:
    try:
        if path.is_file():
            return
        kind = "is a folder, not a file" if path.is_dir() else "does not exist"
    except OSError as error:  # a name that is too long, a folder that may not be entered
        kind = f"cannot be read ({error.strerror})"
    raise UserError(f"weights file {path} {kind}: give the path of a .safetensors file")


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path}: not a whole safetensors file ({error}). It may be truncated, or of another "
        "format: copy it again, or convert it (other formats can execute code and are not read)."
    )


def _shape_differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{name} ({list(found[name].shape)}, expected {list(tensor.shape)})"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]


def _list(label: str, names: list[str]) -> str:
    if not names:
        return ""
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{label}: {', '.join(names[:_NAMED])}{rest}"
