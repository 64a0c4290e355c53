"""A foundation model's patch features against the student's memory (``teacher.features``)."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from foundation_folders import write_folder

from d3etr.config.distillation import MethodConfig
from d3etr.config.training import SetCriterionConfig
from d3etr.detectors.base import DetectionTransformer
from d3etr.detectors.foundation import FoundationModel, load_foundation
from d3etr.detectors.foundation_folder import read_foundation_folder
from d3etr.distiller import Distiller
from d3etr.engine import graphs
from d3etr.structures import ImageBatch, Targets

Build = Callable[..., DetectionTransformer]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> FoundationModel:
    folder = write_folder(tmp_path_factory.mktemp("model"), "dinov3_vit")
    return load_foundation(read_foundation_folder(folder))


def _distiller(
    student: DetectionTransformer, teacher: FoundationModel, **settings: object
) -> Distiller:
    config = MethodConfig.parse({"method": "feature_cosine"} | settings)
    return Distiller(student, teacher, config, SetCriterionConfig(), seed=0)


def test_the_loss_is_one_minus_cosine_of_each_token_with_the_patches_under_it(
    tiny_detector: Build, model: FoundationModel, images: ImageBatch, targets: Targets
) -> None:
    """The student's tokens are 8 pixels wide, as patches are: no resizing."""
    student = tiny_detector(seed=1)
    module = _distiller(student, model, weight=3.0)
    taught = module.run_teacher(images)
    assert taught is not None and taught.memory is not None and not taught.groups
    losses = module(images, targets, taught, module.normalisers(targets, taught))
    memory, theirs = student.encode(images), model.encode(images)
    assert memory.levels == theirs.levels == ((4, 5),) and memory.padding is not None
    adapter, total = module.method.get_submodule("adapter"), 0.0
    for b in range(3):
        height, width = (32, 24) if b == 1 else (16, 40) if b == 2 else (32, 40)
        cosines = []
        for y in range(height // 8):
            for x in range(width // 8):
                ours, patch = adapter(memory.tokens[b, 5 * y + x]), theirs.tokens[b, 5 * y + x]
                cosines.append((ours @ patch / (ours.norm() * patch.norm())).item())
        total += 3 * (1 - sum(cosines) / len(cosines)) / 3
    assert losses["features"].item() == pytest.approx(total, rel=1e-4)


def test_gradients_reach_the_student_and_its_map_only(
    tiny_detector: Build, model: FoundationModel, images: ImageBatch, targets: Targets
) -> None:
    module = _distiller(tiny_detector(seed=1), model).train()
    taught = module.run_teacher(images)
    module(images, targets, taught, module.normalisers(targets, taught))["features"].backward()
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert all(p.grad is not None for p in module.student.get_submodule("encoder").parameters())
    assert not any("model." in name for name in module.state_dict())
    assert module.teacher is None and module.foundation is model


def test_a_picture_of_another_size_is_what_the_model_sees(
    tiny_detector: Build, model: FoundationModel, images: ImageBatch
) -> None:
    larger = ImageBatch(torch.randn(3, 3, 64, 80))
    taught = _distiller(tiny_detector(), model).run_teacher(replace(images, for_teacher=larger))
    assert taught is not None and taught.memory is not None
    assert torch.equal(taught.memory.tokens, model.encode(larger).tokens)
    assert taught.memory.levels == ((8, 10),)


def test_such_steps_are_not_recorded(
    tiny_detector: Build, model: FoundationModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "runs_kernels", lambda _: True)
    reason = graphs.unsupported_reason(_distiller(tiny_detector(), model), torch.device("cpu"))
    assert reason is not None and "teacher.features" in reason
