"""Cross-attention maps added up over queries, as TPRD's D3ETR compares them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import mse_loss

from d3etr.config.distillation import CrossAttentionConfig, MethodConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.distiller import Distiller
from d3etr.structures import ImageBatch, Targets

Build = Callable[..., DetectionTransformer]
OFF = {"weight": 0.0}
SUMMED = {"distance": "mse", "queries": "summed", "layers": "sum", "weight": 3.0}


def losses(
    student: DetectionTransformer,
    teacher: DetectionTransformer,
    batch: tuple[ImageBatch, Targets],
    **cross: Any,
) -> dict[str, float]:
    settings = {"method": "d3etr", "self_attention": OFF, "cross_attention": SUMMED | cross}
    config = MethodConfig.parse(settings)
    module = Distiller(student, teacher, config, SetCriterionConfig(), seed=0)
    taught = module.run_teacher(batch[0])
    found = module(*batch, taught, module.normalisers(batch[1], taught))
    return {name: loss.item() for name, loss in found.items()}


@pytest.mark.parametrize("kind", ["conditional_detr", "deformable_detr", "dab_detr"])
def test_the_loss_is_tprds_whoever_is_paired(
    tiny_detector: Build, images: ImageBatch, targets: Targets, kind: str
) -> None:
    """Mean squared difference of the summed maps over heads and tokens, in TPRD's measure."""
    student, teacher = tiny_detector(seed=1, name=kind), tiny_detector(name=kind)
    found = losses(student, teacher, (images, targets))
    maps = []
    with torch.no_grad():
        for detector in (student, teacher):
            memory = detector.encode(images)
            [outputs] = detector.decode(memory, [detector.object_queries()], attention=True)
            maps.append(outputs.cross_attention)
    layers, batch, _, queries, tokens = maps[0].shape
    expected = 0.0
    for layer in range(layers):
        for image in range(batch):
            ours, theirs = (
                sum(part[layer, image, :, query] for query in range(queries)) for part in maps
            )
            per_query = mse_loss(ours, theirs) * tokens / queries**2
            expected += 0.5 * 3.0 * float(per_query) / batch
    assert expected > 1e-5
    assert found["adaptive/cross_attention"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("distance", ["mse", "kl"])
def test_grids_and_numbers_of_queries_may_differ(
    tiny_detector: Build, images: ImageBatch, targets: Targets, distance: str
) -> None:
    finer = {"name": "small", "stem_width": 8, "stage_widths": (8, 16)}
    teacher = tiny_detector(queries=9, backbone=finer)
    found = losses(tiny_detector(seed=1), teacher, (images, targets), distance=distance)
    assert all(found[f"{branch}/cross_attention"] > 1e-6 for branch in ("adaptive", "fixed"))
    with torch.no_grad():
        same = losses(teacher, teacher, (images, targets), distance=distance)
    assert all(abs(same[f"{branch}/cross_attention"]) < 1e-6 for branch in ("adaptive", "fixed"))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"distance": "energy"}, "compares none: set distance"),
        ({"distance": "points"}, "compares none: set distance"),
        ({"pair_weights": "confidence"}, "set pair_weights to 'uniform'"),
    ],
)
def test_what_has_no_sum_is_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        CrossAttentionConfig.model_validate({"queries": "summed"} | settings)
