"""A teacher that sees the picture at another size (``teacher.image_scale``)."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import FAMILY
from torch.nn.functional import interpolate

from d3etr.attention_maps import MASKED_SCORE, ScoredMaps
from d3etr.config.distillation import MethodConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.distiller import Distiller
from d3etr.losses.attention import kl_rows, resize_maps
from d3etr.structures import ImageBatch, Targets

Build = Callable[..., DetectionTransformer]


def distiller(student: DetectionTransformer, teacher: Any, **settings: object) -> Distiller:
    config = MethodConfig.parse({"method": "d3etr"} | settings)
    return Distiller(student, teacher, config, SetCriterionConfig(), seed=0)


def losses(module: Distiller, images: ImageBatch, targets: Targets) -> dict[str, float]:
    taught = module.run_teacher(images, targets=targets)
    found = module(images, targets, taught, module.normalisers(targets, taught))
    return {name: loss.item() for name, loss in found.items()}


def doubled(images: ImageBatch) -> ImageBatch:
    """The same pictures twice as large for the teacher."""
    assert images.padding is not None
    pixels = interpolate(images.pixels, scale_factor=2.0)
    padding = images.padding.repeat_interleave(2, 1).repeat_interleave(2, 2)
    return replace(images, for_teacher=ImageBatch(pixels, padding))


def test_the_same_size_is_todays_bit_for_bit(
    any_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    module = distiller(any_detector(seed=1), any_detector(seed=0))
    same = replace(images, for_teacher=ImageBatch(images.pixels, images.padding))
    assert losses(module, same, targets) == losses(module, images, targets)


def test_every_detector_learns_from_one_that_sees_a_larger_picture(
    any_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    for method in ("d3etr", "detrdistill"):
        module = distiller(any_detector(seed=1), any_detector(seed=0), method=method)
        found, before = (losses(module, x, targets) for x in (doubled(images), images))
        assert found.keys() == before.keys()
        assert all(torch.isfinite(torch.tensor(x)) and x >= -1e-5 for x in found.values()), found
        changed = {name for name in found if found[name] != before[name]}
        assert "adaptive/class" in changed
        if method == "d3etr":
            assert {"adaptive/cross_attention", "fixed/cross_attention"} <= changed
        else:
            assert "features" in changed
        # The student sees what it saw: its own losses on ground truth are the same.
        assert {name for name in changed if name.startswith(("detection", "proposals"))} == set()


def test_a_teacher_that_says_the_same_at_any_size_teaches_the_same_predictions(
    tiny_detector: Build, images: ImageBatch, targets: Targets, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny_detector(seed=0)
    encode = teacher.encode
    # What it looks at is always the picture of the first size.
    monkeypatch.setattr(teacher, "encode", lambda _: encode(images))
    terms = {name: {"weight": 0.0} for name in ("self_attention", "cross_attention")}
    module = distiller(tiny_detector(seed=1), teacher, **terms)
    assert losses(module, doubled(images), targets) == losses(module, images, targets)


@pytest.mark.parametrize("hides", ["fewer", "more"])
@pytest.mark.parametrize("heads", ["per_head", "mean"])
@pytest.mark.parametrize("kind", ["conditional_detr", "deformable_detr"])
def test_maps_of_equal_grids_are_over_cells_that_both_see(
    tiny_detector: Build, images: ImageBatch, targets: Targets, kind: str, heads: str, hides: str
) -> None:
    """A picture of another size may end in another cell."""
    assert images.padding is not None
    other = torch.zeros_like(images.padding)
    other[:, 16:] = hides == "more"
    shown = replace(images, for_teacher=ImageBatch(images.pixels, other))
    student, teacher = (tiny_detector(seed=n, **FAMILY[kind]) for n in (1, 0))
    cross = {"heads": heads, "weight": 2.0}
    module = distiller(student, teacher, adaptive_ratio=0.0, cross_attention=cross)
    found = losses(module, shown, targets)["fixed/cross_attention"]
    taught = module.run_teacher(shown, targets=targets)
    assert taught is not None
    queries = module.method.student_groups(taught, targets, 0)["auxiliary"].queries
    [ours] = student.decode(student.encode(shown), [queries], attention=True)
    pair = ours, taught.main
    assert pair[0].levels == pair[1].levels and not pair[0].padding.equal(pair[1].padding)
    hidden = pair[0].padding | pair[1].padding
    maps = [replace(x.cross_maps, padding=hidden).scores() for x in pair]
    if heads == "mean":
        maps = [x.softmax(-1).mean(2, keepdim=True).clamp(min=1e-38).log() for x in maps]
    assert found == pytest.approx(2.0 * kl_rows(*maps).mean().item(), rel=1e-4)


@pytest.mark.parametrize("levels", [((8, 12),), ((8, 12), (4, 6))])
def test_resized_maps_are_distributions_over_what_the_student_sees(levels: Any) -> None:
    target = tuple((height // 2, width // 2) for height, width in levels)
    hidden = torch.cat([_columns(*grid, grid[1] * 2 // 3) for grid in levels], 1)
    padding = torch.cat([_columns(*grid, grid[1] * 2 // 3) for grid in target], 1)
    tokens = hidden.shape[1]
    scores = torch.randn(2, 1, 3, 4, tokens).masked_fill(hidden[:, None, None], MASKED_SCORE)
    found = resize_maps(ScoredMaps(scores), levels, hidden, target, padding).scores().softmax(-1)
    assert (found[..., padding[0]] == 0).all()
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 1, 3, 4))
    # The mean place of attention is where it was.
    before, after = (
        (values[..., None] * torch.cat([_places(*grid) for grid in grids])).sum(-2)
        for values, grids in ((scores.softmax(-1), levels), (found, target))
    )
    torch.testing.assert_close(after, before, atol=0.03, rtol=0)


def test_an_even_map_is_even_on_any_grid() -> None:
    hidden, padding = _columns(8, 12, 8), _columns(4, 6, 4)
    even = torch.zeros(1, 1, 1, 1, 96).masked_fill(hidden[:, None, None], MASKED_SCORE)
    found = resize_maps(ScoredMaps(even), ((8, 12),), hidden, ((4, 6),), padding)
    expected = (~padding).float() / 16
    torch.testing.assert_close(found.scores().softmax(-1).flatten(), expected.flatten())


def _columns(height: int, width: int, visible: int) -> torch.Tensor:
    """[1, height * width] bool: True from column ``visible`` on."""
    hidden = torch.zeros(1, height, width, dtype=torch.bool)
    hidden[..., visible:] = True
    return hidden.flatten(1)


def _places(height: int, width: int) -> torch.Tensor:
    """[height * width, 2] centres of cells in [0, 1]."""
    rows, columns = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).view(-1, 2)
