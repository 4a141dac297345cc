"""5. Four prompts in one adapter, or an adapter for each, from as many images."""

from __future__ import annotations

from arms import TASKS, Arm, rl
from runner import Run


SEEDS = range(3)


def apart(quick: bool) -> Arm:
    return Arm("an adapter for each", lambda task, seed: rl(task, seed, quick))


def jointly(quick: bool) -> list[Arm]:
    """Four times the rounds, of 16 images of each prompt."""
    rounds = {"sample_num_images_per_prompt": 2} if quick else {"num_epochs": 96, "sample_num_images_per_prompt": 16}
    return [
        Arm(
            f"one adapter, baseline of the {whose}",
            lambda task, seed, kind=kind: rl(
                TASKS, seed, quick, **rounds, train_adv_type=kind, log_gradient_cosine_freq=1 if quick else 8
            ),
        )
        for kind, whose in (("group", "prompt"),)
    ]


def runs(quick: bool = False) -> list[Run]:
    found = []
    for seed in SEEDS:
        found += [apart(quick).run(task, seed) for task in TASKS]
        found += [arm.run(TASKS[0], seed) for arm in jointly(quick)]
    return found
