"""``d3etr verdict`` from the recipe to the answer, on scenes that take seconds."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import save_untrained, tiny_detector_config
from tiny_recipe import tiny_recipe

from d3etr.cli.main import main
from d3etr.config.load import load_config
from d3etr.config.tree import Config
from d3etr.engine.journal import read_journal
from d3etr.verdict.contenders import ON_LABELS

TAUGHT = ("distilled on pseudo-labels", "predictions, alone", "distilled")
NAMES = ("plain", "inherited plain", "fine-tuned", "pseudo-labels", *TAUGHT)
Verdict = Callable[..., tuple[int, str, str]]
DETECTOR = tiny_detector_config(width=32, feedforward=32, queries=8, box_size_bias=0.7)
"""Its boxes are as large as the objects, which it so finds untrained."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A D3ETR student of a teacher that has learnt nothing; half of the images have labels."""
    folder = tmp_path_factory.mktemp("verdict")
    teacher = folder / "teacher.safetensors"
    scenes = {"root": str(folder / "scenes"), "train_images": 24, "validation_images": 8}
    scenes |= {"test_images": 6, "image_size": 32, "minimum_scale": 24, "maximum_scale": 30}
    unlabelled = {"rest_of_train": True, "share": 0.25}
    start = {"parts": ["decoder", "heads"]}
    file = folder / "taught.yaml"
    file.write_text(
        tiny_recipe(
            run={"name": "taught"},
            data={"digit_scenes": scenes, "labelled_share": 0.5, "unlabelled": unlabelled},
            teacher={"weights": str(teacher)},
            student={"detector": DETECTOR.model_dump(mode="json"), "initialise_from": start},
            distillation={"method": "d3etr"},
            evaluation={"batch_size": 8},
        )
    )
    data = load_config(file).data
    save_untrained(teacher, DETECTOR, data)
    save_untrained(folder / "own.safetensors", DETECTOR, data)
    return file


@pytest.fixture
def verdict(recipe: Path, capfd: pytest.CaptureFixture[str]) -> Verdict:
    def ask(*arguments: str) -> tuple[int, str, str]:
        code = main(["verdict", str(recipe), *arguments])
        return code, *capfd.readouterr()

    return ask


@pytest.mark.slow
def test_a_verdict_compares_at_equal_time_and_goes_on_where_it_ended(
    verdict: Verdict, recipe: Path, tmp_path: Path
) -> None:
    asked = ["--minutes", "0.015", "--seeds", "2", "--rates", "0.5", "--early"]
    asked += ["--checkpoint", str(recipe.parent / "own.safetensors")]
    asked += ["--set", f"run.output={tmp_path}", "--set", "tracking.enabled=true"]
    asked += ["--variant", "predictions, alone", "distillation.self_attention.weight=0"]
    code, out, log = verdict(*asked)
    assert code == 0, log
    first, *_ = out.splitlines()
    assert "over '" in first and "95 % interval" in first and "mAP" in first
    assert "teacher" in first and "2 seeds" in first
    for name in NAMES:
        assert f"{name}: a step takes" in log
    assert "forecast: " in log and "early, after 0.25 of the steps: " in log

    (file,) = tmp_path.glob("taught-verdict-*/verdict.json")
    found = json.loads(file.read_text())
    # How many steps fit depends on the machine, and so does whether short runs settle it.
    assert found["split"] == ("validation" if found["settled_early"] else "test")
    assert found["sentence"] == first
    assert found["rates"] == {}, "none was chosen: there is one"
    assert found["early"]["split"] == "validation"
    labelling, contenders = _labelling(file.parent), found["contenders"]
    seconds = [c["steps"] * c["step_seconds"] for c in contenders]
    times = [0.9 - labelling * (c["name"] in ON_LABELS) for c in contenders]
    share = 0.25 if found["settled_early"] else 1.0
    assert seconds == pytest.approx([share * time for time in times], rel=0.2)
    for each in contenders:
        assert len(each["maps"]) == len(each["runs"]) == 2
        config = load_config(Path(each["runs"][0]) / "config.yaml")
        assert config.optimisation.steps == each["steps"]
        assert each["rate"] == 0.5 and config.optimisation.learning_rate == pytest.approx(5e-4)
        assert (config.teacher is None) == (each["name"] not in TAUGHT)
        _has_images_of_its_own(config, each["name"], file.parent)
    assert (file.parent / "verdict.png").stat().st_size > 10_000
    assert (file.parent / "verdict.md").read_text().startswith(f"# {first}\n")
    _in_mlflow(tmp_path, first)

    stamps = _stamps(tmp_path)
    code, out, log = verdict(*asked, "--json")
    assert code == 0 and json.loads(out)["contenders"] == found["contenders"]
    assert _stamps(tmp_path) == stamps
    starts = [r for p in tmp_path.rglob("journal.jsonl") for r in read_journal(p)]
    assert sum(r["kind"] == "start" for r in starts) == len(stamps) - 1


def _labelling(folder: Path) -> float:
    """Seconds that the teacher took for its labels, as the costs know them."""
    made = json.loads((folder / "pseudo-labels.json").read_text())["info"]
    prepared = json.loads((folder / "costs.json").read_text())["prepared"]
    assert prepared == dict.fromkeys(NAMES, 0.0) | dict.fromkeys(ON_LABELS, made["seconds"])
    return float(made["seconds"])


def _has_images_of_its_own(config: Config, name: str, folder: Path) -> None:
    """Who trains on images without labels, and by whose labels."""
    images = config.data.unlabelled
    assert (images is None) == (name not in ("pseudo-labels", *TAUGHT))
    if images is not None:
        labelled = name in ON_LABELS
        assert images.labels == (folder / "pseudo-labels.json" if labelled else None)
        assert (config.student.initialise_from is not None) or not labelled


def _stamps(output: Path) -> list[int]:
    """When the labels and every run's summary were written."""
    files = [*output.rglob("summary.json"), *output.rglob("pseudo-labels.json")]
    return [file.stat().st_mtime_ns for file in sorted(files)]


def _in_mlflow(output: Path, sentence: str) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{output / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'd3etr'")
    runs = client.search_runs([experiment.experiment_id])
    (run,) = [run for run in runs if run.data.tags.get("role") == "verdict"]
    assert run.data.tags["mlflow.note.content"] == sentence
    assert "distilled/mAP" in run.data.metrics
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert files == {"verdict.json", "verdict.md", "verdict.png"}


def test_a_plain_recipe_and_one_seed_are_refused(verdict: Verdict, tmp_path: Path) -> None:
    asked = ["--minutes", "1", "--set", f"run.output={tmp_path}"]
    plain = ["--set", "teacher=null", "--set", "distillation={method: none}"]
    plain += ["--set", "student.initialise_from=null", "--set", "data.unlabelled=null"]
    code, _, log = verdict(*asked, *plain)
    assert code == 2 and "distils nothing: distillation.method is 'none'" in log
    with pytest.raises(SystemExit):
        verdict(*asked, "--seeds", "1")


def test_a_variant_needs_a_name_and_what_it_changes(verdict: Verdict) -> None:
    for given in (["predictions"], ["distillation.self_attention.weight=0", "run.seed=1"]):
        code, _, log = verdict("--minutes", "1", "--variant", *given)
        assert code == 2 and "expected a name that no other variant has" in log
