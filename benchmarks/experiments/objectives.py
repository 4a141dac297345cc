"""4. The objective, where samples are used again: by further passes over a round, or from a buffer of rounds."""

from __future__ import annotations

from arms import Arm, rl
from runner import Run


SEEDS = range(3)
TASK = "count"
OBJECTIVES = {
    "dpok": {"train_objective": "dpok"},
    "ppo": {"train_objective": "ppo"},
    # in nats; a shift of the mean by 0.2 standard deviations
    "kl_mask": {"train_objective": "kl_mask", "train_kl_threshold": 0.02},
}
# (rounds in the buffer, passes over each round)
REUSE = ((1, 1), (2, 1), (3, 1), (1, 2), (1, 4))
ROUNDS = 12  # half of what the other experiments have: it is about learning more from fewer images


def arms(quick: bool) -> list[Arm]:
    return [
        Arm(
            f"{name}, {rounds} {'round' if rounds == 1 else 'rounds'}, {passes} {'pass' if passes == 1 else 'passes'}",
            lambda task, seed, own={**own, "num_epochs": ROUNDS, "train_buffer_rounds": rounds, "train_num_inner_epochs": passes}: (
                rl(task, seed, quick, **own)
            ),
        )
        for name, own in OBJECTIVES.items()
        for rounds, passes in REUSE
    ]


def runs(quick: bool = False) -> list[Run]:
    return [arm.run(TASK, seed) for seed in SEEDS for arm in arms(quick)]
