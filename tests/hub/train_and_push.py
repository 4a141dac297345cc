"""Trains an adapter on each family's base of the Hub and pushes it. Run by test_round_trip.py, in one process and in two."""

import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from hub_families import MAKE, call, image, red

from dpok_trl import DPOKConfig, DPOKTrainer
from dpok_trl.policy.loading import load_pipeline


FOLDER, OWNER, EPOCHS = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])


def train(family: str) -> DPOKTrainer:
    pipe = load_pipeline(f"someone/tiny-{family}")
    pipe.set_progress_bar_config(disable=True)
    arguments = call(pipe)
    config = DPOKConfig(
        output_dir=str(FOLDER / family),
        tracker_kwargs={"wandb": {"entity": "a-secret-team"}},
        num_epochs=EPOCHS,
        save_freq=1,
        sample_grid_freq=0,
        sample_num_steps=arguments.pop("num_inference_steps"),
        sample_guidance_scale=arguments.pop("guidance_scale"),
        sample_call_kwargs=arguments,
        sample_batch_size=2,
        sample_num_batches_per_epoch=1,
        train_batch_size=2,
        train_learning_rate=1e-2,
        train_lora_rank=2,
        train_lora_alpha=6,
        push_to_hub=True,
        hub_model_id=f"{OWNER}/{family}-lora",
        hub_strategy="checkpoint" if family == "sd" else "end",
        hub_private_repo=family == "sdxl",
    )
    trainer = DPOKTrainer(config, red, ["a cat"], pipe)
    trainer.train()
    return trainer


for family in MAKE:
    trainer = train(family)
    if trainer.accelerator.is_main_process:
        torch.save(image(trainer.pipeline), FOLDER / f"{family}.pt")
    trainer.accelerator.wait_for_everyone()
    AcceleratorState._reset_state()
    GradientState._reset_state()
