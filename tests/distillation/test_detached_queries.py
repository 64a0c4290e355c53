"""Cross-attention that teaches the memory and its keys alone."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from test_distiller_identities import Build, distiller, losses_of
from tiny import FAMILY
from torch import Tensor

from d3etr.config.distillation import MethodConfig
from d3etr.distiller import Distiller
from d3etr.errors import UserError
from d3etr.structures import ImageBatch, Targets

DENSE = ["detr", "conditional_detr", "dab_detr"]
MEMORY = ("backbone.", "projection.", "encoder.")
MATCHINGS: dict[str, dict[str, Any]] = {
    "adaptive": {"adaptive_ratio": 1.0},
    "fixed": {"adaptive_ratio": 0.0},
    "inherited": {"inherited_ratio": 1.0},
}


def _module(
    tiny_detector: Build, kind: str, matching: str, detached: bool, **changes: Any
) -> Distiller:
    student = tiny_detector(seed=1, **FAMILY[kind] | changes)
    term = {"cross_attention": {"detach_queries": detached}}
    return distiller(student, tiny_detector(**FAMILY[kind]), **term, **MATCHINGS[matching])


def _gradients(
    module: Distiller, images: ImageBatch, targets: Targets, matching: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """The cross-attention term, and its gradient by name of the student's parameter."""
    loss = losses_of(module, images, targets)[f"{matching}/cross_attention"]
    named = {name: p for name, p in module.student.named_parameters() if p.requires_grad}
    parts = torch.autograd.grad(loss, [*named.values()], allow_unused=True)
    found = zip(named, parts, strict=True)
    return loss, {name: part for name, part in found if part is not None and part.any()}


def _is_of_memory(name: str) -> bool:
    return name.startswith(MEMORY) or "cross_attention.key" in name


@pytest.mark.parametrize("matching", MATCHINGS)
@pytest.mark.parametrize("kind", DENSE)
def test_nothing_on_the_side_of_the_queries_learns(
    tiny_detector: Build, images: ImageBatch, targets: Targets, kind: str, matching: str
) -> None:
    plain = _module(tiny_detector, kind, matching, False)
    detached = _module(tiny_detector, kind, matching, True)
    before, every = _gradients(plain, images, targets, matching)
    after, found = _gradients(detached, images, targets, matching)
    assert after.item() == before.item()
    assert any(not _is_of_memory(name) for name in every)
    assert found and all(_is_of_memory(name) for name in found), found.keys()
    assert {name.split(".")[0] for name in found} >= {"backbone", "encoder", "decoder"}


@pytest.mark.parametrize("kind", DENSE)
def test_the_keys_of_a_layer_learn_what_they_did(
    tiny_detector: Build, images: ImageBatch, targets: Targets, kind: str
) -> None:
    """In the only layer no query has seen the memory before it asks."""
    plain, detached = (
        _module(tiny_detector, kind, "inherited", detach, decoder_layers=1)
        for detach in (False, True)
    )
    _, every = _gradients(plain, images, targets, "inherited")
    _, found = _gradients(detached, images, targets, "inherited")
    assert found.keys() == {name for name in every if _is_of_memory(name)}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, every[name], rtol=1e-5, atol=1e-8, msg=name)


def test_what_has_no_keys_or_no_term_is_refused(tiny_detector: Build) -> None:
    with pytest.raises(UserError, match="detach_queries leaves nothing to learn from"):
        _module(tiny_detector, "deformable_detr", "fixed", True)
    with pytest.raises(ValidationError, match="detach_queries has no effect: weight is 0"):
        term = {"weight": 0.0, "detach_queries": True}
        MethodConfig.parse({"method": "d3etr", "cross_attention": term})
