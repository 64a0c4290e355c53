"""A plain training step beside Hugging Face's, same weights and batch: Conditional DETR, RT-DETR.

Theirs is used as its documentation does: the model computes the loss from labels; attention and
memory format are its defaults. Theirs drops no attention weights by default and freezes its own
backbone: here both do as the authors' code does (the same dropout everywhere) or without dropout,
and train everything. Both use the same fused AdamW and clip gradients.
"""

from __future__ import annotations

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


def their_rt_detr(ours: DetectorConfig) -> nn.Module:
    """Their RT-DETR with random weights, of the official sizes for its backbone."""
    import transformers

    depths, hidden, kind = DEPTHS[ours.backbone.name.removesuffix("vd")]
    config = transformers.RTDetrConfig(
        backbone_config=transformers.RTDetrResNetConfig(
            depths=depths,
            hidden_sizes=hidden,
            layer_type=kind,
            out_features=["stage2", "stage3", "stage4"],
        ),
        encoder_in_channels=hidden[1:],
        num_queries=ours.queries,
        num_labels=CLASSES,
        encoder_layers=ours.encoder_layers,
        decoder_layers=ours.decoder_layers,
        encoder_ffn_dim=ours.encoder_feedforward,
        decoder_ffn_dim=ours.feedforward,
        hidden_expansion=ours.expansion,
    )
    torch.manual_seed(0)
    return transformers.RTDetrForObjectDetection(config)


def twin(theirs: nn.Module, config: DetectorConfig) -> DetectionTransformer:
    """Ours with the same weights."""
    ours = build_detector(config, CLASSES)
    ours.load_state_dict(rename(theirs.state_dict(), config.name))
    return ours


def train_the_same(theirs: nn.Module, ours: DetectionTransformer) -> int:
    """Train every parameter of both; returns how many numbers that are."""
    for model in (theirs, ours):
        model.requires_grad_(True)
    counts = [sum(p.numel() for p in model.parameters()) for model in (theirs, ours)]
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

    def __call__(self) -> Tensor:
        with autocast(self._scale):
            found = self._model(self._pixels, pixel_mask=self._mask, labels=self._labels)
        found.loss.backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), CLIP_NORM)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        return found.loss.detach()  # type: ignore[no-any-return]


def compare(scale: Scale) -> list[Comparison]:
    """Images per second of both, with the authors' dropout and without any."""
    conditional = [_conditional(side, dropout) for side in scale.sides for dropout in (0.1, 0.0)]
    return [*conditional, *(_rt_detr(side) for side in scale.sides)]


def _conditional(scale: Scale, dropout: float) -> Comparison:
    config = detector_config(scale, scale.backbone, dropout=dropout)
    title = f"Conditional DETR {scale.backbone}, dropout {dropout}"
    return _compare(scale, title, config, hugging_face(config), 1.3)


def _rt_detr(scale: Scale) -> Comparison:
    """With denoising; boxes teach one layer only, as theirs do."""
    small = scale.backbone == "resnet18"
    layers = {"decoder_layers": 3 if small else 6, "expansion": 0.5 if small else 1.0}
    rest = {"name": "rt_detr", "dropout": 0.0, "look_forward_twice": False, "feedforward": 1024}
    sizes = {"encoder_layers": 1, **layers, **rest}
    config = detector_config(scale, f"{scale.backbone}vd", **sizes)
    return _compare(scale, f"RT-DETR {scale.backbone}vd", config, their_rt_detr(config), 1.1)


def _compare(
    scale: Scale, title: str, config: DetectorConfig, theirs: nn.Module, aim: float
) -> Comparison:
    ours = twin(theirs, config)
    trained = train_the_same(theirs, ours)
    batch = random_batch(scale)
    steps: dict[str, Action] = {
        THEIRS: TheirStep(theirs, scale, batch),
        OURS: Step(ours, None, scale, batch),
    }
    if scale.device.type == "cuda":
        steps[REPLAYED] = Step(
            twin(theirs, config).to(scale.device), None, scale, batch, graphs=True
        )
    taken = alternate(steps, scale.rounds, scale.device)
    precision = str(scale.precision).removeprefix("torch.")
    title = (
        f"{title}, {scale.image} px, {scale.batch} images, {scale.queries} queries, {precision}, "
        f"{trained / 1e6:.1f} M trained parameters"
    )
    asked = "at least 2" if scale.device.type == "cuda" else f"at least {aim}"
    return Comparison(title, "images per second", per_second(taken, scale.batch), THEIRS, asked)
