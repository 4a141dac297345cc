"""What each of two processes does in test_tracking.py. Launched by torchrun; not collected by pytest."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: F401  (offline, one thread)
from tiny import stable_diffusion

from dpok_trl import DPOKConfig, DPOKTrainer


def red(images, prompts, metadata):
    return images[:, 0].mean((1, 2)), {}


config = DPOKConfig(
    output_dir=sys.argv[1],
    num_epochs=2,
    save_freq=0,
    log_with="tensorboard",
    sample_num_steps=2,
    sample_batch_size=4,
    sample_num_batches_per_epoch=1,
    train_batch_size=2,
)
DPOKTrainer(config, red, ["a cat", "two dogs"], stable_diffusion()).train()
