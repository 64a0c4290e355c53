"""Target-aware feature distillation (DETRDistill, arXiv 2211.10156, section 3.3).

Students learn the teacher's memory tokens, those most that the teacher's good queries resemble.
That tokens are compared behind the encoder is our choice; the authors compare maps of the neck.
So is what happens where the grids differ: the teacher's level of the nearest grid, by its number of
cells, is resized to each of the student's.

Shapes: B images · M teacher queries · S memory tokens of the student · S' of the teacher ·
T objects of the fullest image · D' width of the teacher.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, interpolate, normalize

from d3etr.matching.boxes import cxcywh_to_xyxy
from d3etr.structures import DecoderOutputs, Levels, Memory, Targets

LEAST = 0.01
"""Weight of tokens that no good query resembles; the authors' code."""


def query_quality(outputs: DecoderOutputs, targets: Targets) -> Tensor:
    """How good each teacher query is: its confidence times its best overlap with an object.

    Args:
        outputs: of the teacher; the last layer is used.
        targets: ground truth.

    Returns:
        [B, M] in [0, 1].
    """
    boxes = cxcywh_to_xyxy(outputs.boxes_cxcywh[-1].float())[:, :, None]
    truth = cxcywh_to_xyxy(targets.boxes_cxcywh)[:, None]
    low = torch.maximum(boxes[..., :2], truth[..., :2])
    high = torch.minimum(boxes[..., 2:], truth[..., 2:])
    overlap = (high - low).clamp(min=0).prod(-1)
    areas = [(part[..., 2:] - part[..., :2]).prod(-1) for part in (boxes, truth)]
    iou = overlap / (areas[0] + areas[1] - overlap).clamp(min=1e-9)
    if not iou.shape[-1]:
        return torch.zeros_like(iou.sum(-1))
    return iou.amax(-1) * outputs.confidence()[-1].float()


def resize_tokens(tokens: Tensor, padding: Tensor | None, levels: Levels, target: Levels) -> Tensor:
    """The teacher's memory on the student's grids, each from the level of the nearest grid.

    Args:
        tokens: [B, S', D'] of the teacher.
        padding: [B, S'] bool, True under its padding, which does not bleed in; or None.
        levels: (height, width) of each of the teacher's feature levels.
        target: those of the student's, as many or not.

    Returns:
        [B, S, D']; without meaning under the student's padding.
    """
    if levels == target:
        return tokens
    visible = torch.ones_like(tokens[..., :1]) if padding is None else (~padding)[..., None]
    areas = [height * width for height, width in levels]
    parts = torch.split(torch.cat([tokens * visible, visible.to(tokens)], -1), areas, 1)
    resized = []
    for size in target:
        nearest = min(range(len(levels)), key=lambda k: abs(math.log(areas[k] / math.prod(size))))
        plane = parts[nearest].mT.reshape(len(tokens), -1, *levels[nearest])
        resized.append(interpolate(plane, size, mode="bilinear", antialias=True).flatten(2).mT)
    mixed = torch.cat(resized, 1)
    smallest = torch.finfo(mixed.dtype).tiny
    return mixed[..., :-1] / mixed[..., -1:].clamp(min=smallest)


def target_weights(
    states: Tensor, tokens: Tensor, padding: Tensor | None, quality: Tensor, queries: int
) -> Tensor:
    """How much each token counts: sum over good queries of quality times likeness.

    Args:
        states: [B, M, D'] the teacher's decoder states.
        tokens: [B, S, D'] its memory.
        padding: [B, S] bool, True for tokens that do not count, or None.
        quality: [B, M].
        queries: how many of the best are used.

    Returns:
        [B, S] in [LEAST, 1], the highest of an image is 1; 0 under padding.
    """
    kept, best = quality.topk(min(queries, quality.shape[1]), dim=1)
    chosen = states.gather(1, best[..., None].expand(-1, -1, states.shape[-1]))
    likeness = normalize(tokens.float(), dim=-1) @ normalize(chosen.float(), dim=-1).mT
    weights = (likeness * kept[:, None]).sum(-1).clamp(min=LEAST)
    if padding is not None:
        weights = weights.masked_fill(padding, 0.0)
    return weights / weights.amax(1, keepdim=True)


def feature_loss(
    tokens: Tensor, teacher: Tensor, weights: Tensor, padding: Tensor | None, images: Tensor
) -> Tensor:
    """Squared distance of weighted tokens, mean over channels and valid tokens.

    Args:
        tokens: [B, S, D'] of the student, with the teacher's width.
        teacher: [B, S, D'].
        weights: [B, S].
        padding: [B, S] bool, True under padding, or None.
        images: scalar, images in the global batch.

    Returns:
        Scalar.
    """
    distance = (tokens.float() - teacher.float()).square().mean(-1) * weights.square()
    return _mean_of_tokens(distance, padding) / images


def cosine_loss(tokens: Tensor, teacher: Tensor, padding: Tensor | None, images: Tensor) -> Tensor:
    """1 - cosine of corresponding tokens, mean over valid ones.

    Args:
        tokens: [B, S, D'] of the student, with the teacher's width.
        teacher: [B, S, D'].
        padding: [B, S] bool, True under padding, or None.
        images: scalar, images in the global batch.

    Returns:
        Scalar.
    """
    distance = 1 - cosine_similarity(tokens.float(), teacher.float(), dim=-1)
    return _mean_of_tokens(distance, padding) / images


def _mean_of_tokens(values: Tensor, padding: Tensor | None) -> Tensor:
    """Sum over images of the mean over valid tokens, of values [B, S]."""
    if padding is None:
        return values.mean(1).sum()
    visible = ~padding
    return ((values * visible).sum(1) / visible.sum(1).clamp(min=1)).sum()


class FeatureComparison(nn.Module):
    """How far the student's memory is from the teacher's where that sees objects.

    Args:
        student: D, width of the student.
        teacher: D'; where it differs, a linear map bridges it, which only training has.
        queries: how many of the teacher's best say where it sees objects.
    """

    def __init__(self, student: int, teacher: int, queries: int) -> None:
        super().__init__()
        same = student == teacher
        self.feature_adapter: nn.Module = nn.Identity() if same else nn.Linear(student, teacher)
        self._queries = queries

    def forward(
        self,
        student: Memory,
        teacher: DecoderOutputs,
        tokens: Tensor,
        targets: Targets,
        images: Tensor,
    ) -> Tensor:
        """Distance of the memories.

        Args:
            student: [B, S, D] tokens.
            teacher: outputs of its own queries, with states.
            tokens: [B, S', D'] of the teacher.
            targets: ground truth, which says what the teacher's good queries are; images without
                labels are left out.
            images: scalar, images with labels in the global batch.

        Returns:
            Scalar.
        """
        known, targets = targets.labelled, targets.of_labelled()
        teacher, tokens = teacher.of_first(known), tokens[:known].float()
        padding = None if student.padding is None else student.padding[:known]
        theirs = resize_tokens(tokens, teacher.padding, teacher.levels, student.levels)
        quality = query_quality(teacher, targets)
        if teacher.states is None:
            raise ValueError("features are compared, but the teacher's states were not kept")
        weights = target_weights(teacher.states, theirs, padding, quality, self._queries)
        ours = self.feature_adapter(student.tokens[:known].float())
        return feature_loss(ours, theirs, weights, padding, images)
