"""Weights of others off the disk, without executing anything that is in them."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d3etr.detectors.weights import bounded_memory, read_tensors
from d3etr.errors import UserError

CONFIG = "config.json"
PREPROCESSING = "preprocessor_config.json"
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
_SHOWN = 4
_LONGEST_JSON = 100_000_000
_TIMES_FILE = 64
"""So many times the file's size may all tensors be together: some share their numbers."""


@dataclass(frozen=True)
class Found:
    """Tensors and what lies beside them.

    Attributes:
        tensors: by their own names, on the CPU.
        files: that the tensors were read from.
        settings: a checkpoint's ``args`` or a folder's ``config.json``; empty without any.
        preprocessing: a folder's ``preprocessor_config.json``; empty without one.
    """

    tensors: dict[str, Tensor]
    files: tuple[Path, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Mapping[str, Any] = field(default_factory=dict)


def read_folder(folder: Path) -> Found:
    """A model that Hugging Face's ``save_pretrained`` wrote, sharded or not.

    Raises:
        UserError: files are missing, broken or outside of the folder.
    """
    config = read_settings(folder / CONFIG)
    files = _weights_files(folder)
    tensors = {name: tensor for file in files for name, tensor in read_tensors(file).items()}
    beside = folder / PREPROCESSING
    return Found(tensors, files, config, read_settings(beside) if beside.is_file() else {})


def _weights_files(folder: Path) -> tuple[Path, ...]:
    if (folder / WEIGHTS).is_file():
        return (folder / WEIGHTS,)
    if not (folder / INDEX).is_file():
        others = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pth"))
        hint = f" ({', '.join(others[:_SHOWN])} there are of a format that can execute code)"
        raise UserError(
            f"{folder}: no {WEIGHTS} and no {INDEX} in this folder{hint if others else ''}: give "
            "a folder that holds the model as safetensors; save_pretrained writes it so"
        )
    names = read_settings(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{folder / INDEX}: no 'weight_map' from tensors to files: copy it again")
    files = sorted(set(names.values()))
    for name in files:
        if Path(name).name != name or name in ("", "..", "."):
            raise UserError(f"{folder / INDEX}: '{name}' is no file of this folder")
    return tuple(folder / name for name in files)


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON file of a folder that ``save_pretrained`` wrote.

    Raises:
        UserError: it is missing, broken, or no object.
    """
    try:
        if path.stat().st_size > _LONGEST_JSON or not path.is_file():
            raise UserError(f"{path}: {path.stat().st_size / 1e6:,.0f} MB are no {path.name}")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}): expected a folder that Hugging "
            f"Face's save_pretrained wrote, with {CONFIG} and {WEIGHTS}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: broken JSON ({error}): copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def read_checkpoint(path: Path) -> Found:
    """A file that ``torch.save`` wrote: tensors alone, or under ``model`` with their ``args``.

    Where there are averaged weights, as RT-DETR's and D-FINE's code saves them under ``ema``, it is
    these.

    Args:
        path: the file. Beside tensors, numbers, texts and containers it may hold an
            ``argparse.Namespace``, as the official training code saves one; nothing else.

    Raises:
        UserError: missing, damaged, or with something else in it, which the text names.
    """
    content = _load(path)
    state = _state_of(content) if isinstance(content, Mapping) else content
    if not _is_state(state):
        keys = [f"{key!r:.80}" for key in content] if isinstance(content, dict) else []
        kind = f"with the keys {', '.join(keys[:_SHOWN])}" if keys else type(content)
        raise UserError(
            f"{path}: no tensors by name in this checkpoint ({kind}): expected a state dict, or "
            "one under 'model' as the official training code saves it"
        )
    args = {} if state is content else content.get("args") or {}
    settings = vars(args) if isinstance(args, argparse.Namespace) else args
    sizes = [tensor.numel() * tensor.element_size() for tensor in state.values()]
    size = path.stat().st_size
    if max(sizes) > size or sum(sizes) > _TIMES_FILE * size:
        # They repeat few stored numbers many times: a copy would fill the memory.
        raise UserError(
            f"{path}: its tensors ({max(sizes) / 1e6:,.0f} MB) are larger than the file "
            f"({size / 1e6:,.2f} MB): get it from where it was made"
        )
    prefix = "module." if all(name.startswith("module.") for name in state) else ""
    tensors = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return Found(tensors, (path,), settings if isinstance(settings, Mapping) else {})


def _state_of(content: Mapping[Any, Any]) -> Any:
    averaged = content.get("ema")
    if isinstance(averaged, Mapping) and _is_state(averaged.get("module")):
        return averaged["module"]
    return content.get("model", content)


def _load(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), bounded_memory(path):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): check it") from error
    except Exception as error:  # a damaged file can break the reader anywhere
        raise UserError(_unreadable(path, error)) from error


def _unreadable(path: Path, error: Exception) -> str:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # of a damaged file, or of the format before PyTorch 1.6
        names = re.findall(r"GLOBAL (\S+)", str(error))[:1]
    if names:
        return (
            f"{path}: refused, as it holds more than weights: "
            f"{', '.join(name[:80] for name in names[: 2 * _SHOWN])}. Reading those "
            "could execute code. If you trust the file, load it where it came from and save its "
            "state dict alone: torch.save(model.state_dict(), FILE)"
        )
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return (
            f"{path}: asks for far more memory than a file of {path.stat().st_size:,} bytes can "
            "fill: get it from where it was made"
        )
    first_line = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return (
        f"{path}: no whole checkpoint of torch.save ({first_line}). It may be cut off, or of "
        "another format: copy it again"
    )


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )
