"""D-FINE's losses equal transformers' piece by piece, and the official code's as a whole.

As a whole they are not transformers' (5.23): that zips class logits with corners of another layer,
leaves the last layer without local losses, and has no union matching. The slow loops here follow
the official code: ``DFINECriterion`` and its ``_get_go_indices``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_criterion_parity import as_targets, random_labels
from test_denoising_parity import CLASSES, MANY, ONE_EMPTY, our_group, table
from test_quality_loss_parity import their_config
from torch import Tensor
from torch.nn.functional import kl_div

from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.denoising import DENOISING, DenoisingConfig
from d3etr.edge_distributions import BoxDistributions
from d3etr.losses.box_distributions import localisation_terms, neighbouring_bins
from d3etr.losses.edge_supervision import match_normalisers
from d3etr.losses.supervision import PROPOSALS, GroundTruthSupervision
from d3etr.matching.assignment import Solver
from d3etr.matching.edges import bin_distances, edge_moves
from d3etr.structures import MAIN, DecoderOutputs, ObjectQueries, QueryGroup

d_fine = pytest.importorskip("transformers.loss.loss_d_fine")

LAYERS, QUERIES, BINS, CURVATURE, BOUND = 3, 25, 32, 4.0, 0.5
CROWD = (1, 9, 4, 0)
Labels = list[dict[str, Tensor]]
Pairs = list[tuple[Tensor, Tensor]]
"""Queries and objects of each image, as transformers has them."""


def refined(images: int, queries: int, seed: int) -> DecoderOutputs:
    """Random outputs whose corners differ by layer and whose boxes lie near and far."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    shape = LAYERS, images, queries
    distributions = BoxDistributions(
        (drawn(*shape, 4, BINS + 1) * 6).requires_grad_(True),
        drawn(images, queries, 4) * 0.5 + 0.02,
        (drawn(images, queries, CLASSES) * 4 - 2).requires_grad_(True),
        (drawn(images, queries, 4) * 0.5 + 0.1).requires_grad_(True),
        bin_distances(BINS + 1, BOUND, CURVATURE, torch.device("cpu")),
        CURVATURE,
    )
    return DecoderOutputs(
        (drawn(*shape, CLASSES) * 6 - 4).requires_grad_(True),
        (drawn(*shape, 4) * 0.5 + 0.1).requires_grad_(True),
        distributions=distributions,
    )


def trained(outputs: DecoderOutputs) -> list[Tensor]:
    own = outputs.distributions
    leaves = [outputs.logits, outputs.boxes_cxcywh]
    return leaves if own is None else [*leaves, own.corners, own.first_logits, own.first_boxes]


def proposed(images: int) -> DecoderOutputs:
    logits, boxes = (x[:1].detach().clone() for x in trained(refined(images, QUERIES, 7))[:2])
    return DecoderOutputs(logits.requires_grad_(True), boxes.requires_grad_(True))


class Case:
    """One batch, our losses of it and what transformers says about its parts."""

    def __init__(self, counts: tuple[int, ...], criterion: SetCriterionConfig) -> None:
        self.labels, images = random_labels(counts), len(counts)
        self.targets, self.criterion = as_targets(self.labels), criterion
        self.decoded = {MAIN: refined(images, QUERIES, 0)}
        self.groups = {MAIN: QueryGroup(ObjectQueries(torch.zeros(QUERIES, 16)))}
        self.proposals = proposed(images)
        if any(counts):
            group, _ = our_group(self.targets, table(), DenoisingConfig(queries=20))
            self.groups[DENOISING] = group
            self.decoded[DENOISING] = refined(images, group.queries.count, 1)
        config = their_config(criterion)
        self.theirs = d_fine.DFineLoss(config)
        self.objects = float(max(1, sum(counts)))

    def normalisers(self) -> dict[str, Tensor]:
        sums = {
            "objects": self.targets.num_objects.sum().float(),
            "labelled_images": torch.tensor(float(len(self.labels))),
        }
        return sums | match_normalisers({MAIN: QUERIES}, self.targets)

    def ours(self) -> dict[str, Tensor]:
        supervision = GroundTruthSupervision(self.criterion, Solver(threads=0), True)
        return supervision.begin(
            self.decoded, self.groups, self.proposals, dict, self.targets, self.normalisers()
        )()

    def layers(self, name: str) -> list[dict[str, Tensor]]:
        """Of decoder layers; the first layer's before refinement comes last."""
        outputs = self.proposals if name == PROPOSALS else self.decoded[name]
        own, count = outputs.distributions, outputs.layers
        found = [
            {"logits": outputs.logits[k], "pred_boxes": outputs.boxes_cxcywh[k]}
            for k in range(count)
        ]
        if own is None:
            return found
        teacher = {"teacher_corners": own.corners[-1], "teacher_logits": outputs.logits[-1]}
        for k, layer in enumerate(found):
            layer |= {"pred_corners": own.corners[k], "ref_points": own.start, **teacher}
        return [*found, {"logits": own.first_logits, "pred_boxes": own.first_boxes}]

    def given(self) -> Pairs:
        objects = self.groups[DENOISING].objects
        assert objects is not None
        places = [(row >= 0).nonzero()[:, 0] for row in objects]
        return [(place, row[place]) for place, row in zip(places, objects, strict=True)]

    def matched(self, name: str) -> list[Pairs]:
        layers = self.layers(name)
        if name == DENOISING:
            return [self.given()] * len(layers)
        return [self.theirs.matcher(layer, self.labels) for layer in layers]

    def terms(
        self, layer: dict[str, Tensor], own: Pairs, shared: Pairs, sums: tuple[float, float]
    ) -> dict[str, Tensor]:
        """Weighted class, L1, GIoU and FGL of one layer as transformers computes them."""
        found = self.theirs.loss_labels_vfl(layer, self.labels, own, sums[0])
        found |= self.theirs.loss_boxes(layer, self.labels, shared, sums[1])
        found |= self.theirs.loss_local(layer, self.labels, shared, sums[1])
        c = self.criterion
        return {
            "class": c.class_weight * found["loss_vfl"],
            "l1": c.l1_weight * found["loss_bbox"],
            "giou": c.giou_weight * found["loss_giou"],
            "fgl": c.fgl_weight * found.get("loss_fgl", torch.zeros(())),
            "ddf": c.ddf_weight * found.get("loss_ddf", torch.zeros(())),
        }


def criterion(**changes: Any) -> SetCriterionConfig:
    return SetCriterionConfig(class_loss="varifocal", class_weight=1.0, **changes)


def ddf_means(layer: dict[str, Tensor], labels: Labels, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """The official code's loss_match_local1 and 2, query by query."""
    sums: tuple[list[Tensor], list[Tensor]] = [], []
    for image, (rows, columns) in enumerate(pairs):
        objects = dict(zip(rows.tolist(), columns.tolist(), strict=True))
        for query in range(layer["logits"].shape[1]):
            student = (layer["pred_corners"][image, query] / 5).log_softmax(-1)
            teacher = (layer["teacher_corners"][image, query].detach() / 5).softmax(-1)
            weight = layer["teacher_logits"][image, query].sigmoid().max().detach()
            if query in objects:
                box = layer["pred_boxes"][image, query].detach()
                truth = labels[image]["boxes"][objects[query]]
                corners = [d_fine.center_to_corners_format(x[None]) for x in (box, truth)]
                weight = d_fine.box_iou(*corners)[0][0, 0]
            edges = 25 * weight * kl_div(student, teacher, reduction="none").sum(-1)
            sums[query not in objects].append(edges)
    none = torch.zeros(())
    first, second = (torch.cat(x).mean() if x else none for x in sums)
    return first, second


def share_of(pairs: Pairs, queries: int) -> float:
    matched = float(sum(len(rows) for rows, _ in pairs))
    others = len(pairs) * queries - matched
    return float(matched**0.5 / (matched**0.5 + others**0.5))


def add(total: dict[str, Tensor], name: str, terms: dict[str, Tensor]) -> None:
    for term, loss in terms.items():
        key = f"{name}/{term}"
        if name != PROPOSALS or term in ("class", "l1", "giou"):
            total[key] = total.get(key, torch.zeros(())) + loss


def assert_same(case: Case, expected: dict[str, Tensor]) -> None:
    """Each loss, and the gradients of their sum."""
    found = case.ours()
    assert found.keys() == expected.keys()
    for name, loss in found.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-5, atol=1e-6)
    leaves = [x for part in (*case.decoded.values(), case.proposals) for x in trained(part)]
    ours, theirs = (
        torch.autograd.grad(torch.stack([*x.values()]).sum(), leaves, materialize_grads=True)
        for x in (found, expected)
    )
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("counts", [MANY, ONE_EMPTY, CROWD, (0, 0, 0, 0)])
def test_every_layers_losses_equal_transformers(counts: tuple[int, ...]) -> None:
    """With their own pairs, first outputs and denoising included; DDF of it as official."""
    case = Case(counts, criterion())
    expected: dict[str, Tensor] = {}
    names = [MAIN, *([DENOISING] if any(counts) else []), PROPOSALS]
    for name in names:
        for layer, pairs in zip(case.layers(name), case.matched(name), strict=True):
            number = case.objects * (case.groups[name].copies if name == DENOISING else 1)
            terms = case.terms(layer, pairs, pairs, (number, number))
            if name == DENOISING and "pred_corners" in layer:  # with the main group's balance
                first, second = ddf_means(layer, case.labels, pairs)
                share = share_of(case.matched(MAIN)[0], QUERIES)
                terms["ddf"] = 1.5 * (share * first + (1 - share) * second)
            add(expected, name, terms)
    assert_same(case, expected)


def go_indices(matchings: list[Pairs]) -> Pairs:
    """The official code's ``_get_go_indices``; of equally many, the lowest pair comes first."""
    results = []
    for image in range(len(matchings[0])):
        pairs = torch.cat([torch.stack(found[image], 1) for found in matchings])
        unique, counts = torch.unique(pairs, return_counts=True, dim=0)
        objects: dict[int, int] = {}
        for row, column in unique[counts.argsort(descending=True, stable=True)].tolist():
            objects.setdefault(row, column)
        rows, columns = torch.tensor([*objects], dtype=torch.int64), [*objects.values()]
        results.append((rows, torch.tensor(columns, dtype=torch.int64)))
    return results


def official_losses(case: Case) -> dict[str, Tensor]:
    """As ``DFINECriterion.forward``."""
    matched = {name: case.matched(name) for name in [*case.decoded, PROPOSALS]}
    main = matched[MAIN]
    union = go_indices([main[LAYERS - 1], *main[: LAYERS - 1], main[-1], *matched[PROPOSALS]])
    number = float(max(1, sum(len(rows) for rows, _ in union)))
    share = share_of(union, QUERIES)
    losses: dict[str, Tensor] = {}
    for name, own in matched.items():
        objects = case.objects * (case.groups[name].copies if name == DENOISING else 1)
        sums = (objects, objects if name == DENOISING else number)
        for layer, pairs in zip(case.layers(name), own, strict=True):
            shared = pairs if name == DENOISING else union
            terms = case.terms(layer, pairs, shared, sums)
            if "pred_corners" in layer:
                first, second = ddf_means(layer, case.labels, shared)
                terms["ddf"] = 1.5 * (share * first + (1 - share) * second)
            add(losses, name, terms)
    return losses


@pytest.mark.parametrize("count", [0, 1, 4, 9, 30])
def test_the_losses_of_an_image_equal_the_official_codes(count: int) -> None:
    case = Case((count,), criterion(union_matching=True))
    assert_same(case, official_losses(case))


def test_images_of_equal_growth_have_the_official_losses() -> None:
    """Images of the same number of pairs in the union: nothing is reckoned then."""
    case = Case((3, 3), criterion(union_matching=True))
    for part in (*case.decoded.values(), case.proposals):
        own = part.distributions
        for tensor in trained(part) + ([] if own is None else [own.start]):
            dim = int(tensor.shape[0] != 2)
            tensor.data.select(dim, 1).copy_(tensor.data.select(dim, 0))
    case.labels[1] = case.labels[0]
    case.targets = as_targets(case.labels)
    assert_same(case, official_losses(case))


@pytest.mark.parametrize("counts", [MANY, CROWD, (0, 0)])
def test_each_image_counts_as_its_own_matches_do(counts: tuple[int, ...]) -> None:
    """The union of several images against a loop over them: box and local losses."""
    case = Case(counts, criterion(union_matching=True))
    found = case.ours()
    main, of_encoder = case.matched(MAIN), case.matched(PROPOSALS)
    union = go_indices([*main, *of_encoder])
    total, sums = float(sum(counts)), dict.fromkeys(("l1", "giou", "fgl", "ddf"), torch.zeros(()))
    for image, count in enumerate(counts):
        pairs = [union[image]]
        grown = len(union[image][0]) / count if count else 1.0
        shrunk = (QUERIES - len(union[image][0])) / (QUERIES - count)
        matched, others = total * grown, (len(counts) * QUERIES - total) * shrunk
        share = matched**0.5 / (matched**0.5 + others**0.5)
        for layer in case.layers(MAIN):
            alone = {key: value[image : image + 1] for key, value in layer.items()}
            labels, number = [case.labels[image]], max(1.0, matched)
            found_here = case.theirs.loss_boxes(alone, labels, pairs, number)
            sums["l1"] = sums["l1"] + 5 * found_here["loss_bbox"]
            sums["giou"] = sums["giou"] + 2 * found_here["loss_giou"]
            if "pred_corners" not in layer:
                continue
            local = case.theirs.loss_local(alone, labels, pairs, number)["loss_fgl"]
            sums["fgl"] = sums["fgl"] + 0.15 * local
            first, second = ddf_means(alone, labels, pairs)
            first = first * len(pairs[0][0]) / number
            second = second * (QUERIES - len(pairs[0][0])) / others
            sums["ddf"] = sums["ddf"] + 1.5 * (share * first + (1 - share) * second)
    for term, expected in sums.items():
        torch.testing.assert_close(found[f"{MAIN}/{term}"], expected, rtol=1e-5, atol=1e-6)


def test_targets_within_and_beyond_the_bins_equal_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(500, 4, generator=generator) * 0.3 + 0.01
    start[0] = torch.tensor([0.5, 0.5, 0.0, 0.0])
    centre = torch.rand(500, 2, generator=generator)
    boxes = torch.cat([centre, centre + torch.rand(500, 2, generator=generator)], 1)
    up = torch.tensor([BOUND])
    theirs, right, left = d_fine.bbox2distance(start, boxes, BINS, CURVATURE, up)
    distances = bin_distances(BINS + 1, BOUND, CURVATURE, torch.device("cpu"))
    moves = edge_moves(start, boxes, CURVATURE)
    assert (moves < distances[0]).any() and (moves > distances[-1]).any()
    bins, share = neighbouring_bins(moves, distances)
    assert torch.equal(bins.flatten(), theirs.long())
    torch.testing.assert_close(share.flatten(), right, atol=1e-5, rtol=1e-5)
    corners = torch.randn(500, 4, BINS + 1, generator=generator).requires_grad_(True)
    ours = localisation_terms(corners, moves, distances)
    loss = d_fine.DFineLoss.unimodal_distribution_focal_loss(
        None, corners.flatten(0, 1), theirs, right, left
    )
    torch.testing.assert_close(ours.sum(), loss)
    gradients = [torch.autograd.grad(x, corners)[0] for x in (ours.sum(), loss)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


def test_the_nearer_bin_has_more_of_an_edge() -> None:
    distances = torch.tensor([-8.0, -1.0, 0.0, 1.0, 8.0])
    moves = torch.tensor([-9.0, -8.0, -2.75, 0.0, 0.25, 8.0, 9.0, float("inf")])
    bins, share = neighbouring_bins(moves, distances)
    assert bins.tolist() == [0, 0, 0, 2, 2, 3, 3, 3]
    assert share.tolist() == [0.0, 0.0, 0.75, 0.0, 0.25, 1.0, 1.0, 1.0]
