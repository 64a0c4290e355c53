"""Projects over pre-trained backbones: what recipes take, what is measured, what is refused."""

from pathlib import Path
from typing import Any, get_args

import pytest
from tiny import FAMILY, save_untrained, tiny_detector_config

from d3etr.config.backbone import BackboneConfig
from d3etr.config.data import DataConfig, DigitScenesConfig, PreprocessingConfig
from d3etr.config.detector import DetectorPart
from d3etr.config.load import load_config
from d3etr.data.digit_scenes import write_digit_scenes
from d3etr.data.splits import open_split
from d3etr.detectors.backbones import build_backbone
from d3etr.detectors.init_from import part_of
from d3etr.detectors.torchvision_weights import has_imagenet_weights
from d3etr.detectors.weights import write_tensors
from d3etr.engine.init_student import build_student, require_start
from d3etr.errors import UserError
from d3etr.progress import no_progress
from d3etr.project import measure
from d3etr.project.make import Machine, Request, make_project
from d3etr.project.measure import Costs
from d3etr.project.recipes import DISTILLED, INHERITED, PLAIN, ROLES, TEACHER, project_trees
from d3etr.project.write import Project

LITE, RESNET = "timm/tf_efficientnet_lite0", "resnet18"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with digit scenes, and two backbones' files as ``import-weights`` writes them."""
    root = tmp_path_factory.mktemp("files")
    sizes = {"train_images": 8, "validation_images": 4, "test_images": 2, "image_size": 32}
    write_digit_scenes(DigitScenesConfig(root=root, minimum_scale=8, maximum_scale=16, **sizes))
    for name in (LITE, RESNET):
        config = BackboneConfig(name=name)
        about = {"backbone": config.model_dump_json()}
        write_tensors(place(root, name), build_backbone(config).state_dict(), about)
    return root


def place(root: Path, name: str) -> Path:
    return root / f"{name.replace('/', '-')}.safetensors"


def make(folder: Path, files: Path, **more: Any) -> Project:
    machine, costs = more.pop("machine", Machine("a GPU", 8)), Costs(0.2, 1.0)
    request = Request(next(files.glob("*/annotations")), 60, folder, "d3etr init", **more)
    return make_project(request, no_progress, machine=machine, measure=lambda *_: costs)


def test_detectors_start_from_them_also_on_a_gpu(files: Path, tmp_path: Path) -> None:
    ours, theirs = place(files, LITE), place(files, RESNET)
    make(tmp_path / "p", files, backbone_weights=ours, teacher_backbone_weights=theirs)
    configs = {role: load_config(tmp_path / "p" / f"{role}.yaml") for role in ROLES}
    for role, config in configs.items():
        name, weights = (RESNET, theirs) if role == TEACHER else (LITE, ours)
        assert config.student.detector.name == "deformable_detr"
        assert config.student.detector.feature_levels == 3
        assert config.student.detector.backbone == BackboneConfig(name=name)
        assert config.student.backbone_weights == weights
        assert config.optimisation.backbone_rate_factor == 0.1
    start = configs[INHERITED].student.initialise_from
    assert start is not None and "backbone" not in start.parts


def test_students_take_over_a_teachers_backbone_of_the_same_kind(
    files: Path, tmp_path: Path
) -> None:
    make(tmp_path / "p", files, backbone_weights=place(files, LITE))
    for role in (INHERITED, DISTILLED):
        student = load_config(tmp_path / "p" / f"{role}.yaml").student
        assert student.backbone_weights is None
        assert student.initialise_from is not None and "backbone" in student.initialise_from.parts
    assert load_config(tmp_path / "p" / "plain.yaml").student.backbone_weights is not None
    assert "take over the teacher's backbone" in (tmp_path / "p" / "README.md").read_text()


def test_steps_are_measured_where_statistics_are_kept(files: Path, tmp_path: Path) -> None:
    small = make(tmp_path / "small", files, machine=Machine(None, 2))
    project = make(tmp_path / "p", files, backbone_weights=place(files, LITE))
    found, design = project.survey, project.plan.design
    trees = project_trees(design, found.data_tree(tmp_path), dict.fromkeys(ROLES, 100))
    for role in (PLAIN, DISTILLED):  # with weights of nobody's, which training would refuse
        config = measure._untaught(trees, role, tmp_path, found.splits["train"])
        assert config.student.detector.backbone.keeps_statistics
        require_start(config)
    trees = project_trees(small.plan.design, found.data_tree(tmp_path), dict.fromkeys(ROLES, 100))
    config = measure._untaught(trees, PLAIN, tmp_path, found.splits["train"])
    assert config.student.detector.backbone.name == "small"
    assert config.student.backbone_weights is None


def test_what_is_no_backbone_of_theirs_is_refused(files: Path, tmp_path: Path) -> None:
    ours, other = place(files, LITE), tmp_path / "other.safetensors"

    def refused(text: str, **more: Any) -> None:
        with pytest.raises(UserError, match=text):
            make(tmp_path / "p", files, **more)
        assert not (tmp_path / "p").exists()

    network = build_backbone(BackboneConfig(name=LITE))
    write_tensors(other, network.state_dict(), {"pretraining": "{}", "backbone": "{}"})
    refused("no ImageNet weights of a backbone", backbone_weights=other)
    small = BackboneConfig(name="small", stem_width=8, stage_widths=(8, 16, 16))
    about = {"backbone": small.model_dump_json()}
    write_tensors(other, build_backbone(small).state_dict(), about)
    refused("maps of strides", backbone_weights=ours, teacher_backbone_weights=other)
    refused("needs --backbone-weights", teacher_backbone_weights=ours)
    refused("has no effect beside", backbone_weights=ours, teacher_weights=ours)


def taught_by(
    folder: Path, files: Path, teacher: dict[str, Any], student: dict[str, Any], **info: Any
) -> dict[str, Path]:
    """The two files that a project is fine-tuned from."""
    sizes = {"train_images": 8, "validation_images": 4, "test_images": 2, "image_size": 32}
    scenes = DigitScenesConfig(root=files, minimum_scale=8, maximum_scale=16, **sizes)
    paths = {role: folder / f"{role}.safetensors" for role in ("teacher", "student")}
    save_untrained(
        paths["teacher"], tiny_detector_config(**teacher), DataConfig(digit_scenes=scenes)
    )
    save_untrained(
        paths["student"], tiny_detector_config(**student), DataConfig(digit_scenes=scenes), **info
    )
    return {f"{role}_weights": path for role, path in paths.items()}


@pytest.mark.parametrize("kind", ["rf_detr", "lw_detr", "conditional_detr"])
def test_inherited_students_without_imagenet_weights_take_the_teachers_backbone(
    kind: str, files: Path, tmp_path: Path
) -> None:
    given = taught_by(tmp_path, files, {**FAMILY[kind], "decoder_layers": 3}, FAMILY[kind])
    make(tmp_path / "p", files, **given)
    (tmp_path / "p" / "weights").mkdir()
    (tmp_path / "p" / "weights" / "teacher.safetensors").symlink_to(given["teacher_weights"])
    for role in ROLES:
        config = load_config(tmp_path / "p" / f"{role}.yaml")
        assert config.student.backbone_weights is None
        student = build_student(config, open_split(config.data, "train").categories, quiet=True)
        assert {part_of(name) for name in student.inherited} == {*get_args(DetectorPart)}


def test_backbones_with_imagenet_weights_start_from_them(files: Path, tmp_path: Path) -> None:
    own = {"name": "rt_detr", "encoder_width": 16, "levels": 2, "points": 2}
    given = taught_by(
        tmp_path,
        files,
        {**own, "backbone": {"name": "resnet34vd"}},
        {**own, "backbone": {"name": "resnet18vd"}},
    )
    make(tmp_path / "p", files, **given)
    student = load_config(tmp_path / "p" / "inherited.yaml").student
    assert student.backbone_weights == "imagenet" and student.initialise_from is not None
    assert student.initialise_from.parts == ("decoder", "heads", "queries")


def test_students_that_could_not_start_are_refused_before_anything_trains(
    files: Path, tmp_path: Path
) -> None:
    def refused(text: str, *given: dict[str, Any], **info: Any) -> None:
        with pytest.raises(UserError, match=text):
            make(tmp_path / "p", files, **taught_by(tmp_path, files, *given, **info))
        assert not (tmp_path / "p").exists()

    vit = FAMILY["rf_detr"]["backbone"]["vit"]
    larger = {**FAMILY["rf_detr"], "backbone": {"name": "vit", "vit": {**vit, "positions": 4}}}
    refused("no ImageNet weights", larger, FAMILY["rf_detr"])
    d_fine = FAMILY["d_fine"]
    refused("student.detector.curvature to 8", {**d_fine, "curvature": 8.0}, d_fine)
    refused("attention heads", {"heads": 4}, {"heads": 2})
    unit = PreprocessingConfig(normalisation="unit")
    refused("normalisation 'imagenet'", {}, {}, preprocessing=unit)


@pytest.mark.parametrize(
    ("backbone", "published"),
    [
        ({"name": "resnet18"}, True),
        ({"name": "resnet18vd"}, True),
        ({"name": "timm/hgnetv2_b0"}, True),
        ({"name": "timm/hgnetv2_atto"}, False),
        ({"name": "resnet18", "norm": "group"}, False),
        ({"name": "dinov3"}, False),
    ],
)
def test_who_has_imagenet_weights(backbone: dict[str, Any], published: bool) -> None:
    assert has_imagenet_weights(BackboneConfig(**backbone)) is published
