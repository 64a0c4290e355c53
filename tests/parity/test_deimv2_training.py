"""A training step of DEIMv2: the official code's losses over what transformers' model computes.

transformers' own total (5.23) is another: it pairs class logits with boxes of another layer and
leaves the last layer without local losses, as D-FINE's there. Its criterion's pieces, which are
official, are put together here as the official ``DEIMCriterion`` does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_criterion_parity import as_targets, random_labels
from test_d_fine_loss_parity import QUERIES, Case, Labels, Pairs, add, official_losses
from test_d_fine_parity import CLASSES, imported
from test_deimv2_parity import VARIANTS, their_model
from test_denoising_parity import same_noise as same_noise
from test_quality_loss_parity import their_config
from torch import Tensor, nn

from d3etr.config.distillation import MethodConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.denoising import DENOISING, DenoisingNoise, draw_noise
from d3etr.detectors.imports.layouts import rename
from d3etr.distiller import Distiller
from d3etr.edge_distributions import BoxDistributions
from d3etr.matching.edges import bin_distances
from d3etr.structures import MAIN, DecoderOutputs, ImageBatch, ObjectQueries, QueryGroup

loss_deimv2 = pytest.importorskip("transformers.loss.loss_deimv2")

BINS, QUERIES_OF_NOISE, STEP = 32, 10, 3
COUNTS = {
    "N": (5, 5),
    "S over HGNet: elan5, a wider encoder": (3, 3),
    "Atto": (3, 0, 6, 1),
    "X: registers and gated blocks": (4, 4),
}
"""Objects of each image. Where matches are united, images are twice the same: the union of several
is theirs only if it grows alike in all (``test_d_fine_loss_parity``)."""


class Step(Case):
    """What their model made of a batch, as the parts that ours has."""

    def __init__(self, labels: Labels, theirs: Any, criterion: SetCriterionConfig) -> None:
        self.labels, self.targets, self.criterion = labels, as_targets(labels), criterion
        self.objects = float(max(1, sum(len(part["boxes"]) for part in labels)))
        self.theirs = loss_deimv2.Deimv2Loss(their_config(criterion))
        meta = theirs.denoising_meta_values
        self.decoded, self.groups = {}, {}
        split = [0, QUERIES] if meta is None else meta["dn_num_split"]
        for name, part in ((DENOISING, slice(split[0])), (MAIN, slice(split[0], None))):
            if part.stop != 0:
                self.decoded[name] = self.outputs(theirs, part)
        self.groups[MAIN] = QueryGroup(ObjectQueries(torch.zeros(QUERIES, 1)))
        if meta is not None:
            objects = torch.full((len(labels), split[0]), -1)
            for image, places in enumerate(meta["dn_positive_idx"]):
                count = len(labels[image]["boxes"])
                objects[image, places] = torch.arange(count).repeat(meta["dn_num_group"])
            self.groups[DENOISING] = QueryGroup(
                ObjectQueries(torch.zeros(split[0], 1)),
                objects=objects,
                copies=meta["dn_num_group"],
            )
        self.proposals = DecoderOutputs(theirs.enc_topk_logits[None], theirs.enc_topk_bboxes[None])

    @staticmethod
    def outputs(theirs: Any, part: slice) -> DecoderOutputs:
        """Of some queries; their first outputs come in front of those of the layers."""
        logits, boxes, corners, starts = (
            x[:, :, part].transpose(0, 1)
            for x in (
                theirs.intermediate_logits,
                theirs.intermediate_reference_points,
                theirs.intermediate_predicted_corners,
                theirs.initial_reference_points,
            )
        )
        distributions = BoxDistributions(
            corners.unflatten(-1, (4, BINS + 1)),
            starts[0],
            logits[0],
            boxes[0],
            bin_distances(BINS + 1, 0.5, 4.0, torch.device("cpu")),
            4.0,
        )
        return DecoderOutputs(logits[1:], boxes[1:], distributions=distributions)

    def terms(
        self, layer: dict[str, Tensor], own: Pairs, shared: Pairs, sums: tuple[float, float]
    ) -> dict[str, Tensor]:
        """Weighted terms of one layer, with the matchability-aware loss of classes."""
        c, none = self.criterion, torch.zeros(())
        found = self.theirs.loss_labels_mal(layer, self.labels, own, sums[0])
        found |= self.theirs.loss_boxes(layer, self.labels, shared, sums[1])
        if c.fgl_weight:
            found |= self.theirs.loss_local(layer, self.labels, shared, sums[1])
        return {
            "class": c.class_weight * found["loss_mal"],
            "l1": c.l1_weight * found["loss_bbox"],
            "giou": c.giou_weight * found["loss_giou"],
            "fgl": c.fgl_weight * found.get("loss_fgl", none),
            "ddf": c.ddf_weight * found.get("loss_ddf", none),
        }

    def expected(self) -> dict[str, Tensor]:
        """As the official code puts them together; lite sizes match every layer by itself."""
        if self.criterion.union_matching:
            return official_losses(self)
        losses: dict[str, Tensor] = {}
        for name in [*self.decoded, "proposals"]:
            copies = self.groups[name].copies if name == DENOISING else 1
            number = self.objects * copies
            for layer, pairs in zip(self.layers(name), self.matched(name), strict=True):
                add(losses, name, self.terms(layer, pairs, pairs, (number, number)))
        return losses


@pytest.mark.parametrize("name", COUNTS)
def test_a_training_step_equals_the_official_losses(
    name: str, tmp_path: Path, same_noise: Callable[[DenoisingNoise], None]
) -> None:
    """Of the same weights, images and noise: the loss, and its gradient of every parameter."""
    counts = COUNTS[name]
    changes = {"num_queries": QUERIES, "max_num_bins": BINS, "num_denoising": QUERIES_OF_NOISE}
    model = their_model(VARIANTS[name], **changes, label_noise_ratio=0.5, box_noise_scale=1.0)
    detector, _ = imported(model, tmp_path)
    detector.train()
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    # Drawn so that nothing lies at a border of cells, where gradients jump: pixels that differ by
    # 1e-6 change them by 2e-6 at most.
    torch.manual_seed(0)
    pixels, labels = torch.randn(len(counts), 3, 96, 128), random_labels(counts)
    if detector.config.criterion_defaults["union_matching"]:
        pixels[1], labels[1] = pixels[0], labels[0]
    images = ImageBatch(pixels)
    targets = as_targets(labels)
    queries = 2 * max(counts) * (QUERIES_OF_NOISE // max(counts))
    same_noise(draw_noise(targets.image_ids, queries, CLASSES, seed=0, step=STEP))

    criterion = SetCriterionConfig.model_validate({**detector.config.criterion_defaults})
    module = Distiller(detector, None, MethodConfig.parse({}), criterion, seed=0)
    losses = module(images, targets, None, module.normalisers(targets, None), step=STEP)
    ours = torch.stack(list(losses.values())).sum()
    expected = Step(labels, model.model(images.pixels, labels=labels), criterion).expected()
    theirs = torch.stack([*expected.values()]).sum()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    ours.backward()
    theirs.backward()
    require_equal_gradients(detector, model)


def require_equal_gradients(detector: nn.Module, model: nn.Module) -> None:
    """Up to 1e-5 of the largest; the backbone's norms are buffers in theirs."""
    gradients = {
        name: torch.zeros_like(x) if x.grad is None else x.grad
        for name, x in model.named_parameters()
    }
    # Theirs are one tensor, which the model has under several names.
    expected = rename(gradients, "deimv2", agree=lambda *_: True)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    compared = set()
    for name, parameter in detector.named_parameters():
        if name.startswith("backbone.") and ".conv." not in name:
            continue
        assert parameter.grad is not None, name
        error = (parameter.grad - expected[name]).abs().max().item()
        assert error <= 1e-5 * largest, (name, error, largest)
        compared.add(name)
    assert {"decoder.layers.0.feedforward.inner.weight", "label_embedding.weight"} <= compared
    assert not {x for x in expected if not x.startswith("backbone.")} - compared
