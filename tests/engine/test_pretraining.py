import json
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file

from d3etr.config.backbone import BackboneConfig
from d3etr.config.data import AugmentationConfig, DataConfig
from d3etr.config.training import PretrainingConfig
from d3etr.detectors.backbones import build_backbone
from d3etr.detectors.weights import load_backbone_weights, read_metadata
from d3etr.engine.pretraining import MARGIN, augmented, pretrain_backbone
from d3etr.errors import UserError

SMALL = BackboneConfig(name="small", stem_width=8, stage_widths=(8, 16, 16))
BRIEF = PretrainingConfig(crop_size=16, steps=3, batch_size=4)


def test_a_detectors_backbone_starts_from_the_file(scenes: DataConfig, tmp_path: Path) -> None:
    output = tmp_path / "backbone.safetensors"
    result = pretrain_backbone(scenes, SMALL, output, BRIEF)
    assert 0 <= result.accuracy <= 1 and result.crops > 24
    backbone = build_backbone(SMALL)
    load_backbone_weights(backbone, output)
    metadata = read_metadata(output)
    assert json.loads(metadata["result"])["accuracy"] == result.accuracy
    assert BackboneConfig.model_validate_json(metadata["backbone"]) == SMALL
    assert len(metadata["data_digest"]) == 64


def test_equal_seeds_give_equal_weights(scenes: DataConfig, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a", "b", "c")]
    for file, seed in zip(files, (1, 1, 2), strict=True):
        pretrain_backbone(scenes, SMALL, file, BRIEF, seed=seed)
    a, b, c = (load_file(file) for file in files)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_training_learns_what_it_sees_and_says_how_long_it_takes(
    scenes: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    # Validation is the training split itself: the question is whether anything is learnt.
    data = scenes.model_copy(deep=True)
    config = PretrainingConfig(crop_size=16, steps=60, batch_size=16, backgrounds=1.0)
    untrained = pretrain_backbone(
        data, SMALL, tmp_path / "a", config.model_copy(update={"steps": 1})
    )
    trained = pretrain_backbone(data, SMALL, tmp_path / "b", config)
    assert trained.accuracy > untrained.accuracy + 0.1
    (said,) = [text for text in caplog.messages if "takes about" in text]
    assert said.endswith("60 steps")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnets_are_pretrained_too(scenes: DataConfig, tmp_path: Path, name: str) -> None:
    config = BackboneConfig.model_validate({"name": name, "norm": "group", "frozen_stages": 2})
    pretrain_backbone(scenes, config, tmp_path / "backbone", BRIEF)
    load_backbone_weights(build_backbone(config), tmp_path / "backbone")


@pytest.mark.parametrize(
    "settings",
    [{"name": "swin_t", "frozen_stages": 1}, {"name": "mobilenet_v3_small", "norm": "group"}],
    ids=lambda settings: settings["name"],
)
def test_torchvisions_other_networks_are_pretrained_too(
    scenes: DataConfig, tmp_path: Path, settings: dict[str, object]
) -> None:
    config = BackboneConfig.model_validate(settings)
    pretrain_backbone(scenes, config, tmp_path / "backbone", BRIEF)
    load_backbone_weights(build_backbone(config), tmp_path / "backbone")


def test_frozen_batch_norm_without_weights_is_refused(scenes: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Set backbone\.norm to 'group'"):
        pretrain_backbone(scenes, BackboneConfig(name="resnet18"), tmp_path / "backbone", BRIEF)
    assert not (tmp_path / "backbone").exists()


def test_augmentation_keeps_shape_and_the_middle(scenes: DataConfig) -> None:
    config, random = PretrainingConfig(crop_size=20), Random(0)
    side = round(20 * MARGIN)
    crop = torch.zeros(3, side, side, dtype=torch.uint8)
    crop[0, side // 2 - 4 : side // 2 + 4, side // 2 - 4 : side // 2 + 4] = 255

    def shown(**changes: float) -> torch.Tensor:
        data = scenes.model_copy(update={"augmentation": AugmentationConfig(**changes)})
        return torch.stack([augmented(crop, config, data, random) for _ in range(50)])

    out = shown(horizontal_flip=0.0)
    assert out.shape == (50, 3, 20, 20) and out.dtype == torch.uint8
    assert out[:, 0, 10, 10].min() == 255 and out[:, 1:].max() == 0
    assert len({tuple(image[0, :, 10].tolist()) for image in out}) > 10, "shifted and scaled"
    changed = shown(channel_permutation=1.0, inversion=1.0)
    bright = (changed[:, :, 10, 10] == 0).float()  # inverted: the object is dark
    assert torch.equal(bright.sum(1), torch.ones(50))
    assert bright.mean(0).min() > 0.1  # every channel has its turn
