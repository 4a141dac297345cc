# /// script
# requires-python = ">=3.10"
# dependencies = ["dpok-trl"]
# ///
"""A reward of your own, with a column of your own, on the embedded pipeline: no download, no GPU.

    python examples/custom_reward.py --epochs 20

Each prompt comes with the colour that is wanted; the reward is how close the picture's mean colour is to it.
"""

from __future__ import annotations

import argparse

import numpy as np
from peft import LoraConfig
from PIL import Image

from dpok_trl import DPOKConfig, DPOKTrainer, check_reward
from dpok_trl.demo import load_demo_pipeline


PROMPTS = [
    ("a green triangle", {"wanted": (60, 200, 90)}),
    ("four circles", {"wanted": (80, 100, 220)}),
]


def mean_colour(images: list[Image.Image], wanted: list[tuple[int, int, int]]) -> list[float]:
    """1 for a picture of the wanted colour; asks for the pictures and the column `wanted` by their names."""
    means = [np.asarray(image, dtype=np.float32).mean(axis=(0, 1)) for image in images]
    return [1 - float(np.linalg.norm(mean - colour)) / 255 for mean, colour in zip(means, wanted, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64, help="images sampled, and trained on, at once")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps")
    parser.add_argument("--output", default="custom-reward", help="folder for metrics, pictures and checkpoints")
    args = parser.parse_args()

    # Before anything is trained: six sample pictures, and what is wrong with the reward, in words.
    report = check_reward(mean_colour, metadata=[{"wanted": (60, 200, 90)}] * 6)
    print(report)
    if not report.ok:
        raise SystemExit(1)

    config = DPOKConfig(
        output_dir=args.output,
        num_epochs=args.epochs,
        save_freq=0,
        sample_num_steps=args.steps,
        sample_guidance_scale=1.0,
        sample_batch_size=args.batch_size,
        sample_num_batches_per_epoch=1,
        train_batch_size=args.batch_size,
        train_timesteps_per_update=2,
        train_learning_rate=2e-3,
        train_adam_beta2=0.99,
        train_log_prob_reduction="sum",
        train_clip_range=0.2,
        kl_weight=0.02,
    )
    layers = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "time_emb_proj"]
    lora = LoraConfig(r=8, lora_alpha=8, init_lora_weights="gaussian", target_modules=layers)
    trainer = DPOKTrainer(config, mean_colour, PROMPTS, load_demo_pipeline(), peft_config=lora)
    trainer.train()
    trainer.save_model(f"{args.output}/lora")
    print(f"LoRA: {args.output}/lora")


if __name__ == "__main__":
    main()
