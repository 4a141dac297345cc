# /// script
# requires-python = ">=3.10"
# dependencies = ["dpok-trl"]
# ///
"""The supervised baseline of the DPOK paper, beside which to see reinforcement learning: no download, no GPU.

    python examples/sft_baseline.py --epochs 20

The pretrained model draws images once; it then learns from them by regression, each weighted by its reward. The same model, prompts,
rewards and evaluation as in RL, so the two can be compared: docs/sft.md.
"""

from __future__ import annotations

import argparse

from dpok_trl import DPOKSFTConfig, DPOKSFTTrainer
from dpok_trl.demo import load_demo_pipeline
from dpok_trl.demo.command import demo_lora_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64, help="images sampled, and trained on, at once")
    parser.add_argument("--batches", type=int, default=8, help="batches that are drawn, once")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps")
    parser.add_argument("--gamma", type=float, default=1.0, help="weight of the KL's surrogate")
    parser.add_argument("--eval-images", type=int, default=64, help="images of each prompt in the evaluation")
    parser.add_argument("--output", default="sft-baseline", help="folder for metrics, pictures and checkpoints")
    args = parser.parse_args()

    config = DPOKSFTConfig(
        output_dir=args.output,
        num_epochs=args.epochs,
        save_freq=0,
        sample_num_steps=args.steps,
        sample_guidance_scale=1.0,
        sample_batch_size=args.batch_size,
        sample_num_batches_per_epoch=args.batches,
        train_batch_size=args.batch_size,
        train_learning_rate=1e-3,
        sft_kl="kl_o",  # KL-O: stay close to what the pretrained model predicts
        sft_gamma=args.gamma,
    )
    trainer = DPOKSFTTrainer(
        config,
        "demo-soft",  # in [0, 1]: weights must not be negative
        ["a green triangle"],
        load_demo_pipeline(),
        peft_config=demo_lora_config(),
        eval_prompts=["a green triangle"],
        eval_reward_function="demo-exact",
    )
    trainer.train()
    trainer.save_model(f"{args.output}/lora")
    evaluation = trainer.evaluate(images_per_prompt=args.eval_images)
    print(evaluation.table())
    print(f"Saved to {evaluation.save(f'{args.output}/evaluation')}")


if __name__ == "__main__":
    main()
