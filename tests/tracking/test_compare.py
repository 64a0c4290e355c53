"""Runs side by side, from synthetic run folders."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny import tiny_detector_config
from tracked_folders import journal_records, write_journal

from d3etr.config.data import PreprocessingConfig
from d3etr.config.load import to_yaml
from d3etr.config.tree import Config
from d3etr.detectors.build import build_detector
from d3etr.detectors.weights import WeightsInfo, save_weights
from d3etr.errors import UserError
from d3etr.tracking.compare import Comparison, Spread, compare
from d3etr.tracking.compare.comparison import distinct_labels
from d3etr.tracking.compare.tables import as_tables, duration, millions, percent

MakeConfig = Callable[..., Config]


def write_run(config: Config, mAP: float, **more: Any) -> Path:
    folder = config.run.output / f"{config.run.name}-{config.run.seed:08x}"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    write_journal(folder, journal_records(20, mAP))
    summary = {"mAP": mAP, "AP50": mAP + 0.2, "AP/cat": mAP, "AP/dog": mAP / 2, "steps": 20}
    summary |= {"parameters": 478000, "images_per_second": 120.0, "training_seconds": 80.0}
    (folder / "summary.json").write_text(json.dumps(summary | more), encoding="utf-8")
    return folder


@pytest.fixture
def folders(make_config: MakeConfig, tmp_path: Path) -> Path:
    """Two seeds each of a plain student (20, 22 %) and a D3ETR student (35, 39 %)."""
    with_teacher: dict[str, Any] = {
        "teacher": {"weights": "teacher.safetensors"},
        "distillation": {"method": "d3etr"},
    }
    for seed, plain, distilled in ((0, 0.20, 0.35), (1, 0.22, 0.39)):
        write_run(make_config("digits-plain", seed), plain)
        write_run(make_config("digits-d3etr", seed, **with_teacher), distilled)
    return tmp_path / "runs"


def shown(comparison: Comparison) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(as_tables(comparison))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_seeds_of_one_recipe_are_one_group_with_mean_and_spread(folders: Path) -> None:
    comparison = compare(["digits-d3etr", "digits-plain"], folders)
    assert [group.seeds for group in comparison.groups] == [(0, 1), (0, 1)]
    distilled, plain = comparison.groups
    assert comparison.baseline is plain
    spread = distilled.metric("mAP")
    assert spread is not None and spread.mean == pytest.approx(0.37)
    assert spread.deviation == pytest.approx(0.02 * 2**0.5)
    gain = comparison.gain(distilled)
    # Seed by seed: 15 and 17 points.
    assert gain is not None and gain.mean == pytest.approx(0.16)
    assert gain.deviation == pytest.approx(0.01 * 2**0.5)
    assert comparison.gain(plain) is None


def test_the_table_says_quality_cost_and_gain(folders: Path) -> None:
    text = shown(compare(["digits-plain", "digits-d3etr"], folders))
    for expected in ("37.0 ± 2.8", "+16.0 ± 1.4", "57.0", "0.48 M", "80 s", "0, 1"):
        assert expected in text
    assert "images/s" not in text and "p50 ms" not in text  # 120 was of one moment of one run
    assert "D3ETR student · digits" in text and "validation split" in text
    assert "distillation.method" in text and "run.seed" not in text
    assert "cat" in text and "18.5 ± 1.4" in text


def _benchmark(path: Path, **networks: float) -> Path:
    rows = [
        {"run_as": way, "batch": batch, "p50_ms": scale * ms, "network": name or None}
        for name, ms in networks.items()
        for way, batch, scale in (("eager float32", 8, 5), ("eager float32", 1, 1), ("other", 1, 9))
    ]
    value = {"device": "CPU, 2 threads", "machine": "Abacus 3", "rows": rows}
    path.write_text(json.dumps(value))
    return path


def _weights(folder: Path, width: int) -> str:
    """Weights of some detector in a run's folder; the digest of its network."""
    config = tiny_detector_config(name="conditional_detr", width=width)
    preprocessing = PreprocessingConfig(shortest_side=64, longest_side=64)
    info = WeightsInfo(detector=config, categories=((1, "a"),), preprocessing=preprocessing)
    save_weights(folder / "weights.safetensors", build_detector(config, 1), info)
    return info.network


def test_one_network_has_one_latency_from_a_benchmark(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    teacher = {"teacher": {"weights": "t"}, "distillation": {"method": "d3etr"}}
    folders = [
        write_run(make_config("plain"), 0.3, images_per_second=585.0),
        write_run(make_config("same", **teacher), 0.4, images_per_second=628.0),
        write_run(make_config("larger", optimisation={"steps": 30}), 0.5),
    ]
    student, again, _ = (_weights(f, w) for f, w in zip(folders, (16, 16, 32), strict=True))
    assert student == again
    file = _benchmark(tmp_path / "latency.json", **{student: 4.25})
    comparison = compare(folders, tmp_path, file)
    assert [comparison.latency(group) for group in comparison.groups] == [4.25, 4.25, None]
    text = " ".join(shown(comparison).split())
    assert text.count(" 4.2 ") == 2 and "p50 ms: 1 at once, eager float32, Abacus 3" in text
    assert "The benchmark has no such network" in text and "585" not in text
    found = comparison.to_json()
    assert [group["latency_ms"] for group in found["groups"]] == [4.25, 4.25, None]
    assert found["latency"]["machine"] == "Abacus 3, CPU, 2 threads"
    with pytest.raises(UserError, match="has none of these runs' networks: write one with"):
        compare(folders, tmp_path, _benchmark(tmp_path / "other.json", other=1.0))
    (tmp_path / "x.json").write_text('{"rows": [{}]}')
    with pytest.raises(UserError, match="not what d3etr benchmark --json prints"):
        compare(folders, tmp_path, tmp_path / "x.json")


def test_a_teacher_is_what_its_recipe_or_its_student_says_whatever_its_name(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    used = write_run(make_config("larger"), 0.6)
    with_teacher = {"weights": str(used / "weights.safetensors")}
    write_run(make_config("d", teacher=with_teacher, distillation={"method": "d3etr"}), 0.4)
    write_run(make_config("without-a-teacher", optimisation={"steps": 30}), 0.3)
    write_run(make_config("named", run={"role": "teacher"}, optimisation={"steps": 40}), 0.5)
    comparison = compare(["larger", "without-a-teacher", "d-", "named"], tmp_path / "runs")
    titles = ["teacher", "plain student", "D3ETR student", "teacher"]
    assert [group.title for group in comparison.groups] == titles
    assert comparison.baseline is comparison.groups[1]
    assert [comparison.gain(group) is None for group in comparison.groups] == [True] * 2 + [
        False,
        True,
    ]


def test_of_runs_of_one_recipe_and_seed_one_counts_and_the_others_are_named(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    folders = [write_run(make_config(name, 1), 0.3) for name in ("one", "same")]
    comparison = compare([*folders, write_run(make_config("other", 0), 0.4)], tmp_path)
    [group] = comparison.groups
    assert [run.folder.name for run in group.runs] == ["other-00000000", "one-00000001"]
    assert group.metric("mAP") == Spread(pytest.approx(0.35), pytest.approx(0.1 / 2**0.5), 2)
    [caution] = comparison.cautions()
    assert caution == "Left out, as another run has the same recipe and seed: same-00000001."


def test_data_that_was_changed_between_runs_is_a_caution(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    for seed, digest in enumerate(("a" * 64, "a" * 64, "b" * 64)):
        inputs = {"the validation data": digest, "teacher.weights": str(seed)}
        write_run(make_config("one", seed), 0.3, inputs=inputs)
    runs = sorted(path.name for path in (tmp_path / "runs").glob("one-*"))
    [caution] = compare(runs, tmp_path / "runs").cautions()
    assert caution.startswith("The runs did not have the same validation data")
    assert compare(runs[:2], tmp_path / "runs").cautions() == []


def test_json_holds_everything_and_is_valid(folders: Path) -> None:
    found = json.loads(json.dumps(compare(["digits-plain", "digits-d3etr"], folders).to_json()))
    plain, distilled = found["groups"]
    assert plain["gain"] is None and distilled["gain"]["mean"] == pytest.approx(0.16)
    assert distilled["metrics"]["mAP"]["runs"] == 2
    assert next(iter(found["differences"])) == "teacher.weights"
    assert found["differences"]["distillation.method"] == ["none", "d3etr"]
    assert distilled["classes"]["dog"]["mean"] == pytest.approx(0.185)
    assert plain["label"] == "plain student · digits"
    assert distilled["curves"][1] == {
        "seed": 1,
        "steps": [10, 20],
        "val/mAP": pytest.approx([0.195, 0.39]),
    }


def test_the_test_split_is_compared_where_all_runs_were_measured_on_it(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    write_run(make_config("one"), 0.3, **{"test/mAP": 0.28, "test/AP/cat": 0.4})
    second = make_config("two", optimisation={"steps": 30})
    write_run(second, 0.3, **{"test/mAP": 0.29, "steps": 30})
    comparison = compare(["one", "two"], tmp_path / "runs")
    assert comparison.split == "test"
    metric = comparison.groups[0].metric("mAP")
    assert metric is not None and metric.mean == 0.28 and metric.deviation is None
    assert any("same number of steps" in caution for caution in comparison.cautions())


def test_runs_are_found_by_folder_or_beginning(folders: Path) -> None:
    folder = folders / "digits-plain-00000001"
    for asked in (folder, folder.name, "digits-plain-00000001"):
        assert compare([asked], folders).groups[0].runs[0].folder == folder
    again = compare([folder, folder.name], folders)
    assert len(again.groups[0].runs) == 1


def test_a_runs_name_does_not_mean_runs_whose_names_go_on(
    folders: Path, make_config: MakeConfig
) -> None:
    """``digits-inherited`` and ``digits-inherited-matching`` lie side by side."""
    write_run(make_config("digits-plain-longer", 3), 0.4)
    second = write_run(make_config("digits-plain", 2), 0.3)
    second.rename(second.with_name("digits-plain-00000000-2"))
    names = {run.folder.name for run in compare(["digits-plain"], folders).groups[0].runs}
    assert names == {f"digits-plain-{end}" for end in ("00000000", "00000001", "00000000-2")}
    assert sum(len(group.runs) for group in compare(["digits-pl"], folders).groups) == 4


def test_of_the_teachers_settings_only_chosen_ones_are_listed(folders: Path) -> None:
    """Plain runs have no such section: its defaults are no difference that anybody made."""
    found = compare(["digits-plain", "digits-d3etr"], folders).differences()
    assert found == {
        "teacher.weights": ["-", "teacher.safetensors"],
        "distillation.method": ["none", "d3etr"],
    }


def test_what_was_refused_at_its_start_is_no_run(
    folders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refused = folders / "digits-plain-00000001"
    (refused / "summary.json").unlink()
    write_journal(refused, journal_records(20, 0.2)[:1])
    runs = compare(["digits-plain"], folders).groups[0].runs
    assert [run.folder.name for run in runs] == ["digits-plain-00000000"]
    assert "digits-plain-00000001 is left out: it ended before its first step" in caplog.text


def test_missing_and_unfinished_runs_are_clear_errors(folders: Path) -> None:
    with pytest.raises(UserError, match=r"no run 'digits-x'.*digits-d3etr-00000000"):
        compare(["digits-x"], folders)
    (folders / "digits-plain-00000001" / "summary.json").unlink()
    with pytest.raises(UserError, match=r"has not finished \(last step 20\)"):
        compare(["digits-plain"], folders)
    with pytest.raises(UserError, match=r"no config\.yaml"):
        compare([folders], folders)
    with pytest.raises(UserError, match="at least one"):
        compare([], folders)


def test_runs_measured_at_different_steps_have_the_curve_of_their_shared_ones(
    folders: Path,
) -> None:
    write_journal(folders / "digits-plain-00000001", journal_records(30, 0.22))
    [plain] = compare(["digits-plain"], folders).groups
    curve = plain.curve()
    assert list(curve) == [10, 20] and all(at.runs == 2 for at in curve.values())
    write_journal(folders / "digits-plain-00000001", journal_records(5))
    [plain] = compare(["digits-plain"], folders).groups
    assert [at.runs for at in plain.curve().values()] == [1, 1], "one was never measured"


def test_recipes_of_one_name_are_told_apart_by_what_differs(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    write_run(make_config("a"), 0.3)
    for seed, steps in ((7, 20), (8, 30)):
        config = make_config("a", seed, optimisation={"steps": steps, "weight_decay": 0.01})
        write_run(config, 0.3)
    comparison = compare(["a"], tmp_path / "runs")
    labels = [group.label for group in comparison.groups]
    assert labels[0] == "plain student · a, weight_decay=0.0001"
    assert labels[1:] == ["plain student · a", "plain student · a, steps=30"]
    assert comparison.baseline is comparison.groups[1], "the usual one, not the first"


def test_labels_are_distinct_whatever_differs() -> None:
    measured = [{"evaluation.every_epochs": "1"}, {"evaluation.every_epochs": "5"}]
    assert distinct_labels(["x", "x"], measured, ["x-1", "x-2"]) == ["x", "x, every_epochs=5"]
    assert distinct_labels(["x", "x"], [{}, {}], ["x-1", "x-2"]) == ["x (x-1)", "x (x-2)"]
    many = [{}, {}, {"a.b": "1", "a.c": "y" * 30}]
    assert distinct_labels(["x"] * 3, many, ["1", "2", "3"])[2] == "x, b=1"
    assert distinct_labels(["x", "y"], [{}, {"a": "1"}], ["1", "2"]) == ["x", "y"]


def test_numbers_read_well() -> None:
    assert percent(None) == "-"
    assert (millions(478e3), millions(41.3e6)) == ("0.48 M", "41.3 M")
    assert (duration(45), duration(720), duration(12240)) == ("45 s", "12 min", "3.4 h")


@pytest.fixture
def with_teacher(make_config: MakeConfig, tmp_path: Path) -> Path:
    """A D3ETR student of 20 steps and 100 s; plain ones of 52 s and, unless removed, 104 s."""
    teacher: dict[str, Any] = {
        "teacher": {"weights": "teacher.safetensors"},
        "distillation": {"method": "d3etr"},
    }
    write_run(make_config("d3etr", **teacher), 0.40, training_cpu_seconds=100.0)
    write_run(make_config("plain"), 0.20, training_cpu_seconds=52.0)
    longer = make_config("longer", optimisation={"steps": 40})
    write_run(longer, 0.36, training_cpu_seconds=104.0, steps=40)
    return tmp_path / "runs"


def test_a_gain_at_equal_time_is_over_the_strongest_plain_student_that_took_as_long(
    with_teacher: Path,
) -> None:
    comparison = compare(["d3etr", "plain", "longer"], with_teacher)
    [row] = comparison.to_json()["equal_time"]
    assert row["rival"] == "plain student · longer" and not row["estimated"]
    assert row["seconds"] == [100.0, 104.0], "CPU seconds, not the wall time of 80 s"
    assert row["gain"] == pytest.approx(0.04)
    text = shown(comparison)
    assert "at equal time (CPU time of training steps)" in text and "+4.0" in text


def test_a_plain_student_that_is_better_and_cheaper_makes_the_row(
    with_teacher: Path, make_config: MakeConfig
) -> None:
    better = make_config("better", optimisation={"steps": 30})
    write_run(better, 0.45, training_cpu_seconds=85.0, steps=30)
    for others in (["plain"], ["plain", "longer"]):
        [row] = compare(["d3etr", *others, "better"], with_teacher).equal_time()
        assert row.rival.runs[0].config.run.name == "better" and not row.estimated
        assert row.seconds == (100.0, 85.0) and row.mAP == (0.40, 0.45)
        assert row.gain is not None and row.gain.mean == pytest.approx(-0.05)


def test_a_cheaper_plain_student_counts_where_it_is_the_strongest_within_the_time(
    with_teacher: Path, make_config: MakeConfig
) -> None:
    cheaper = make_config("cheaper", optimisation={"steps": 30})
    write_run(cheaper, 0.38, training_cpu_seconds=85.0, steps=30)
    [row] = compare(["d3etr", "longer", "cheaper"], with_teacher).equal_time()
    assert row.mAP == (0.40, 0.38) and row.seconds == (100.0, 85.0)


def test_without_a_plain_student_of_that_length_curves_are_read_at_the_same_time(
    with_teacher: Path,
) -> None:
    [row] = compare(["d3etr", "plain"], with_teacher).to_json()["equal_time"]
    assert row["estimated"] and row["seconds"] == [52.0, 52.0]
    # D3ETR after 10.4 of its 20 steps, between 20 % at step 10 and 40 % at step 20.
    assert row["mAP"] == [pytest.approx(0.208), pytest.approx(0.20)]
    assert "from curves" in shown(compare(["d3etr", "plain"], with_teacher))


def test_time_is_not_compared_where_runs_do_not_say_what_they_cost(folders: Path) -> None:
    by_wall = compare(["digits-d3etr", "digits-plain"], folders)
    assert "wall time of training steps" in shown(by_wall), "all that older runs have"
    assert compare(["digits-d3etr"], folders).to_json()["equal_time"] == []


def test_a_plain_student_that_inherits_a_decoder_is_called_so_and_is_no_baseline(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    start = {"initialise_from": {"weights": "teacher.safetensors"}}
    write_run(make_config("inherited", student=start), 0.30)
    write_run(make_config("plain"), 0.20)
    comparison = compare(["inherited", "plain"], tmp_path / "runs")
    assert [group.title for group in comparison.groups] == ["inherited student", "plain student"]
    gain = comparison.gain(comparison.groups[0])
    assert gain is not None and gain.mean == pytest.approx(0.10)
