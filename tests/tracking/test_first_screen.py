"""What a stranger sees first in MLflow: the result, pictures, runs by result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from tracked_folders import client_of, journal_records, run_of, write_journal

from d3etr.config.tree import Config
from d3etr.tracking.note import KEY, result_lines
from d3etr.tracking.runs import open_tracker, replay
from d3etr.tracking.sweeps import SweepRun, Swept

MakeConfig = Callable[..., Config]
MakeRun = Callable[..., Path]


def test_a_result_is_told_in_two_lines() -> None:
    summary = {"mAP": 0.34218, "AP50": 0.5512, "test/mAP": 0.33, "steps": 12500, "method": "none"}
    costs = {"parameters": 1234567, "training_seconds": 751.0, "training_images_per_second": 79.96}
    assert result_lines(summary | costs) == [
        "**34.2 mAP** on validation (AP50 55.1), **33.0 mAP** on test",
        "1.23 M parameters, 12,500 steps, 12:31 of training, 80 images/s",
    ]


@pytest.mark.parametrize(
    ("status", "steps", "told"),
    [
        ("KILLED", 15, "Stopped at step 15 of 20; best until then **12.5 mAP** on validation, at"),
        ("FAILED", 5, "Failed at step 5 of 20, before the first evaluation."),
    ],
)
def test_a_run_that_ended_before_its_end_says_how_far_it_came(
    status: str, steps: int, told: str, make_config: MakeConfig, make_run: MakeRun
) -> None:
    config = make_config()
    run_dir = make_run(config, finished=False)
    write_journal(run_dir, [r for r in journal_records(20) if r["step"] <= steps])
    assert open_tracker(config, run_dir).finish(status) is None  # type: ignore[arg-type]
    assert told in run_of(config, run_dir).data.tags[KEY]


def test_a_description_that_a_person_wrote_stays(
    make_config: MakeConfig, make_run: MakeRun
) -> None:
    config = make_config()
    run_dir = make_run(config)
    tracker = open_tracker(config, run_dir)
    client_of(config).set_tag(tracker.run_id, KEY, "the one for the paper")
    assert tracker.finish("FINISHED") is None
    assert run_of(config, run_dir).data.tags[KEY] == "the one for the paper"


def test_a_run_that_a_sweep_stopped_early_is_no_failure(
    make_config: MakeConfig, make_run: MakeRun
) -> None:
    config = make_config()
    run_dir = make_run(config, finished=False)
    write_journal(run_dir, [r for r in journal_records(20) if r["step"] <= 10])
    tracker = open_tracker(config, run_dir)
    tracker.mark_as_stopped_early()
    assert tracker.finish("FINISHED") is None
    assert replay(run_dir) is None, "sent again, it is the same"
    run = run_of(config, run_dir)
    assert run.info.status == "FINISHED" and run.data.tags["stopped_early"] == "step 10 of 20"
    assert "Stopped early by the sweep at step 10 of 20" in run.data.tags[KEY]


def test_pictures_are_in_the_grid_of_images(
    make_config: MakeConfig, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(config: Config, run_dir: Path, folder: Path) -> list[Path]:
        folder.mkdir()
        Image.new("RGB", (8, 8), "red").save(folder / "predictions.png")
        return [folder / "predictions.png"]

    monkeypatch.setattr("d3etr.tracking.figures.collect.draw_figures", draw)
    config = make_config(tracking={"figures": True})
    run_dir = make_run(config)
    assert open_tracker(config, run_dir).finish("FINISHED") is None
    run = run_of(config, run_dir)
    assert run.data.tags["mlflow.loggedImages"] == "True", "what MLflow's page looks for"
    images = [file.path for file in client_of(config).list_artifacts(run.info.run_id, "images")]
    assert len(images) == 2 and all("figures~predictions+step+20+" in path for path in images)
    figures = client_of(config).list_artifacts(run.info.run_id, "figures")
    assert [file.path for file in figures] == ["figures/predictions.png"]


def test_a_new_experiment_leads_to_its_runs_by_result(
    make_config: MakeConfig, make_run: MakeRun
) -> None:
    config = make_config()
    run_dir = make_run(config, finished=False)
    assert replay(run_dir) is None
    client, experiment = client_of(config), run_of(config, run_dir).info.experiment_id
    note = client.get_experiment(experiment).tags[KEY]
    assert "best validation mAP first" in note
    assert "orderByKey=metrics.%60val%2Fkept_mAP%60" in note
    client.set_experiment_tag(experiment, KEY, "ours")
    assert replay(run_dir) is None
    assert client.get_experiment(experiment).tags[KEY] == "ours"


def test_a_sweeps_numbers_have_the_digits_that_a_person_reads(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config, folder = make_config(), tmp_path / "runs" / "ratios"
    folder.mkdir()
    sweep = SweepRun(config, folder, "The matching ratios", {"seeds": "0"})
    swept = Swept("adaptive_ratio=1", 0.432178943, folder)
    assert sweep.finish("FINISHED", [swept], []) is None
    assert run_of(config, folder).data.metrics["val/mAP"] == 0.4322
