"""Patch features of foundation models: those of transformers, and what a folder has to hold."""

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from foundation_folders import MEAN, STD, write_folder
from torch.nn.functional import interpolate

from d3etr.detectors import foundation
from d3etr.detectors.foundation import FoundationModel, load_foundation, require_transformers
from d3etr.detectors.foundation_folder import KINDS, read_foundation_folder
from d3etr.errors import UserError
from d3etr.structures import ImageBatch

PIXELS = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("dinov2"))


@pytest.fixture
def copy(dinov2: Path, tmp_path: Path) -> Path:
    """A folder that a test may spoil."""
    return Path(shutil.copytree(dinov2, tmp_path / "model"))


def _load(folder: Path) -> FoundationModel:
    return load_foundation(read_foundation_folder(folder)).eval()


def _column(values: list[float]) -> torch.Tensor:
    return torch.tensor(values)[:, None, None]


def _seen_by_students(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in [0, 1] as a student's batch has them."""
    return (pixels - _column(PIXELS[0])) / _column(PIXELS[1])


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (27, 37)])
@torch.no_grad()
def test_features_are_those_of_transformers(folder: Path, size: tuple[int, int]) -> None:
    """Its own model's patch tokens, for the picture that its own normalisation gives."""
    from transformers import AutoModel

    pixels = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    theirs = (pixels - _column(MEAN)) / _column(STD)
    grid = (round(size[0] / 8), round(size[1] / 8))
    if size == (27, 37):
        theirs = interpolate(theirs, (24, 40), mode="bilinear", antialias=True)
    model = AutoModel.from_pretrained(folder).eval()
    hidden = model(theirs).last_hidden_state
    prefix = 1 if type(model).__name__ == "Dinov2Model" else 4
    assert hidden.shape[1] == prefix + grid[0] * grid[1]
    memory = _load(folder).encode(ImageBatch(_seen_by_students(pixels)))
    assert memory.levels == (grid,) and memory.padding is None
    assert memory.position.shape == (1, grid[0] * grid[1], 16)
    torch.testing.assert_close(memory.tokens, hidden[:, prefix:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_is_under_padding_changes_no_patch_of_the_picture(folder: Path) -> None:
    model, pixels = _load(folder), torch.randn(2, 3, 32, 40)
    padding = torch.zeros(2, 32, 40, dtype=torch.bool)
    padding[1, :, 24:] = True
    padding[1, 16:] = True
    found = model.encode(ImageBatch(pixels, padding))
    other = torch.where(padding[:, None], 9.0, pixels)
    again = model.encode(ImageBatch(other, padding))
    assert found.padding is not None
    valid = ~found.padding
    assert valid.reshape(2, 4, 5)[1].tolist() == [
        [r < 2 and c < 3 for c in range(5)] for r in range(4)
    ]
    torch.testing.assert_close(found.tokens[valid], again.tokens[valid])
    assert not torch.allclose(found.tokens[1], model.encode(ImageBatch(pixels)).tokens[1])
    alone = model.encode(ImageBatch(pixels[:1])).tokens
    torch.testing.assert_close(found.tokens[:1], alone, rtol=1e-4, atol=1e-5)


def test_nothing_asks_the_network(dinov2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    assert _load(dinov2).config.width == 16


def test_loading_says_nothing_and_draws_nothing(
    dinov2: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    state = torch.get_rng_state()
    _load(dinov2)
    assert torch.equal(torch.get_rng_state(), state)
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize(
    ("card", "text"),
    [
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0 (README.md)"),
        ("---\nlicense: other\nlicense_name: dinov3-license\n---", "dinov3-license (README.md)"),
        ("---\nlicense:\n- mit\n- bsd-3-clause\n---\n", "mit, bsd-3-clause (README.md)"),
        ("# A model\nlicense: mit\n", None),
        ("---\ntags: [a]\n---\nlicense: mit\n", None),
        ("---\nlicense: [mit\n---\n", None),
        (None, None),
    ],
)
def test_the_licence_is_that_of_the_card_or_a_file(
    copy: Path, card: str | None, text: str | None
) -> None:
    (copy / "README.md").unlink()
    if card is not None:
        (copy / "README.md").write_text(card)
    assert read_foundation_folder(copy).licence == text
    (copy / "LICENSE.md").write_text("terms")
    both = read_foundation_folder(copy).licence
    assert both == ("" if text is None else f"{text}, ") + "the text in LICENSE.md"


def _change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_folders_of_something_else_are_refused(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*nothing is downloaded"):
        read_foundation_folder(tmp_path / "facebook" / "dinov2-small")
    for value, text in (("rt_detr", "a 'rt_detr'; expected a ViT"), (None, "a None; expected")):
        _change(copy / "config.json", model_type=value)
        with pytest.raises(UserError, match=text):
            read_foundation_folder(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: broken JSON"):
        read_foundation_folder(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors missing in this folder"):
        read_foundation_folder(copy)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"image_mean": [0.5]}, r"image_mean is \[0\.5\]; expected three numbers"),
        ({"image_std": [0.2, 0.0, 0.2]}, "image_std is .* above 0"),
        ({"do_rescale": False}, "divided by 255"),
        ({"rescale_factor": 1.0}, "divided by 255"),
        ({"do_normalize": False}, "divided by 255"),
    ],
)
def test_pictures_of_another_kind_are_refused(
    copy: Path, values: dict[str, object], text: str
) -> None:
    _change(copy / "preprocessor_config.json", **values)
    with pytest.raises(UserError, match=text):
        read_foundation_folder(copy)


def test_tensors_that_are_missing_damaged_or_of_other_sizes_are_refused(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = copy / "model.safetensors"
    tensors, content = load_file(file), file.read_bytes()
    name = "encoder.layer.0.norm1.weight"
    save_file({key: tensors[key] for key in tensors if key != name}, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"1 tensors are missing, such as {name}"):
        _load(copy)
    file.write_bytes(content[:-8])
    with pytest.raises(UserError, match="this dinov2 cannot be loaded"):
        _load(copy)
    file.write_bytes(content)
    _change(copy / "config.json", patch_size=[8, 8])
    with pytest.raises(UserError, match=r"patch_size is \[8, 8\]"):
        _load(copy)
    _change(copy / "config.json", hidden_size=32, patch_size=8)
    with pytest.raises(UserError, match="this dinov2 cannot be loaded"):
        _load(copy)


@pytest.mark.parametrize("found", [None, "4.57.1"])
def test_a_missing_or_old_package_is_named(
    found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if found is None:
            raise foundation.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(foundation, "version", version)
    state = "is 4.57.1" if found else "is not installed"
    with pytest.raises(UserError, match=rf"{state} here: pip install 'transformers>=5.23'"):
        require_transformers()
