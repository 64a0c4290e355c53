"""Cosine of encoders' outputs, and the weight that follows the encoder's share of the gradient."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import FAMILY
from torch import Tensor, nn

from d3etr.config.distillation import EncoderShareConfig, MethodConfig
from d3etr.config.load import load_config
from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.distiller import Distiller
from d3etr.errors import UserError
from d3etr.losses.features import cosine_loss, resize_tokens
from d3etr.methods.feature_cosine import FeatureCosine
from d3etr.methods.gradient_share import GradientShare
from d3etr.structures import ImageBatch, Targets

Build = Callable[..., DetectionTransformer]


def _distiller(
    student: DetectionTransformer, teacher: DetectionTransformer, **settings: object
) -> Distiller:
    config = MethodConfig.parse({"method": "feature_cosine"} | settings)
    return Distiller(student, teacher, config, SetCriterionConfig(), seed=0)


def test_it_is_one_minus_cosine_token_by_token() -> None:
    ours, theirs = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    padding[2] = True  # an image without a token counts nothing
    expected = 0.0
    for image in range(3):
        valid = [s for s in range(5) if not padding[image, s]]
        for s in valid:
            a, b = ours[image, s], theirs[image, s]
            cosine = (a @ b / (a.norm() * b.norm())).item()
            expected += (1 - cosine) / len(valid) / 7
    found = cosine_loss(ours, theirs, padding, torch.tensor(7.0))
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert cosine_loss(ours, 3 * ours, None, torch.tensor(1.0)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("levels", ["last", "every"])
@pytest.mark.parametrize("kind", ["conditional_detr", "deformable_detr"])
def test_the_term_compares_mapped_memory_with_the_teachers(
    tiny_detector: Build, images: ImageBatch, targets: Targets, kind: str, levels: str
) -> None:
    coarser = {"backbone": {"name": "small", "stem_width": 8, "stage_widths": (8, 8, 8, 16)}}
    student = tiny_detector(seed=1, **FAMILY[kind])
    teacher = tiny_detector(width=64, **FAMILY[kind] | coarser)
    module = _distiller(student, teacher, levels=levels, weight=3.0)
    taught = module.run_teacher(images)
    assert taught is not None and not taught.groups  # its decoder did not run
    found = module(images, targets, taught, module.normalisers(targets, taught))["features"]
    ours, theirs = student.encode(images), teacher.encode(images)
    assert isinstance(module.method, FeatureCosine) and ours.padding is not None
    kept = ours.levels if levels == "every" else ours.levels[-1:]
    first = ours.tokens.shape[1] - sum(h * w for h, w in kept)
    shown = resize_tokens(theirs.tokens, theirs.padding, theirs.levels, kept)
    cosine = nn.CosineSimilarity(-1)(module.method.adapter(ours.tokens[:, first:]), shown)
    rows = [(1 - cosine[b])[~ours.padding[b, first:]].mean() for b in range(len(images.pixels))]
    assert found.item() == pytest.approx(3 * torch.stack(rows).mean().item(), rel=1e-5)


def test_a_teacher_in_another_basis_is_reached_by_the_map(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    """Memory that is a rotation of the student's costs nothing where the map is that rotation."""
    detector = tiny_detector()
    module = _distiller(detector, tiny_detector())
    rotation = torch.linalg.qr(torch.randn(32, 32)).Q
    with torch.no_grad():
        module.method.adapter.weight.copy_(rotation)
        module.method.adapter.bias.zero_()
    taught = module.run_teacher(images)
    assert taught is not None and taught.memory is not None
    taught.memory.tokens.copy_(taught.memory.tokens @ rotation.T)
    losses = module(images, targets, taught, module.normalisers(targets, taught))
    assert losses["features"].item() == pytest.approx(0, abs=1e-5)


class _Toy(nn.Module):
    """An encoder of one parameter and a rest of one, with constant gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.rest = (nn.ParameterList([torch.zeros(1)]) for _ in range(2))

    def loss(self, weight: Tensor) -> Tensor:
        encoder, rest = self.encoder[0], self.rest[0]
        return (0.3 * encoder + 2.0 * rest + weight * 0.5 * encoder).sum()


def _epoch(toy: _Toy, share: GradientShare, steps: int = 3) -> float:
    for _ in range(steps):
        toy.zero_grad()
        toy.loss(share.factor).backward()
        share.watch(toy)
    gradients = [p.grad.abs().item() for p in (toy.encoder[0], toy.rest[0]) if p.grad is not None]
    return gradients[0] / sum(gradients)


@pytest.mark.parametrize("target", [0.2, 0.5, 0.8])
def test_the_share_is_reached_and_then_left_alone(target: float) -> None:
    toy = _Toy()
    share = GradientShare(EncoderShareConfig(target=target, tolerance=0.01))
    found = [_epoch(toy, share)]
    texts = []
    for _ in range(12):
        texts.append(share.change())
        found.append(_epoch(toy, share))
    assert abs(found[0] - target) > 0.05 and abs(found[-1] - target) <= 0.01
    assert texts[0] is not None and texts[-1] is None


def test_one_change_follows_the_formula_and_its_bounds() -> None:
    def changed(share: float, target: float) -> float:
        controller = GradientShare(EncoderShareConfig(target=target, tolerance=0.0))
        controller.seen.copy_(torch.tensor([share, 1.0]))
        controller.change()
        return controller.factor.item()

    assert changed(0.2, 0.3) == pytest.approx(0.3 * 0.8 / (0.2 * 0.7))
    assert changed(0.001, 0.5) == 10 and changed(0.999, 0.5) == pytest.approx(0.1)
    assert changed(0.0, 0.5) == 10 and changed(1.0, 0.5) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("epochs", "per_epoch", "until", "changes", "released"),
    [
        (20, 2, 0.8, [*range(2, 32, 2)], 32),
        (1, 40, 0.8, [*range(4, 32, 4)], 32),
        (3, 10, 0.5, [3, 6, 9, 12], 15),
        (1, 5, 0.7, [1, 2, 3], 4),
        (1, 20, 1.0, [*range(2, 20, 2)], None),
    ],
)
def test_the_weight_changes_once_an_epoch_or_ten_times_and_is_the_recipes_in_the_end(
    epochs: int, per_epoch: int, until: float, changes: list[int], released: int | None
) -> None:
    share, steps = GradientShare(EncoderShareConfig(target=0.5, until=until)), epochs * per_epoch
    found = {}
    for step in range(1, steps + 1):
        share.seen.copy_(torch.tensor([1.0, 4.0]))
        before = share.factor.item()
        if text := share.steer(step, steps, per_epoch):
            found[step] = text
            assert share.factor == (1 if step == released else min(3 * before, 1e3))
    assert [*found] == [*changes, *[released] * (released is not None)]
    if released is not None:
        assert found[released] == "the weight is the recipe's again" and share.factor == 1


def test_the_encoders_share_is_watched_and_kept_with_the_run(
    tiny_detector: Build, images: ImageBatch, targets: Targets
) -> None:
    settings = {"gradient_share": {"target": 0.5}}
    module = _distiller(tiny_detector(seed=1), tiny_detector(), **settings)
    taught = module.run_teacher(images)
    losses = module(images, targets, taught, module.normalisers(targets, taught))
    torch.stack([*losses.values()]).sum().backward()
    assert module.share is not None
    module.share.watch(module.student)
    parts = [
        sum(p.grad.abs().sum().item() for p in part.parameters() if p.grad is not None)
        for part in (module.student.encoder, module.student)
    ]
    state = module.state_dict()
    assert state["share.seen"].tolist() == pytest.approx(parts)
    text = module.share.change()
    assert text is not None and f"{100 * parts[0] / parts[1]:.1f} %" in text
    again = module(images, targets, taught, module.normalisers(targets, taught))
    factor = module.state_dict()["share.factor"].item()
    expected = factor * losses["features"].item()
    assert factor != 1 and again["features"].item() == pytest.approx(expected, rel=1e-6)


def test_a_share_of_no_encoder_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "extends: digits/plain\nteacher: {weights: a.safetensors}\n"
        "student: {detector: {encoder_layers: 0}}\n"
        "distillation: {method: feature_cosine, gradient_share: {target: 0.5}}\n"
    )
    with pytest.raises(UserError, match="encoder_layers is 0"):
        load_config(recipe)
