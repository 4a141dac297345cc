# /// script
# requires-python = ">=3.10"
# dependencies = ["dpok-trl"]
# ///
"""The supervised baseline of the DPOK paper, beside which to see reinforcement learning: no download, no GPU.

    python examples/sft_baseline.py
    python examples/sft_baseline.py --sft_kl kl_d --sft_gamma 2 --output_dir kl-d
    python examples/sft_baseline.py --config examples/recipes/demo-sft.yaml

The pretrained model draws images once; it then learns from them by regression, each weighted by its reward. The same model, prompts,
rewards and evaluation as in RL, so the two can be compared: docs/sft.md.
"""

from __future__ import annotations

from dpok_trl import DPOKParser, DPOKSFTConfig, DPOKSFTTrainer
from dpok_trl.demo import load_demo_pipeline
from dpok_trl.demo.command import demo_lora_config


DEFAULTS = {
    "output_dir": "sft-baseline",
    "num_epochs": 20,
    "save_freq": 0,
    "sample_num_steps": 10,
    "sample_guidance_scale": 1.0,
    "sample_batch_size": 64,
    "sample_num_batches_per_epoch": 8,  # drawn once
    "train_batch_size": 64,
    "train_learning_rate": 1e-3,
    "sft_kl": "kl_o",  # KL-O: stay close to what the pretrained model predicts
    "sft_gamma": 1.0,
    "eval_num_images_per_prompt": 64,
}


def main() -> None:
    parser = DPOKParser((DPOKSFTConfig,), description=__doc__.splitlines()[0])
    parser.set_defaults(**DEFAULTS)
    (config,) = parser.parse_args_and_config()

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
    trainer.save_model(trainer.output_dir / "lora")
    evaluation = trainer.evaluate()
    print(evaluation.table())
    print(f"Saved to {evaluation.save(trainer.output_dir / 'evaluation')}")


if __name__ == "__main__":
    main()
