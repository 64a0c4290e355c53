"""``d3etr completion``: a script that completes commands, options, recipes, runs and keys.

The script holds all names, those of shipped recipes too, so completing starts no Python; what is on
the disk (recipes and runs of the user) the shell looks up itself.
"""

from __future__ import annotations

import argparse
import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable

from d3etr.cli.command import Command, add_json, answer

SHELLS = ("bash", "zsh", "fish")


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="whose script to print")
    add_json(parser)
    parser.epilog = (
        "bash: d3etr completion bash > ~/.local/share/bash-completion/completions/d3etr\n"
        "zsh:  d3etr completion zsh > ~/.zfunc/_d3etr, with ~/.zfunc in fpath before compinit\n"
        "fish: d3etr completion fish > ~/.config/fish/completions/d3etr.fish"
    )


def _run(options: Namespace) -> int:
    import shtab

    from d3etr.cli.main import build_parser

    parser = build_parser()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                _complete_values(below)
    script = shtab.complete(parser, options.shell)
    answer(options, {"shell": options.shell, "script": script}, script)
    return 0


def _complete_values(parser: ArgumentParser) -> None:
    """Say what completes the values of a command's arguments: files, where nothing else does."""
    import shtab

    from d3etr.config.reference import all_keys
    from d3etr.config.shipped import recipe_names, sweep_names

    runs = "ls runs 2>/dev/null"
    keys = _words(key.path for key in all_keys() if not key.is_section)
    commands = {
        "recipe": f"{_words(recipe_names())}; ls *.yaml 2>/dev/null",
        "sweep": f"{_words(sweep_names())}; ls *.yaml 2>/dev/null",
        **dict.fromkeys(("resume", "run", "runs"), runs),
        **dict.fromkeys(("overrides", "key"), keys),
    }
    for action in parser._actions:
        if action.nargs != 0 and action.choices is None:
            command = commands.get(action.dest)
            action.complete = shtab.cmd(command) if command else shtab.FILE  # type: ignore[attr-defined]


def _words(names: Iterable[str]) -> str:
    return f"echo {shlex.join(names)}"


COMMAND = Command(
    "completion", "print a script that completes commands in a shell", _add_arguments, _run
)
