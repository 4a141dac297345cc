"""`dpok-trl`: the command line.

A command is a module with `HELP` (one line), `add_arguments(parser)` and `run(args) -> int`. It imports torch and everything heavy inside
`run`, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from dpok_trl import __version__


COMMANDS = {
    "demo": "dpok_trl.demo.command",
    "train": "dpok_trl.commands.train",
    "sample": "dpok_trl.commands.sample",
    "check": "dpok_trl.commands.check",
    "evaluate": "dpok_trl.commands.evaluate",
    "report": "dpok_trl.commands.report",
    "push": "dpok_trl.commands.push",
    "rewards": "dpok_trl.commands.rewards",
    "serve-reward": "dpok_trl.commands.serve_reward",
    "env": "dpok_trl.commands.env",
    "completion": "dpok_trl.commands.completion",
}

# command -> what to type, under its `--help`
EXAMPLES = {
    "demo": "dpok-trl demo --prompt 'four circles' --output four-circles",
    "train": "dpok-trl train --config recipe.yaml --num_epochs 20 --kl_weight 0.02",
    "sample": "dpok-trl sample rabbit-lora --prompts 'A green colored rabbit.' --images 4 --output rabbits.png",
    "check": "dpok-trl check owner/model --scheduler DDIM --dtype bf16",
    "evaluate": "dpok-trl evaluate rabbit-lora --prompts 'A green colored rabbit.' --held-out animals --reward image-reward --held-out-reward aesthetic",
    "rewards": "dpok-trl rewards score clip-score --prompt 'a red circle' one.png two.png",
    "serve-reward": "dpok-trl serve-reward hpsv2.1 --host 0.0.0.0 --device cuda:1",
    "push": "dpok-trl push rabbit-lora me/rabbit-lora --private",
    "report": "dpok-trl report logs/rabbit",
    "env": "dpok-trl env",
    "completion": 'eval "$(dpok-trl completion bash)"',
}

USER_ERROR = 2  # argparse's own code for arguments it does not take
DEBUG = "--debug"
INTERRUPTED = 130  # what a shell reports of a program that ended by Ctrl-C

# Raised in words for something the user can mend; this package's own exception classes count as well.
MENDABLE = (ValueError, OSError, ImportError, FloatingPointError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 1 if what it tested does not hold, 2 for a user's error (one line on stderr), 130 after
    Ctrl-C.

    Args:
        argv (`Sequence[str]`, *optional*): Default: `sys.argv[1:]`.
    """
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt as stopped:  # a training says what it has saved
        print(f"\ndpok-trl {args.command}: {str(stopped) or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        ours = type(error).__module__.partition(".")[0] == "dpok_trl"
        if args.debug or not (ours or isinstance(error, MENDABLE)):
            raise
        message = " ".join(str(error).split())
        print(f"dpok-trl {args.command}: error: {message} (--debug shows where)", file=sys.stderr)
        return USER_ERROR


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class CommandParser(argparse.ArgumentParser):
    """Refuses what it does not know by itself, with its own usage; argparse leaves that to the program's parser.

    With `takes_all`, the command reads its arguments itself, `--help` too: they are `args.arguments`.
    """

    takes_all = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        if self.takes_all:
            namespace, _ = super().parse_known_args([], namespace)
            namespace.arguments = [word for word in args if word != DEBUG]
            namespace.debug = DEBUG in args
            return namespace, []
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0].replace("_", "-")
            near = difflib.get_close_matches(flag, self._option_string_actions, n=1) if flag.startswith("--") else []
            hint = f". Did you mean {near[0]}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return namespace, unknown


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dpok-trl",
        description="Reinforcement-learning fine-tuning of diffusers text-to-image pipelines, kept close to the pretrained model.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dpok-trl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=CommandParser)
    for name, module_name in COMMANDS.items():
        module = importlib.import_module(module_name)
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            epilog=f"example: {EXAMPLES[name]}",
            allow_abbrev=False,
            formatter_class=HelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument(DEBUG, action="store_true", help="show the traceback of an error")
        command.set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
