"""The tokens of the highest class score as boxes alone: LW-DETR's first stage.

Shapes: B images · S memory tokens of all levels · N queries of a group · C classes · D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d3etr.detectors.heads import moved_boxes
from d3etr.detectors.proposals import TokenHeads
from d3etr.detectors.selection import at_places


class BoxSelection(TokenHeads):
    """Scores every token by its classes; the best ones propose boxes.

    Args:
        config: uses width and queries.
        classes: C.
    """

    def forward(
        self, tokens: Tensor, start: Tensor, silent: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the selected tokens say, and the scores of all.

        Args:
            tokens: [B, S, D], zero where they are silent.
            start: [B or 1, S, 4] boxes cxcywh, zero likewise.
            silent: [B or 1, S] bool: tokens that are taken last.

        Returns:
            Logits [B, N, C], boxes [B, N, 4] and places [B, N]; and the logits [B, S, C] that they
            were selected by.
        """
        states = self.states(tokens)
        scores: Tensor = self.class_head(states)
        place = self.best(scores.detach().amax(-1).masked_fill(silent, float("-inf")))
        start, states, selected = (at_places(x, place) for x in (start, states, scores))
        with torch.autocast(states.device.type, enabled=False):
            boxes = moved_boxes(start, self.box_head(states.float()))
        return selected.float(), boxes, place, scores
