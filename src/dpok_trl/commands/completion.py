"""`dpok-trl completion`: the shell completes commands, options and choices. Written from the parser, so it cannot lag behind."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from dpok_trl.cli import CommandParser


HELP = "print a script that lets the shell complete commands and options"

INSTALL = {
    "bash": 'eval "$(dpok-trl completion bash)"   # in ~/.bashrc',
    "zsh": 'eval "$(dpok-trl completion zsh)"    # in ~/.zshrc, after compinit',
    "fish": "dpok-trl completion fish > ~/.config/fish/completions/dpok-trl.fish",
}


@dataclass(frozen=True)
class Completed:
    """What may follow a command.

    Args:
        name (`str`): Of the command.
        options (`dict[str, list[str]]`): Long option -> its choices; empty if any value will do.
        words (`list[str]`): Choices of its positional arguments.
    """

    name: str
    options: dict[str, list[str]]
    words: list[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=list(INSTALL), help="; ".join(INSTALL.values()))


def run(args: argparse.Namespace) -> int:
    from dpok_trl.cli import build_parser

    commands = list(commands_of(build_parser()))
    print({"bash": bash, "zsh": zsh, "fish": fish}[args.shell](commands))
    return 0


def commands_of(parser: CommandParser) -> Iterator[Completed]:
    from dpok_trl.training.config import DPOKConfig
    from dpok_trl.training.parsing import DPOKParser, ScriptArguments

    for name, command in _subparsers(parser).items():
        options, words = _options(command)
        if command.takes_all:  # what a run can be told
            settings, _ = _options(DPOKParser((ScriptArguments, DPOKConfig)))
            options |= settings
        for action, inner in _subparsers(command).items():
            inner_options, inner_words = _options(inner)
            options |= inner_options
            words += [action, *inner_words]
        yield Completed(name, options, words)


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, Any]:
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return {name: inner for group in groups for name, inner in group.choices.items()}


def _options(parser: argparse.ArgumentParser) -> tuple[dict[str, list[str]], list[str]]:
    options: dict[str, list[str]] = {}
    words: list[str] = []
    for action in parser._actions:
        choices = [str(choice) for choice in action.choices or () if choice is not None]
        if isinstance(action, argparse._SubParsersAction):
            continue
        if not action.option_strings:
            words += choices
        # of two spellings of a setting, the one that docs and files have
        options.update({option: choices for option in action.option_strings[:1] if option.startswith("--")})
    return options, words


def bash(commands: list[Completed]) -> str:
    cases = []
    for command in commands:
        for option, choices in command.options.items():
            if choices:
                cases.append(f"        {command.name}:{option}) words={shlex.quote(' '.join(choices))} ;;")
        cases.append(f"        {command.name}:*) words={shlex.quote(' '.join([*command.words, *command.options]))} ;;")
    names = " ".join(command.name for command in commands)
    return "\n".join(
        [
            "_dpok_trl() {",
            '    local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}" words=""',
            '    if [ "$COMP_CWORD" -eq 1 ]; then',
            f"        words={shlex.quote(names)}",
            "    else",
            '        case "${COMP_WORDS[1]}:$prev" in',
            *cases,
            "        esac",
            "    fi",
            '    COMPREPLY=($(compgen -W "$words" -- "$cur"))',
            "}",
            "complete -o default -F _dpok_trl dpok-trl",
        ]
    )


def zsh(commands: list[Completed]) -> str:
    """By zsh's own reading of bash completions."""
    return "autoload -U +X bashcompinit && bashcompinit\n" + bash(commands)


def fish(commands: list[Completed]) -> str:
    lines = []
    for command in commands:
        lines.append(f"complete -c dpok-trl -n __fish_use_subcommand -f -a {command.name}")
        seen = shlex.quote(f"__fish_seen_subcommand_from {command.name}")
        for word in command.words:
            lines.append(f"complete -c dpok-trl -n {seen} -a {shlex.quote(word)}")
        for option, choices in command.options.items():
            values = f" -x -a {shlex.quote(' '.join(choices))}" if choices else ""
            lines.append(f"complete -c dpok-trl -n {seen} -l {option[2:]}{values}")
    return "\n".join(lines)
