"""`dpok-trl demo`: tune the shipped pipeline on a CPU, compare it with the pretrained one, and leave a page to look at."""

from __future__ import annotations

import argparse
import logging
import math
import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpok_trl.training.presets import PRESETS


if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig

    from dpok_trl.results.evaluation import Evaluation
    from dpok_trl.training.config import DPOKConfig
    from dpok_trl.training.trainer import DPOKTrainer


HELP = "tune the shipped 3-million-parameter Stable Diffusion on this computer, without a download (about two minutes on a CPU)"

PRESET = PRESETS["demo"].values()
IMAGES_PER_EPOCH = PRESET["sample_batch_size"]
STEPS = PRESET["sample_num_steps"]
EPOCHS = PRESET["num_epochs"]
MOST_THREADS = 8  # the network is so small that more threads wait for each other
SAMPLING = {"num_inference_steps": STEPS, "guidance_scale": PRESET["sample_guidance_scale"], "eta": 1.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt",
        default="a green triangle",
        help="also: 'four circles', 'a red square and a blue circle', 'a circle above a square' ...",
    )
    parser.add_argument(
        "--reward",
        choices=["exact", "soft", "greenness"],
        default="soft",
        help="exact: 1 if the picture shows what was asked; soft: partial credit; greenness: any green will do, to see a reward hacked",
    )
    parser.add_argument(
        "--kl-weight", type=_not_negative, default=PRESET["kl_weight"], help="weight of the KL to the pretrained model"
    )
    parser.add_argument("--epochs", type=_positive, default=EPOCHS, help=f"rounds of {IMAGES_PER_EPOCH} images")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training run")
    parser.add_argument("--images", type=_positive, default=64, help="images of the comparison")
    parser.add_argument("--output", type=Path, default=Path("dpok-demo"), help="folder for everything the run leaves")


def run(args: argparse.Namespace) -> int:
    started = time.monotonic()
    from dpok_trl.demo.scenes import parse_prompt

    parse_prompt(args.prompt)  # before anything is loaded
    refuse_other_run(args.output)
    try:
        with only_errors():
            return _run(args, started)
    except KeyboardInterrupt:  # a training says how to resume it, which this command does not
        again = ". The demo cannot be resumed: start it again with another --output" if args.output.exists() else ""
        raise KeyboardInterrupt(f"interrupted{again}") from None


def _run(args: argparse.Namespace, started: float) -> int:
    print("Loading ...", flush=True)
    from dpok_trl.demo import load_demo_pipeline
    from dpok_trl.rewards.registry import load_reward
    from dpok_trl.training.trainer import DPOKTrainer

    threads = limit_threads()
    config = demo_config(args.output, args.epochs, args.kl_weight, args.seed, args.images)
    trainer = DPOKTrainer(
        config,
        {args.reward: load_reward(f"demo-{args.reward}")},  # the shipped one, so that the model card knows it
        [args.prompt],
        load_demo_pipeline(),
        peft_config=demo_lora_config(),
        eval_prompts={"training": [args.prompt]},
        eval_reward_function={name: one for name, one in demo_rewards(args.reward).items() if name != args.reward},
    )
    size = sum(parameter.numel() for parameter in trainer.trainable_layers)
    print(
        f"Prompt “{args.prompt}”, reward {args.reward}: {epochs_in_words(args.epochs)} of {IMAGES_PER_EPOCH} images in {STEPS} steps, LoRA of {size:,} "
        f"parameters, kl_weight {args.kl_weight:g}, {threads} CPU {'thread' if threads == 1 else 'threads'}.",
        flush=True,
    )
    trainer.train()
    trained = time.monotonic() - started
    evaluation = trainer.evaluator.newest
    print(f"\n{evaluation.table()}\n")

    lora = args.output / "lora"
    trainer.save_model(lora)
    difference = reload_difference(trainer.pipeline, lora, args.prompt)
    verdict = "the same pictures" if difference == 0 else "OTHER pictures"
    print(
        f"Loaded into a stock StableDiffusionPipeline, the LoRA draws {verdict}: largest difference of a pixel {difference}."
    )
    page = write_demo_report(args, trainer, evaluation, difference, trained)
    print(f"Report: {page}\nLoRA:   {lora}\nDone in {time.monotonic() - started:.0f} s.", flush=True)
    return 0 if difference == 0 else 1


def demo_config(output: Path, epochs: int, kl_weight: float, seed: int, images: int) -> DPOKConfig:
    """The preset "demo", with what is different from run to run, and an evaluation at the end."""
    from dpok_trl.training.config import DPOKConfig

    return DPOKConfig.preset(
        "demo",
        exp_name="dpok-demo",
        output_dir=str(output),
        accelerator_kwargs={
            "cpu": True
        },  # the same numbers on every machine; a GPU would mostly wait for its next kernel
        seed=seed,
        num_epochs=epochs,
        save_freq=0,
        sample_grid_freq=5,
        kl_weight=kl_weight,
        eval_freq=epochs,
        eval_num_images_per_prompt=images,
    )


def demo_lora_config() -> LoraConfig:
    """Rank 8 on all linear maps and 1x1 convolutions of the transformer blocks, and on the time embeddings of the residual blocks."""
    from peft import LoraConfig

    attention = ["to_q", "to_k", "to_v", "to_out.0"]
    others = ["proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "time_emb_proj"]
    return LoraConfig(r=8, lora_alpha=8, init_lora_weights="gaussian", target_modules=attention + others)


def demo_rewards(reward: str) -> dict[str, Any]:
    """What the evaluation shows: whether the picture is right, how nearly, whether it is clean, and the trained reward."""
    from dpok_trl.demo.world import exact_reward, fidelity, greenness_reward, soft_reward

    def fidelity_scores(images: torch.Tensor, prompts: tuple[str, ...], metadata: Any) -> list[float]:
        return [fidelity(image, prompt) for image, prompt in zip(images, prompts, strict=True)]

    rewards = {"exact": exact_reward, "soft": soft_reward, "fidelity": fidelity_scores}
    if reward == "greenness":
        rewards["greenness"] = greenness_reward
    return rewards


def reload_difference(tuned: StableDiffusionPipeline, lora: Path, prompt: str, images: int = 8) -> float:
    """The largest difference of a pixel value (in [0, 1]) between the tuned pipeline and a stock one that loads the saved LoRA."""
    import torch

    from dpok_trl.demo import load_demo_pipeline

    stock = load_demo_pipeline()
    stock.load_lora_weights(str(lora))
    pictures = []
    for pipeline in (tuned, stock):
        generators = [torch.Generator().manual_seed(seed) for seed in range(images)]
        output = pipeline([prompt] * images, generator=generators, output_type="pt", **SAMPLING)
        pictures.append(output.images)
    return (pictures[0] - pictures[1]).abs().max().item()


def write_demo_report(
    args: argparse.Namespace, trainer: DPOKTrainer, evaluation: Evaluation, difference: float, trained: float
) -> Path:
    from dpok_trl.results.report import write_report

    return write_report(
        args.output,
        f"DPOK on “{args.prompt}”",
        evaluation=evaluation,
        summary=(
            f"A Stable Diffusion of three million parameters that draws coloured shapes, tuned by reinforcement learning on the reward "
            f"“{args.reward}” for {epochs_in_words(args.epochs)} of {IMAGES_PER_EPOCH} images, with {args.kl_weight:g} times the KL to the pretrained model. "
            f"Exact is 1 where a picture shows what was asked, all of it and nothing else; soft gives partial credit; fidelity says how much a "
            f"picture looks like one of this world, whatever it shows."
        ),
        command=shlex.join(command_line(args)),
        config=trainer.config.to_dict(),
        facts={
            "Time": f"{trained:.0f} s to load, train and evaluate",
            "Adapter": f"{sum(parameter.numel() for parameter in trainer.trainable_layers):,} parameters, LoRA of rank 8",
            "Saved LoRA": f"in lora/; a stock StableDiffusionPipeline draws from it the same pictures (largest difference of a pixel: {difference})"
            if difference == 0
            else f"in lora/; a stock StableDiffusionPipeline draws other pictures from it (largest difference of a pixel: {difference})",
        },
        reduction=trainer.config.train_log_prob_reduction,
        device=trainer.accelerator.device,
    )


def epochs_in_words(epochs: int) -> str:
    return f"{epochs} epoch{'s' if epochs > 1 else ''}"


def command_line(args: argparse.Namespace) -> list[str]:
    """What to type for this run, all options spelled out."""
    names = ("prompt", "reward", "kl_weight", "epochs", "seed", "images", "output")
    options = [[f"--{name.replace('_', '-')}", str(getattr(args, name))] for name in names]
    return ["dpok-trl", "demo", *(word for option in options for word in option)]


def refuse_other_run(output: Path) -> None:
    """Raises `FileExistsError` for a folder that holds anything: nothing of another run is overwritten or mixed into this one."""
    if output.is_dir() and any(output.iterdir()):
        what = "another run" if (output / "metrics.jsonl").exists() else "other files"
        raise FileExistsError(f"{output} holds {what}. Give a new folder with --output, or remove that one.")
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file. Give a folder with --output.")


def limit_threads() -> int:
    """Sets the number of torch's threads, and returns it: half the cores that this process may use. OMP_NUM_THREADS, where set, holds.

    With one on every core an idle machine of two cores is a third faster, and a busy one up to a hundred times slower: threads of OpenMP
    wait for each other at every operation, and each for a core that something else holds.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        # torch counts the machine's cores; a container may be allowed fewer
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cpu_quota(), MOST_THREADS) // 2))
    return torch.get_num_threads()


def cpu_quota(path: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that a container's quota (cgroup v2) allows, rounded up; as many as there are without a quota."""
    cores = os.cpu_count() or 1
    if not path.exists():
        return cores
    quota, period = path.read_text().split()
    return cores if quota == "max" else max(1, math.ceil(int(quota) / int(period)))


@contextmanager
def only_errors() -> Iterator[None]:
    """Without the libraries' notes: on torchvision, which nothing here needs, on a LoRA that has no part for the text encoder, and on torchao's kernels
    where it is installed without a GPU."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [(library, library.get_verbosity()) for library in (diffusers_logging, transformers_logging)]
    loggers = [(logger, logger.level) for logger in map(logging.getLogger, ("torchao", "torch.utils._pytree"))]
    for library, _ in before:
        library.set_verbosity_error()
    for logger, _ in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for library, verbosity in before:
            library.set_verbosity(verbosity)
        for logger, level in loggers:
            logger.setLevel(level)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{value} is not a number of at least 0")
    return value
