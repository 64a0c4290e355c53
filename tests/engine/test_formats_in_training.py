"""The same scenes train and measure alike, whatever format they are written in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from format_writers import WRITERS
from safetensors.torch import load_file
from tiny_runs import MakeConfig, assert_identical, losses, records

from d3etr.config.data import DataConfig
from d3etr.data.splits import configured_splits, read_split
from d3etr.engine.distributed import SingleProcess
from d3etr.engine.provenance import INPUTS_KEY, Inputs, data_digests, splits_of
from d3etr.engine.run import run_training
from d3etr.errors import UserError


@pytest.fixture(scope="module")
def splits(scenes: DataConfig) -> DataConfig:
    """The tiny scenes as COCO files that the configuration names."""
    return scenes.model_copy(update={"digit_scenes": None, **configured_splits(scenes)})


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_losses_and_map_do_not_depend_on_the_format(
    make_config: MakeConfig, splits: DataConfig, tmp_path: Path, name: str
) -> None:
    written = WRITERS[name](configured_splits(splits), tmp_path / "data")
    for folder, data in (("coco", splits), (name, splits.model_copy(update=written))):
        config = make_config().model_copy(update={"data": data})
        run_training(config, tmp_path / folder, SingleProcess(torch.device("cpu")))
    assert len(losses(tmp_path / name)) == 12
    for kind in ("step", "teacher", "evaluation"):
        assert records(tmp_path / name, kind) == records(tmp_path / "coco", kind)
    weights = [load_file(tmp_path / run / "weights.safetensors") for run in (name, "coco")]
    assert_identical(*weights)


def test_changed_labels_are_noticed(
    make_config: MakeConfig, splits: DataConfig, tmp_path: Path
) -> None:
    written = WRITERS["yolo"](configured_splits(splits), tmp_path)
    config = make_config().model_copy(update={"data": splits.model_copy(update=written)})
    digests = {}
    for name, split in splits_of(config):
        digests |= data_digests(read_split(name, split))
    (tmp_path / "summary.json").write_text(json.dumps({INPUTS_KEY: digests}))
    Inputs().ensure_result_is_of(config, tmp_path)
    label = next((tmp_path / "labels" / "train").iterdir())
    label.write_text(label.read_text() + "\n")
    with pytest.raises(UserError, match="the training data is not what the run"):
        Inputs().ensure_result_is_of(config, tmp_path)
