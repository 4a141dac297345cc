"""What each of two processes does in test_sft_runs.py. Launched by torchrun; not collected by pytest."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: F401  (offline, one thread)
import datasets
import numpy as np
import torch
from PIL import Image
from tiny import stable_diffusion

from dpok_trl import DPOKSFTConfig, DPOKSFTTrainer


FOLDER = Path(sys.argv[1])
RUN = {
    "num_epochs": 3,
    "save_freq": 1,
    "sample_grid_freq": 0,
    "sample_num_steps": 3,
    "sample_guidance_scale": 3.0,
    "sample_batch_size": 4,
    "sample_num_batches_per_epoch": 2,
    "train_batch_size": 4,
    "train_learning_rate": 1e-2,
    "train_timesteps_per_update": 1,
    "sft_kl": "kl_o",
}


def red(images, prompts, metadata):
    return images[:, 0].mean((1, 2)), {}


def make(name, reward=red, prompts=("a cat", "two dogs"), dataset=None, **kwargs):
    config = DPOKSFTConfig(output_dir=str(FOLDER / name), **{**RUN, **kwargs})
    return DPOKSFTTrainer(config, reward, prompts, stable_diffusion(), train_dataset=dataset)


def adapter(trainer):
    return {n: p.detach().clone() for n, p in trainer.policy.named_parameters() if p.requires_grad}


def main():
    out = {}
    for name, parts in (("whole", [3]), ("parts", [1, 3])):
        for epochs in parts:
            trainer = make(name)
            out.setdefault("start", adapter(trainer))
            trainer.train(epochs=epochs, resume_from_checkpoint=epochs == 3 and parts != [3])
        out[name] = {"end": adapter(trainer), "seeds": trainer.data.seeds, "metrics": dict(trainer.last_metrics)}

    pixels = np.random.default_rng(0).integers(0, 256, size=(9, 16, 16, 3), dtype=np.uint8)
    rows = {"image": [Image.fromarray(one) for one in pixels], "prompt": [f"number {row}" for row in range(9)]}
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    trainer = make("dataset", prompts=None, dataset=dataset, num_epochs=1)
    trainer.train()
    out["dataset"] = {"end": adapter(trainer), "prompts": trainer.data.prompts}

    def negative_on_1(images, prompts, metadata):
        return [1.0 if trainer.accelerator.process_index == 0 else -1.0] * len(images)

    trainer = make("negative", negative_on_1)
    try:
        trainer.train()
    except ValueError as error:
        out["negative"] = str(error)
    rank = trainer.accelerator.process_index
    trainer.accelerator.wait_for_everyone()
    torch.save(out, FOLDER / f"rank-{rank}.pt")


if __name__ == "__main__":
    main()
