"""``d3etr import-weights``: weights of others as a file that every command here takes."""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from d3etr.cli.command import (
    Command,
    above_zero,
    add_json,
    answer,
    ensure_other_file,
    file_to_write,
    positive,
)
from d3etr.errors import UserError
from d3etr.text import printable

if TYPE_CHECKING:
    from d3etr.config.backbone import BackboneConfig
    from d3etr.detectors.imports.importing import Imported

_SHOWN = 6


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="an official checkpoint of DETR, Conditional DETR, DAB-DETR or Deformable DETR, or "
        "torchvision's of a backbone (.pth); a folder of Hugging Face's; or a file of d3etr",
    )
    parser.add_argument(
        "target",
        type=file_to_write(".safetensors"),
        metavar="TARGET",
        help="the file to write (.safetensors)",
    )
    parser.add_argument(
        "--categories",
        type=Path,
        metavar="FILE",
        help="COCO detection JSON that the detector learnt from, if that was not COCO",
    )
    parser.add_argument(
        "--heads", type=positive, metavar="N", help="attention heads, where nothing says (8)"
    )
    parser.add_argument(
        "--dilation",
        action=BooleanOptionalAction,
        help="whether the backbone's last stage is dilated (DC5), where nothing says",
    )
    parser.add_argument(
        "--temperature",
        type=above_zero,
        metavar="T",
        help="of DAB-DETR's and DINO's position encoding, where nothing says (20; DAB-DETR's "
        "official R50-DC5: 10)",
    )
    parser.add_argument(
        "--activation",
        choices=("relu", "silu"),
        help="within D-FINE's or DEIMv2's heads, where nothing says (relu; DEIM, DEIMv2: silu)",
    )
    parser.add_argument(
        "--sampling",
        choices=("bilinear", "discrete"),
        help="of RT-DETRv2's deformable attention, where nothing says (bilinear; official files "
        "named dsp: discrete)",
    )
    parser.add_argument(
        "--backbone",
        metavar="NAME",
        help="timm/NAME or a ResNet-vd (resnet50vd, of timm's resnet50d): the network whose file "
        "it is (.safetensors or .pth)",
    )
    add_json(parser)


def _run(options: Namespace) -> int:
    from d3etr.data.annotations import Source
    from d3etr.data.formats import AUTO, find_format
    from d3etr.detectors.imports.importing import import_weights
    from d3etr.detectors.imports.settings import Unseen

    categories = None
    if options.categories is not None:
        _, annotated = find_format(AUTO, options.categories)
        known = annotated.read(Source(options.categories)).categories
        categories = tuple((category.id, category.name) for category in known)
    unseen = Unseen(
        heads=options.heads,
        dilation=options.dilation,
        temperature=options.temperature,
        activation=options.activation,
        sampling=options.sampling,
    )
    ensure_other_file(options.source, options.target)
    backbone = None if options.backbone is None else _named(options.backbone)
    imported = import_weights(options.source, options.target, unseen, categories, backbone)
    answer(options, imported.as_dict(), lambda: _print(imported))
    return 0


def _named(name: str) -> BackboneConfig:
    from d3etr.config.backbone import BackboneConfig
    from d3etr.config.backbones import RESNET_VD, TIMM

    if not name.startswith(TIMM) and name not in RESNET_VD:
        raise UserError(
            f"--backbone: found '{name}', expected '{TIMM}' and timm's name of a network, or one "
            f"of {', '.join(RESNET_VD)}"
        )
    return BackboneConfig(name=name)


def _print(imported: Imported) -> None:
    print(f"{imported.source}: {imported.kind}")
    print(f"  network     {imported.network}, {imported.parameters / 1e6:.2f} M parameters")
    backbone = imported.architecture.get("backbone")
    if backbone is not None:
        sizes = ("encoder_layers", "decoder_layers", "queries", "width", "heads")
        numbers = ", ".join(f"{imported.architecture[key]} {key}" for key in sizes)
        dilated = " dilated" if backbone["dilation"] else ""
        print(f"  sizes       {backbone['name']}{dilated}; {numbers.replace('_', ' ')}")
        names = imported.categories
        more = ", ..." if len(names) > _SHOWN else ""
        print(f"  categories  {len(names)}: {printable(', '.join(names[:_SHOWN]))}{more}")
    print(f"  tensors     {imported.tensors}, all checked")
    for note in imported.notes:
        print(f"  note        {note}")
    print(f"{imported.target}: written")


COMMAND = Command(
    "import-weights",
    "turn official checkpoints, Hugging Face folders and torchvision backbones into our weights",
    _add_arguments,
    _run,
)
