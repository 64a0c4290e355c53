"""The script that installs Chromium before the tests: it may fail, and then says so and no more."""

import shutil
import subprocess
from pathlib import Path

import pytest


def tools(folder: Path, **scripts: str) -> str:
    """A PATH of nothing but a shell, ``timeout`` and the given scripts."""
    folder.mkdir()
    for name in ("sh", "timeout", "touch"):
        found = shutil.which(name)
        assert found is not None
        (folder / name).symlink_to(found)
    for name, text in scripts.items():
        script = folder / name.replace("_", "-")
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(0o755)
    return str(folder)


@pytest.mark.parametrize(
    ("scripts", "said"),
    [
        ({"id": "echo 1000", "apt_get": "exit 0"}, "only root may install it"),
        ({"id": "echo 0"}, "apt-get is not here"),
        ({"id": "echo 0", "apt_get": "exit 100"}, "apt-get update failed"),
        ({"id": "echo 0", "apt_get": 'case "$*" in *update) ;; *) exit 1; esac'}, "its download"),
        ({"chromium": "exit 1", "apt_get": "touch called"}, ""),
    ],
)
def test_without_chromium_the_run_goes_on(
    scripts: dict[str, str], said: str, tmp_path: Path, repository: Path
) -> None:
    path = tools(tmp_path / "bin", **scripts)
    done = subprocess.run(
        [repository / ".ci" / "chromium"],
        env={"PATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert said in done.stdout
    assert ("apt-get install chromium" in done.stdout) == bool(said), "how to have it"
    assert not (tmp_path / "called").exists()


def test_it_is_downloaded_and_then_installed(tmp_path: Path, repository: Path) -> None:
    path = tools(tmp_path / "bin", id="echo 0", apt_get='echo "$@" >>calls')
    script = repository / ".ci" / "chromium"
    subprocess.run([script], env={"PATH": path}, cwd=tmp_path, check=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [line.split()[-1] for line in calls] == ["update", "chromium", "chromium"]
    assert "--download-only" in calls[1] and "--no-download" in calls[2]
