"""Divergences that store no map against those of stored ones, with their gradients."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from d3etr.attention_maps import ProductMaps, SampledMaps
from d3etr.losses import product_divergence, splatted_divergence
from d3etr.losses.attention import kl_rows
from d3etr.structures import Levels

LEVELS: Levels = ((5, 6), (2, 3))
SHAPE = 2, 2, 3, 4  # L, B, H, P
CELLS = 36


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _padding(padded: bool) -> Tensor | None:
    """The second image ends after the first row of each level."""
    if not padded:
        return None
    hidden = torch.zeros(2, CELLS, dtype=torch.bool)
    hidden[1, 6:30] = hidden[1, 33:] = True
    return hidden


def sampled(seed: int, points: int, hidden: Tensor | None) -> SampledMaps:
    """Some outside, two in the same cells, one without weight."""
    shape = (*SHAPE, len(LEVELS), points)
    places = torch.rand(*shape, 2, generator=_random(seed)) * 1.6 - 0.3
    places[..., 1, :] = places[..., 0, :] + 1e-3
    weights = (3 * torch.randn(*SHAPE, len(LEVELS) * points, generator=_random(seed + 9))).softmax(
        -1
    )
    weights = weights.view(shape).clone()
    weights[..., -1, -1] = 0
    return SampledMaps(places, weights, LEVELS, hidden)


def products(seed: int, width: int, hidden: Tensor | None) -> ProductMaps:
    """Scores of up to about 20."""
    query, key = (torch.randn(*SHAPE[:3], n, width, generator=_random(seed)) for n in (4, CELLS))
    return ProductMaps(4 * query, key, hidden)


def _gradients(loss: Callable[[], Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    value = loss()
    return (value.detach(), *torch.autograd.grad(value, leaves))


@pytest.mark.parametrize("cells", [2**20, 1])
@pytest.mark.parametrize("padded", [False, True])
def test_splatted_maps(padded: bool, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other numbers of points; also when few rows are computed at once."""
    monkeypatch.setattr(splatted_divergence, "_CELLS", cells)
    hidden = _padding(padded)
    student, teacher = sampled(0, 3, hidden), sampled(1, 4, hidden)
    leaves = [x.requires_grad_() for x in (student.locations, student.weights)]
    weights = torch.rand(SHAPE, generator=_random(3))
    compared = splatted_divergence.splatted_divergence
    found = _gradients(lambda: (compared(student, teacher) * weights).sum(), leaves)
    stored = _gradients(
        lambda: (kl_rows(student.scores(), teacher.scores()) * weights).sum(), leaves
    )
    for one, other in zip(found, stored, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_the_same_samples_are_nothing_apart() -> None:
    maps = sampled(0, 3, _padding(True))
    maps.locations.requires_grad_()
    rows = splatted_divergence.splatted_divergence(maps, maps)
    assert rows.abs().max() < 1e-6
    rows.sum().backward()
    assert maps.locations.grad is not None and maps.locations.grad.abs().max() < 1e-3


@pytest.mark.parametrize("cells", [2**20, 1])
@pytest.mark.parametrize("padded", [False, True])
def test_products(padded: bool, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other widths; also when one map is computed at once."""
    monkeypatch.setattr(product_divergence, "_CELLS", cells)
    hidden = _padding(padded)
    student, teacher = products(0, 8, hidden), products(1, 16, hidden)
    leaves = [x.requires_grad_() for x in (student.query, student.key)]
    weights = torch.rand(SHAPE[0], SHAPE[1], SHAPE[3], generator=_random(3))
    compared = product_divergence.product_divergence
    found = _gradients(lambda: compared(student, teacher, weights), leaves)
    stored = _gradients(
        lambda: (kl_rows(student.scores(), teacher.scores()).mean(2) * weights).sum(), leaves
    )
    for one, other in zip(found, stored, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("padded", ["student", "teacher", "both"])
@pytest.mark.parametrize("kind", ["products", "samples"])
def test_a_key_that_either_hides_is_in_neither_map(kind: str, padded: str) -> None:
    """Such as cells of a batch that an image's stored keys do not reach."""
    own, theirs = _padding(True), torch.zeros(2, CELLS, dtype=torch.bool)
    assert own is not None
    theirs[0, 3:6] = theirs[1, :2] = True
    hidden = {"student": own, "teacher": theirs, "both": own | theirs}[padded]
    given = own if padded != "teacher" else None, theirs if padded != "student" else None
    weights = torch.rand(SHAPE, generator=_random(3))
    if kind == "samples":
        maps = [sampled(0, 3, None), sampled(1, 4, None)]
        student, teacher = (replace(x, padding=y) for x, y in zip(maps, given, strict=True))
        found = (splatted_divergence.splatted_divergence(student, teacher) * weights).sum()
    else:
        maps = [products(0, 8, None), products(1, 16, None)]
        student, teacher = (replace(x, padding=y) for x, y in zip(maps, given, strict=True))
        found = product_divergence.product_divergence(student, teacher, weights[:, :, 0])
        weights = weights[:, :, :1] / SHAPE[2]
    stored = kl_rows(*(replace(x, padding=hidden).scores() for x in maps))
    torch.testing.assert_close(found, (stored * weights).sum(), rtol=1e-4, atol=1e-5)
