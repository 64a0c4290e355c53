"""Pascal VOC folders: what their files mean, and what is odd or wrong is named with the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from coco_files import picture
from format_reading import problem, read

from d3etr.errors import UserError

Write = Callable[..., Path]


XML = """<annotation>
  <filename>{name}</filename>
  <size><width>{width}</width><height>{height}</height><depth>3</depth></size>
  {objects}
</annotation>
"""


def voc_object(*corners: object, name: str = "cat", difficult: str = "0") -> str:
    places = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=False)
    box = "".join(f"<{place}>{value}</{place}>" for place, value in places)
    return (
        f"<object><name>{name}</name><difficult>{difficult}</difficult>"
        f"<bndbox>{box}</bndbox></object>"
    )


@pytest.fixture
def voc(tmp_path: Path) -> Write:
    """One picture of 40 x 20 pixels, its XML file and a list for training."""

    def write(*objects: str, name: str = "a.jpg", width: object = 40, text: str = "") -> Path:
        root = tmp_path / "voc"
        for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (root / part).mkdir(parents=True)
        picture(40, 20).save(root / "JPEGImages/a.jpg")
        inside = "".join(objects) or voc_object(1, 1, 10, 20)
        xml = text or XML.format(name=name, width=width, height=20, objects=inside)
        (root / "Annotations/a.xml").write_text(xml)
        (root / "ImageSets/Main/train.txt").write_text("a  1\n")
        return root

    return write


@pytest.mark.parametrize("backwards", [False, True])
def test_of_pictures_of_one_name_the_first_is_taken_whatever_the_order_of_the_folder(
    voc: Write, monkeypatch: pytest.MonkeyPatch, backwards: bool
) -> None:
    root = voc(name="gone.jpg")
    picture(40, 20).save(root / "JPEGImages/a.png")
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: iter(sorted(listed(path), reverse=backwards)))
    assert [record.file_name for record in read(root).records] == ["a.jpg"]


def test_voc_boxes_count_pixels_from_1_and_include_both_ends(voc: Write) -> None:
    root = voc(voc_object(1, 1, 40, 20), voc_object("11.0", 6, 20, 15, name="bird"))
    split = read(root)
    [record] = split.records
    assert record.boxes_xywh.tolist() == [[0, 0, 40, 20], [10, 5, 10, 10]]
    assert [category.name for category in split.categories] == ["bird", "cat"]
    assert record.labels.tolist() == [1, 0] and record.file_name == "a.jpg"


def test_difficult_voc_objects_are_set_aside_as_crowds_are(voc: Write) -> None:
    [record] = read(voc(voc_object(1, 1, 9, 9, difficult="1"), voc_object(2, 2, 9, 9))).records
    assert record.crowd.tolist() == [True, False] and len(record.objects()[0]) == 1


@pytest.mark.parametrize("width", [0, "", "x", "40.5"])
def test_a_voc_size_that_says_nothing_is_read_from_the_picture(voc: Write, width: object) -> None:
    [record] = read(voc(width=width)).records
    assert (record.width, record.height) == (40, 20)


def test_a_voc_size_that_is_wrong_is_refused(voc: Write) -> None:
    from d3etr.config.data import PreprocessingConfig
    from d3etr.data.dataset import DetectionDataset

    split = read(voc(width=50))
    with pytest.raises(UserError, match=r"is 40 x 20 pixels, but .* says 50 x 20"):
        DetectionDataset(split, PreprocessingConfig()).decoded(0)


def test_a_voc_file_name_that_is_not_there_gives_way_to_that_of_the_xml_file(voc: Write) -> None:
    assert read(voc(name="IMG_0001.jpg")).records[0].file_name == "a.jpg"


@pytest.mark.parametrize(
    ("objects", "words"),
    [
        ("<object><bndbox/></object>", ["object 1", "no name"]),
        (voc_object(1, 2, 3), ["object 1", "ymax None", "four numbers"]),
        (voc_object(1, 2, "x", 4), ["xmax 'x'"]),
        (voc_object(1, 2, "nan", 4), ["xmax 'nan'"]),
        (voc_object(1, 2, 3, 4, difficult="maybe"), ["difficult is 'maybe'", "0 or 1"]),
    ],
)
def test_voc_objects_that_cannot_be_used_are_named(
    voc: Write, objects: str, words: list[str]
) -> None:
    text = problem(voc(objects))
    for word in ["Annotations/a.xml", *words]:
        assert word in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<annotation>", ["a.xml: broken XML", "line 1"]),
        ("", ["a.xml: broken XML"]),
        ("<!DOCTYPE a [<!ENTITY x 'y'>]><annotation>&x;</annotation>", ["a.xml: has a DOCTYPE"]),
        ("<?xml version='1.0' encoding='no-such'?><annotation/>", ["a.xml: broken XML"]),
    ],
)
def test_hostile_and_broken_xml_is_one_sentence(voc: Write, text: str, words: list[str]) -> None:
    root = voc()
    (root / "Annotations/a.xml").write_text(text)
    found = problem(root)
    for word in words:
        assert word in found


def test_entities_are_never_expanded(voc: Write) -> None:
    root = voc()
    nested = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12))
    bomb = f'<!DOCTYPE a [<!ENTITY e0 "ha">{nested}]><annotation>&e11;</annotation>'
    for encoding in ("utf-8", "utf-16"):
        (root / "Annotations/a.xml").write_bytes(bomb.encode(encoding))
        assert "a.xml: has a DOCTYPE" in problem(root)


def test_voc_file_names_cannot_leave_the_folder(voc: Write) -> None:
    assert "leaves the image folder" in problem(voc(name="../../secret.jpg"))


def test_voc_lists_choose_images(voc: Write) -> None:
    root = voc()
    text = problem(root, "validation")
    assert "val.txt is not there" in text and "Found train" in text
    assert len(read(root, "validation", subset="train").records) == 1
    (root / "ImageSets/Main/train.txt").write_text("a\nb\n")
    assert "b.xml is not there, but train.txt lists it" in problem(root)


@pytest.mark.parametrize("line", ["photo 1", "photo 1  1", "photo 1 -1"])
def test_a_name_in_a_voc_list_may_have_spaces_and_a_flag(voc: Write, line: str) -> None:
    root = voc(name="photo 1.jpg")
    (root / "Annotations/a.xml").rename(root / "Annotations/photo 1.xml")
    (root / "JPEGImages/a.jpg").rename(root / "JPEGImages/photo 1.jpg")
    (root / "ImageSets/Main/train.txt").write_text(f"{line}\n")
    assert [record.file_name for record in read(root).records] == ["photo 1.jpg"]


def test_voc_images_that_are_not_there_are_named(voc: Write) -> None:
    root = voc()
    (root / "JPEGImages/a.jpg").unlink()
    assert "a.jpg" in problem(root) and "1 of 1 images are not in" in problem(root)


def test_xml_files_next_to_their_pictures_are_a_split(voc: Write, tmp_path: Path) -> None:
    root, flat = voc(), tmp_path / "flat"
    (root / "Annotations").rename(flat)
    (root / "JPEGImages/a.jpg").rename(flat / "a.jpg")
    assert [record.file_name for record in read(flat).records] == ["a.jpg"]


@pytest.mark.parametrize(
    ("annotations", "images", "named"),
    [
        ("annotations", "images", ""),  # as on Kaggle
        ("annotations", "images", "annotations"),
        ("Annotations", "images", ""),
        ("annotations", "JPEGImages", ""),
        ("labels", "images", "labels"),
        ("annotations", "annotations", ""),
        ("annotations", ".", ""),
    ],
)
def test_voc_images_are_found_beside_the_folder_of_xml_files(
    voc: Write, annotations: str, images: str, named: str
) -> None:
    root = voc()
    (root / "Annotations").rename(root / annotations)
    (root / "ImageSets/Main/train.txt").unlink()
    (root / images).mkdir(exist_ok=True)
    (root / "JPEGImages/a.jpg").rename(root / images / "a.jpg")
    if images != "JPEGImages":
        (root / "JPEGImages").rmdir()
    [record] = read(root / named).records
    assert record.file_name == "a.jpg" and len(record.labels) == 1


def test_a_folder_called_annotations_without_xml_is_no_voc_data_set(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    assert "in no format that is known" in problem(tmp_path)


def test_classes_txt_fixes_the_order_of_voc_classes(voc: Write) -> None:
    root = voc()
    (root / "classes.txt").write_text("dog\ncat\n")
    split = read(root)
    assert [(c.id, c.name) for c in split.categories] == [(0, "dog"), (1, "cat")]
    (root / "classes.txt").write_text("dog\n")
    assert "classes.txt: lacks 'cat'" in problem(root)
    (root / "classes.txt").write_text("cat\ncat\n")
    assert "'cat' is there twice" in problem(root)
