"""`dpok-trl evaluate`: what a run has made of its model, on prompts and by rewards that it was trained on, and on others."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpok_trl.policy.shipped import DEMO


if TYPE_CHECKING:
    import torch

    from dpok_trl.rewards.combining import RewardSet


HELP = "compare a tuned model with the one it was made from: same prompts, same seeds"

SETS = {"prompts": "training", "held_out": "held-out", "paraphrased": "paraphrased"}  # option -> name of the set
PROMPTS = "prompts, files of them (txt, csv, json ...), names of lists, or ids of datasets"


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
        "--output", type=Path, default=Path("dpok-evaluation"), help="new folder for tables, numbers and pictures"
    )


def run(args: argparse.Namespace) -> int:
    from dpok_trl.demo.command import only_errors

    with only_errors():
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    import torch

    from dpok_trl.policy.saved import base_model, find_model
    from dpok_trl.policy.saved_policy import load_policy
    from dpok_trl.results.drawing import refuse_less_than_one
    from dpok_trl.results.evaluation import bind_rewards, evaluate
    from dpok_trl.results.evaluation_files import refuse_other_evaluation
    from dpok_trl.results.prompt_sets import read_prompt_sets, refuse_wrong_sets

    # what needs no model first: to load one may take minutes
    refuse_less_than_one(**{"--images": args.images, "--steps": args.steps, "--batch-size": args.batch_size})
    refuse_other_evaluation(args.output)
    sets = prompt_sets(args)
    refuse_wrong_sets(read_prompt_sets(sets), [prompt for prompt, _ in sets.get(SETS["prompts"], [])])
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rewards, held_out = load_rewards(args, device)
    bind_rewards(rewards, held_out, device)
    folder = find_model(args.model)
    base = args.base or base_model(folder)
    if base is None:
        raise ValueError(
            f"neither a model card nor a checkpoint in {args.model} says which pipeline this was trained on: give it with --base (--base {DEMO} for the one that is "
            "shipped)."
        )
    print(f"Loading {base} and {folder} ...", flush=True)
    policy = load_policy(
        base,
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
        rewards,
        held_out_rewards=held_out,
        images_per_prompt=args.images,
        batch_size=args.batch_size,
        seed=args.seed,
        category_column="category",
    )
    evaluation = replace(evaluation, about=about(args.model, base, folder, evaluation.about))
    print(f"\n{evaluation.table()}\n\nSaved to {evaluation.save(args.output)}.")
    return 0


def about(model: str, base: str, folder: Path, others: dict[str, Any]) -> dict[str, Any]:
    """What was evaluated, by its names, and of a checkpoint how far it had come."""
    from dpok_trl.policy.saved import STATE_FILE, is_checkpoint_name
    from dpok_trl.results.provenance import public_word

    found = {"model": public_word(model), "base": public_word(base)}
    if is_checkpoint_name(folder):
        state = json.loads((folder / STATE_FILE).read_text())
        found |= {"checkpoint": folder.name, "epoch": state["epoch"], "step": state["global_step"]}
    return {**others, **found}


# --- what to evaluate on ----------------------------------------------------------------------------------------------


def prompt_sets(args: argparse.Namespace) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """The sets that were given, as (prompt, metadata) pairs.

    Raises:
        `ValueError` or `FileNotFoundError`: Without any, and for a file that cannot be read.
    """
    from dpok_trl.prompts.reading import read_prompts

    given = {name: getattr(args, option) for option, name in SETS.items() if getattr(args, option)}
    if not given:
        raise ValueError(
            "no prompts were given: give those that were trained on with --prompts, and others with --held-out or --paraphrased."
        )
    return {name: read_prompts(items) for name, items in given.items()}


def load_rewards(args: argparse.Namespace, device: torch.device) -> tuple[RewardSet | None, RewardSet | None]:
    """Those that were trained on, and the others.

    Raises:
        `ValueError`: Without any, for one that is given twice, and for one that there is not.
    """
    from dpok_trl.rewards.combining import RewardSet
    from dpok_trl.rewards.registry import SHIPPED, load_on_device

    names = [*args.reward, *args.held_out_reward]
    if not names:
        raise ValueError(
            f"no reward was given: give one or more with --reward (trained on) or --held-out-reward. There are: {', '.join(SHIPPED)}; 'module:function' and "
            "'http://...' work too."
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(
            f"the reward {twice[0]} is given {names.count(twice[0])} times: give it once, with --reward or --held-out-reward."
        )
    trained, held_out = (
        [load_on_device(name, None, default=str(device)) for name in chosen]
        for chosen in (args.reward, args.held_out_reward)
    )
    return RewardSet(trained) if trained else None, RewardSet(held_out) if held_out else None
