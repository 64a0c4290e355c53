"""Who competes, with what, and for how many steps."""

from pathlib import Path

import pytest
from tiny_recipe import tiny_recipe

from d3etr.config.load import load_config
from d3etr.errors import UserError
from d3etr.launch.sweeps.plan import make_plan
from d3etr.verdict.contenders import ON_LABELS, Contest, make_contest, with_labels
from d3etr.verdict.stages import entry, sweep_of

RECIPE = {
    "teacher": {"weights": "teacher.safetensors"},
    "student": {"initialise_from": {"parts": ["decoder", "queries"]}},
    "distillation": {"method": "d3etr", "warmup_steps": 10},
}


def written(folder: Path, **sections: dict[str, object]) -> Path:
    file = folder / "taught.yaml"
    file.write_text(tiny_recipe(**(RECIPE | sections)))
    return file


def contest(folder: Path, *overrides: str, **more: Path) -> Contest:
    return make_contest(written(folder), overrides, **more)


def test_rivals_are_the_recipe_without_its_teacher(tmp_path: Path) -> None:
    plain, inherited, distilled = contest(tmp_path, "optimisation.batch_size=8").ways
    assert [way.name for way in (plain, inherited)] == ["plain", "inherited plain"]
    for way in (plain, inherited):
        assert way.config.teacher is None and not way.distilled
        assert way.config.distillation.method == "none"
        assert way.config.optimisation == distilled.config.optimisation
        assert way.config.optimisation.batch_size == 8
    assert plain.config.student.initialise_from is None
    start = inherited.config.student.initialise_from
    assert start is not None and start.parts == ("decoder", "queries")
    assert start.weights == Path("teacher.safetensors")
    assert distilled.distilled and distilled.overrides == ()


def test_without_a_start_of_its_own_the_usual_parts_are_inherited(tmp_path: Path) -> None:
    ways = contest(tmp_path, "student.initialise_from=null").ways
    start = ways[1].config.student.initialise_from
    assert start is not None and start.parts == ("decoder", "heads", "queries")
    assert ways[2].config.student.initialise_from is None


def test_a_checkpoint_of_the_students_own_is_fine_tuned(tmp_path: Path) -> None:
    own = Path("own.safetensors")
    tuned = contest(tmp_path, "student.backbone_weights=b.safetensors", checkpoint=own).ways[2]
    assert tuned.name == "fine-tuned" and not tuned.distilled
    start = tuned.config.student.initialise_from
    assert start is not None and start.weights == own and "backbone" in start.parts
    assert tuned.config.student.backbone_weights is None


def test_variants_are_further_distilled_students(tmp_path: Path) -> None:
    changes = ("distillation={method: feature_cosine}", "optimisation.learning_rate=0.5")
    ways = make_contest(written(tmp_path), (), variants={"features": changes}).ways
    assert [way.name for way in ways][2:] == ["features", "distilled"]
    features = ways[2]
    assert features.distilled and features.overrides == changes
    assert features.config.distillation.method == "feature_cosine"
    each = entry(features, 0.5, 10.0, 0.1).overrides()
    assert load_config(written(tmp_path), each).optimisation.learning_rate == 0.25


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("inherited plain", ("optimisation.batch_size=2",), "has this name already"),
        ("none", ("teacher=null", "distillation={method: none}"), "no teacher teaches it"),
    ],
)
def test_a_variant_that_is_none_is_refused(
    tmp_path: Path, name: str, changes: tuple[str, ...], message: str
) -> None:
    start = ("student.initialise_from=null",)
    with pytest.raises(UserError, match=message):
        make_contest(written(tmp_path), start, variants={name: changes})


def test_a_recipe_without_a_teacher_is_refused(tmp_path: Path) -> None:
    plain = ("teacher=null", "distillation={method: none}", "student.initialise_from=null")
    with pytest.raises(UserError, match=r"distils nothing.*digits/d3etr"):
        contest(tmp_path, *plain)


def test_boxes_in_files_give_no_rival_a_start(tmp_path: Path) -> None:
    boxes = ("teacher={detections: found.json}", "distillation={method: teach_detr}")
    with pytest.raises(UserError, match=r"learns from teacher\.detections.*d3etr compare"):
        contest(tmp_path, "teacher=null", *boxes, "student.initialise_from=null")


FEATURES = (
    "teacher={features: dino}",
    "distillation={method: feature_cosine}",
    "data.preprocessing.normalisation=imagenet",
)


def test_a_foundation_model_leaves_nothing_to_inherit_and_labels_nothing(tmp_path: Path) -> None:
    anew = (*FEATURES, "student.initialise_from=null")
    found = contest(tmp_path, *anew, checkpoint=Path("own.safetensors"))
    assert [way.name for way in found.ways] == ["plain", "fine-tuned", "distilled"]
    assert [way.config.teacher is None for way in found.ways] == [True, True, False]
    assert set(found.left_out) == {"inherited plain"}
    assert "no decoder, heads or queries to start from" in found.left_out["inherited plain"]
    unlabelled = contest(tmp_path, *anew, *REST)
    assert [way.name for way in unlabelled.ways] == ["plain", "distilled"]
    assert set(unlabelled.left_out) == {"inherited plain", *ON_LABELS}
    assert "cannot label images" in unlabelled.left_out[ON_LABELS[0]]


def test_a_start_of_its_own_is_the_plain_rivals_too(tmp_path: Path) -> None:
    other = ("student.initialise_from.weights=other.safetensors",)
    plain, inherited, distilled = contest(tmp_path, *FEATURES, *other).ways
    assert inherited.name == "inherited plain" and plain.config.student.initialise_from is None
    assert inherited.config.student == distilled.config.student


REST = ("data.labelled_share=0.5", "data.unlabelled={rest_of_train: true, share: 0.25}")


def test_without_a_teacher_only_images_with_labels_are_left(tmp_path: Path) -> None:
    plain, inherited, *_, distilled = contest(tmp_path, *REST).ways
    assert plain.config.data.unlabelled is None and inherited.config.data.unlabelled is None
    assert distilled.config.data.unlabelled is not None
    assert plain.config.data.labelled_share == distilled.config.data.labelled_share == 0.5


def test_a_rival_and_a_distilled_student_train_on_the_teachers_labels(tmp_path: Path) -> None:
    recipe, found = written(tmp_path), contest(tmp_path, *REST)
    ways = {way.name: way for way in found.ways}
    assert list(ways) == ["plain", "inherited plain", *ON_LABELS, "distilled"]
    file = tmp_path / "a verdict: 1" / "pseudo-labels.json"
    for inherits in (True, False):
        placed = with_labels(found, recipe, REST, file, inherits=inherits)
        assert [w for w in placed.ways if w.name not in ON_LABELS] == [
            w for w in found.ways if w.name not in ON_LABELS
        ]
        way, taught = placed.ways[2:4]
        assert not way.distilled and taught.distilled
        for each in (way, taught):
            assert each.config == load_config(recipe, [*REST, *each.overrides])
            images = each.config.data.unlabelled
            assert images is not None and images.labels == file and images.rest_of_train
        assert taught.config.student == ways["distilled"].config.student
        assert taught.config.distillation == ways["distilled"].config.distillation
        like = ways["inherited plain" if inherits else "plain"].config
        assert way.config.student == like.student
        assert way.config.data.labelled_share == 0.5


def test_images_that_a_file_labels_are_everybodys(tmp_path: Path) -> None:
    labelled = ("data.labelled_share=0.5", "data.unlabelled={rest_of_train: true, labels: a.json}")
    ways = contest(tmp_path, *labelled).ways
    assert [way.name for way in ways] == ["plain", "inherited plain", "distilled"]
    images = [way.config.data.unlabelled for way in ways]
    assert images[0] is not None and images[0] == images[1] == images[2]


def test_what_a_recipe_inherits_and_how_its_rivals_do_too(tmp_path: Path) -> None:
    start = {"parts": ["decoder", "queries"], "layers": [1, 3], "widths": "principal"}
    recipe = written(
        tmp_path,
        student={"initialise_from": start},
        optimisation={"inherited_rate_factor": 0.1, "inherited_warmup_steps": 40},
    )
    found = make_contest(recipe, REST, Path("own.safetensors"))
    plain, inherited, tuned, labelled, *_, distilled = found.ways
    assert distilled.config.student.initialise_from is not None
    expected = distilled.config.student.initialise_from.model_copy(
        update={"weights": Path("teacher.safetensors")}
    )
    assert (expected.layers, expected.widths) == ((1, 3), "principal")
    for way in (inherited, labelled):
        assert way.config.student.initialise_from == expected
        assert way.config.optimisation == distilled.config.optimisation
    for way in (plain, tuned):  # what starts from nothing, or as a whole, inherits nothing slowly
        assert way.config.optimisation.inherited_warmup_steps == 0
        assert way.config.optimisation.inherited_rate_factor == 1
    short = load_config(recipe, [*REST, *entry(inherited, 1.0, 80.0, 1.0).overrides()])
    assert short.optimisation.inherited_warmup_steps == 20
    for way in found.ways:
        load_config(recipe, [*REST, *entry(way, 1.0, 80.0, 1.0).overrides()])


def test_equal_time_is_steps_by_cost(tmp_path: Path) -> None:
    found = contest(tmp_path)
    costs = {"plain": 0.5, "inherited plain": 0.5, "distilled": 1.25}
    entries = {w.name: entry(w, 0.5, 100.0, costs[w.name]) for w in found.ways}
    assert {name: each.steps for name, each in entries.items()} == {
        "plain": 200,
        "inherited plain": 200,
        "distilled": 80,
    }
    plan = make_plan(sweep_of("final", written(tmp_path), (), entries, (3, 4)))
    configs = [plan.config(trial) for trial in plan.trials]
    assert [c.run.seed for c in configs] == [3, 3, 3, 4, 4, 4]
    assert [c.optimisation.steps for c in configs[:3]] == [200, 200, 80]
    assert {c.optimisation.learning_rate for c in configs} == {5e-4}
    assert [c.evaluation.every_steps for c in configs[:3]] == [25, 25, 10]
    assert not any(c.evaluation.test for c in configs)
    assert plan.sweep.name == "tiny-verdict-final"


def test_warm_ups_are_cut_where_runs_are_short(tmp_path: Path) -> None:
    recipe = written(
        tmp_path, optimisation={"schedule": {"kind": "cosine", "warmup_steps": 30}, "batch_size": 4}
    )
    ways = make_contest(recipe, ()).ways
    for steps, expected in ((400, (30, 10)), (20, (5, 5))):
        each = entry(ways[-1], 1.0, float(steps), 1.0)
        config = load_config(recipe, each.overrides())
        warm = config.optimisation.schedule.warmup_steps, config.distillation.warmup
        assert warm == expected


def test_too_little_time_is_refused(tmp_path: Path) -> None:
    way = contest(tmp_path).ways[0]
    with pytest.raises(UserError, match=r"3 steps of 'plain'.*more --minutes"):
        entry(way, 1.0, 1.5, 0.5)


def test_a_shipped_recipe_is_found_by_its_name() -> None:
    name = Path("digits/d3etr")
    way = make_contest(name, ()).ways[-1]
    plan = make_plan(sweep_of("final", name, (), {"distilled": entry(way, 1.0, 20.0, 1.0)}, (0, 1)))
    assert [plan.config(trial).optimisation.steps for trial in plan.trials] == [20, 20]
