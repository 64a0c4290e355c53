"""Exporting weights: the same detector in half the space."""

from pathlib import Path

import torch

from d3etr.cli.main import main
from d3etr.config.data import PreprocessingConfig
from d3etr.config.detector import BackboneConfig, detector_config
from d3etr.detectors.build import build_detector
from d3etr.detectors.weights import WeightsInfo, load_weights, read_info, save_weights


def test_half_the_space_same_detector_no_evaluation_of_other_numbers(tmp_path: Path) -> None:
    config = detector_config(
        backbone=BackboneConfig(name="small"), width=64, encoder_layers=1, decoder_layers=1
    )
    detector = build_detector(config, 2)
    info = WeightsInfo(
        detector=config,
        categories=((1, "a"), (2, "b")),
        preprocessing=PreprocessingConfig(),
        evaluation={"mAP": 0.5},
    )
    source, target = tmp_path / "source.safetensors", tmp_path / "target.safetensors"
    save_weights(source, detector, info)
    assert main(["export", str(source), str(target), "--half"]) == 0
    assert target.stat().st_size < 0.6 * source.stat().st_size
    loaded, found = load_weights(target)
    assert found.evaluation is None and found.detector == config
    for name, tensor in detector.state_dict().items():
        assert torch.allclose(loaded.state_dict()[name], tensor, rtol=1e-3, atol=1e-6), name


def test_a_plain_copy_keeps_the_evaluation(tmp_path: Path) -> None:
    config = detector_config(backbone=BackboneConfig(name="small"), width=32, decoder_layers=1)
    info = WeightsInfo(
        detector=config,
        categories=((1, "a"),),
        preprocessing=PreprocessingConfig(),
        evaluation={"mAP": 0.5},
    )
    source, target = tmp_path / "source.safetensors", tmp_path / "target.safetensors"
    save_weights(source, build_detector(config, 1), info)
    assert main(["export", str(source), str(target)]) == 0
    assert read_info(target).evaluation == {"mAP": 0.5}
