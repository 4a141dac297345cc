# /// script
# requires-python = ">=3.10"
# dependencies = ["dpok-trl"]
# ///
"""Several rewards with weights, on the embedded pipeline: no download, no GPU.

    python examples/multi_reward.py --epochs 20 --weights 1 0.5 0.2

"demo-soft" says whether the picture is right, "jpeg-compressibility" (clipped: beyond a point, plainer is no better) keeps it clean, and
"diversity" keeps the pictures of one prompt from becoming all alike. Their scales differ, so each is normalised over the pictures of its
prompt before they are added. With a GPU and real weights the same list may say "image-reward", "pickscore", "aesthetic" ...
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from peft import LoraConfig

from dpok_trl import Clipped, DPOKConfig, DPOKTrainer
from dpok_trl.demo import load_demo_pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--weights", type=float, nargs=3, default=[1.0, 0.5, 0.2], help="right, clean, diverse")
    parser.add_argument("--group-size", type=int, default=8, help="images of each prompt")
    parser.add_argument("--batch-size", type=int, default=64, help="images sampled, and trained on, at once")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps")
    parser.add_argument("--output", default="multi-reward", help="folder for metrics, pictures and checkpoints")
    args = parser.parse_args()

    rewards = {
        "right": "demo-soft",
        "clean": Clipped("jpeg-compressibility", high=-0.9),
        "diverse": "diversity",
    }
    config = DPOKConfig(
        output_dir=args.output,
        num_epochs=args.epochs,
        save_freq=0,
        reward_weights=args.weights,
        reward_aggregation="normalize_then_sum",
        sample_num_images_per_prompt=args.group_size,
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
    prompts = ["a green triangle", "four circles", "a red square and a blue circle", "a circle above a square"]
    trainer = DPOKTrainer(config, rewards, prompts, load_demo_pipeline(), peft_config=lora)
    trainer.train()

    lines = [json.loads(line) for line in Path(args.output, "metrics.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if "reward" in line]
    for name in rewards:
        first, last = (line[f"rewards/{name}/mean"] for line in (rounds[0], rounds[-1]))
        print(f"{name}: {first:.3f} -> {last:.3f}")


if __name__ == "__main__":
    main()
