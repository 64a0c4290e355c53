"""Weights files: detectors, backbones and bare tensors as safetensors.

Files are written whole or not at all, and nothing in one is executed when it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import safetensors
import safetensors.torch
import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn

from d3etr.config.backbones import RESNET_VD, TIMM
from d3etr.config.base import Section
from d3etr.config.data import PreprocessingConfig
from d3etr.config.detector import AnyDetector
from d3etr.config.problems import ConfigError, problems_of
from d3etr.config.renamed import with_current_keys
from d3etr.detectors.backbones import Backbone
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.build import build_detector
from d3etr.detectors.torchvision_weights import from_torchvision, imagenet_weights
from d3etr.errors import UserError
from d3etr.files import atomic_write

FORMAT_KEY = "d3etr_format"
INFO_KEY = "d3etr_info"
FORMAT = "1"
THRESHOLD = "threshold"
"""Key of ``WeightsInfo.evaluation``: the score above which detections had the highest F1 there."""
DEFAULT_THRESHOLD = 0.5
"""Of weights without one."""
_NAMED = 6
"""Tensors that an error message names before it counts the rest."""
_COPIES = 4
_RESERVE = 512 * 2**20
_THREAD = 16 * 2**20
"""Bytes that reading may take beside ``_COPIES`` of the file: at all, and for each core."""

CategoryId = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class WeightsInfo(Section):
    """What a weights file says beside its tensors."""

    detector: AnyDetector
    categories: Annotated[tuple[tuple[CategoryId, str], ...], Field(min_length=1)]
    """(id of the annotation file, name) of each class, in the order of the logits."""
    preprocessing: PreprocessingConfig
    evaluation: dict[str, Any] | None = None
    """Split, data digest, mAP and whatever else its evaluation recorded."""
    origin: Annotated[dict[str, Any], Field(default_factory=dict)]
    """How the weights came about: run, seed, steps, versions."""

    @property
    def network(self) -> str:
        """Digest of architecture, number of classes and image size: equal where time has to be."""
        shown = self.preprocessing.model_dump_json()
        text = f"{self.detector.model_dump_json()} {len(self.categories)} {shown}"
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def threshold(self) -> float:
        """Lowest score of a detection where nobody says another."""
        found = (self.evaluation or {}).get(THRESHOLD)
        if isinstance(found, int | float) and 0 <= found <= 1:
            return float(found)
        return DEFAULT_THRESHOLD


def save_weights(
    path: Path, detector: DetectionTransformer, info: WeightsInfo, dtype: torch.dtype | None = None
) -> None:
    """Write a detector, whole or not at all.

    Args:
        path: where to; its folder is made.
        detector: whose state is written.
        info: must describe ``detector``.
        dtype: store matrices and kernels like this, for example ``torch.float16`` to halve a
            file that is shipped; vectors (biases, norms) stay as they are. None: all as it is.
    """
    if len(info.categories) != detector.classes or info.detector != detector.config:
        raise ValueError("info does not describe this detector")
    tensors = {name: _stored(name, x, dtype) for name, x in detector.state_dict().items()}
    write_tensors(path, tensors, {FORMAT_KEY: FORMAT, INFO_KEY: info.model_dump_json()})


def _stored(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not tensor.is_floating_point() or tensor.dim() < 2:
        return tensor
    stored = tensor.to(dtype)
    if not stored.isfinite().all():
        raise UserError(f"tensor {name} has values that {dtype} can't hold: save it as float32")
    return stored


def read_info(path: Path) -> WeightsInfo:
    """What a weights file says about itself, without reading its tensors.

    Raises:
        UserError: not a d3etr weights file, or one of another format version.
    """
    metadata = read_metadata(path)
    if INFO_KEY not in metadata:
        raise UserError(
            f"{path}: a safetensors file, but not one of d3etr's: its metadata has no "
            f"'{INFO_KEY}'. Expected a file that a run of d3etr wrote (weights.safetensors)."
        )
    if metadata.get(FORMAT_KEY) != FORMAT:
        raise UserError(
            f"{path}: format version {metadata.get(FORMAT_KEY)}, but this d3etr reads version "
            f"{FORMAT}: use the d3etr that wrote it, or write it again with this one."
        )
    try:
        return WeightsInfo.model_validate_json(_with_current_keys(metadata[INFO_KEY]))
    except ValidationError as error:
        problems = problems_of(error, WeightsInfo)
        raise ConfigError(f"{path}, whose '{INFO_KEY}' metadata is broken", problems) from error


def _with_current_keys(text: str) -> str:
    """The JSON of a file that an earlier version wrote, with today's keys."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return text  # whoever validates it says what is wrong
    sections = {"detector": "student.detector", "preprocessing": "data.preprocessing"}
    for name, path in sections.items():
        if isinstance(tree, dict) and isinstance(tree.get(name), dict):
            tree[name], _ = with_current_keys(tree[name], path, warn=False)
    return json.dumps(tree)


def load_backbone_weights(backbone: Backbone, source: str | Path) -> None:
    """Start a backbone from ImageNet or from a file of pre-training.

    Args:
        backbone: changed in place.
        source: ``imagenet``, or a safetensors file that holds the backbone's tensors by name.

    Raises:
        UserError: weights can't be had, or tensors are missing, left over or of another shape.
    """
    name = backbone.config.name
    downloads = str(source) == "imagenet"
    label = f"ImageNet weights ({name})" if downloads else str(source)
    if name.startswith(TIMM):
        from d3etr.detectors import timm_weights  # importing timm takes two seconds

        found = timm_weights.imagenet_weights_of_timm(name) if downloads else None
        read = found or read_tensors(Path(source))
        tensors = timm_weights.from_timm(backbone, read, for_our_pixels=downloads)
    elif downloads:
        tensors = imagenet_weights(backbone.config)
    else:
        tensors = read_tensors(Path(source))
        if name in RESNET_VD:  # timm's file of a ResNet-D will do
            tensors = from_torchvision(name, tensors)
    load_strictly(backbone, tensors, label)


def load_weights(path: Path) -> tuple[DetectionTransformer, WeightsInfo]:
    """Build the detector of a weights file.

    Args:
        path: a file that ``save_weights`` wrote, in any storage type.

    Returns:
        The detector in evaluation mode, float32 on the CPU, and what the file says about it.

    Raises:
        UserError: missing, truncated or foreign file, or tensors that do not fit.
    """
    info = read_info(path)
    tensors = read_tensors(path)
    with torch.device("meta"):  # what the file says of itself may be larger than this machine
        expected = build_detector(info.detector, len(info.categories)).state_dict()
    ensure_fit(expected, tensors, str(path))
    detector = build_detector(info.detector, len(info.categories))
    load_strictly(detector, tensors, str(path))
    return detector.eval(), info


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
    """The metadata of a safetensors file, without reading tensors; errors as ``read_tensors``."""
    with _opened(path), safetensors.safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        UserError: ``path`` is missing, truncated or not a safetensors file.
    """
    with _opened(path):
        return safetensors.torch.load_file(path)


@contextmanager
def _opened(path: Path) -> Iterator[None]:
    _require_file(path)
    try:
        yield
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path}: not a whole safetensors file ({error}). It may be truncated, or of another "
            "format: copy it again, or convert it (other formats can execute code and are not "
            "read)."
        ) from error


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
    misfits = {
        "missing": [name for name in expected if name not in tensors],
        "left over": [name for name in tensors if name not in expected],
        "of another shape": [
            f"{name} ({list(tensors[name].shape)}, expected {list(tensor.shape)})"
            for name, tensor in expected.items()
            if name in tensors and tensors[name].shape != tensor.shape
        ],
    }
    problems = []
    for label, names in misfits.items():
        rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        problems += [f"{label}: {', '.join(names[:_NAMED])}{rest}"] if names else []
    if problems:
        raise UserError(
            f"{source}: the weights do not fit the configured network. Tensors "
            f"{'; '.join(problems)}. "
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
