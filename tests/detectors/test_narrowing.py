"""Decoders, heads and queries taken over into a narrower detector."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from tiny import FAMILY, tiny_detector_config
from torch import Tensor

from d3etr.detectors.base import DetectionTransformer, SingleScaleDetector
from d3etr.detectors.build import build_detector
from d3etr.detectors.init_from import load_matching
from d3etr.detectors.narrowing import Narrowing, nearest_frequencies, principal_rows
from d3etr.errors import UserError
from d3etr.structures import Memory

HEADS, NARROW, WIDE = 2, 32, 64
KINDS = (
    "detr",
    "detr-softmax",
    "conditional_detr",
    "dab_detr",
    "deformable_detr",
    "deformable-refined",
)
PARTS = ("decoder", "heads", "queries")
IN_HEADS = re.compile(
    r"attention\.(query_key|content|position|query|query_content|query_embedding|query_spatial|key"
    r"|key_value|key_position|value)\."
)
WRITES = re.compile(r"(attention\.output|outer|norm|anchor_head\.layers\.1)\.")
OF_PLACES = re.compile(r"cross_attention\.(query_spatial|key|key_value|key_position|value)\.weight")
HIDDEN = re.compile(r"(feedforward\.inner|(head|scale|heads\.\d)\.layers\.(\d))\.")


def detector(seed: int, width: int, **changes: Any) -> DetectionTransformer:
    torch.manual_seed(seed)
    settings = {"width": width, "heads": HEADS, "feedforward": width} | changes
    built = build_detector(tiny_detector_config(**settings), 5)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return built.eval()


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A wide detector's tensors, changed so that no more than half of its channels tell anything.

    Channels of the stream are there twice; of hidden layers and within heads half are 0; half of
    the positions' channels are not looked at.
    """
    places = nearest_frequencies(WIDE, NARROW).bool().any(0)
    found = {}
    for name, values in state.items():
        x = values.clone()
        if "decoder" in name and WRITES.search(name):
            x[NARROW:] = x[:NARROW]
        elif name in ("query_embedding.weight", "query_content.weight"):
            x[:, NARROW:] = x[:, :NARROW]
        elif "decoder" in name and IN_HEADS.search(name):
            channels = WIDE // HEADS
            x.view(-1, channels, *x.shape[1:])[:, channels // 2 :] = 0
            if OF_PLACES.search(name):
                x[:, ~places] = 0
        elif (match := HIDDEN.search(name)) and "encoder" not in name:
            last = f"{name.split('layers.')[0]}layers.{int(match[3] or 0) + 1}.weight"
            if match[3] is None or last in state:
                x[NARROW:] = 0
            if name.endswith("anchor_head.layers.0.weight"):
                x[:, ~torch.cat([places, places])] = 0
        found[name] = x
    return found


def memories(wide: DetectionTransformer, narrow: DetectionTransformer) -> list[Memory]:
    """What both read: the narrow one has the channels that the wide one looks at."""
    levels = ((4, 5),) if isinstance(wide, SingleScaleDetector) else ((4, 5), (2, 3))
    places = nearest_frequencies(WIDE, NARROW).float()
    tokens = torch.randn(2, sum(h * w for h, w in levels), WIDE)
    found = []
    for model, own in ((wide, tokens), (narrow, tokens @ places.T)):
        position = torch.zeros(1, *own.shape[1:])
        if isinstance(model, SingleScaleDetector):
            position = model.position.grid(levels[0], None)
        found.append(Memory(own, position, None, levels))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_the_wider_ones_where_half_of_its_channels_are_copies(kind: str) -> None:
    wide, narrow = detector(0, WIDE, **FAMILY[kind]), detector(1, NARROW, **FAMILY[kind])
    wide.load_state_dict(copied(wide.state_dict()))
    taken = load_matching(narrow, wide, PARTS, same_classes=True, narrows=True)
    assert not taken.left
    theirs, ours = (
        model.decode(memory, [model.object_queries()], attention=True)[0]
        for model, memory in zip((wide, narrow), memories(wide, narrow), strict=True)
    )
    for name in ("logits", "boxes_cxcywh", "self_attention", "cross_attention"):
        found, expected = getattr(ours, name), getattr(theirs, name)
        assert expected.std() > 1e-3
        # Single precision through two detectors; DAB-DETR divides by the sides of small anchors.
        tolerance = 1e-3 * max(1.0, float(expected.abs().max()) / 4)
        assert torch.allclose(found, expected, rtol=0, atol=tolerance), name


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_channels_change_nothing(kind: str) -> None:
    source, target = (detector(seed, NARROW, **FAMILY[kind]) for seed in (0, 1))
    state = source.state_dict()
    assert not load_matching(target, source, PARTS, same_classes=True, narrows=True).left
    same = Narrowing(state, HEADS, NARROW, NARROW)
    for name in target.inherited:
        assert torch.equal(target.state_dict()[name], state[name])
        assert torch.equal(same.tensor(name), state[name]), name


def test_rows_are_orthonormal_and_span_what_is_written() -> None:
    torch.manual_seed(0)
    written = torch.randn(12, 4) @ torch.randn(4, 30)
    rows = principal_rows([written], 4)
    assert torch.allclose(rows @ rows.T, torch.eye(4, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(rows.T @ rows @ written.double(), written.double(), atol=1e-4)


def test_the_sine_channels_that_stay_are_those_of_the_narrow_encoding() -> None:
    wide, narrow = (detector(0, width, name="detr") for width in (WIDE, NARROW))
    assert isinstance(wide, SingleScaleDetector) and isinstance(narrow, SingleScaleDetector)
    places = nearest_frequencies(WIDE, NARROW).float()
    there, here = (model.position.grid((3, 4), None) for model in (wide, narrow))
    assert torch.allclose(there @ places.T, here, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "widths", "text"),
    [
        ("deformable-two-stage", (WIDE, NARROW), "does not know what the channels of .* are"),
        ("conditional_detr", (NARROW, WIDE), "its width 32 is below the student's 64"),
    ],
)
def test_what_cannot_be_narrowed_is_refused(kind: str, widths: tuple[int, int], text: str) -> None:
    source, target = (detector(seed, width, **FAMILY[kind]) for seed, width in enumerate(widths))
    with pytest.raises(UserError, match=text):
        load_matching(target, source, PARTS, same_classes=True, narrows=True)
