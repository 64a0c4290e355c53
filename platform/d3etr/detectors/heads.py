"""From decoder states to class logits and boxes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from d3etr.detectors.transformer import MLP

EPSILON = 1e-5
"""Of the inverse sigmoid of every official code but DAB-DETR's."""


def movable(reference: Tensor, epsilon: float) -> Tensor:
    """Where boxes move from: a saturated reference could never move again.

    log(max(p, epsilon) / max(1 - p, epsilon)) of p = sigmoid(reference): the ``inverse_sigmoid`` of
    the official codes, without the rounding of p.

    Args:
        reference: logits of any shape.
        epsilon: e; logits between those of e and 1 - e stay as they are.
    """
    limit = functional.logsigmoid(reference.abs()) - math.log(epsilon)
    return reference.clamp(-limit, limit)


def box_logits(
    head: MLP, states: Tensor, reference: Tensor | None = None, epsilon: float = EPSILON
) -> Tensor:
    """Boxes before the sigmoid, as offsets from references.

    In float32 also under autocast: 8 bits of mantissa are 1/256 of the image.

    Args:
        head: D to 4.
        states: [..., N, D].
        reference: [..., N, 2] or [..., N, 4] logits that broadcast against the states, or None.
        epsilon: as of ``movable``.

    Returns:
        [..., N, 4].
    """
    with torch.autocast(states.device.type, enabled=False):
        offsets: Tensor = head(states.float())
        return offsets if reference is None else moved(offsets, reference, epsilon)


def moved(offsets: Tensor, reference: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Boxes before the sigmoid [..., N, 4]: references, moved by offsets [..., N, 4] in float32.

    Args:
        offsets: of a head.
        reference: as of ``box_logits``.
        epsilon: as of ``movable``.
    """
    with torch.autocast(offsets.device.type, enabled=False):
        reference = movable(reference.float(), epsilon)
        return offsets + functional.pad(reference, (0, 4 - reference.shape[-1]))


def predict_boxes(
    head: MLP, states: Tensor, reference: Tensor | None = None, epsilon: float = EPSILON
) -> Tensor:
    """Boxes [..., N, 4] cxcywh in [0, 1]; arguments as of ``box_logits``."""
    return box_logits(head, states, reference, epsilon).sigmoid()


def moved_boxes(boxes: Tensor, moves: Tensor) -> Tensor:
    """Boxes moved by shares of their own sides, which grow by the exponential.

    LW-DETR's parametrisation (arXiv 2406.03459): boxes may reach beyond the picture.

    Args:
        boxes: [..., 4] cxcywh.
        moves: [..., 4].
    """
    sides = boxes[..., 2:]
    return torch.cat([boxes[..., :2] + moves[..., :2] * sides, moves[..., 2:].exp() * sides], -1)


def sigmoid_logits(logits: Tensor, classes: int) -> Tensor:
    """Logits whose sigmoids are a softmax's probabilities of classes, among other outputs.

    logit(p_c) = z_c - log sum_{j != c} exp(z_j), without cancellation: where a class has most
    of the mass, the others are summed up without it.

    Args:
        logits: [..., C + X]; X other outputs, such as "no object", come last.
        classes: C.

    Returns:
        [..., C].
    """
    total = logits.logsumexp(-1, keepdim=True)
    top = logits.argmax(-1, keepdim=True)
    without_top = logits.scatter(-1, top, float("-inf")).logsumexp(-1, keepdim=True)
    share = (logits - total).clamp(max=-1e-6)  # of the top one, which is replaced below
    others = total + torch.log1p(-share.exp())
    return (logits - others.scatter(-1, top, without_top))[..., :classes]
