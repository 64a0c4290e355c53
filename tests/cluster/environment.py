"""An environment like the image's: what d3etr needs is installed, d3etr itself is not."""

import sysconfig
import venv
from pathlib import Path

COMMANDS = ("ray", "mlflow", "uvicorn")


def make_environment(folder: Path) -> Path:
    """Make the environment from the packages of the running one.

    Args:
        folder: where.

    Returns:
        The folder of its commands.
    """
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    packages = sysconfig.get_path("purelib")
    # A folder that is named in a .pth file is searched, but its own .pth files, among which may
    # be that of an editable d3etr, are not read.
    ours = sysconfig.get_path("purelib", vars={"base": str(folder)})
    (Path(ours) / "packages.pth").write_text(packages + "\n")
    commands = folder / "bin"
    for name in COMMANDS:
        script = (Path(sysconfig.get_path("scripts")) / name).read_text()
        (commands / name).write_text(f"#!{commands / 'python'}\n{script.partition(chr(10))[2]}")
        (commands / name).chmod(0o755)
    return commands
