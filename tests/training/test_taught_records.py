"""What a teacher says, as bytes and back."""

import pytest
import torch
from tiny import FAMILY, tiny_detector_config

from d3etr.attention_maps import ProductMaps, ScoredMaps
from d3etr.config.distillation import DistillationConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.build import build_detector
from d3etr.distillation.distiller import Distiller
from d3etr.distillation.teaching import Taught
from d3etr.structures import ImageBatch
from d3etr.training.taught_records import RecordLayout

ONE_STAGE = sorted(FAMILY.keys() - {"deformable-two-stage"})


def distiller_of(variant: str, **distillation: object) -> Distiller:
    """Student and teacher of a variant; the teacher has more layers and queries."""
    settings = FAMILY[variant] | {"width": 32}
    student = build_detector(tiny_detector_config(**settings), 3)
    teacher = build_detector(tiny_detector_config(**settings, decoder_layers=3, queries=7), 3)
    if settings["name"] == "deformable_detr":  # it has no attention maps to compare
        distillation |= {"cross_attention": {"weight": 0.0}}
    config = DistillationConfig.model_validate({"method": "d3etr", **distillation})
    return Distiller(student, teacher, config, SetCriterionConfig(), seed=0)


def _flat(part: object) -> dict[str, object]:
    """Fields by name, those of attention maps dotted."""
    found: dict[str, object] = {}
    for name, value in vars(part).items():
        inner = vars(value) if isinstance(value, ProductMaps | ScoredMaps) else None
        found |= {name: value} if inner is None else {f"{name}.{k}": v for k, v in inner.items()}
    return found


def equal(left: Taught, right: Taught) -> None:
    """To the last bit, in value, type and form."""
    for name in ("outputs", "group", "queries"):
        theirs, ours = _flat(getattr(left, name)), _flat(getattr(right, name))
        assert theirs.keys() == ours.keys()
        for key, value in theirs.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, ours[key]) and value.dtype == ours[key].dtype, key
            else:
                assert value == ours[key], key
    assert (left.tokens is None) == (right.tokens is None)
    assert left.tokens is None or torch.equal(left.tokens, right.tokens)


@pytest.mark.parametrize("reduced", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ONE_STAGE)
def test_a_teacher_is_recalled_to_the_last_bit(variant: str, reduced: bool) -> None:
    distiller = distiller_of(variant, teacher_query_ratio=0.5)
    images = ImageBatch(torch.randn(3, 3, 64, 64))
    with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
        taught = distiller.teach(images)
        assert taught is not None
        layout = RecordLayout.of(taught)
        records = layout.pack(taught)
        assert records.shape == (3, layout.record_bytes)
        equal(distiller.recall(*layout.unpack(records)), taught)
        shuffled = distiller.recall(*layout.unpack(records[[2, 0]]))
    assert torch.equal(shuffled.outputs.logits, taught.outputs.logits[:, [2, 0]])


def test_memory_is_kept_only_where_features_are_distilled() -> None:
    images = ImageBatch(torch.randn(2, 3, 64, 64))
    without, with_features = (
        distiller_of("conditional_detr", features={"weight": weight}) for weight in (0.0, 1.0)
    )
    taught = with_features.teach(images)
    assert taught is not None and taught.tokens is not None
    layout = RecordLayout.of(taught)
    assert {part.name for part in layout.parts} >= {"states", "tokens"}
    equal(with_features.recall(*layout.unpack(layout.pack(taught))), taught)
    small = without.teach(images)
    assert small is not None and small.tokens is None
    assert RecordLayout.of(small).record_bytes < layout.record_bytes
    assert RecordLayout.of(small).describe() != layout.describe()
