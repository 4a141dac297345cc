"""The demo world's public face: prompts, pictures, the checker, and rewards in DDPO's form.

    >>> import numpy as np
    >>> from dpok_trl.demo.world import check, parse_prompt, render
    >>> image = render(parse_prompt("a green triangle"), np.random.default_rng(0))
    >>> check(image, "a green triangle").exact
    True

Grammar and painter live in `scenes`, the judge in `checker`; all of it needs only numpy, PIL and torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .checker import CheckResult, Detected, check, detect, fidelity
from .scenes import (
    COLORS,
    IMAGE_SIZE,
    NUMBERS,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    corrupt_scene,
    parse_prompt,
    render,
    sample_prompt,
    sample_scene,
)


__all__ = [
    "COLORS", "IMAGE_SIZE", "NUMBERS", "RELATIONS", "REWARDS", "SHAPES", "TASKS", "CheckResult", "Detected", "Scene", "Thing",
    "check", "corrupt_scene", "detect", "exact_reward", "fidelity", "greenness_reward", "parse_prompt", "render",
    "sample_prompt", "sample_scene", "soft_reward",
]  # fmt: skip

RewardFunction = Callable[[torch.Tensor, Sequence[str], Any], tuple[torch.Tensor, dict[str, Any]]]

#: The four abilities of the paper (section 5.1), each with the demo world's prompt for it.
TASKS: dict[str, str] = {
    "color": "a green triangle",
    "count": "four circles",
    "composition": "a red square and a blue circle",
    "location": "a circle above a square",
}


def _check_all(images: torch.Tensor, prompts: Sequence[str]) -> list[CheckResult]:
    if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(prompts):
        raise ValueError(
            f"Demo rewards need images of shape (B, 3, H, W) and B prompts, got {tuple(images.shape)} and {len(prompts)}."
        )
    return [check(image, prompt) for image, prompt in zip(images, prompts, strict=True)]


def exact_reward(
    images: torch.Tensor, prompts: Sequence[str], metadata: Any = None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """1 where the picture shows what the prompt asks for, all of it and nothing else, otherwise 0.

    Args:
        images (`torch.Tensor` of shape `(B, 3, H, W)`): pictures in [0, 1].
        prompts (`Sequence[str]`): the B prompts, sentences of the demo grammar.
        metadata: not used; here because DDPO reward functions take it.

    Returns:
        `tuple[torch.Tensor, dict]`: float32 rewards `(B,)` on the CPU, and the number of objects found in each picture.
    """
    results = _check_all(images, prompts)
    return torch.tensor([float(result.exact) for result in results]), {"objects": [len(r.detected) for r in results]}


def soft_reward(
    images: torch.Tensor, prompts: Sequence[str], metadata: Any = None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Partial credit in [0, 1] (see `check`), with the exact verdicts alongside.

    Args:
        images (`torch.Tensor` of shape `(B, 3, H, W)`): pictures in [0, 1].
        prompts (`Sequence[str]`): the B prompts, sentences of the demo grammar.
        metadata: not used; here because DDPO reward functions take it.

    Returns:
        `tuple[torch.Tensor, dict]`: float32 rewards `(B,)` on the CPU, and `{"exact": list of bool}`.
    """
    results = _check_all(images, prompts)
    return torch.tensor([result.soft for result in results], dtype=torch.float32), {
        "exact": [r.exact for r in results]
    }


def greenness_reward(
    images: torch.Tensor, prompts: Sequence[str], metadata: Any = None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """How green the picture is, whatever was asked: a reward made to be hacked.

    The mean over all pixels of `max(G - (R + B) / 2, 0)`, in [0, 1]. On "a green triangle" it rises a little when the triangle
    is green and a lot when the canvas is painted green, so it shows what the KL term is for.

    Args:
        images (`torch.Tensor` of shape `(B, 3, H, W)`): pictures in [0, 1].
        prompts (`Sequence[str]`): not used.
        metadata: not used.

    Returns:
        `tuple[torch.Tensor, dict]`: float32 rewards `(B,)` on the images' device, and `{}`.
    """
    red, green, blue = images.float().unbind(dim=1)
    return (green - (red + blue) / 2).clamp(min=0).mean(dim=(1, 2)), {}


REWARDS: dict[str, RewardFunction] = {"exact": exact_reward, "soft": soft_reward, "greenness": greenness_reward}
