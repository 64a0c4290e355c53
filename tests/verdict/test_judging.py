"""Students and teacher on one split."""

from pathlib import Path

import pytest
from tiny import save_untrained, tiny_detector_config
from tiny_recipe import SECTIONS, tiny_recipe

from d3etr.config.load import load_config
from d3etr.data.splits import open_split
from d3etr.detectors.weights import load_weights
from d3etr.engine.distributed import SingleProcess
from d3etr.evaluation.evaluator import Evaluator
from d3etr.verdict.judging import Trained, judge_runs


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_teacher_is_judged_on_images_as_large_as_it_sees_them(
    tmp_path: Path, scale: float
) -> None:
    teacher, recipe = tmp_path / "teacher.safetensors", tmp_path / "taught.yaml"
    scenes = SECTIONS["data"]["digit_scenes"] | {"minimum_scale": 24, "maximum_scale": 30}
    sizes = SECTIONS["data"]["preprocessing"] | {"shortest_side": 32, "longest_side": 32}
    data = {"digit_scenes": scenes | {"root": str(tmp_path)}, "preprocessing": sizes}
    taught = {"weights": str(teacher), "image_scale": scale}
    method = {"method": "d3etr"}
    recipe.write_text(tiny_recipe(data=data, teacher=taught, distillation=method))
    config = load_config(recipe)
    save_untrained(teacher, tiny_detector_config(box_size_bias=0.7), config.data)
    trained = [
        Trained(name, name == "distilled", (0.1, 0.1), (teacher, teacher))
        for name in ("plain", "distilled")
    ]
    judgement = judge_runs(config, "validation", trained)
    context = SingleProcess()
    asked = open_split(config.data, "validation"), config.data, config.evaluation, context
    detector = load_weights(teacher)[0].to(context.device)
    measured = [Evaluator(*asked, each).measure(detector).mAP for each in (1.0, 2.0)]
    assert measured[0] != measured[1]
    assert judgement.teacher == pytest.approx(measured[int(scale) - 1])
    assert judgement.of("plain").maps == pytest.approx([measured[0]] * 2)
