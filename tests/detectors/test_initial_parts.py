"""Detectors started from parts of others."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from tiny import FAMILY, tiny_detector_config

from d3etr.config.detector import DetectorPart
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.build import build_detector
from d3etr.detectors.init_from import load_matching, part_of
from d3etr.errors import UserError

ALL: tuple[DetectorPart, ...] = get_args(DetectorPart)


def detector(seed: int, classes: int = 5, **changes: object) -> DetectionTransformer:
    torch.manual_seed(seed)
    settings = {"width": 32, "heads": 4, "encoder_layers": 2} | changes
    built = build_detector(tiny_detector_config(**settings), classes)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter))
    return built


@pytest.mark.parametrize("kind", FAMILY)
def test_all_parts_make_the_whole(kind: str) -> None:
    source, target = (detector(seed, **FAMILY[kind]) for seed in (0, 1))
    assert {part_of(name) for name in source.state_dict()} == set(ALL)
    taken = load_matching(target, source, ALL, same_classes=True)
    assert not taken.left
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name


@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize("part", ALL)
def test_one_part_is_taken_and_the_rest_is_left(part: DetectorPart, kind: str) -> None:
    source, target = (detector(seed, **FAMILY[kind]) for seed in (0, 1))
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    taken = load_matching(target, source, (part,), same_classes=True)
    for name, tensor in target.state_dict().items():
        assert (name in taken.names) == (part_of(name) == part), name
        expected = source.state_dict() if part_of(name) == part else before
        assert torch.equal(tensor, expected[name]), name


def test_modules_whose_names_tell_no_part_are_refused() -> None:
    """A detector of another package has such."""
    source, target = detector(0), detector(1)
    target.neck = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"which part of a detector neck\.weight is: call its .*"):
        load_matching(target, source, ("decoder",), same_classes=True)


def test_what_does_not_fit_is_named_and_keeps_its_start() -> None:
    source, target = detector(0, classes=7), detector(1, queries=4)
    start = target.state_dict()["class_head.bias"].clone()
    taken = load_matching(target, source, ("heads", "queries"), same_classes=False)
    assert taken.left == {
        "query_embedding.weight": "[4, 32], there [5, 32]",
        "class_head.weight": "[5, 32], there [7, 32]",
        "class_head.bias": "[5], there [7]",
    }
    assert torch.equal(target.state_dict()["class_head.bias"], start)


def test_class_heads_of_other_classes_are_left() -> None:
    taken = load_matching(detector(1), detector(0), ("heads",), same_classes=False)
    assert taken.left == dict.fromkeys(
        ("class_head.weight", "class_head.bias"), "of other classes there"
    )


def test_a_deeper_source_gives_its_first_layers() -> None:
    source, target = detector(0, decoder_layers=3), detector(1, decoder_layers=2)
    assert not load_matching(target, source, ("decoder",), same_classes=True).left
    name = "decoder.layers.1.self_attention.content.weight"
    assert torch.equal(target.state_dict()[name], source.state_dict()[name])


@pytest.mark.parametrize(
    ("source", "parts", "text"),
    [
        ({"width": 16, "heads": 2}, ("decoder",), "nothing of its decoder fits: decoder.layers.0"),
        ({"name": "detr"}, ("decoder", "encoder"), "nothing of its decoder fits"),
        ({"heads": 8}, ("encoder",), "it has 8 attention heads, the student 4"),
        (
            {"backbone": {"name": "small", "stem_width": 8, "stage_widths": (8, 8, 24)}},
            ("backbone",),
            "its backbone is small with norm 'frozen'",
        ),
    ],
)
def test_whole_parts_that_do_not_fit_are_refused(
    source: dict[str, object], parts: tuple[DetectorPart, ...], text: str
) -> None:
    target = detector(1)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_matching(target, detector(0, **source), parts, same_classes=True)
    assert text in str(caught.value)
    assert all(torch.equal(x, before[name]) for name, x in target.state_dict().items())


def test_encoders_of_relatives_are_taken() -> None:
    source, target = detector(0, name="detr"), detector(1, name="conditional_detr")
    assert not load_matching(target, source, ("backbone", "encoder"), same_classes=True).left


@pytest.mark.parametrize("kind", FAMILY)
def test_chosen_layers_start_the_students(kind: str) -> None:
    source = detector(0, **FAMILY[kind] | {"decoder_layers": 6})
    target = detector(1, **FAMILY[kind] | {"decoder_layers": 3})
    layers = [1, 3, 5]
    taken = load_matching(target, source, ("decoder", "heads"), same_classes=True, layers=layers)
    assert not taken.left
    assert target.inherited == {*taken.names}
    there = source.state_dict()
    for name, tensor in target.state_dict().items():
        if part_of(name) not in ("decoder", "heads"):
            continue
        words = name.split(".")
        number = next((k for k, word in enumerate(words) if word.isdigit()), None)
        if words[0] == "decoder" and number is not None and number <= 2:
            words[number] = str(layers[int(words[number])])
        other = ".".join(words)
        first_only = "cross_attention.query_embedding" in name
        shared = "heads.0" in name and other not in there
        other = name if first_only or shared else other
        assert torch.equal(tensor, there[other]), name


SAME_POSITIONS = {"grid_temperature": 10_000.0, "grid_centred": True}
"""Deformable DETR's."""


@pytest.mark.parametrize("teacher", ["deformable-two-stage", "dino"])
def test_a_dino_starts_from_encoder_and_decoder_of_relatives(teacher: str) -> None:
    """As NVIDIA TAO's students do; what a Deformable DETR does not have is named."""
    own = SAME_POSITIONS if teacher != "dino" else {}
    source = detector(0, **FAMILY[teacher], decoder_layers=3)
    target = detector(1, **FAMILY["dino"], **own)
    taken = load_matching(target, source, ("encoder", "decoder", "heads"), same_classes=True)
    missing = {"decoder.norm.weight", "decoder.norm.bias"}
    missing |= {name for name in target.state_dict() if ".position_head." in name}
    assert {*taken.left} == (missing if teacher != "dino" else set())
    assert any(name.startswith("encoder.layers.1.") for name in taken.names)
    assert any(name.startswith("decoder.layers.1.cross_attention.") for name in taken.names)
    assert {"position.level", "levels.projections.1.0.weight"} <= {*taken.names}


def test_a_two_stage_deformable_detr_starts_from_its_like() -> None:
    kind = FAMILY["deformable-two-stage"]
    source, target = detector(0, **kind, decoder_layers=3), detector(1, **kind)
    taken = load_matching(target, source, ("encoder", "decoder", "heads"), same_classes=True)
    assert not taken.left
    name = "decoder.box_heads.1.layers.2.weight"
    assert torch.equal(target.state_dict()[name], source.state_dict()[name])


@pytest.mark.parametrize(
    ("source", "target", "text"),
    [
        ("deformable-two-stage", "dino", "set student.detector.grid_temperature to 10000 and"),
        ("dino", "deformable-two-stage", "20, cells by their far edges, the student's has 10000"),
    ],
)
def test_an_encoder_of_other_positions_is_refused(source: str, target: str, text: str) -> None:
    student, teacher = detector(1, **FAMILY[target]), detector(0, **FAMILY[source])
    with pytest.raises(UserError) as caught:
        load_matching(student, teacher, ("encoder",), same_classes=True)
    assert text in str(caught.value) and "take 'encoder' out of the parts" in str(caught.value)
    assert load_matching(student, teacher, ("decoder",), same_classes=True).names


@pytest.mark.parametrize(
    ("kind", "theirs"),
    [
        ("d_fine", {"curvature": 8.0, "bound": 0.25}),
        ("d_fine", {"activation": "silu"}),
        ("deimv2", {"activation": "relu"}),
        ("rt_detr", {"sampling": "discrete"}),
    ],
)
@pytest.mark.parametrize("part", ["decoder", "heads"])
def test_what_no_shape_shows_has_to_be_the_same(
    part: DetectorPart, kind: str, theirs: dict[str, object]
) -> None:
    source, target = detector(0, **FAMILY[kind] | theirs), detector(1, **FAMILY[kind])
    with pytest.raises(UserError) as caught:
        load_matching(target, source, (part,), same_classes=True)
    for key, value in theirs.items():
        shown = f"{value:g}" if isinstance(value, float) else value
        assert f"student.detector.{key} to {shown}" in str(caught.value)
    assert load_matching(target, source, ("backbone", "encoder"), same_classes=True).names
    same = detector(2, **FAMILY[kind] | theirs)
    assert load_matching(same, source, (part,), same_classes=True).names


@pytest.mark.parametrize(
    ("kind", "theirs", "kept", "shown"),
    [
        ("d_fine", {"points": [3, 2]}, "encoder", ([3, 2], [2, 3])),
        ("deformable_detr", {"levels": 1, "points": 4}, "heads", ([4], [2, 2])),
    ],
)
def test_places_are_divided_among_the_same_levels(
    kind: str,
    theirs: dict[str, object],
    kept: DetectorPart,
    shown: tuple[list[int], list[int]],
) -> None:
    source, target = detector(0, **FAMILY[kind] | theirs), detector(1, **FAMILY[kind])
    with pytest.raises(UserError) as caught:
        load_matching(target, source, ("decoder",), same_classes=True)
    text = "it samples {} places on its feature levels, the student {}".format(*shown)
    assert text in str(caught.value)
    assert load_matching(target, source, (kept,), same_classes=True).names
    fewer = detector(2, **FAMILY[kind] | {"points": 1})  # whose tensors have other shapes
    left = load_matching(fewer, source, ("decoder",), same_classes=True).left
    assert "decoder.layers.0.cross_attention.offsets.weight" in left


VIT = {
    **{"kind": "lw_detr", "width": 24, "heads": 3, "patch": 8, "positions": 5},
    **{"blocks": 3, "whole": [1], "outputs": [1, 3]},
}
OVER_DINOV3 = {
    **{"width": 32, "heads": 2, "blocks": 4, "outputs": (1, 3, 4)},
    **{"inner": 40, "detail": 6, "feedforward": "silu_gated"},
}


@pytest.mark.parametrize(
    ("kind", "section", "own", "theirs"),
    [
        ("lw_detr", "vit", VIT, {"heads": 6}),
        ("deimv2", "dinov3", OVER_DINOV3, {"heads": 4}),
        ("deimv2", "dinov3", OVER_DINOV3, {"feedforward": "gelu_gated"}),
    ],
)
def test_a_vision_transformer_has_to_compute_the_same(
    kind: str, section: str, own: dict[str, object], theirs: dict[str, object]
) -> None:
    def over(settings: dict[str, object]) -> dict[str, object]:
        return FAMILY[kind] | {"backbone": {"name": section, section: settings}}

    source, target = detector(0, **over(own | theirs)), detector(1, **over(own))
    with pytest.raises(UserError) as caught:
        load_matching(target, source, ("backbone",), same_classes=True)
    [(key, value)] = theirs.items()
    assert f"Set student.detector.backbone.{section}.{key} to {value}" in str(caught.value)
    assert load_matching(target, source, ("decoder",), same_classes=True).names
    assert not load_matching(target, target, ("backbone",), same_classes=True).left
