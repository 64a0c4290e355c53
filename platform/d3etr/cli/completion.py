"""``d3etr completion``: a script that completes commands, options, recipes, runs and keys.

The script holds all names, those of shipped recipes too, so completing starts no Python; what is on
the disk (recipes and runs of the user) the shell looks up itself.
"""

from __future__ import annotations

import argparse
import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from d3etr.cli.command import Command, add_json, answer

SHELLS = ("bash", "zsh", "fish")
_BY_DEST = {
    "recipe": "recipes",
    "sweep": "sweeps",
    "resume": "runs",
    "run": "runs",
    "runs": "runs",
    "overrides": "keys",
    "key": "keys",
}
"""An argument's name -> what completes its value: files by default."""


@dataclass(frozen=True)
class Completed:
    """One option or positional argument of a command.

    Attributes:
        flags: of an option; none of a positional argument.
        kind: what its value is: "" (it has none), words, keys, runs, recipes, sweeps or files.
        words: the values, of kind ``words``.
        help: a line about it.
    """

    flags: tuple[str, ...]
    kind: str
    words: tuple[str, ...]
    help: str


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="whose script to print")
    add_json(parser)
    parser.epilog = (
        "bash: d3etr completion bash > ~/.local/share/bash-completion/completions/d3etr\n"
        "zsh:  d3etr completion zsh > ~/.d3etr.zsh, and 'source ~/.d3etr.zsh' in ~/.zshrc\n"
        "fish: d3etr completion fish > ~/.config/fish/completions/d3etr.fish"
    )


def _run(options: Namespace) -> int:
    from d3etr.cli.main import COMMANDS
    from d3etr.config.reference import all_keys
    from d3etr.config.shipped import recipe_names, sweep_names

    names = {
        "KEYS": [key.path for key in all_keys() if not key.is_section],
        "RECIPES": recipe_names(),
        "SWEEPS": sweep_names(),
        "COMMANDS": [command.name for command in COMMANDS],
    }
    script = {"bash": _bash, "zsh": _zsh, "fish": _fish}[options.shell]
    text = script(COMMANDS, {name: " ".join(words) for name, words in names.items()})
    answer(options, {"shell": options.shell, "script": text}, text)
    return 0


def _arguments(command: Command) -> Iterator[Completed]:
    parser = ArgumentParser()
    command.add_arguments(parser)
    for action in parser._actions:
        words = tuple(str(choice) for choice in action.choices or ())
        kind = "words" if words else _BY_DEST.get(action.dest, "files")
        kind = "" if action.nargs == 0 else kind
        text = action.help or ""
        if text is not argparse.SUPPRESS:
            yield Completed(tuple(action.option_strings), kind, words, text.split(";")[0])


def _filled(head: str, names: Mapping[str, str]) -> str:
    """The beginning of a script with its placeholders replaced by what they stand for."""
    for placeholder, words in names.items():
        head = head.replace(placeholder, words)
    return head


def _bash(commands: Iterable[Command], names: Mapping[str, str]) -> str:
    cases = []
    for command in commands:
        arguments = list(_arguments(command))
        flags = " ".join(flag for one in arguments for flag in one.flags)
        cases += [
            f"    {shlex.quote(f'{command.name} {flag}')}) {_bash_action(one)} ;;"
            for one in arguments
            for flag in one.flags
            if one.kind
        ]
        positional = [_bash_action(one) for one in arguments if not one.flags]
        cases.append(f'    "{command.name} "*) case "$cur" in')
        cases.append(f'      -*) COMPREPLY=($(compgen -W "{flags}" -- "$cur")) ;;')
        cases.append(f"      *) {'; '.join(dict.fromkeys(positional)) or ':'} ;;")
        cases.append("      esac ;;")
    return "\n".join([_filled(_BASH_HEAD, names), *cases, _BASH_TAIL])


def _bash_action(one: Completed) -> str:
    words = f'COMPREPLY+=($(compgen -W "{" ".join(one.words)}" -- "$cur"))'
    return words if one.kind == "words" else f"_d3etr_{one.kind}"


def _zsh(commands: Iterable[Command], names: Mapping[str, str]) -> str:
    return f"autoload -U +X bashcompinit && bashcompinit\n{_bash(commands, names)}"


def _fish(commands: Iterable[Command], names: Mapping[str, str]) -> str:
    lines = [_filled(_FISH_HEAD, names)]
    for command in commands:
        about = shlex.quote(command.summary)
        lines.append(f"complete -c d3etr -n __fish_use_subcommand -f -a {command.name} -d {about}")
        here = f"complete -c d3etr -n '__fish_seen_subcommand_from {command.name}'"
        for one in _arguments(command):
            values = " ".join(one.words) if one.kind == "words" else f"(__d3etr_{one.kind})"
            value = f" -f -a '{values}'" if one.kind not in ("", "files") else ""
            flags = [f"-l {f[2:]}" if f.startswith("--") else f"-s {f[1:]}" for f in one.flags]
            needs = " -r" if one.flags and one.kind else ""
            if flags:
                lines.append(f"{here} {' '.join(flags)}{needs}{value} -d {shlex.quote(one.help)}")
            elif value:
                lines.append(f"{here}{value}")
    return "\n".join(lines)


_BASH_HEAD = """\
# Completion of d3etr for bash; made by 'd3etr completion'.
_d3etr_key_names="KEYS"
_d3etr_keys() {
  COMPREPLY+=($(compgen -W "$_d3etr_key_names" -- "$cur"))
  if [ "$prev" = --set ] && type compopt > /dev/null 2>&1; then
    COMPREPLY=("${COMPREPLY[@]/%/=}")
    compopt -o nospace
  fi
}
_d3etr_runs() {
  local names
  names=$(cd runs 2> /dev/null && ls)
  COMPREPLY+=($(compgen -W "$names" -- "$cur") $(compgen -d -- "$cur"))
}
_d3etr_recipes() { _d3etr_yaml "RECIPES"; }
_d3etr_sweeps() { _d3etr_yaml "SWEEPS"; }
_d3etr_yaml() {
  COMPREPLY+=($(compgen -W "$1" -- "$cur"))
  COMPREPLY+=($(compgen -f -X '!*.yaml' -- "$cur") $(compgen -d -S / -- "$cur"))
  if type compopt > /dev/null 2>&1; then compopt -o nospace; fi
}
_d3etr_files() { COMPREPLY+=($(compgen -f -- "$cur")); }
_d3etr() {
  local cur prev
  cur="${COMP_WORDS[COMP_CWORD]}"
  prev="${COMP_WORDS[COMP_CWORD-1]}"
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "COMMANDS" -- "$cur"))
    return
  fi
  case "${COMP_WORDS[1]} $prev" in"""
_BASH_TAIL = """\
  esac
}
complete -F _d3etr d3etr"""
_FISH_HEAD = """\
# Completion of d3etr for fish; made by 'd3etr completion'.
function __d3etr_keys; string split ' ' 'KEYS'; end
function __d3etr_runs; test -d runs; and ls runs; __fish_complete_directories; end
function __d3etr_recipes; string split ' ' 'RECIPES'; __fish_complete_suffix .yaml; end
function __d3etr_sweeps; string split ' ' 'SWEEPS'; __fish_complete_suffix .yaml; end"""

COMMAND = Command(
    "completion", "print a script that completes commands in a shell", _add_arguments, _run
)
