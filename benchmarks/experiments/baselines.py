"""2. What is taken from a reward before it becomes an advantage: the mean of the round, of the prompt, of the others, or what V expects."""

from __future__ import annotations

from arms import TASKS, Arm, rl
from runner import Run


SEEDS = range(3)
BASELINES = {
    "batch": {"train_adv_type": "batch"},
    "group": {"train_adv_type": "group"},
    "leave-one-out": {"train_adv_type": "leave_one_out"},
    "V of latents": {"train_adv_type": "value", "value_input": "latents"},
    "V of features": {"train_adv_type": "value", "value_input": "features"},
}
ALONE = ("batch", "V of latents", "V of features")  # of one prompt, the others are `batch` but for a factor of 63 / 64


def jointly(quick: bool) -> list[Arm]:
    """Four prompts in a round, 16 images of each."""
    rounds = {"sample_num_images_per_prompt": 2} if quick else {"num_epochs": 48, "sample_num_images_per_prompt": 16}
    return [
        Arm(name, lambda task, seed, own=own: rl(TASKS, seed, quick, **rounds, **own))
        for name, own in BASELINES.items()
    ]


def alone(quick: bool) -> list[Arm]:
    return [Arm(name, lambda task, seed, own=BASELINES[name]: rl(task, seed, quick, **own)) for name in ALONE]


def runs(quick: bool = False) -> list[Run]:
    found = []
    for seed in SEEDS:
        found += [arm.run(TASKS[0], seed) for arm in jointly(quick)]
        found += [arm.run("count", seed) for arm in alone(quick)]
    return found
