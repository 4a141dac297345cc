"""1. The paper's figure: the pretrained model, supervised fine-tuning and RL on the four tasks, and a reward that can be hacked."""

from __future__ import annotations

from arms import TASKS, rl, sft
from runner import Run


SEEDS = range(5)
KL_WEIGHTS = (0.0, 0.02, 0.1)
HACKED_KL_WEIGHTS = (0.0, 0.02, 0.1, 0.5)
SUPERVISED = {
    "reward-weighted": {},
    "KL-D, γ = 0.3": {"sft_kl": "kl_d", "sft_gamma": 0.3},
    "KL-D, γ = 2": {"sft_kl": "kl_d", "sft_gamma": 2.0},
    "KL-O, γ = 0.3": {"sft_kl": "kl_o", "sft_gamma": 0.3},
    "KL-O, γ = 2": {"sft_kl": "kl_o", "sft_gamma": 2.0},
    "best half, KL-O, γ = 0.3": {"sft_loss": "filtered", "sft_kl": "kl_o", "sft_gamma": 0.3},
}
BEST_OF = (1, 2, 4, 8, 16, 32, 64)


def runs(quick: bool = False) -> list[Run]:
    found = [
        Run("base", {"task": task, "images": 8 if quick else 1024, "best_of": [1, 2] if quick else BEST_OF})
        for task in TASKS
    ]
    for seed in SEEDS:
        found += [rl(task, seed, quick, kl_weight=weight) for weight in KL_WEIGHTS for task in TASKS]
        found += [rl("color", seed, quick, reward="greenness", kl_weight=weight) for weight in HACKED_KL_WEIGHTS]
        found += [sft(task, seed, quick, **changes) for changes in SUPERVISED.values() for task in TASKS]
    return found
