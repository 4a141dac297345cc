"""`dpok-trl evaluate`: what a run has made of its model, on prompts and by rewards that it was trained on, and on others."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch


HELP = "compare a tuned model with the one it was made from: same prompts, same seeds"

DEMO = "demo"
SETS = {"prompts": "training", "held_out": "held-out", "paraphrased": "paraphrased"}  # option -> name of the set
PROMPTS = "prompts, files of them (txt, csv, json ...), or names of shipped lists"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", help="folder that `save_model` or a run left (a checkpoint, or a run with checkpoints), or its Hub id"
    )
    parser.add_argument(
        "--base",
        help=f"the pretrained pipeline: Hub id, folder, or '{DEMO}' for the one that is shipped (default: what the model says it was trained on)",
    )
    parser.add_argument("--prompts", nargs="+", metavar="PROMPT", help=f"those that were trained on: {PROMPTS}")
    parser.add_argument("--held-out", nargs="+", metavar="PROMPT", help="others, likewise")
    parser.add_argument("--paraphrased", nargs="+", metavar="PROMPT", help="the same in other words, likewise")
    parser.add_argument(
        "--reward",
        nargs="+",
        default=[],
        metavar="NAME",
        help="what was trained on: name of a shipped reward, module:function, or an address",
    )
    parser.add_argument("--held-out-reward", nargs="+", default=[], metavar="NAME", help="others, likewise")
    parser.add_argument("--images", type=int, default=4, help="images of each prompt")
    parser.add_argument("--seed", type=int, default=0, help="of the first image of a set; the others count on")
    parser.add_argument("--steps", type=int, help="denoising steps (default: as in training)")
    parser.add_argument("--guidance-scale", type=float, help="of the call (default: as in training)")
    parser.add_argument("--batch-size", type=int, default=4, help="images drawn at a time")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="of the base (default: diffusers' own)")
    parser.add_argument("--device", help="such as cuda:1 (default: cuda where there is one, else cpu)")
    parser.add_argument(
        "--output", type=Path, default=Path("dpok-evaluation"), help="folder for tables, numbers and pictures"
    )


def run(args: argparse.Namespace) -> int:
    from dpok_trl.demo.command import only_errors

    with only_errors():
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    import torch

    from dpok_trl.demo import demo_pipeline_path
    from dpok_trl.policy.saved import base_model, find_model
    from dpok_trl.policy.saved_policy import load_policy
    from dpok_trl.results.evaluation import evaluate
    from dpok_trl.results.prompt_sets import read_prompt_sets, refuse_training_prompts

    # what needs no model first: to load one may take minutes
    sets = prompt_sets(args)
    refuse_training_prompts(read_prompt_sets(sets), [prompt for prompt, _ in sets.get(SETS["prompts"], [])])
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rewards, held_out = (load_rewards(names, device) for names in (args.reward, args.held_out_reward))
    if not rewards and not held_out:
        from dpok_trl.rewards.registry import SHIPPED

        raise ValueError(
            f"no reward was given: give one or more with --reward (trained on) or --held-out-reward. There are: {', '.join(SHIPPED)}; 'module:function' and "
            "'http://...' work too."
        )
    folder = find_model(args.model)
    args.base = args.base or base_model(folder)
    if args.base is None:
        raise ValueError(
            f"neither a model card nor a checkpoint in {folder} says which pipeline this was trained on: give it with --base."
        )
    print(f"Loading {args.base} and {folder} ...", flush=True)
    policy = load_policy(
        demo_pipeline_path() if args.base == DEMO else args.base,
        folder,
        device,
        args.dtype,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance_scale,
    )
    count = sum(map(len, sets.values())) * args.images
    print(f"Drawing {count} images of each of the two models on {device} ...", flush=True)
    evaluation = evaluate(
        policy,
        sets,
        rewards or None,
        held_out_rewards=held_out or None,
        images_per_prompt=args.images,
        batch_size=args.batch_size,
        seed=args.seed,
        category_column="category",
    )
    print(f"\n{evaluation.table()}\n\nSaved to {evaluation.save(args.output)}.")
    return 0


# --- what to evaluate on ----------------------------------------------------------------------------------------------


def prompt_sets(args: argparse.Namespace) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """The sets that were given, as (prompt, metadata) pairs.

    Raises:
        `ValueError` or `FileNotFoundError`: Without any, and for a file that cannot be read.
    """
    given = {name: getattr(args, option) for option, name in SETS.items() if getattr(args, option)}
    if not given:
        raise ValueError(
            "no prompts were given: give those that were trained on with --prompts, and others with --held-out or --paraphrased."
        )
    return {name: [pair for item in items for pair in read_prompts(item)] for name, items in given.items()}


def read_prompts(item: str) -> list[tuple[str, dict[str, Any]]]:
    """What one argument stands for: a prompt, a file of prompts, or a shipped list."""
    from dpok_trl.prompts import load_prompts
    from dpok_trl.prompts.datasets import shipped_lists

    path = Path(item).expanduser()
    if path.is_file() or item in shipped_lists():
        rows = load_prompts(str(path) if path.is_file() else item)
        return [(row["prompt"], {name: value for name, value in row.items() if name != "prompt"}) for row in rows]
    if path.suffix in (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet"):
        raise FileNotFoundError(f"there is no file {item}.")
    return [(item, {})]


def load_rewards(names: list[str], device: torch.device) -> list[Callable[..., Any]]:
    from dpok_trl.rewards.registry import load_on_device

    return [load_on_device(name, None, default=str(device)) for name in names]
