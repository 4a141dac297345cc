"""CPU time per image of TRL's DDPOTrainer and of ours at the same work.

    python cost.py --trl-env FOLDER [--batches 4 16 64] [--rounds 5] [--epochs 6] [--output cost.json]

FOLDER is an environment by `make_trl_env.sh` (default: $DPOK_TRL_ENV). For each training batch size, the variants run one after another, each in a process of
its own, and that `--rounds` times: whatever slows the machine for a while slows all of them. Each run draws 64 images an epoch in 10 steps and trains the same
adapter on all 10 of each, at a constant learning rate, with one optimizer step for each training batch and all of its steps; that the numbers of optimizer steps
agree is checked. A run's figure is the median of its epochs after the first two, and after the first three with `torch.compile`; what those took more is the
column `start`. Ratios are to the first variant within a round: their median, and their quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from result import seconds_per_image


HERE = Path(__file__).resolve().parent
IMAGES = 64
VARIANTS = ("trl", "ours", "ours-kl", "compiled", "compiled-kl")
KL_WEIGHT = 0.02


def settings_of(variant: str, batch: int, arguments: argparse.Namespace, kernels: str) -> dict[str, Any]:
    """Of one run: the same work, said to each side in its own words."""
    common = {"epochs": arguments.epochs, "threads": arguments.threads, "eval_images": 0}
    learning_rate = 1e-3 * batch / IMAGES  # moves the policy without spoiling it, however many steps an epoch has
    if variant == "trl":
        sizes = {
            "sample_batch_size": IMAGES,
            "num_batches": 1,
            "train_batch_size": batch,
            "num_steps": arguments.steps,
        }
        return {**common, **sizes, "learning_rate": learning_rate}
    config = {
        "sample_num_steps": arguments.steps,
        "sample_batch_size": IMAGES,
        "sample_num_batches_per_epoch": 1,
        "train_batch_size": batch,
        "train_timesteps_per_update": None,
        "train_learning_rate": learning_rate,
        "train_lr_scheduler": "constant",
        "train_objective": "ppo",  # DDPO's
        "kl_weight": KL_WEIGHT if variant.endswith("-kl") else 0.0,
        "torch_compile": variant.startswith("compiled"),
    }
    return {**common, "compile_cache": kernels, "config": config}


def measure(variant: str, batch: int, arguments: argparse.Namespace, kernels: str) -> dict[str, Any]:
    python, script = (arguments.trl_python, "trl_ddpo.py") if variant == "trl" else (sys.executable, "ours.py")
    settings = settings_of(variant, batch, arguments, kernels)
    done = subprocess.run(
        [python, str(HERE / script), json.dumps(settings)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(arguments.threads)},
    )
    if done.returncode:
        raise RuntimeError(f"{script} failed with {json.dumps(settings)}:\n{done.stderr[-3000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    skip = min(3 if variant.startswith("compiled") else 2, arguments.epochs - 1)
    curve = result["curve"]
    return {
        "variant": variant,
        "batch": batch,
        **seconds_per_image(curve, skip),
        "optimizer_steps": curve[-1]["optimizer_steps"],
        "peak_rss_mb": result["peak_rss_mb"],
        "versions": result["versions"],
    }


def refuse_other_work(runs: list[dict[str, Any]]) -> None:
    """Raises `RuntimeError` unless all runs took the same number of optimizer steps."""
    steps = {run["variant"]: run["optimizer_steps"] for run in runs}
    if len(set(steps.values())) > 1:
        raise RuntimeError(f"not the same work: optimizer steps are {steps}.")


def table(rounds: list[list[dict[str, Any]]], epochs: int) -> list[str]:
    """Rows of a training batch size, one for each variant. Times are medians over the rounds, in CPU milliseconds per image; `start` is that
    of the first round, which finds no compiled kernels, in CPU-seconds."""
    rows = []
    for place, run in enumerate(rounds[0]):
        column = [of_round[place] for of_round in rounds]
        sample, update, total, memory = (
            statistics.median(one[name] for one in column) for name in ("sample", "update", "total", "peak_rss_mb")
        )
        ratios = [of_round[place]["total"] / of_round[0]["total"] for of_round in rounds]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        rows.append(
            f"| {run['batch']} | {run['variant']} | {run['optimizer_steps'] / epochs:g} | {1000 * sample:.1f} | {1000 * update:.1f} | {1000 * total:.1f} "
            f"| {middle:.3f} | {low:.3f} to {high:.3f} | {run['start_up']:.1f} | {memory:.0f} |"
        )
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-env", default=os.environ.get("DPOK_TRL_ENV"), help="TRL's environment")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 16, 64], help="training batch sizes")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="the first is the yardstick")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=6, help="of a run")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="all figures, as JSON")
    parser.add_argument(
        "--quick", action="store_true", help="batch 64, one round of 2 epochs of 2 steps: that it runs"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.batches, arguments.rounds, arguments.epochs, arguments.steps = [IMAGES], 1, 2, 2
    if arguments.epochs < 2:
        parser.error(f"--epochs {arguments.epochs}: those that start up are not counted, so there must be 2 at least")
    if "trl" in arguments.variants and arguments.trl_env is None:
        parser.error("TRL needs an environment of its own: make one by make_trl_env.sh, and give it with --trl-env")
    arguments.trl_python = str(Path(arguments.trl_env or "") / "bin" / "python")
    return arguments


def main() -> None:
    arguments = parse()
    print(
        "| train batch | variant | optimizer steps | sample ms | update ms | ms per image | ratio | quartiles | start s | MiB |"
    )
    print("|--:|---|--:|--:|--:|--:|--:|---|--:|--:|", flush=True)
    figures = {}
    with tempfile.TemporaryDirectory() as kernels:  # compiled once for all rounds
        for batch in arguments.batches:
            rounds = []
            for number in range(arguments.rounds):
                rounds.append([measure(variant, batch, arguments, kernels) for variant in arguments.variants])
                refuse_other_work(rounds[-1])
                print(f"batch {batch}, round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
            print("\n".join(table(rounds, arguments.epochs)), flush=True)
            figures[batch] = rounds
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
