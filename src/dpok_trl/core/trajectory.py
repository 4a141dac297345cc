"""The two records between sampling and updating: what a rollout made, and the rows that an update eats."""

from __future__ import annotations

from collections.abc import Sequence
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

    def transitions(
        self,
        samples: Sequence[int],
        steps: Sequence[int],
        advantages: torch.Tensor,
        reference: Gaussian | torch.Tensor | None = None,
    ) -> Transitions:
        """The transitions of the given samples, each at a step. `advantages`, `(B,)`, has one entry for each sample of the trajectory."""
        device = self.log_probs.device
        rows = torch.tensor(samples, device=device)
        columns = torch.tensor([self.steps.index(step) for step in steps], device=device)
        return Transitions(
            trajectory=self,
            samples=tuple(samples),
            steps=tuple(steps),
            old_log_prob=self.log_probs[rows, columns],
            advantage=advantages[rows],
            reference=reference,
        )


@dataclass(frozen=True)
class Transitions:
    """`n` transitions (x_t, x_{t-1}) of one trajectory: what one forward and backward pass eats.

    Args:
        trajectory (`Trajectory`): Where the rows come from.
        samples (`tuple[int, ...]` of length `n`): The rows, in any order.
        steps (`tuple[int, ...]` of length `n`): The denoising step of each, counted from 0 in generation order; mostly all the same.
        old_log_prob (`torch.Tensor` of shape `(n,)`): Under the policy that drew them.
        advantage (`torch.Tensor` of shape `(n,)`)
        reference ([`Gaussian`] or `torch.Tensor`, *optional*): What the pretrained model says of these rows: its distribution of x_{t-1}, or
            its model output where the KL is taken in noise space. `None` without a KL term.
    """

    trajectory: Trajectory
    samples: tuple[int, ...]
    steps: tuple[int, ...]
    old_log_prob: torch.Tensor
    advantage: torch.Tensor
    reference: Gaussian | torch.Tensor | None = None
