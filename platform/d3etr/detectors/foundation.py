"""A foundation model as a teacher: a ViT of DINOv2 or DINOv3 whose patch features are imitated.

The network is that of transformers, frozen, and reads what the student sees. Our choices: the
student's batch is normalised as the model wants it; its sides are resized to the nearest multiples
of a patch, so that the grid of patches covers the same picture; no token attends to patches under
padding, which count as padding. Positions are those in the padded batch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from d3etr.detectors.base import shrink_padding
from d3etr.detectors.foundation_folder import Channels, FoundationFolder
from d3etr.detectors.torchvision_weights import MEAN, STD
from d3etr.errors import UserError
from d3etr.structures import ImageBatch, Memory

_OLDEST = (5, 23)
"""Of transformers: earlier ones of DINOv2 may not look at a mask."""
_UNUSED = {"embeddings.mask_token"}
"""Tensors that only the model's own training needs."""


@dataclass(frozen=True)
class FoundationConfig:
    """What of the architecture others need.

    Attributes:
        width: D' of its tokens.
        patch: side of a patch, pixels.
        prefix: tokens before the patches': the class token and the registers.
    """

    width: int
    patch: int
    prefix: int


class FoundationModel(nn.Module):
    """Patch features of images that are normalised by ImageNet's mean and deviation.

    Args:
        model: of transformers, DINOv2 or DINOv3.
        config: its sizes.
        mean: that the model takes away from pixels in [0, 1], per channel.
        std: that it divides them by.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, model: nn.Module, config: FoundationConfig, mean: Channels, std: Channels
    ) -> None:
        super().__init__()
        self.model, self.config = model, config
        channels = list(zip(MEAN, STD, mean, std, strict=True))
        scale = [ours / theirs for _, ours, _, theirs in channels]
        shift = [(ours - theirs) / deviation for ours, _, theirs, deviation in channels]
        self.register_buffer("scale", torch.tensor(scale)[:, None, None])
        self.register_buffer("shift", torch.tensor(shift)[:, None, None])

    def encode(self, images: ImageBatch) -> Memory:
        """Patch tokens behind the last norm, without class token and registers.

        Args:
            images: B padded images, normalised by ``imagenet``.

        Returns:
            Memory of h * w tokens, h and w the sides divided by a patch's, rounded, at least 1;
            its positions are zeros, as nothing decodes it.
        """
        height, width = images.pixels.shape[-2:]
        patch, prefix = self.config.patch, self.config.prefix
        grid = (max(1, round(height / patch)), max(1, round(width / patch)))
        size = (patch * grid[0], patch * grid[1])
        pixels = images.pixels * self.scale + self.shift
        if size != (height, width):
            pixels = interpolate(pixels, size, mode="bilinear", antialias=True)
        padding, visible = shrink_padding(images.padding, grid), None
        if padding is not None:
            padding = padding.flatten(1)
            before = padding.new_ones(len(padding), prefix)
            visible = torch.cat([before, ~padding], 1)[:, None, None]
        tokens = self.model(pixels, attention_mask=visible).last_hidden_state[:, prefix:]
        return Memory(tokens, torch.zeros_like(tokens[:1]), padding, (grid,))


def require_transformers(what: str = "teacher.features") -> None:
    """Make sure that transformers is here; it is not imported for that.

    Args:
        what: needs it, for the error's text.

    Raises:
        UserError: it is missing or too old.
    """
    try:
        found = version("transformers")
    except PackageNotFoundError:
        found = ""
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < _OLDEST:
        needed = ".".join(map(str, _OLDEST))
        state = f"is {found}" if found else "is not installed"
        raise UserError(
            f"{what} needs the package transformers, at least {needed}, which {state} "
            f"here: pip install 'transformers>={needed}' (d3etr's extra 'transformers')"
        )


def load_foundation(folder: FoundationFolder) -> FoundationModel:
    """The model of a folder, on the CPU in float32; nothing is downloaded or executed.

    Raises:
        UserError: transformers is missing, or tensors are missing, damaged or of other shapes.
    """
    require_transformers()
    model, found = _from_pretrained(folder)
    missing = sorted({*found["missing_keys"]} - _UNUSED)
    if missing:
        raise UserError(
            f"teacher.features {folder.path}: {len(missing)} tensors are missing, such as "
            f"{missing[0]}; expected all of a {folder.kind}: copy model.safetensors again"
        )
    settings = model.config
    patch, channels = settings.patch_size, settings.num_channels
    if not isinstance(patch, int) or channels != 3:
        raise UserError(
            f"teacher.features {folder.path}: patch_size is {patch} and num_channels {channels}; "
            "expected one number of pixels and 3"
        )
    prefix = 1 + getattr(settings, "num_register_tokens", 0)
    config = FoundationConfig(settings.hidden_size, patch, prefix)
    return FoundationModel(model, config, folder.mean, folder.std)


def _from_pretrained(folder: FoundationFolder) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModel  # takes seconds, and few runs need it

    try:
        with quiet():
            found: tuple[Any, dict[str, Any]] = AutoModel.from_pretrained(
                folder.path,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
                attn_implementation="sdpa",
                output_loading_info=True,
            )
        return found
    except Exception as error:  # what a damaged file raises is of many kinds
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"teacher.features {folder.path}: this {folder.kind} cannot be loaded ({line}): copy "
            "config.json and model.safetensors again"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without lines and bars of transformers: what is wrong is raised."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
