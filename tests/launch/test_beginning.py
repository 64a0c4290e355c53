"""What can be known before a run begins is judged before anything is started or tracked."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from d3etr.cli.main import main
from d3etr.config.load import to_yaml
from d3etr.config.tree import Config
from d3etr.errors import UserError
from d3etr.launch.api import launch
from d3etr.launch.ray_environment import JOB_CONFIG

MakeConfig = Callable[..., Config]
TRACKED = ("tracking.enabled=true", "cluster.address=null")


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("dry", [True, False], ids=["dry-run", "train"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("student.backbone_weights=nowhere.safetensors", "student.backbone_weights: there is no"),
        ("teacher.weights=nowhere.safetensors", "teacher.weights: there is no file"),
        (
            "student.detector.backbone={name: resnet18, norm: frozen}",
            "random weights would keep batch statistics",
        ),
        ("optimisation.batch_size=25", "24 images, fewer than one batch"),
        ("cluster.cpus_per_worker=4000", "1 worker with 4000 CPUs do not fit"),
        ("cluster.gpus_per_worker=500", "with 1 CPU and 500 GPUs do not fit"),
    ],
)
def test_a_dry_run_and_training_refuse_the_same_and_track_nothing(
    make_config: MakeConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: str,
    said: str,
    dry: bool,
) -> None:
    (tmp_path / "recipe.yaml").write_text(to_yaml(make_config(*TRACKED)))
    changes = ["--set", change]
    if change.startswith("teacher"):
        changes += ["--set", "distillation.method=d3etr"]
    code = main(["train", str(tmp_path / "recipe.yaml"), *changes, *(["--dry-run"] if dry else [])])
    assert code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("launcher", ["ray", "local"])
def test_what_cannot_begin_is_never_tracked(make_config: MakeConfig, launcher: str) -> None:
    def open_tracker(config: Config, run_dir: Path) -> object:
        pytest.fail("the tracked run was opened")

    config = make_config("student.backbone_weights=nowhere.safetensors")
    with pytest.raises(UserError, match=r"student\.backbone_weights"):
        launch(config, launcher=launcher, open_tracker=open_tracker)  # type: ignore[arg-type]
    assert not config.run.output.exists()


def test_a_dry_run_says_what_it_asks_of_a_cluster(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(to_yaml(make_config("cluster.workers=2")))
    far = ["--set", "cluster.address=10.255.255.1:6379", "--set", "cluster.cpus_per_worker=300"]
    assert main(["train", str(tmp_path / "recipe.yaml"), *far, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "needs 2 workers with 300 CPUs each" in text
    assert "at 10.255.255.1:6379, which a dry run does not ask" in text


@pytest.mark.parametrize("launcher", ["ray", "local"])
@pytest.mark.parametrize("dry", [True, False], ids=["dry-run", "train"])
@pytest.mark.parametrize("key", ["run.output", "tracking.uri"])
def test_results_are_not_written_to_a_jobs_temporary_copy(
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    key: str,
    dry: bool,
    launcher: str,
) -> None:
    copy = tmp_path / "working_dir_files" / "_ray_pkg_0123"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv(JOB_CONFIG, json.dumps({"runtime_env": {"working_dir": "gcs://_ray"}}))
    (copy / "recipe.yaml").write_text(to_yaml(make_config("tracking.enabled=true")))
    value = "sqlite:///mlflow.db" if key == "tracking.uri" else "results"
    line = ["train", "recipe.yaml", "--launcher", launcher, "--set", f"{key}={value}"]
    assert main([*line, *(["--dry-run"] if dry else [])]) == 2
    text = capsys.readouterr().err
    assert f"error: {key}: '" in text and "absolute path on storage" in text
    assert [file.name for file in copy.iterdir()] == ["recipe.yaml"]
