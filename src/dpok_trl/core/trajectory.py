"""The two records between sampling and updating: what a rollout made, and the rows that an update eats."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from dpok_trl.core.gaussian import Gaussian


@dataclass(frozen=True)
class Trajectory:
    """What one rollout made: `B` samples over `S` denoising steps.

    Args:
        prompts (`list[str]` of length `B`): The prompt of each sample.
        seeds (`list[int]` of length `B`): The seed of each sample's generator, which drew x_T and every step's noise.
        images (`torch.Tensor` of shape `(B, 3, H, W)`, or `(B, F, 3, H, W)` for videos): In [0, 1].
        latents (`tuple` of `S + 1` `torch.Tensor` of shape `(B, *)`): The state of each step, x_T first, and at the end what the last one returned.
        next_latents (`tuple` of `S` `torch.Tensor` of shape `(B, *)`): The action of each step: what it returned. The same tensors as
            `latents[1:]`, but for pipelines that change the latents between the steps (inpainting).
        steps (`tuple[int, ...]`): The stochastic steps, the ones that are actions, ascending. Deterministic steps are not in it.
        log_probs (`torch.Tensor` of shape `(B, len(steps))`): float32, of the stored actions under the policy that drew them.
        arguments (`dict[str, list]`): Arguments of the pipeline's call that differ from sample to sample, lists of length `B`.
        recording (`Any`): What the policy needs to walk the same path again; opaque to everybody else.
        prompt_embeddings (`torch.Tensor` of shape `(B, E)`, *optional*): float32, of each sample's prompt, where a value function sees it.
        features (`torch.Tensor` of shape `(B, len(steps), C)`, *optional*): float32, what the middle of the denoiser made of each state, where a value
            function sees it.
    """

    prompts: list[str]
    seeds: list[int]
    images: torch.Tensor
    latents: tuple[torch.Tensor, ...]
    next_latents: tuple[torch.Tensor, ...]
    steps: tuple[int, ...]
    log_probs: torch.Tensor
    arguments: dict[str, list[Any]]
    recording: Any
    prompt_embeddings: torch.Tensor | None = None
    features: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def with_log_probs(self, log_probs: torch.Tensor) -> Trajectory:
        """The same trajectory with other old log-probabilities, `(B, len(steps))` (re-anchoring)."""
        if log_probs.shape != self.log_probs.shape:
            raise ValueError(f"log_probs has shape {tuple(log_probs.shape)}, needed is {tuple(self.log_probs.shape)}")
        return replace(self, log_probs=log_probs)

    def without_images(self) -> Trajectory:
        """The same trajectory with no images: they are much larger than latents, and a replay needs none."""
        return replace(self, images=self.images[:0].clone())


@dataclass(frozen=True)
class Transitions:
    """`n` transitions (x_t, x_{t-1}) of one trajectory: what one forward and backward pass eats.

    Args:
        trajectory (`Trajectory`): Where the rows come from.
        samples (`tuple[int, ...]` of length `n`): The rows, in any order.
        steps (`tuple[int, ...]` of length `n`): The denoising step of each, counted from 0 in generation order; mostly all the same.
        old_log_prob (`torch.Tensor` of shape `(n,)`): Under the policy that drew them.
        advantage (`torch.Tensor` of shape `(n,)`)
        reference ([`Gaussian`] or `torch.Tensor`, *optional*): What the reference model says of these rows: its distribution of x_{t-1}, or
            its model output where the KL is taken in noise space. `None` without a KL term.
        old ([`Gaussian`], *optional*): The distribution that drew the actions, for an objective that looks at more than `old_log_prob`.
    """

    trajectory: Trajectory
    samples: tuple[int, ...]
    steps: tuple[int, ...]
    old_log_prob: torch.Tensor
    advantage: torch.Tensor
    reference: Gaussian | torch.Tensor | None = None
    old: Gaussian | None = None
