"""A run's way into MLflow with the embedded SQLite store."""

from __future__ import annotations

import json
import re
import shutil
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlflow
import pytest
from tracked_folders import client_of, journal_records, run_of, write_journal

from d3etr.config.tree import Config
from d3etr.engine.journal import Journal
from d3etr.errors import UserError
from d3etr.tracking.description import teacher_tags
from d3etr.tracking.runs import open_tracker, register_run, replay
from d3etr.tracking.state import RunState, read_state

MakeConfig = Callable[..., Config]
MakeRun = Callable[..., Path]


def steps_of(config: Config, run_dir: Path, metric: str) -> list[int]:
    history = client_of(config).get_metric_history(run_of(config, run_dir).info.run_id, metric)
    return [point.step for point in history]


def test_a_finished_run_has_metrics_params_tags_files_and_a_model(
    make_config: MakeConfig, make_run: MakeRun
) -> None:
    config = make_config(seed=3, tracking={"register_as": "tiny-student"})
    run_dir = make_run(config)
    tracker = open_tracker(config, run_dir)
    assert tracker.finish("FINISHED") is None
    run = run_of(config, run_dir)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "plain student · seed 3"
    assert steps_of(config, run_dir, "train/loss") == [5, 10, 15, 20]
    assert steps_of(config, run_dir, "val/mAP") == [10, 20]
    assert run.data.metrics["val/mAP"] == 0.25 and run.data.metrics["epoch"] == 2
    assert run.data.params["optimisation.batch_size"] == "4"
    assert run.data.params["student.detector.backbone.stage_widths"] == "[8, 8, 16]"
    assert run.data.params["teacher"] == "null"
    assert run.data.tags["role"] == "student" and run.data.tags["method"] == "none"
    assert run.data.tags["backbone"] == "small-8-8-16"
    assert run.data.tags["data_digest"] == "d" * 16
    assert [used.dataset.name for used in run.inputs.dataset_inputs] == ["digit-scenes"]
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith("**plain student**, detector conditional_detr")
    assert "**25.0 mAP** on validation (AP50 50.0)" in note and str(run_dir) in note
    names = {file.path for file in client_of(config).list_artifacts(run.info.run_id)}
    assert {"config.yaml", "summary.json", "journal.jsonl", "weights"} <= names
    state = read_state(run_dir)
    assert state is not None and state.complete and state.sent_step == 20
    assert state.registered_as == "models:/tiny-student/1"
    champion = client_of(config).get_model_version_by_alias("tiny-student", "champion")
    assert str(champion.version) == "1" and champion.tags["mAP"] == "0.2500"
    (model,) = client_of(config).search_logged_models([run.info.experiment_id])
    assert model.name == "plain student · seed 3 · conditional_detr"
    assert state.model_uri == model.model_uri


def test_images_without_labels_are_parameters(make_config: MakeConfig, make_run: MakeRun) -> None:
    config = make_config()
    run_dir = make_run(config)
    summary = json.loads((run_dir / "summary.json").read_text())
    inputs = {"the unlabelled data": "e" * 64, "data.unlabelled.labels": "f" * 64}
    summary |= {"unlabelled_images": 5700, "inputs": inputs}
    (run_dir / "summary.json").write_text(json.dumps(summary))
    assert open_tracker(config, run_dir).finish("FINISHED") is None
    params = run_of(config, run_dir).data.params
    assert (params["unlabelled_images"], params["unlabelled_digest"]) == ("5700", "e" * 16)
    assert params["unlabelled_labels_digest"] == "f" * 16


def test_a_run_that_does_not_learn_has_a_tag(make_config: MakeConfig, make_run: MakeRun) -> None:
    config = make_config()
    run_dir = make_run(config, finished=False)
    said = {"kind": "message", "time": 1e9, "level": "warning", "text": "finds nothing"}
    kinds = ["zero mAP", "no descent", "zero mAP"]
    found = [said | {"step": 15, "finding": kind} for kind in kinds]
    write_journal(run_dir, [*journal_records(15), *found])
    assert open_tracker(config, run_dir).finish("KILLED") is None
    assert run_of(config, run_dir).data.tags["not_learning"] == "zero mAP, no descent"


def test_going_on_and_replaying_makes_no_duplicates(
    make_config: MakeConfig, make_run: MakeRun
) -> None:
    config = make_config()
    run_dir = make_run(config, finished=False)
    write_journal(run_dir, journal_records(15))
    first = open_tracker(config, run_dir)
    assert first.finish("KILLED") is None
    assert run_of(config, run_dir).info.status == "KILLED"
    # Training went back to step 10 and on to the end; the journal is sent from its beginning.
    write_journal(run_dir, [record | {"time": 2e9} for record in journal_records(20)])
    second = open_tracker(config, run_dir)
    assert second.run_id == first.run_id
    assert run_of(config, run_dir).info.status == "RUNNING"
    assert second.finish("FINISHED") is None
    assert replay(run_dir) is None
    assert steps_of(config, run_dir, "train/loss") == [5, 10, 15, 20]
    assert steps_of(config, run_dir, "val/mAP") == [10, 20]
    assert len(client_of(config).search_runs(["1"])) == 1


def test_no_step_is_sent_twice_when_a_resume_cuts_the_journal_back(
    make_config: MakeConfig, make_run: MakeRun
) -> None:
    config = make_config()
    run_dir = make_run(config, finished=False)
    journal = Journal(run_dir / "journal.jsonl")
    journal.cut_back(-1)
    tracker = open_tracker(config, run_dir)
    for first, last in ((1, 6), (5, 9)):
        journal.cut_back(first - 1)
        for step in range(first, last + 1):
            journal.write("step", step, metrics={"train/loss": 1 / step})
        deadline = time.monotonic() + 60
        while last not in steps_of(config, run_dir, "train/loss"):
            assert time.monotonic() < deadline, "the journal is not followed"
            time.sleep(0.05)
    assert tracker.finish("FINISHED") is None
    assert steps_of(config, run_dir, "train/loss") == list(range(1, 10))


def test_metrics_have_the_digits_that_a_person_reads(
    make_config: MakeConfig, make_run: MakeRun
) -> None:
    config = make_config()
    run_dir = make_run(config, finished=False)
    values = {"val/mAP": 0.432178943, "optimiser/learning_rate": 1.23456e-5, "epoch": 123456}
    write_journal(run_dir, [{"kind": "evaluation", "step": 20, "time": 1e9, "metrics": values}])
    assert open_tracker(config, run_dir).finish("FINISHED") is None
    expected = {"val/mAP": 0.4322, "optimiser/learning_rate": 1.235e-5, "epoch": 123456}
    assert run_of(config, run_dir).data.metrics == expected


def test_a_lost_state_write_makes_no_duplicates(make_config: MakeConfig, make_run: MakeRun) -> None:
    config = make_config()
    run_dir = make_run(config, finished=False)
    tracker = open_tracker(config, run_dir)
    before = (run_dir / "mlflow_run.json").read_text()
    assert tracker.finish("KILLED") is None
    (run_dir / "mlflow_run.json").write_text(before)
    assert open_tracker(config, run_dir).finish("FINISHED") is None
    assert steps_of(config, run_dir, "train/loss") == [5, 10, 15, 20]


def test_the_journal_alone_is_enough(make_config: MakeConfig, make_run: MakeRun) -> None:
    config = make_config()
    run_dir = make_run(config)
    assert replay(run_dir) is None
    assert steps_of(config, run_dir, "val/mAP") == [10, 20]
    info = run_of(config, run_dir).info
    assert info.status == "FINISHED"
    assert info.end_time - info.start_time == 20_000, "times of the run, not of the sending"


def test_a_run_that_was_tracked_elsewhere_is_sent_there_or_nowhere(
    make_config: MakeConfig,
    make_run: MakeRun,
    tmp_path: Path,
    empty_database: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copy(empty_database, tmp_path / "other.db")
    elsewhere = f"sqlite:///{tmp_path / 'other.db'}"
    config = make_config(tracking={"uri": f"sqlite:///{tmp_path}/unused.db"})
    run_dir = make_run(config)
    tracking = config.tracking.model_copy(update={"uri": elsewhere})
    later = config.model_copy(update={"tracking": tracking})
    assert open_tracker(later, run_dir).finish("KILLED") is None
    noted = (run_dir / "mlflow_run.json").read_text()
    expected = rf"was tracked at {elsewhere}.*{tmp_path}/unused\.db.*MLFLOW_TRACKING_URI.*remove"
    for send in (replay, partial(register_run, name="student")):
        with pytest.raises(UserError, match=expected):
            send(run_dir)
    assert (run_dir / "mlflow_run.json").read_text() == noted
    monkeypatch.setenv("MLFLOW_TRACKING_URI", elsewhere)
    assert replay(run_dir) is None
    before, now = RunState.model_validate_json(noted), read_state(run_dir)
    assert now is not None and now.run_id == before.run_id


def test_a_model_is_logged_once_and_best_stays_with_the_best(
    make_config: MakeConfig, make_run: MakeRun
) -> None:
    good, worse = (
        make_config(seed=seed, tracking={"register_as": "tiny-student"}) for seed in (0, 1)
    )
    good_dir, worse_dir = make_run(good, mAP=0.4), make_run(worse, mAP=0.3)
    for run_dir in (good_dir, worse_dir, good_dir):
        assert replay(run_dir) is None
    client = client_of(good)
    assert len(client.search_model_versions("name='tiny-student'")) == 2
    assert str(client.get_model_version_by_alias("tiny-student", "champion").version) == "1"
    assert str(client.get_model_version_by_alias("tiny-student", "newest").version) == "2"


def test_a_name_that_is_asked_for_later_is_registered(
    make_config: MakeConfig, make_run: MakeRun
) -> None:
    config, named = make_config(), make_config(tracking={"register_as": "mine"})
    run_dir = make_run(config)
    for each in (config, named, named):
        assert open_tracker(each, run_dir).finish("FINISHED") is None
    state = read_state(run_dir)
    assert state is not None and state.registered_as == "models:/mine/1" and not state.lacking
    assert len(client_of(config).search_model_versions("name='mine'")) == 1


def test_params_and_state_hold_no_credentials(make_config: MakeConfig, make_run: MakeRun) -> None:
    # Loading refuses such an address; params do not rely on it.
    address = {"address": "ray://user:hunter2@head:10001?token=hunter2"}
    config = make_config()
    run_dir = make_run(config, finished=False)
    config = config.model_copy(update={"cluster": config.cluster.model_copy(update=address)})
    assert open_tracker(config, run_dir).finish("KILLED") is None
    run = run_of(config, run_dir)
    assert run.data.params["cluster.address"] == "ray://head:10001"
    assert "hunter2" not in json.dumps(run.data.to_dictionary())


def test_a_student_names_its_teachers_run(make_config: MakeConfig, make_run: MakeRun) -> None:
    teacher = make_config("digits", run={"role": "teacher"})
    teacher_dir = make_run(teacher)
    assert replay(teacher_dir) is None
    weights = str(teacher_dir / "weights.safetensors")
    student = make_config(
        "digits-d3etr", teacher={"weights": weights}, distillation={"method": "d3etr"}
    )
    student_dir = make_run(student)
    noted = teacher_dir / "mlflow_run.json"
    whole = noted.read_text()
    noted.write_text(whole[:20])
    assert "teacher_run" not in teacher_tags(student), "named in a warning, and no error"
    noted.write_text(whole)
    assert replay(student_dir) is None
    tags = run_of(student, student_dir).data.tags
    assert tags["teacher_run"] == run_of(teacher, teacher_dir).info.run_id
    assert tags["title"] == "D3ETR student"
    assert run_of(student, student_dir).info.run_name == "D3ETR student · digits · seed 0"
    assert run_of(teacher, teacher_dir).data.tags["role"] == "teacher"


def test_the_last_record_adds_the_test_split_and_the_kept_weights_results(
    make_config: MakeConfig, make_run: MakeRun
) -> None:
    config = make_config()
    run_dir = make_run(config, finished=False)
    ended = {"mAP": 0.3, "test/mAP": 0.28, "parameters": 1000, "seed": 0, "train/loss": 9.0}
    end = {"kind": "end", "step": 20, "time": 1e9, "metrics": ended}
    write_journal(run_dir, [*journal_records(20), end])
    assert open_tracker(config, run_dir).finish("FINISHED") is None
    metrics = run_of(config, run_dir).data.metrics
    assert metrics["final/mAP"] == 0.3 and metrics["test/mAP"] == 0.28
    assert metrics["model/parameters"] == 1000
    assert metrics["train/loss"] == 0.5 and "final/seed" not in metrics
    once = ("final/mAP", "test/mAP", "model/parameters")
    steps = [steps_of(config, run_dir, name) for name in once]
    assert steps == [[0]] * 3, "at any other step MLflow draws lines of one dot instead of bars"
    assert steps_of(config, run_dir, "train/loss")[-1] == 20


def test_a_run_that_is_gone_from_mlflow_is_sent_anew(
    make_config: MakeConfig, make_run: MakeRun
) -> None:
    config = make_config()
    run_dir = make_run(config, finished=False)
    assert replay(run_dir) is None
    old = run_of(config, run_dir).info.run_id
    client_of(config).delete_run(old)
    assert replay(run_dir) is None
    assert run_of(config, run_dir).info.run_id != old
    assert steps_of(config, run_dir, "train/loss") == [5, 10, 15, 20]


ODD_CLASSES = (
    "cat", "a/b", "a_b", "a b", "a:b", "a:2f:b", "a//b", "50 % off @home", "..", ".", "", " ",
    " a b", "a b ", "../a", "a.b", "\u00fcber", "u\u0308ber", "\u732b", "\U0001f408", "a\tb\n",
    "\ud800", "x" * 300, "x" * 299 + "y", "/" * 300, "/" * 299 + "_",
)  # fmt: skip


def class_of(metric: str) -> str:
    """A class's name as it was, from that of its metric."""
    codes = re.compile(":([0-9a-f]*):")
    return codes.sub(lambda code: chr(int(code[1], 16)) if code[1] else "", metric)


def test_every_class_has_a_metric_of_its_own_that_names_it(
    make_config: MakeConfig, make_run: MakeRun
) -> None:
    config = make_config()
    run_dir = make_run(config, finished=False)
    sent = {f"val/AP/{name}": place / 100 for place, name in enumerate(ODD_CLASSES)}
    record = {"kind": "evaluation", "step": 20, "time": 1e9, "metrics": sent | {"val/mAP": 0.5}}
    write_journal(run_dir, [record])
    assert open_tracker(config, run_dir).finish("FINISHED") is None
    found = run_of(config, run_dir).data.metrics
    assert found.pop("val/mAP") == 0.5
    assert sorted(found.values()) == sorted(sent.values())
    assert found["val/AP/a:2f:b"] == 1 / 100 and found["val/AP/a_b"] == 2 / 100
    names = {class_of(name.removeprefix("val/AP/")): value for name, value in found.items()}
    short = [name for name in ODD_CLASSES if len(name) < 100]
    assert {name: names.get(name) for name in short} == {n: sent[f"val/AP/{n}"] for n in short}
    assert max(map(len, found)) == 250


def test_a_deleted_experiment_is_a_clear_error(make_config: MakeConfig, make_run: MakeRun) -> None:
    config = make_config()
    run_dir = make_run(config, finished=False)
    assert replay(run_dir) is None
    client_of(config).delete_experiment(run_of(config, run_dir).info.experiment_id)
    with pytest.raises(UserError, match=r"was deleted.*tracking.experiment"):
        open_tracker(config, run_dir)


def test_a_server_that_is_down_at_the_start_is_one_error_within_15_seconds(
    make_config: MakeConfig, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setattr("d3etr.tracking.server.PROBE_SECONDS", 1.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:hunter2@127.0.0.1:{port}")
    config = make_config()
    run_dir = make_run(config, finished=False)
    begun = time.monotonic()
    with pytest.raises(UserError, match=f"http://127.0.0.1:{port} cannot be used") as caught:
        open_tracker(config, run_dir)
    assert time.monotonic() - begun < 5
    assert "hunter2" not in str(caught.value)
    assert not (run_dir / "mlflow_run.json").exists()


@pytest.mark.slow
def test_a_server_that_accepts_and_says_nothing_is_one_error_within_15_seconds(
    make_config: MakeConfig, make_run: MakeRun
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        config = make_config(tracking={"uri": f"http://127.0.0.1:{silent.getsockname()[1]}"})
        run_dir = make_run(config, finished=False)
        begun = time.monotonic()
        with pytest.raises(UserError, match="cannot be used"):
            open_tracker(config, run_dir)
        assert time.monotonic() - begun < 15


def test_mlflows_process_wide_address_is_left_alone(
    make_config: MakeConfig, make_run: MakeRun
) -> None:
    assert replay(make_run(make_config())) is None
    assert not mlflow.is_tracking_uri_set()
