# /// script
# requires-python = ">=3.10"
# dependencies = ["dpok-trl"]
# ///
"""Prompts from a datasets.Dataset, with categories and weights, and an evaluation on held-out prompts: no download, no GPU.

    python examples/train_dataset.py --epochs 20

Counting is harder for the shipped pipeline than colours, so prompts of that category are drawn three times as often. Rewards are logged for
each category, and at the end the tuned model is compared with the pretrained one on prompts and by a reward that it was not trained on.
"""

from __future__ import annotations

import argparse

from dpok_trl import DPOKConfig, DPOKTrainer, load_prompts
from dpok_trl.demo import load_demo_pipeline
from dpok_trl.demo.command import demo_lora_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64, help="images sampled, and trained on, at once")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps")
    parser.add_argument("--eval-images", type=int, default=16, help="images of each prompt in the evaluation")
    parser.add_argument("--output", default="train-dataset", help="folder for metrics, pictures and checkpoints")
    args = parser.parse_args()

    # Columns "prompt" and "category". Any dataset of the Hub, csv, json or txt file will do: load_prompts("my-prompts.csv").
    prompts = load_prompts("demo")
    prompts = prompts.add_column("weight", [3.0 if row["category"] == "count" else 1.0 for row in prompts])
    held_out = load_prompts("demo-unseen").filter(lambda row: row["kind"] == "held out")

    config = DPOKConfig.preset(
        "demo",
        output_dir=args.output,
        num_epochs=args.epochs,
        save_freq=0,
        sample_num_steps=args.steps,
        sample_batch_size=args.batch_size,
        train_batch_size=args.batch_size,
        sample_weight_column="weight",
        sample_category_column="category",
        eval_freq=args.epochs,
        eval_num_images_per_prompt=args.eval_images,
    )
    trainer = DPOKTrainer(
        config,
        "demo-soft",
        prompts,
        load_demo_pipeline(),
        peft_config=demo_lora_config(),
        eval_prompts={"training": prompts, "held-out": held_out},
        eval_reward_function="demo-exact",
    )
    trainer.train()
    trainer.save_model(f"{args.output}/lora")
    print(f"LoRA: {args.output}/lora, tuned against pretrained: {args.output}/evaluation/evaluation.md")


if __name__ == "__main__":
    main()
