"""The policy that a side of the race ends with, drawn by a stock diffusers pipeline from seeds that no training has seen."""

from __future__ import annotations

from typing import Any

import torch

from dpok_trl.demo.world import check, fidelity


FIRST_SEED = 10_000
BATCH = 64


def evaluate(pipe: Any, prompt: str, *, images: int, num_steps: int, eta: float = 1.0) -> dict[str, float] | None:
    """Shares and means over `images` pictures: whether they are exact, their soft score and their fidelity. `None` for no images.

    Args:
        pipe (`StableDiffusionPipeline`): Its own `__call__` draws; TRL's sampler takes no generators for the noise of its steps.
        num_steps (`int`), eta (`float`): DDIM steps and their noise, without guidance.
    """
    if images == 0:
        return None
    found = []
    for start in range(0, images, BATCH):
        seeds = range(FIRST_SEED + start, FIRST_SEED + min(start + BATCH, images))
        drawn = pipe(
            [prompt] * len(seeds),
            num_inference_steps=num_steps,
            guidance_scale=1.0,
            eta=eta,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
        ).images
        found += [(check(image, prompt), fidelity(image, prompt)) for image in drawn]
    return {
        "images": images,
        "exact": sum(result.exact for result, _ in found) / images,
        "soft": sum(result.soft for result, _ in found) / images,
        "fidelity": sum(clean for _, clean in found) / images,
    }
