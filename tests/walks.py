"""What tests of the policy do with a tiny pipeline: call it untouched, tune it, roll it out, replay it."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from tiny import nudge
from zoo import build, call_arguments

from dpok_trl.policy.hooks import PipelineHooks
from dpok_trl.policy.policy import Policy
from dpok_trl.policy.tuning import tune


PROMPTS = ["a cat", "two dogs"]
SEEDS = [3, 4]
NUDGE = 0.1


def pipeline(name: str, dtype: torch.dtype = torch.float32, **given: Any):
    """A tiny pipeline of a class of diffusers, always with the same weights."""
    return build(getattr(diffusers, name), **given).to(dtype)


def image(pipe, **arguments: Any) -> torch.Tensor:
    """By the untouched pipeline."""
    generator = torch.Generator().manual_seed(5)
    call = {**call_arguments(pipe), "output_type": "pt", "return_dict": False, **arguments}
    return pipe(prompt=PROMPTS[0], generator=generator, **call)[0]


def policy_of(pipe, *, nudged: bool = True, call: dict | None = None, policy: dict | None = None, **settings: Any):
    """A policy over `tune(pipe, **settings)`, its weights moved away from where they start."""
    tuned = tune(pipe, PipelineHooks().denoisers(pipe), **settings)
    if nudged:
        for module in tuned.modules.values():
            nudge(module, NUDGE)
    return Policy(pipe, tuned, call_kwargs={**call_arguments(pipe), **(call or {})}, **(policy or {}))


def trained(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}


def log_probs(replayed) -> torch.Tensor:
    return torch.stack([step.log_prob for step in replayed], dim=1)


def kl(policy: Policy, trajectory) -> torch.Tensor:
    """Of the policy to its reference, `(B, steps)`."""
    with torch.no_grad():
        tuned = policy(trajectory)
        with policy.reference():
            reference = policy(trajectory)
    return torch.stack([a.distribution.kl(b.distribution) for a, b in zip(tuned, reference, strict=True)], dim=1)


def without_gradient(policy: Policy) -> list[str]:
    """The trained tensors that get none from a whole replay, which must have the ratio 1 everywhere."""
    trajectory = policy.rollout(PROMPTS, SEEDS)
    policy.zero_grad()
    replayed = log_probs(policy(trajectory, verify=True))
    assert torch.equal(replayed, trajectory.log_probs)
    replayed.sum().backward()
    return [name for name, parameter in trained(policy).items() if parameter.grad is None or not parameter.grad.any()]
