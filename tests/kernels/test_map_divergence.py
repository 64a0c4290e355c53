"""The fused divergence of attention maps against the one that stores them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from d3etr.attention_maps import ProductMaps, ScoredMaps
from d3etr.config.distillation import AttentionConfig
from d3etr.losses.attention import attention_loss, kl_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYERS, IMAGES, HEADS = 2, 2, 2


def _maps(
    rows: int, keys: int, width: int, seed: int, padding: Tensor | None = None
) -> ProductMaps:
    generator = torch.Generator().manual_seed(seed)
    shape = LAYERS, IMAGES, HEADS
    query = 3 * torch.randn(*shape, rows, width, generator=generator)
    key = torch.randn(*shape, keys, width, generator=generator)
    parts = [part.to(DEVICE).requires_grad_(seed == 0) for part in (query, key)]
    return ProductMaps(*parts, padding)


def _padding(keys: int) -> Tensor:
    hidden = torch.zeros(IMAGES, keys, dtype=torch.bool)
    hidden[0, 1:4] = hidden[1, keys // 2 :] = True
    return hidden.to(DEVICE)


@pytest.mark.parametrize("padded", ["neither", "both", "teacher", "apart"])
@pytest.mark.parametrize(
    ("rows", "keys", "width", "width_"), [(5, 7, 8, 8), (70, 130, 16, 24), (64, 64, 40, 16)]
)
def test_values_and_gradients_are_those_of_stored_maps(
    rows: int, keys: int, width: int, width_: int, padded: str
) -> None:
    from d3etr.kernels.map_divergence import map_divergence

    padding = None if padded == "neither" else _padding(keys)
    fewer = None if padding is None else padding & padding[1]
    own = {"teacher": None, "apart": fewer}.get(padded, padding)
    student = _maps(rows, keys, width, 0, own)
    teacher = _maps(rows, keys, width_, 1, padding)
    weights = torch.rand(LAYERS, IMAGES, rows, device=DEVICE)
    found = map_divergence(student, teacher)
    total = (found.mean(2) * weights).sum() / LAYERS
    total.backward()
    gradients = [student.query.grad, student.key.grad]
    student.query.grad = student.key.grad = None

    kept = [ScoredMaps(replace(maps, padding=padding).scores()) for maps in (student, teacher)]
    stored = attention_loss(*kept, weights, AttentionConfig())
    stored.backward()
    torch.testing.assert_close(total, stored, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[0], student.query.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradients[1], student.key.grad, rtol=1e-4, atol=1e-6)


def test_equal_maps_are_not_apart() -> None:
    from d3etr.kernels.map_divergence import map_divergence

    student = _maps(9, 20, 8, 0)
    found = map_divergence(student, student)
    assert found.abs().max() < 1e-5
    found.sum().backward()
    assert student.query.grad is not None and student.query.grad.abs().max() < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_bfloat16_products_are_as_good_as_stored_ones() -> None:
    from d3etr.kernels.map_divergence import map_divergence

    student, teacher = _maps(300, 400, 64, 0), _maps(300, 400, 64, 1)
    halves = [
        ProductMaps(maps.query.detach().bfloat16(), maps.key.detach().bfloat16())
        for maps in (student, teacher)
    ]
    for part in (halves[0].query, halves[0].key):
        part.requires_grad_()
    found = map_divergence(*halves)
    weights = torch.rand_like(found)
    (found * weights).sum().backward()
    exact = [
        ProductMaps(maps.query.detach().double(), maps.key.detach().double()) for maps in halves
    ]
    for part in (exact[0].query, exact[0].key):
        part.requires_grad_()
    scores = [(maps.query * maps.scale) @ maps.key.mT for maps in exact]
    student_, teacher_ = (part.log_softmax(-1) for part in scores)
    reference = (teacher_.exp() * (teacher_ - student_)).sum(-1)
    (reference * weights).sum().backward()
    torch.testing.assert_close(found.double(), reference, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(
        (halves[0].query, halves[0].key), (exact[0].query, exact[0].key), strict=True
    ):
        assert ours.grad is not None and theirs.grad is not None
        error = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert error < 1e-2


def test_rows_of_bfloat16_passes_are_those_of_a_cpu_which_stores_maps() -> None:
    from d3etr.kernels.map_divergence import map_divergence

    maps = [_maps(33, 70, 16, seed) for seed in (0, 1)]
    halves = [ProductMaps(m.query.detach().bfloat16(), m.key.detach().bfloat16()) for m in maps]
    # Interpreted products know no bfloat16; those of the same numbers in float32 are exact too.
    exact = [ProductMaps(half.query.float(), half.key.float()) for half in halves]
    with torch.autocast("cpu", torch.bfloat16):
        kept = [ProductMaps(half.query.cpu(), half.key.cpu()).scores() for half in halves]
    found = map_divergence(*(halves if DEVICE.type == "cuda" else exact))
    torch.testing.assert_close(found.cpu(), kl_rows(*kept), rtol=1e-4, atol=1e-5)
