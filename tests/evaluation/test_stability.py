from pathlib import Path

import torch
from tiny import save_untrained
from tiny_runs import MakeConfig

from d3etr.config.detector import DetectorConfig, TeacherConfig
from d3etr.config.distillation import MethodConfig
from d3etr.engine.build import build_models, open_splits
from d3etr.engine.distributed import SingleProcess
from d3etr.evaluation.evaluator import Evaluator
from d3etr.evaluation.stability import MatchingStability, unchanged

CPU = torch.device("cpu")


def test_unchanged_is_a_share_of_todays_pairs() -> None:
    before = torch.tensor([[9, 0, 1, 2, -1], [10, 3, 3, -1, 0]])
    now = torch.tensor([[9, 0, 2, 1, -1], [10, 3, -1, 3, 0]])
    assert unchanged(before, now) == 3 / 6
    assert unchanged(now, now) == 1.0


def test_stability_compares_consecutive_evaluations(make_config: MakeConfig) -> None:
    config, context = make_config(), SingleProcess(CPU)
    splits = open_splits(config, context)
    models = build_models(config, splits, context)
    evaluator = Evaluator(splits.validation, config.data, config.evaluation, context)
    stability = MatchingStability(models.distiller, splits.validation, context)

    def examine() -> float | None:
        evaluator.measure(models.student, stability.observe)
        return stability.compare()

    assert examine() is None
    assert stability.state is not None
    # 7 images; 2 layers of 8 teacher queries, of which the 6 student queries match 6
    assert stability.state.shape == (7, 1 + 2 * 8)
    assert (stability.state[:, 1:] >= 0).sum() == 7 * 2 * 6
    assert stability.state[:, 0].tolist() == sorted(r.id for r in splits.validation.records)
    assert examine() == 1.0
    with torch.no_grad():
        models.student.query_embedding.weight.copy_(models.student.query_embedding.weight.flip(0))
    share = examine()
    assert share is not None and share < 0.5


def test_a_two_stage_teacher_may_have_fewer_tokens_than_queries(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config, context = make_config(), SingleProcess(CPU)
    two_stage = {"levels": 2, "points": 2, "box_refinement": True, "two_stage": True}
    student = config.student.detector.model_dump(mode="json")
    kind = DetectorConfig.parse(student | {"name": "deformable_detr", "queries": 900, **two_stage})
    file = tmp_path / "teacher.safetensors"
    save_untrained(file, kind, config.data)
    no_maps = {"method": "d3etr", "cross_attention": {"weight": 0.0}}
    changes = {
        "teacher": TeacherConfig(weights=file),
        "distillation": MethodConfig.parse(no_maps),
    }
    config = config.model_copy(update=changes)
    splits = open_splits(config, context)
    models = build_models(config, splits, context)
    evaluator = Evaluator(splits.validation, config.data, config.evaluation, context)
    stability = MatchingStability(models.distiller, splits.validation, context)
    evaluator.measure(models.student, stability.observe)
    assert stability.compare() is None and stability.state is not None
    assert (stability.state[:, 1:] >= 0).sum() == 7 * 2 * 6
