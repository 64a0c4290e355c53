"""Students in MLflow's registry: how they get there, what their page says, who loads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tracked_folders import client_of

import d3etr
from d3etr.cli.main import main
from d3etr.config.tree import Config
from d3etr.engine.provenance import INPUTS_KEY, data_key
from d3etr.errors import UserError
from d3etr.serving.replica import load_model
from d3etr.serving.settings import ServeSettings
from d3etr.tracking.model_card import LATENCY, MACHINE
from d3etr.tracking.state import read_state, write_state

MakeConfig = Callable[..., Config]
MakeRun = Callable[..., Path]


def on_test(folder: Path, mAP: float, digest: str = "t" * 64) -> Path:
    """A run's folder whose student was measured on test images, too."""
    path = folder / "summary.json"
    found: dict[str, Any] = {"test/mAP": mAP, "parameters": 12345}
    found[INPUTS_KEY] = {data_key("test"): digest}
    path.write_text(json.dumps(json.loads(path.read_text()) | found))
    return folder


def test_the_best_on_test_is_champion_and_loads_by_that_name_everywhere(
    make_config: MakeConfig,
    make_run: MakeRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    configs = [make_config(seed=seed, tracking={"register_as": "both"}) for seed in (0, 1)]
    configs.append(make_config(seed=2))
    client = client_of(configs[0])
    better, worse = on_test(make_run(configs[0], 0.2), 0.4), on_test(make_run(configs[1], 0.3), 0.1)
    other = on_test(make_run(configs[2], 0.5), 0.9, "o" * 64)

    assert main(["register", str(better), "tiny"]) == 0
    assert "models:/tiny/1: version 1 is the champion, with mAP 0.4000" in capsys.readouterr().out
    assert main(["register", str(worse), "tiny", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["standing"].startswith("the champion is version 1, with mAP 0.4000; version 2")
    assert main(["register", str(other), "tiny"]) == 0
    assert "version 3 was measured on other data than version 1" in capsys.readouterr().out
    assert client.get_model_version_by_alias("both", "champion").version == 1
    state = read_state(better)
    assert state is not None
    client.log_metric(state.run_id, LATENCY, 3.25)
    client.set_tag(state.run_id, MACHINE, "a CPU, 1 at once")
    assert main(["register", str(better), "tiny"]) == 0, "again"
    assert len(client.search_model_versions("name = 'tiny'")) == 3

    version = client.get_model_version_by_alias("tiny", "champion")
    facts = ("| teacher | none |", "| data | digit-scenes |", "40.0 on test", "12,345")
    for text in (*facts, "| latency | 3.25 ms (a CPU, 1 at once) |"):
        assert text in version.description
    assert version.tags["split"] == "test" and version.tags["parameters"] == "12345"
    assert "model_card.md" in {each.path for each in client.list_artifacts(state.run_id)}

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{configs[0].run.output / 'mlflow.db'}")
    picture = tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 48, 3), np.uint8)
    Image.fromarray(pixels).save(picture)
    [expected] = d3etr.load(better / "weights.safetensors").predict(picture, 0)
    [found] = d3etr.load("models:/tiny@champion").predict(picture, 0)
    assert np.array_equal(found.scores, expected.scores) and len(found) == 10
    replica = load_model(ServeSettings("models:/tiny/1"))
    assert np.array_equal(replica.predict(picture, 0)[0].scores, expected.scores)
    capsys.readouterr()
    predict = ["predict", "models:/tiny/1", str(picture), "--threshold", "0", "--json"]
    assert main(predict) == 0
    assert json.loads(capsys.readouterr().out)[0]["detections"] == expected.as_dicts()
    written = tmp_path / "written.safetensors"
    assert main(["export", "models:/tiny@champion", str(written)]) == 0
    assert d3etr.load(written).predict(picture, 0)[0].names == expected.names
    for address, text in (
        ("models:/tiny@best", "Its aliases are: champion, newest"),
        ("models:/other@champion", "Registered models are: both, tiny"),
        ("models:/tiny", "expected models:/NAME@ALIAS"),
    ):
        with pytest.raises(UserError, match=text):
            d3etr.load(address)


def test_what_was_deleted_or_renamed_in_mlflow_is_registered_again(
    make_config: MakeConfig, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tracking={"register_as": "tiny"})
    client, folder = client_of(config), make_run(config)
    assert main(["register", str(folder), "tiny"]) == 0
    state = read_state(folder)
    assert state is not None and state.registered_as == "models:/tiny/1"
    # Earlier versions remembered the address in the registry alone.
    earlier = state.model_copy(update={"model_uri": state.registered_as, "registered_as": None})
    for remembered in (state, earlier):
        write_state(folder, remembered)
        client.rename_registered_model("tiny", "other")
        client.delete_registered_model("other")
        assert main(["register", str(folder), "tiny"]) == 0
        assert client.get_model_version("tiny", "1").source == state.model_uri
    capsys.readouterr()
    client.delete_logged_model(state.model_uri.removeprefix("models:/"))
    assert main(["register", str(folder), "another"]) == 2
    assert "refuses model 'another': " in capsys.readouterr().err


def test_what_is_needed_to_find_a_model_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="set MLFLOW_TRACKING_URI to its address"):
        d3etr.load("models:/tiny@champion")


def test_a_run_that_is_not_finished_is_not_registered(
    make_config: MakeConfig, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(make_config(), finished=False)
    assert main(["register", str(folder), "tiny"]) == 2
    assert "is not finished" in capsys.readouterr().err
