"""`dpok-trl sample`: pictures of a tuned model beside those of its base, from the same seeds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from dpok_trl.policy.shipped import DEMO


if TYPE_CHECKING:
    from PIL.Image import Image

    from dpok_trl.policy.policy import Policy


HELP = "draw with a tuned model and with its base: same prompts, same seeds, one picture of all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder that `save_model` or a run left, or its Hub id")
    parser.add_argument(
        "--prompts",
        nargs="+",
        required=True,
        metavar="PROMPT",
        help="prompts, files of them (txt, csv, json ...), names of lists, ids of datasets",
    )
    parser.add_argument(
        "--base",
        help=f"the pretrained pipeline: Hub id, folder, or '{DEMO}' for the one that is shipped (default: what the model says it was trained on)",
    )
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--images", type=_positive, default=4, help="images of each prompt, of the seeds 0, 1, 2 ...")
    seeds.add_argument("--seeds", type=_seed, nargs="+", metavar="SEED", help="the seeds themselves")
    parser.add_argument("--steps", type=_positive, help="denoising steps (default: as in training)")
    parser.add_argument("--guidance-scale", type=float, help="of the call (default: as in training)")
    parser.add_argument("--batch-size", type=_positive, default=4, help="images drawn at a time")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="of the base (default: diffusers' own)")
    parser.add_argument("--device", help="such as cuda:1 (default: cuda where there is one, else cpu)")
    parser.add_argument("--output", type=Path, default=Path("grid.png"), help="file of the picture")


def run(args: argparse.Namespace) -> int:
    from dpok_trl.demo.command import only_errors

    with only_errors():
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    import torch
    from PIL.Image import registered_extensions

    from dpok_trl.policy.saved import base_model, find_model
    from dpok_trl.policy.saved_policy import load_policy
    from dpok_trl.prompts.reading import read_prompts
    from dpok_trl.results.pictures import stacked

    # what needs no model first: to load one may take minutes
    if args.output.suffix.lower() not in registered_extensions():
        raise ValueError(f"--output {args.output} is no name of a picture: give one that ends in .png, .jpg or .webp.")
    prompts = [prompt for prompt, _ in read_prompts(args.prompts)]
    seeds = args.seeds or list(range(args.images))
    folder = find_model(args.model)
    base = args.base or base_model(folder)
    if base is None:
        raise ValueError(
            f"nothing in {args.model} says which pipeline this was trained on: give it with --base (--base {DEMO} for the one that is shipped)."
        )
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    print(f"Loading {base} and {folder} ...", flush=True)
    policy = load_policy(
        base,
        folder,
        device,
        args.dtype,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance_scale,
    )
    print(f"Drawing {len(prompts) * len(seeds)} images of each of the two models on {device} ...", flush=True)
    grid = stacked([prompt_grid(policy, prompt, seeds, args.batch_size) for prompt in prompts])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    grid.save(args.output)
    print(f"Saved to {args.output}.")
    return 0


def prompt_grid(policy: Policy, prompt: str, seeds: Sequence[int], batch_size: int) -> Image:
    """The pictures of one prompt, those of the base above."""
    from dpok_trl.results.pictures import pair_grid

    rows = [draw(policy, prompt, seeds, batch_size, pretrained=pretrained) for pretrained in (True, False)]
    return pair_grid((rows[0], rows[1]), ("base", "tuned"), [(f"seed {seed}", "") for seed in seeds], prompt)


def draw(
    policy: Policy, prompt: str, seeds: Sequence[int], batch_size: int, *, pretrained: bool = False
) -> list[Image]:
    from dpok_trl.results.pictures import to_pil

    pictures = []
    with policy.pretrained() if pretrained else nullcontext():
        for first in range(0, len(seeds), batch_size):
            some = seeds[first : first + batch_size]
            pictures += to_pil(policy.rollout([prompt] * len(some), list(some)).images)
    return pictures


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is not at least 0")
    return value
