"""What a shell offers after the script of ``d3etr completion`` was read."""

import shutil
import subprocess
from pathlib import Path

import pytest

from d3etr.cli.completion import SHELLS
from d3etr.cli.main import COMMANDS, main

TRY = """
source {script}
COMP_WORDS=({words})
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_shtab_d3etr d3etr "${{COMP_WORDS[-1]}}" "${{COMP_WORDS[-2]}}" 2> /dev/null
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script for bash, in a folder with a recipe and a run."""
    folder = tmp_path_factory.mktemp("completion")
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda text: printed.append(text))
        assert main(["completion", "bash"]) == 0
    (folder / "script").write_text("\n".join(printed))
    (folder / "own.yaml").write_text("")
    (folder / "own.txt").write_text("")
    (folder / "runs" / "student-1234").mkdir(parents=True)
    return folder / "script"


def offered(script: Path, *words: str) -> set[str]:
    quoted = " ".join(f"'{word}'" for word in ("d3etr", *words))
    done = subprocess.run(
        ["bash", "-c", TRY.format(script=script, words=quoted)],
        cwd=script.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("tr",), {"train"}),
        (("train", "--set", "optimisation.sch"), {"optimisation.schedule.kind"}),
        (("train", "--launcher", "l"), {"local"}),
        (("train", "--re"), {"--resume"}),
        (("train", "o"), {"own.yaml"}),
        (("train", "--resume", "st"), {"student-1234"}),
        (("attention", "stu"), {"student-1234"}),
        (("sweep", "ow"), {"own.yaml"}),
        (("train", "digits/d3"), {"digits/d3etr"}),
        (("sweep", "abl"), {"ablation"}),
        (("explain", "run.se"), {"run.seed"}),
        (("evaluate", "own.t"), {"own.txt"}),
        (("completion", ""), {*SHELLS}),
    ],
)
def test_bash_completes(bash_script: Path, words: tuple[str, ...], expected: set[str]) -> None:
    found = {name.rstrip("=") for name in offered(bash_script, *words)}
    assert expected <= found
    assert all(name.startswith(words[-1]) for name in found)


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shells_script_has_all_commands_and_keys(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for name in (*(command.name for command in COMMANDS), "optimisation.schedule.drop_at"):
        assert name in script
    if shutil.which(shell) is not None:
        (tmp_path / "script").write_text(script)
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)
