"""What each of two processes does in test_evaluating.py, and what one does alone. The former are launched by torchrun; not collected by pytest."""

import os
import sys
from pathlib import Path


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import conftest  # noqa: F401  (offline, one thread)

import torch
from tiny import nudge, stable_diffusion

from dpok_trl import DPOKConfig, DPOKTrainer, RewardError


SETS = {"training": ["a cat", "two dogs"], "held-out": ["3 birds", "a fox", "an owl"]}


def red(images, prompts, metadata):
    return images[:, 0].mean((1, 2)), {}


class Spread:
    """A reward of all images of a prompt together."""

    wants_groups = True

    def __call__(self, images, prompts):
        assert len(images) == 3 and len(set(prompts)) == 1
        return [float(len(images))] * 3


def make(folder, held_out):
    config = DPOKConfig(
        output_dir=str(folder),
        num_epochs=1,
        save_freq=0,
        sample_grid_freq=0,
        sample_num_steps=2,
        sample_guidance_scale=1.0,
        sample_batch_size=2,
        sample_num_batches_per_epoch=1,
        train_batch_size=2,
        eval_freq=1,
        eval_num_images_per_prompt=3,
        eval_batch_size=2,
    )
    pipe = stable_diffusion()
    trainer = DPOKTrainer(config, red, ["a cat"], pipe, eval_prompts=SETS, eval_reward_function=held_out)
    nudge(trainer.policy.networks)
    return trainer


def numbers(evaluation):
    return {name: (one.tuned.scores, one.base.scores, one.tuned.path_kl, one.tuned.features, one.base.features, one.tuned.pictures, one.base.pictures)
            for name, one in evaluation.sets.items()}  # fmt: skip


def everything(folder):
    out = {}
    for name, held_out in (("alone", None), ("with a group", Spread())):
        trainer = make(folder / name, held_out)
        evaluation = trainer.evaluate()
        out[name] = numbers(evaluation), evaluation.table()
    processes, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    trainer.train()
    out["metrics"] = {name: value for name, value in trainer.last_metrics.items() if name.startswith("eval/")}

    def fails_on_the_last(images, prompts, metadata):
        if rank == processes - 1:
            raise ConnectionError("no route to host")
        return red(images, prompts, metadata)

    try:
        make(folder / "fails", fails_on_the_last).evaluate()
    except RewardError as error:
        out["fails"] = str(error)
    return out, rank


if __name__ == "__main__":
    found, process = everything(Path(sys.argv[1]))
    torch.save(found, Path(sys.argv[1]) / f"rank-{process}.pt")
    torch.distributed.barrier()
    # Without Python's shutdown, in which a thread of gloo may abort the process (see `let_gloo_threads_finish`): it ends right after a collective.
    os._exit(0)
