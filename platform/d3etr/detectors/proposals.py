"""The first stage of two-stage Deformable DETR: every memory token proposes a box.

(Zhu et al., arXiv 2010.04159, appendix A.4.)

Shapes: B images · S tokens of all levels · N queries · C classes · D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from d3etr.config.detector import DetectorConfig
from d3etr.detectors.feature_levels import cell_centres, valid_ratios
from d3etr.detectors.heads import box_logits
from d3etr.detectors.position import SineEncoding
from d3etr.detectors.transformer import MLP, Activation, relu
from d3etr.structures import DecoderOutputs, Levels, Memory, ObjectQueries

if TYPE_CHECKING:
    from d3etr.detectors.deformable_detr import DeformableDETRConfig

FINEST_SIZE = 0.05
"""Width and height that tokens of the finest level propose before they have learned; each
further level proposes twice as much."""
MARGIN = 0.01
"""Tokens whose first box has a side or centre this close to 0 or 1 propose nothing."""


class TokenHeads(nn.Module):
    """What a first stage says about tokens: their classes, and moves of their boxes.

    Args:
        config: uses width and queries.
        classes: C.
        activation: within the box head.
        projects: whether tokens are projected and normed first.
    """

    def __init__(
        self,
        config: DetectorConfig,
        classes: int,
        activation: Activation = relu,
        projects: bool = True,
    ) -> None:
        super().__init__()
        width = config.width
        self.queries = config.queries
        self.projection = nn.Linear(width, width) if projects else nn.Identity()
        self.norm = nn.LayerNorm(width) if projects else nn.Identity()
        self.class_head = nn.Linear(width, classes)
        self.box_head = MLP((width, width, width, 4), activation)

    def states(self, tokens: Tensor) -> Tensor:
        """What heads read, [.., D] of tokens [.., D]."""
        return self.norm(self.projection(tokens))  # type: ignore[no-any-return]

    def best(self, scores: Tensor) -> Tensor:
        """[B, N] places of the best of S tokens, of which each has one score [B, S]."""
        return scores.topk(min(self.queries, scores.shape[1]), dim=1).indices


class Proposals(TokenHeads):
    """Scores every token as "some object" and moves a box of its place and level.

    Args:
        config: uses width and queries.
        classes: C; as in the official code, class 0's score stands for "some object".
    """

    def __init__(self, config: DeformableDETRConfig, classes: int) -> None:
        super().__init__(config, classes)
        width = config.width
        self.embed = nn.Linear(2 * width, 2 * width)
        self.embed_norm = nn.LayerNorm(2 * width)
        self.encoding = SineEncoding(width)

    def forward(
        self, tokens: Tensor, padding: Tensor | None, levels: Levels
    ) -> tuple[DecoderOutputs, Tensor]:
        """What each token proposes.

        Returns:
            Logits [1, B, S, C] and boxes [1, B, S, 4]; the boxes before the sigmoid [B, S, 4].
        """
        start, silent = first_boxes(tokens, padding, levels)
        states = self.states(tokens.masked_fill(silent[..., None], 0.0))
        box_logits_of_tokens = box_logits(self.box_head, states, start)
        # As in the official code: what proposes nothing covers everything.
        box_logits_of_tokens = box_logits_of_tokens.masked_fill(silent[..., None], float("inf"))
        logits, boxes = self.class_head(states).float()[None], box_logits_of_tokens.sigmoid()[None]
        return DecoderOutputs(logits, boxes, levels=levels, padding=padding), box_logits_of_tokens

    def object_queries(self, memory: Memory | None) -> ObjectQueries:
        """The best proposals of each image as queries [B, N, ..], with their places.

        Gradients do not pass: proposals learn from their own loss.
        """
        if memory is None or memory.proposals is None or memory.proposal_logits is None:
            raise ValueError("two-stage queries are made from the memory that 'encode' returned")
        proposals, box_logits_of_tokens = memory.proposals, memory.proposal_logits
        best = self.best(proposals.logits[0, ..., 0])
        anchors = box_logits_of_tokens.gather(1, best[..., None].expand(-1, -1, 4)).detach()
        embedded = self.embed_norm(self.embed(self.encoding.in_order(anchors.sigmoid())))
        embedding, content = embedded.chunk(2, -1)
        return ObjectQueries(embedding, anchors, content, best)


def first_boxes(tokens: Tensor, padding: Tensor | None, levels: Levels) -> tuple[Tensor, Tensor]:
    """Boxes at the tokens' places before they have learned anything, as logits.

    Arguments and result as of ``token_boxes``.
    """
    boxes, silent = token_boxes(tokens, padding, levels)
    return boxes.clamp(MARGIN, 1 - MARGIN).logit(), silent


def token_boxes(tokens: Tensor, padding: Tensor | None, levels: Levels) -> tuple[Tensor, Tensor]:
    """Boxes at the tokens' places before they have learned anything.

    Args:
        tokens: [B, S, D].
        padding: [B, S] bool or None.
        levels: the grids that S runs over.

    Returns:
        [B or 1, S, 4] cxcywh, and [B or 1, S] bool: tokens that propose nothing.
    """
    centres = cell_centres(valid_ratios(padding, levels), levels, tokens)
    sizes = [
        tokens.new_full((h * w,), FINEST_SIZE * 2.0**level, dtype=torch.float32)
        for level, (h, w) in enumerate(levels)
    ]
    sides = torch.cat(sizes)[None, :, None].expand(centres.shape[0], -1, 2)
    boxes = torch.cat([centres, sides], -1)
    silent = ~((boxes > MARGIN) & (boxes < 1 - MARGIN)).all(-1)
    if padding is not None:
        silent = silent | padding
    return boxes, silent
