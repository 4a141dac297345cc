"""Do prompts pull the policy in different directions? The cosine between their policy gradients, measured beside the training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dpok_trl.core.objectives import reinforce_loss
from dpok_trl.core.trajectory import Transitions
from dpok_trl.training.batches import TrainingBatch
from dpok_trl.training.config_checks import selected_steps


def prompt_gradient_cosines(
    policy: nn.Module,
    batches: Sequence[TrainingBatch],
    parameters: Sequence[nn.Parameter],
    *,
    timestep_fraction: float,
    random: np.random.Generator,
    loss_scale: float = 1.0,
) -> dict[str, float]:
    """The cosines between the policy gradients of the prompts of a round, at the policy that sampled it.

    There, where every ratio is 1, the gradients of all objectives are those of `reinforce`, so that one is taken. The KL term is left out: it pulls all prompts
    back to the same model. Call it before the round's first update, and within `accelerator.no_sync(policy)`: these gradients are of this process alone.

    Args:
        policy (`nn.Module`): The prepared policy.
        batches (`Sequence[TrainingBatch]`): The training batches of the round, of this process.
        parameters (`Sequence[nn.Parameter]`): What is trained.
        timestep_fraction (`float`): Fraction of the stochastic steps to measure on, at least one; the same steps for all prompts.
        random (`np.random.Generator`): Draws them.
        loss_scale (`float`): Of an fp16 gradient scaler, whose gradients would be 0 without it. No result depends on it otherwise.

    Returns:
        `dict[str, float]`: As [`gradient_cosines`]; empty for a round of a single prompt.
    """
    steps = batches[0].trajectory.steps
    steps = random.permutation(steps)[: max(1, selected_steps(len(steps), timestep_fraction))].tolist()

    def loss_of(transitions: Transitions) -> Tensor:
        (replayed,) = policy(transitions.trajectory, transitions.samples, each=transitions.steps)
        return loss_scale * reinforce_loss(replayed.log_prob, transitions.advantage)

    return gradient_cosines(loss_of, transitions_by_prompt(batches, steps), parameters)


def transitions_by_prompt(batches: Sequence[TrainingBatch], steps: Sequence[int]) -> dict[str, list[Transitions]]:
    """All samples of `batches` at each of `steps`, apart for each prompt. No forward pass is larger than a training batch."""
    found: dict[str, list[Transitions]] = {}
    for batch in batches:
        prompts = [batch.trajectory.prompts[sample] for sample in batch.samples]
        for prompt in dict.fromkeys(prompts):
            rows = [row for row, other in enumerate(prompts) if other == prompt]
            samples = tuple(batch.samples[row] for row in rows)
            of_prompt = TrainingBatch(batch.trajectory, samples, batch.advantages[rows])
            found.setdefault(prompt, []).extend(of_prompt.transitions([step] * len(rows)) for step in steps)
    return found


def gradient_cosines(
    loss_of: Callable[[Transitions], Tensor],
    transitions: Mapping[str, Sequence[Transitions]],
    parameters: Sequence[nn.Parameter],
) -> dict[str, float]:
    """Compares the gradients of prompts, without touching `.grad`.

    Holds a gradient for each prompt on the CPU: 4 bytes for each trained weight.

    Args:
        loss_of (`Callable`): The mean loss of some transitions, 0-d.
        transitions (`Mapping[str, Sequence[Transitions]]`): Those of each prompt. Its gradient is that of the mean over all of them.
        parameters (`Sequence[nn.Parameter]`): What the gradient is taken of; one that a loss does not depend on counts as 0.

    Returns:
        `dict[str, float]`: Empty for less than two prompts. Else `gradient/prompts` (those whose gradient is not 0; the others have no direction and are left
        out), `gradient/cosine_mean` and `gradient/cosine_min` over all pairs of them, and `gradient/norm_ratio`, the largest norm over the smallest. These three
        are NaN where less than two are left, and not finite where a gradient is not.
    """
    if len(transitions) < 2:
        return {}
    gradients = torch.stack([_gradient(loss_of, of_prompt, parameters) for of_prompt in transitions.values()])
    norms = gradients.norm(dim=1)
    gradients, norms = gradients[norms != 0], norms[norms != 0]
    metrics = {"gradient/prompts": float(len(norms))}
    if len(norms) < 2:
        return metrics | dict.fromkeys(
            ("gradient/cosine_mean", "gradient/cosine_min", "gradient/norm_ratio"), math.nan
        )
    directions = gradients / norms[:, None]
    first, second = torch.triu_indices(len(norms), len(norms), offset=1)
    cosines = (directions @ directions.T)[first, second]
    return metrics | {
        "gradient/cosine_mean": cosines.mean().item(),
        "gradient/cosine_min": cosines.min().item(),
        "gradient/norm_ratio": (norms.max() / norms.min()).item(),
    }


def _gradient(
    loss_of: Callable[[Transitions], Tensor], transitions: Sequence[Transitions], parameters: Sequence[nn.Parameter]
) -> Tensor:
    """Of the mean loss over all rows: flat, float32, on the CPU (where no TF32 rounds the products)."""
    rows = sum(len(one.steps) for one in transitions)
    total = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    for one in transitions:
        share = torch.autograd.grad(loss_of(one), parameters, allow_unused=True)
        for sum_of_shares, gradient in zip(total, share, strict=True):
            if gradient is not None:
                sum_of_shares.add_(gradient.float(), alpha=len(one.steps) / rows)
    return torch.cat([gradient.flatten() for gradient in total]).cpu()
