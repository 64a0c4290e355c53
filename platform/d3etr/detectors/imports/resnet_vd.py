"""Names of ResNet-vd's tensors by others, and ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

RULES: Sequence[tuple[str, Callable[[re.Match[str]], str] | str]] = (
    (r"\.embedder\.embedder\.(\d)\.convolution\.", lambda match: _stem(int(match[1]), "conv")),
    (r"\.embedder\.embedder\.(\d)\.normalization\.", lambda match: _stem(int(match[1]), "norm")),
    (r"\.conv1\.conv1_(\d)\.(conv|norm)\.", lambda match: _stem(int(match[1]) - 1, match[2])),
    (r"\.shortcut\.(1\.)?convolution\.", ".downsample.1."),  # the 1 is where a pool is 0
    (r"\.shortcut\.(1\.)?normalization\.", ".downsample.2."),
    (r"\.short\.(conv\.)?norm\.", ".downsample.2."),
    (r"\.short\.(conv\.)?conv\.", ".downsample.1."),
    (r"\.res_layers\.(\d+)\.blocks\.", lambda match: f".layer{int(match[1]) + 1}."),
    (r"\.branch2([abc])\.conv\.", lambda match: f".conv{'abc'.index(match[1]) + 1}."),
    (r"\.branch2([abc])\.norm\.", lambda match: f".bn{'abc'.index(match[1]) + 1}."),
)
"""Names in a backbone by ``rtdetr_pytorch``'s PResNet and by transformers' RTDetrResNet; before
``layouts.FIRST``, which takes a shortcut for one without a pool."""
_SIGN = re.compile(r"(^|\.)(embedder\.embedder\.0\.convolution|conv1\.conv1_1\.conv)\.")


def is_resnet_vd(names: Iterable[str]) -> bool:
    """Whether tensors of these names are a ResNet-vd's, alone or in a detector."""
    return any(map(_SIGN.search, names))


def _stem(layer: int, kind: str) -> str:
    """Our place of a ResNet-vd's stem layer, 0 to 2: convolution, norm and ReLU are a sequence."""
    if kind == "norm" and layer == 2:
        return ".bn1."
    return f".conv1.{3 * layer + (kind == 'norm')}."
