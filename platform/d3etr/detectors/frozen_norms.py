"""Frozen batch norms, convolutions that take them up, and ResNet's blocks of those.

On a GPU, whatever follows a convolution in a block is one kernel.

Shapes: B images · C channels · h, w cells of a map; C', h', w' after a convolution.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from d3etr.kernels.availability import runs_kernels


class FusedFrozenBatchNorm2d(FrozenBatchNorm2d):  # type: ignore[misc]
    """Frozen batch norm in one kernel, where no convolution comes before it."""

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift [B, C, h, w] by the frozen statistics."""
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


class FrozenNorm(FrozenBatchNorm2d):  # type: ignore[misc]
    """A batch norm whose frozen statistics the convolution before it has taken up: an identity.

    Attributes:
        scale: [C] what a channel is multiplied by.
        shift: [C] what is then added to it.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__(channels, eps)
        for name in ("scale", "shift"):
            self.register_buffer(name, torch.empty(channels), persistent=False)
        self._summarise()
        self.register_load_state_dict_post_hook(FrozenNorm._summarise)

    def _summarise(self, *_: object) -> None:
        self.scale = self.weight * (self.running_var + self.eps).rsqrt()
        self.shift = self.bias - self.running_mean * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w], unchanged."""
        return x


class NormedConv2d(nn.Conv2d):
    """A convolution and the frozen batch norm behind it as one convolution.

    conv(x) * scale + shift is conv with scaled weights: nothing is normalised, and nothing is kept
    of what would have been.

    Args:
        convolution: whose parameters it takes over.
        norm: is an identity from now on; it keeps its names in the state dict.
    """

    def __init__(self, convolution: nn.Conv2d, norm: FrozenNorm) -> None:
        nn.Module.__init__(self)  # Conv2d's would draw weights
        self.__dict__.update(convolution.__dict__)
        self._norm = (norm,)  # inside a tuple, it stays a child of its own parent alone
        self._kept = _KeptProduct()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to [B, C', h', w'], scaled and shifted."""
        result: Tensor = self._conv_forward(x, self._scaled(), self._shift())
        return result

    def unshifted(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, h, w] to [B, C', h', w'], scaled, and [C'] that is still to be added.

        Weights that nobody trains are scaled once, not in every call.
        """
        (norm,) = self._norm
        # Tensors of inference mode count no versions.
        sources = (self.weight, norm.scale)
        changes = self.weight.requires_grad or any(x.is_inference() for x in sources)
        weight = self._scaled() if changes else self._kept(*sources)
        return self._conv_forward(x, weight, None), self._shift()

    def _scaled(self) -> Tensor:
        (norm,) = self._norm
        return self.weight * norm.scale[:, None, None, None]

    def _shift(self) -> Tensor:
        (norm,) = self._norm
        return norm.shift if self.bias is None else norm.shift + self.bias * norm.scale


class _KeptProduct:
    """Weights times scale as a convolution takes them, kept until either has changed.

    Writing to a tensor counts up its version; only writing to its ``.data`` would go unnoticed.
    What a product was computed from is held, so that no other tensor comes to lie there. A product
    stays where it is: recorded CUDA graphs read it there.
    """

    def __init__(self) -> None:
        self._products: dict[torch.dtype, Tensor] = {}
        self._keys: dict[torch.dtype, tuple[object, ...]] = {}
        self._sources: dict[torch.dtype, tuple[Tensor, ...]] = {}

    def __reduce__(self) -> tuple[type[_KeptProduct], tuple[()]]:
        """Copies and files hold no product."""
        return _KeptProduct, ()

    def __call__(self, weight: Tensor, scale: Tensor) -> Tensor:
        """[C', C, ...] times [C'], under autocast in its dtype."""
        dtype, kind = weight.dtype, weight.device.type
        if dtype == torch.float32 and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        key = tuple((x.data_ptr(), x._version) for x in (weight, scale))
        if key != self._keys.get(dtype):
            # Whoever comes next may need it for a backward pass.
            with torch.inference_mode(False), torch.no_grad():
                self._keep(dtype, (weight * scale[:, None, None, None]).to(dtype))
            self._keys[dtype], self._sources[dtype] = key, (weight.detach(), scale)
        return self._products[dtype]

    def _keep(self, dtype: torch.dtype, product: Tensor) -> None:
        kept = self._products.get(dtype)
        if kept is not None and (kept.device, kept.shape) == (product.device, product.shape):
            kept.copy_(product)
        else:
            self._products[dtype] = product


class RectifiedConvolution(nn.Sequential):
    """A convolution, the frozen norm that it has taken up and a ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to [B, C', h', w']."""
        return _rectified(cast(NormedConv2d, self[0]), x)


class FrozenBasicBlock(BasicBlock):  # type: ignore[misc]
    """Two convolutions and what passes them by."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to [B, C', h', w']."""
        return _joined(self.conv2, _rectified(self.conv1, x), *_beside(self.downsample, x))


class FrozenBottleneck(Bottleneck):  # type: ignore[misc]
    """Three convolutions and what passes them by."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to [B, C', h', w']."""
        narrow = _rectified(self.conv2, _rectified(self.conv1, x))
        return _joined(self.conv3, narrow, *_beside(self.downsample, x))


_WITH_FROZEN_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    BasicBlock: FrozenBasicBlock,
    Bottleneck: FrozenBottleneck,
}


def with_frozen_norms(block: nn.Module) -> None:
    """Let one of torchvision's residual blocks, whose norms are frozen, compute as those here do.

    Modules of other kinds stay as they are.
    """
    block.__class__ = _WITH_FROZEN_NORMS.get(type(block), type(block))


def _beside(downsample: nn.Sequential | None, x: Tensor) -> tuple[NormedConv2d | None, Tensor]:
    """The convolution that passes a block by, if there is one, and what goes into it.

    ResNet-vd pools before that convolution.
    """
    if downsample is None:
        return None, x
    *before, convolution, _ = downsample
    for step in before:
        x = step(x)
    return cast(NormedConv2d, convolution), x


def _rectified(convolution: NormedConv2d, x: Tensor) -> Tensor:
    """relu(convolution(x))."""
    if not _fuses(x):
        maps: Tensor = convolution(x)
        return maps.relu_()
    from d3etr.kernels.epilogue import shift_and_rectify

    return shift_and_rectify(*convolution.unshifted(x))


def _joined(
    convolution: NormedConv2d, x: Tensor, shortcut: NormedConv2d | None, identity: Tensor
) -> Tensor:
    """relu(convolution(x) + shortcut(identity)); no shortcut leaves the identity as it is."""
    if not _fuses(x):
        maps: Tensor = convolution(x)
        maps += identity if shortcut is None else shortcut(identity)
        return maps.relu_()
    from d3etr.kernels.epilogue import shift_and_rectify

    maps, shift = convolution.unshifted(x)
    if shortcut is not None:
        identity, its_shift = shortcut.unshifted(identity)
        shift = shift + its_shift  # of both at once: the shortcut's maps need no pass of their own
    return shift_and_rectify(maps, shift, identity)


def _fuses(x: Tensor) -> bool:
    """Whether kernels run where x is; what torch.compile traces is fused by its own."""
    return not torch.compiler.is_compiling() and runs_kernels(x.device)
