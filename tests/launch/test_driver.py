import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import fake_training
import pytest

from d3etr.config.tree import Config
from d3etr.detectors.backbones import build_backbone
from d3etr.detectors.weights import write_tensors
from d3etr.engine.distributed import TrainContext
from d3etr.engine.find_run import folder_of, prepare
from d3etr.engine.journal import read_journal
from d3etr.engine.provenance import weight_digests
from d3etr.errors import UserError
from d3etr.launch.api import launch
from d3etr.launch.driver import RunFailedError, RunInterrupted, RunResult
from d3etr.launch.lock import RunLock, RunLockedError
from d3etr.tracking.state import RunState, write_state

MakeConfig = Callable[..., Config]


class Tracker:
    """Remembers how runs ended; breaks where a test wants it."""

    run_id = "tracked"

    def __init__(self, breaks: bool = False) -> None:
        self.statuses: list[str] = []
        self._breaks = breaks

    def finish(self, status: str, stage: object = None) -> str | None:
        self.statuses.append(status)
        if self._breaks:
            raise ConnectionError("server gone")
        return None


def run(config: Config, tracker: Tracker | None = None, **arguments: object) -> RunResult:
    def open_tracker(config: Config, run_dir: Path) -> Tracker:
        assert tracker is not None
        return tracker

    settings = {"task": fake_training.train, "launcher": "local", "quiet": True, **arguments}
    if tracker is not None:
        settings["open_tracker"] = open_tracker
    return launch(config, **settings)  # type: ignore[arg-type]


def test_a_run_hands_over_its_folder_metrics_and_weights(make_config: MakeConfig) -> None:
    config, tracker = make_config(), Tracker()
    result = run(config, tracker)
    assert result.run_dir == folder_of(config).path
    assert result.metrics["mAP"] == 1.0
    assert result.weights.exists()
    assert (result.tracked_run, result.trained) == ("tracked", True)
    assert tracker.statuses == ["FINISHED"]
    journal = read_journal(result.run_dir / "journal.jsonl")
    assert [record["kind"] for record in journal].count("evaluation") == 3
    assert not (result.run_dir / "lock").exists()


def test_a_finished_run_returns_its_result_at_once(make_config: MakeConfig) -> None:
    first = run(make_config())

    def must_not_run(config: Config, run_dir: Path, context: TrainContext) -> dict[str, float]:
        raise AssertionError("trained again")

    second = run(make_config(), task=must_not_run)
    assert second.metrics == first.metrics
    assert not second.trained


@pytest.mark.parametrize("damaged", ["summary.json", "weights.safetensors"])
def test_training_again_does_not_begin_with_the_summary_of_a_damaged_result(
    make_config: MakeConfig, damaged: str
) -> None:
    first, seen = run(make_config()), list[bool]()
    summary = first.run_dir / "summary.json"
    noted = json.loads(summary.read_text()) | {"weights": {"bytes": len(b"weights")}}
    summary.write_text(json.dumps(noted))
    (first.run_dir / damaged).write_bytes(b"{")

    def train(config: Config, run_dir: Path, context: TrainContext) -> dict[str, float]:
        seen.append(summary.exists())
        return fake_training.train(config, run_dir, context)

    again = run(make_config(), task=train)
    assert seen == [False] and again.trained and again.metrics == first.metrics


def test_a_run_that_finished_untracked_is_tracked_when_asked_again(make_config: MakeConfig) -> None:
    run(make_config())
    tracker = Tracker()
    run(make_config(), tracker)
    assert tracker.statuses == ["FINISHED"]


def test_a_run_that_mlflow_has_all_of_needs_no_mlflow(make_config: MakeConfig) -> None:
    config = make_config("tracking.enabled=true", "tracking.uri=http://127.0.0.1:1")
    result = run(make_config())
    state = RunState(
        tracking_uri="http://127.0.0.1:1", experiment_id="1", run_id="all", complete=True
    )
    write_state(result.run_dir, state)
    assert run(config).tracked_run == "all"
    named = make_config(
        "tracking.enabled=true", "tracking.uri=http://127.0.0.1:1", "tracking.register_as=mine"
    )
    write_state(result.run_dir, state.model_copy(update={"registered_as": "models:/mine/3"}))
    assert run(named).tracked_run == "all"
    write_state(result.run_dir, state.model_copy(update={"registered_as": "models:/mine-too/3"}))
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1"):  # it is to be registered
        run(named)
    write_state(result.run_dir, state.model_copy(update={"complete": False}))
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1"):
        run(config)


def test_tracking_without_mlflow_is_refused_before_anything_is_made(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d3etr.launch.api.find_spec", lambda name: None)
    config = make_config("tracking.enabled=true")
    with pytest.raises(UserError, match=r"pip install mlflow.*tracking\.enabled=false"):
        run(config)
    assert not config.run.output.exists()


def test_the_same_call_goes_on_after_a_failure(make_config: MakeConfig) -> None:
    config, tracker = make_config(), Tracker()
    config.run.output.mkdir()
    order = config.run.output / "order.json"
    order.write_text('["raise", 0, 6]')
    with pytest.raises(ZeroDivisionError):
        run(config, tracker)
    order.unlink()
    run(config, tracker)
    journal = read_journal(folder_of(config).path / "journal.jsonl")
    starts = [record["step"] for record in journal if record["kind"] == "start"]
    assert tracker.statuses == ["FAILED", "FINISHED"]
    assert starts[-1] == fake_training.STEPS_PER_EPOCH


def test_a_tracker_that_breaks_costs_no_training(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(make_config(), Tracker(breaks=True)).metrics["mAP"] == 1.0
    assert "server gone" in caplog.text


def test_tracking_that_cannot_start_stops_the_run_before_training(make_config: MakeConfig) -> None:
    def refuse(config: Config, run_dir: Path) -> Tracker:
        raise UserError("MLflow does not answer")

    with pytest.raises(UserError, match="does not answer"):
        run(make_config(), open_tracker=refuse)
    folder = folder_of(make_config())
    assert not folder.journal.exists()
    assert not (folder.path / "lock").exists()


def test_a_run_that_is_going_on_is_left_alone(make_config: MakeConfig) -> None:
    config = make_config()
    folder = folder_of(config)
    prepare(folder, config)
    with RunLock(folder.path), pytest.raises(RunLockedError):
        run(config)
    assert not folder.journal.exists()


def test_resume_without_a_run_is_refused_and_makes_nothing(make_config: MakeConfig) -> None:
    config = make_config()
    with pytest.raises(UserError, match="nothing to resume"):
        run(config, resume=True)
    assert not config.run.output.exists()


def test_a_folder_found_by_name_is_not_given_to_another_recipe(make_config: MakeConfig) -> None:
    first = run(make_config())
    with pytest.raises(UserError, match="another configuration"):
        run(make_config("run.seed=5"), run_dir=first.run_dir, resume=True)


def test_training_that_leaves_no_result_is_a_failure(make_config: MakeConfig) -> None:
    with pytest.raises(RunFailedError, match=r"summary\.json"):
        run(make_config(), task=lambda config, run_dir, context: {})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_in_order_and_says_how_to_go_on(
    make_config: MakeConfig, number: signal.Signals
) -> None:
    config, tracker = make_config(), Tracker()
    config.run.output.mkdir()
    (config.run.output / "order.json").write_text('["sleep", 0, 6]')
    asleep = folder_of(config).path / "asleep"

    def interrupt() -> None:
        while not asleep.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(RunInterrupted, match=r"trainers/run\.py --resume .*tiny-"):
        run(config, tracker)
    assert tracker.statuses == ["KILLED"]
    assert not (folder_of(config).path / "lock").exists()
    assert run(config).trained


@pytest.mark.parametrize("place", ["/proc/runs", __file__])
def test_a_place_that_cannot_hold_runs_is_one_clear_error(
    make_config: MakeConfig, place: str
) -> None:
    with pytest.raises(UserError, match=r"cannot be made.*run\.output"):
        run(make_config(f"run.output={place}"))


def test_a_result_is_not_taken_for_that_of_other_weights(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    backbone = tmp_path / "backbone.safetensors"
    tensors = build_backbone(make_config().student.detector.backbone).state_dict()
    write_tensors(backbone, tensors, {})
    config = make_config(f"student.backbone_weights={backbone}")
    folder = folder_of(config)
    run(config)
    summary = json.loads(folder.summary.read_text()) | {"inputs": weight_digests(config)}
    folder.summary.write_text(json.dumps(summary))
    assert not run(config).trained
    backbone.write_bytes(b"second")
    with pytest.raises(UserError, match=r"student\.backbone_weights is not what the run .* began"):
        run(config)
    backbone.unlink()
    assert not run(config).trained, "results outlive the files"
