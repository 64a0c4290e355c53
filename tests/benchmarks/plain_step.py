"""A plain training step of Conditional DETR beside Hugging Face's, same weights and batch.

Theirs is used as its documentation does: the model computes the loss from labels; attention and
memory format are its defaults. Theirs drops no attention weights by default and freezes its own
backbone: here both do as the authors' code does (the same dropout everywhere) or without dropout,
and train everything. Both use the same fused AdamW and clip gradients.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from benchmarks.problems import CLASSES, CLIP_NORM, Step, autocast, detector_config, random_batch
from benchmarks.side_by_side import Action, Comparison, Scale, alternate, per_second
from d3etr.config.detector import DetectorConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.build import build_detector
from d3etr.detectors.imports.layouts import rename
from d3etr.structures import ImageBatch, Targets

DEPTHS = {
    "resnet18": ([2, 2, 2, 2], [64, 128, 256, 512], "basic"),
    "resnet50": ([3, 4, 6, 3], [256, 512, 1024, 2048], "bottleneck"),
}
THEIRS, OURS, REPLAYED = "Hugging Face's", "d3etr's", "d3etr's, cuda_graphs"


def hugging_face(ours: DetectorConfig) -> nn.Module:
    """Their Conditional DETR with random weights, and dropout where the authors have it."""
    import transformers

    depths, hidden, kind = DEPTHS[ours.backbone.name]
    config = transformers.ConditionalDetrConfig(
        backbone_config=transformers.ResNetConfig(
            depths=depths, hidden_sizes=hidden, layer_type=kind, out_features=["stage4"]
        ),
        num_queries=ours.queries,
        num_labels=CLASSES,
        encoder_layers=ours.encoder_layers,
        decoder_layers=ours.decoder_layers,
        encoder_ffn_dim=ours.feedforward,
        decoder_ffn_dim=ours.feedforward,
        auxiliary_loss=True,
        dropout=ours.dropout,
        attention_dropout=ours.dropout,
        activation_dropout=ours.dropout,
    )
    torch.manual_seed(0)
    return transformers.ConditionalDetrForObjectDetection(config)


def twin(theirs: nn.Module, config: DetectorConfig) -> DetectionTransformer:
    """Ours with the same weights."""
    ours = build_detector(config, CLASSES)
    ours.load_state_dict(rename(theirs.state_dict(), config.name))
    return ours


def train_the_same(theirs: nn.Module, ours: DetectionTransformer) -> int:
    """Train every parameter of both; returns how many numbers that are."""
    for model in (theirs, ours):
        model.requires_grad_(True)
    return require_as_many(theirs, ours)


def require_as_many(theirs: nn.Module, ours: nn.Module) -> int:
    """How many numbers both train.

    Raises:
        ValueError: one trains more than the other.
    """
    counts = [
        sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (theirs, ours)
    ]
    if counts[0] != counts[1]:
        raise ValueError(f"not the same: they train {counts[0]:,} numbers, we {counts[1]:,}")
    return counts[0]


class TheirStep:
    """Forward, loss, backward, clipping, update."""

    def __init__(self, model: nn.Module, scale: Scale, batch: tuple[ImageBatch, Targets]) -> None:
        self._model, self._scale = model.train().to(scale.device), scale
        images, targets = batch
        self._pixels = images.pixels
        self._mask = torch.ones(images.pixels[:, 0].shape, dtype=torch.int64, device=scale.device)
        self._labels = [
            {"class_labels": labels, "boxes": boxes}
            for labels, boxes in zip(targets.labels, targets.boxes_cxcywh, strict=True)
        ]
        self._optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def backward(self) -> Tensor:
        """The loss; gradients are added."""
        with autocast(self._scale):
            found = self._model(self._pixels, pixel_mask=self._mask, labels=self._labels)
        found.loss.backward()
        return found.loss.detach()  # type: ignore[no-any-return]

    def __call__(self) -> Tensor:
        loss = self.backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), CLIP_NORM)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        return loss


def compare(scale: Scale) -> list[Comparison]:
    """Images per second of both, with the authors' dropout and without any."""
    return [_conditional(side, dropout) for side in scale.sides for dropout in (0.1, 0.0)]


def _conditional(scale: Scale, dropout: float) -> Comparison:
    config = detector_config(scale, scale.backbone, dropout=dropout)
    theirs = hugging_face(config)
    ours = twin(theirs, config)
    trained = train_the_same(theirs, ours)
    title = f"Conditional DETR {scale.backbone}, dropout {dropout}, {scale.queries} queries"
    return side_by_side(scale, title, theirs, ours, trained, 1.3)


def side_by_side(
    scale: Scale,
    title: str,
    theirs: nn.Module,
    ours: DetectionTransformer,
    trained: int,
    aim: float,
) -> Comparison:
    """Steps of both on one batch, in turns.

    Args:
        scale: images, precision and rounds.
        title: of the table, in front of what the scale says.
        theirs: is trained.
        ours: is trained; of the same weights.
        trained: numbers that each trains.
        aim: ratio that is asked for on a CPU.
    """
    batch = random_batch(scale)
    again = copy.deepcopy(ours) if scale.device.type == "cuda" else None
    steps: dict[str, Action] = {
        THEIRS: TheirStep(theirs, scale, batch),
        OURS: Step(ours, None, scale, batch),
    }
    if again is not None:
        steps[REPLAYED] = Step(again.to(scale.device), None, scale, batch, graphs=True)
    taken = alternate(steps, scale.rounds, scale.device)
    precision = str(scale.precision).removeprefix("torch.")
    title = (
        f"{title}, {scale.image} px, {scale.batch} images, {precision}, "
        f"{trained / 1e6:.1f} M trained parameters"
    )
    asked = "at least 2" if scale.device.type == "cuda" else f"at least {aim}"
    return Comparison(title, "images per second", per_second(taken, scale.batch), THEIRS, asked)
