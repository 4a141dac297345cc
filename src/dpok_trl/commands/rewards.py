"""`dpok-trl rewards`: which rewards there are, whether one holds to the contract, and what it says of pictures."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from dpok_trl.rewards.base import RewardFunction, Scored


HELP = "list the shipped rewards, check one (or yours), or score pictures with it"

COLUMNS = ("name", "needs", "weights", "licence", "range", "input")
REWARD = "name of a shipped reward, module:function for one of yours, or the address of a server"
NOT_OK = 1  # exit code: what was asked for was done, and the answer is no


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="list | check | score")
    _add_action(actions, parser, "list", "what there is, without loading any of it")
    check = _add_action(
        actions, parser, "check", "call a reward on sample pictures and tell what the trainer would make of it"
    )
    check.add_argument("reward", help=REWARD)
    check.add_argument("images", nargs="*", type=Path, help="pictures of one size in place of the samples")
    score = _add_action(actions, parser, "score", "the rewards of pictures")
    score.add_argument("reward", help=REWARD)
    score.add_argument("images", nargs="+", type=Path, help="picture files")
    for action in (check, score):
        action.add_argument(
            "--prompt",
            action="append",
            required=action is score,
            help="one for all pictures, or, given several times, one for each in their order",
        )
        action.add_argument(
            "--metadata",
            type=_mapping,
            help='what comes with the prompts, for a reward that asks for a column: \'{"text": "hello"}\'',
        )
        action.add_argument("--device", help="such as cuda:1, for a reward with a model (default: the CPU)")


def _add_action(
    actions: argparse._SubParsersAction, parser: argparse.ArgumentParser, name: str, text: str
) -> argparse.ArgumentParser:
    action = actions.add_parser(
        name, help=text, description=text, allow_abbrev=False, formatter_class=parser.formatter_class
    )
    action.add_argument("--json", action="store_true", help="print JSON")
    # It stands after `rewards` as well, whose value it must not write over.
    action.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    return action


def run(args: argparse.Namespace) -> int:
    return {"list": _list, "check": _check, "score": _score}[args.action](args)


# --- list -------------------------------------------------------------------------------------------------------------


def _list(args: argparse.Namespace) -> int:
    from dpok_trl.rewards.registry import shipped_rewards

    rows = [dataclasses.asdict(info) for info in shipped_rewards()]
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        print(_table([COLUMNS, *([row[column] for column in COLUMNS] for row in rows)]))
    return 0


def _table(rows: list[Any]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


# --- check ------------------------------------------------------------------------------------------------------------


def _check(args: argparse.Namespace) -> int:
    from dpok_trl.rewards.checking import SAMPLE_PROMPTS, check_reward
    from dpok_trl.rewards.registry import load_on_device

    reward = load_on_device(args.reward, args.device)
    images = [_picture(path) for path in args.images] or None
    prompts = None
    if args.prompt is not None:
        samples = len(SAMPLE_PROMPTS) if len(args.prompt) == 1 else len(args.prompt)
        prompts = _one_each(args.prompt, len(images) if images else samples)
    count = len(images or prompts or SAMPLE_PROMPTS)
    metadata = None if args.metadata is None else [args.metadata] * count
    report = check_reward(reward, images, prompts, metadata)
    if args.json:
        fields = {"ok": report.ok, **dataclasses.asdict(report)}
        fields["values"] = [_plain(value) for value in report.values]
        print(json.dumps({name: _plain(value) for name, value in fields.items()}, indent=1))
    else:
        print(report)
    return 0 if report.ok else NOT_OK


# --- score ------------------------------------------------------------------------------------------------------------


def _score(args: argparse.Namespace) -> int:
    from dpok_trl.rewards.registry import load_on_device

    prompts = _one_each(args.prompt, len(args.images))
    pictures = [_picture(path) for path in args.images]
    reward = load_on_device(args.reward, args.device)
    scored = _scores(reward, pictures, prompts, [args.metadata or {}] * len(pictures))
    values = [
        value if applies else None
        for value, applies in zip(scored.values.tolist(), scored.applies.tolist(), strict=True)
    ]
    if args.json:
        rows = zip(args.images, prompts, values, scored.applies.tolist(), strict=True)
        print(
            json.dumps(
                [
                    {"image": str(path), "prompt": prompt, "reward": _plain(value), "applies": applies}
                    for path, prompt, value, applies in rows
                ],
                indent=1,
            )
        )
    else:
        shown = ["does not apply" if value is None else f"{value:.6g}" for value in values]
        print(_table([("reward", "image", "prompt"), *zip(shown, map(str, args.images), prompts, strict=True)]))
    return NOT_OK if any(value is not None and not math.isfinite(value) for value in values) else 0


def _scores(reward: RewardFunction, pictures: list[Any], prompts: list[str], metadata: list[Any]) -> Scored:
    """In one call if the pictures are of one size, as in a run; otherwise one by one."""
    import torch

    from dpok_trl.rewards.base import Scored, score_batch
    from dpok_trl.rewards.binding import BoundReward, RewardInputs
    from dpok_trl.rewards.pictures import to_tensor

    bound = BoundReward(reward)
    one_call = bound.wants_groups or len({picture.size for picture in pictures}) == 1
    rows = range(len(pictures))
    parts = [
        score_batch(
            bound,
            RewardInputs(
                to_tensor([pictures[row] for row in some]),
                tuple(prompts[row] for row in some),
                tuple(metadata[row] for row in some),
            ),
        )
        for some in ([rows] if one_call else [[row] for row in rows])
    ]
    return Scored(torch.cat([part.values for part in parts]), torch.cat([part.applies for part in parts]), None)


# --- arguments --------------------------------------------------------------------------------------------------------


def _picture(path: Path) -> Any:
    from PIL import Image

    with Image.open(path) as picture:  # an OSError names the file
        return picture.convert("RGB")


def _one_each(prompts: list[str], count: int) -> list[str]:
    if len(prompts) == 1:
        return prompts * count
    if len(prompts) != count:
        raise ValueError(
            f"--prompt was given {len(prompts)} times for {count} pictures: give it once, or once for each."
        )
    return prompts


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are written as words."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value
