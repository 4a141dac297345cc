"""3. The KL term: the exact KL of a step or the squared difference of the noise, the paper's gradient or the exact one; and how tight the bound is."""

from __future__ import annotations

from arms import Arm, rl
from runner import Run


SEEDS = range(3)
TASKS = ("color", "count")
TERMS = {
    "gaussian, paper": ({"kl_type": "gaussian", "kl_gradient": "paper"}, (0.02, 0.1)),
    "gaussian, exact": ({"kl_type": "gaussian", "kl_gradient": "exact"}, (0.02, 0.1)),
    "noise, paper": ({"kl_type": "noise", "kl_gradient": "paper"}, (0.005, 0.02, 0.1)),
}
BOUND_KL_WEIGHTS = (0.0, 0.02, 0.1)


def arms(quick: bool) -> list[Arm]:
    return [
        Arm(f"{name}, {weight:g}", lambda task, seed, own={**own, "kl_weight": weight}: rl(task, seed, quick, **own))
        for name, (own, weights) in TERMS.items()
        for weight in weights
    ]


def bounds(quick: bool) -> list[Arm]:
    """Trained like the others, with what the KL between the distributions of images is at least."""

    def bound(task: str, seed: int, weight: float) -> Run:
        settings = {**rl(task, seed, quick, kl_weight=weight).settings, "pairs": 64 if quick else 2048}
        return Run("bound", settings)

    return [
        Arm(f"{weight:g}", lambda task, seed, weight=weight: bound(task, seed, weight)) for weight in BOUND_KL_WEIGHTS
    ]


def runs(quick: bool = False) -> list[Run]:
    found = []
    for seed in SEEDS:
        found += [arm.run(task, seed) for arm in arms(quick) for task in TASKS]
        found += [arm.run("color", seed) for arm in bounds(quick)]
    return found
