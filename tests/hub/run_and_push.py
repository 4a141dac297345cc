"""Runs whose pushes fail in one way or another: what each raised and said. Run by test_failing_pushes.py."""

import json
import logging
import os
import sys
import time
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from hub_families import red
from huggingface_hub import snapshot_download
from tiny import stable_diffusion

from dpok_trl import DPOKConfig, DPOKTrainer


FOLDER = Path(sys.argv[1])
time.sleep = lambda seconds: None  # between tries


class Said(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def run(name: str, token: str | None = "hf_me", resume=None, epochs: int = 2, **settings) -> tuple[dict, DPOKTrainer]:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    os.environ.pop("HF_TOKEN", None)
    if token is not None:
        os.environ["HF_TOKEN"] = token
    config = DPOKConfig(
        output_dir=str(FOLDER / name),
        num_epochs=epochs,
        save_freq=1,
        sample_grid_freq=0,
        sample_num_steps=2,
        sample_guidance_scale=1.0,
        sample_batch_size=2,
        sample_num_batches_per_epoch=1,
        train_batch_size=2,
        push_to_hub=True,
        **settings,
    )
    said = Said()
    logging.getLogger("dpok_trl").addHandler(said)
    trainer = DPOKTrainer(config, red, ["a cat"], stable_diffusion())
    trainer.pipeline.set_progress_bar_config(disable=True)
    raised = None
    try:
        trainer.train(resume_from_checkpoint=resume)
    except OSError as error:
        raised = f"{type(error).__name__}: {error}"
    logging.getLogger("dpok_trl").removeHandler(said)
    return {"raised": raised, "said": said.messages, "epochs": trainer.first_epoch}, trainer


def adapter(trainer: DPOKTrainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.trainable_layers]


found = {}
for name, settings in {
    "late": {"hub_model_id": "me/late"},  # the Hub does not answer before training, and does after it
    "down": {"hub_model_id": "me/down", "hub_strategy": "every_save"},
    "no-token": {"hub_model_id": "me/x", "token": None},
    "bad-token": {"hub_model_id": "me/x", "token": "hf_wrong"},
    "theirs": {"hub_model_id": "you/theirs"},
    "bad-name": {"hub_model_id": "me/rabbit lora"},
}.items():
    found[name], _ = run(name, **settings)

# A run that ends after two epochs, and goes on elsewhere from what it pushed.
settings = {"hub_model_id": "me/resumed", "hub_strategy": "checkpoint"}
run("first", epochs=2, **settings)
pushed = snapshot_download("me/resumed", allow_patterns="last-checkpoint/*")
found["resumed"], resumed = run("second", epochs=3, resume=f"{pushed}/last-checkpoint", **settings)
_, whole = run("whole", epochs=3, hub_model_id="me/whole")
found["resumed"]["identical"] = all(map(torch.equal, adapter(resumed), adapter(whole)))
print(json.dumps(found))
