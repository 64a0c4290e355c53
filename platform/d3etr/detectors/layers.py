"""Parts that encoder, decoder and heads share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional


class MLP(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        widths: channels from input to output; one linear layer between neighbours.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., widths[0]] to [..., widths[-1]]."""
        *hidden, last = self.layers
        for layer in hidden:
            x = functional.relu(layer(x), inplace=True)
        return last(x)  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """Post-norm residual block of two linear layers.

    Args:
        width: D.
        hidden: channels between the two layers.
        dropout: probability, after the activation and before the sum.
        learned_slope: PReLU instead of ReLU, as in DAB-DETR.
    """

    def __init__(
        self, width: int, hidden: int, dropout: float, learned_slope: bool = False
    ) -> None:
        super().__init__()
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.activation = nn.PReLU() if learned_slope else nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        hidden = self.dropout(self.activation(self.inner(x)))
        return self.norm(x + self.dropout(self.outer(hidden)))  # type: ignore[no-any-return]
