"""The paper's supervised baseline (DPOK, arXiv:2305.16381, section 4.3): regression on drawn images, weighted by their rewards.

Legend: ``x_t = alpha * x0 + sigma * eps`` the noisy latents, ``out`` what the network predicts in its own
parametrisation and ``target`` what it should, ``r`` the reward of ``x0``, ``gamma`` the weight of the KL's surrogate.

    base   w ||target - out||^2                              with w = r
    KL-D   w ||target - out||^2                              with w = max(r + gamma, 0)
    KL-O   w ||target - out||^2 + gamma ||out - out_pre||^2  with w = r

A squared norm is the mean over the dimensions of a sample, as in the published losses of diffusion models.
"""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor

from .gaussian import reduce_samples
from .grid import SchedulerGrid
from .transitions import NoiseLevels, PredictionType, scaled


def noisy_latents(x0: Tensor, eps: Tensor, levels: NoiseLevels) -> Tensor:
    """
    `x_t = alpha * x0 + sigma * eps`, at the beginning of a step and on the scheduler's scale (before
    `scale_model_input`).

    Args:
        x0 (`torch.Tensor` of shape `(B, *)`): The clean latents; any floating dtype.
        eps (`torch.Tensor` of shape `(B, *)`): Gaussian noise of unit variance.
        levels (`NoiseLevels`): Of shape `()` or `(B,)`.

    Returns:
        `torch.Tensor` of shape `(B, *)`, float32.

    Raises:
        ValueError: If the shapes differ.
    """
    _refuse_other_shape("eps", eps, "x0", x0)
    return scaled(levels.alpha, x0.float()) + scaled(levels.sigma, eps.float())


def regression_target(prediction_type: PredictionType, x0: Tensor, eps: Tensor, levels: NoiseLevels) -> Tensor:
    """
    What a perfect network says of `x_t`: the inverse of [`~dpok_trl.core.transitions.predict_x0_eps`].

    Args:
        prediction_type (`"epsilon"`, `"sample"`, `"v_prediction"` or `"flow_prediction"`):
            What the network predicts: `eps`, `x0`, `(alpha * eps - sigma * x0) / sqrt(alpha^2 + sigma^2)`
            (arXiv:2202.00512, appendix D; the root is 1 on variance preserving grids), or `eps - x0`.
        x0, eps (`torch.Tensor` of shape `(B, *)`): The parts of `x_t`; any floating dtype.
        levels (`NoiseLevels`): Of shape `()` or `(B,)`.

    Returns:
        `torch.Tensor` of shape `(B, *)`, float32.

    Raises:
        ValueError: If the shapes differ, or `prediction_type` is none of these.
    """
    _refuse_other_shape("eps", eps, "x0", x0)
    x0, eps = x0.float(), eps.float()
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "sample":
        return x0
    if prediction_type == "v_prediction":
        norm = (levels.alpha.square() + levels.sigma.square()).sqrt()
        return scaled(levels.alpha / norm, eps) - scaled(levels.sigma / norm, x0)
    if prediction_type == "flow_prediction":
        return eps - x0
    raise ValueError(f"prediction_type must be one of {get_args(PredictionType)}, but is {prediction_type!r}")


def target_on_grid(grid: SchedulerGrid, x0: Tensor, eps: Tensor, step_index: int | Tensor) -> Tensor:
    """
    [`regression_target`] at steps of a grid, with the scheduler's scalings of x0: the inverse of
    [`~dpok_trl.core.grid.predict_on_grid`], but for its clamp.

    Args:
        grid ([`SchedulerGrid`]): Of the walk.
        x0, eps (`torch.Tensor` of shape `(B, *)`): The parts of `x_t`.
        step_index (`int` or `torch.LongTensor` of shape `(B,)`): In `[0, S)`.

    Returns:
        `torch.Tensor` of shape `(B, *)`, float32.

    Raises:
        ValueError: If the shapes differ, or where the scheduler does not listen to its network (`c_out = 0`).
    """
    levels = grid.levels(step_index)
    if grid.x0_scalings is not None:
        row = step_index.cpu() if isinstance(step_index, Tensor) else step_index
        c_out, c_skip = (scaling[row] for scaling in grid.x0_scalings)
        if bool((c_out == 0).any()):
            raise ValueError(
                f"at step {step_index} the scheduler's x0 does not depend on the network (c_out = 0), so there is nothing to regress on; leave that step out"
            )
        x = noisy_latents(x0, eps, levels)
        x0 = scaled(1.0 / c_out, x0.float() - scaled(c_skip, x))
        eps = scaled(1.0 / levels.sigma, x - scaled(levels.alpha, x0))
    return regression_target(grid.prediction_type, x0, eps, levels)


def squared_errors(output: Tensor, target: Tensor) -> Tensor:
    """
    `||target - out||^2` of each sample, the mean over its dimensions.

    Args:
        output (`torch.Tensor` of shape `(B, *)`): What the pipeline hands to `scheduler.step`; carries the gradient.
        target (`torch.Tensor` of shape `(B, *)`): [`target_on_grid`], or the pretrained model's output; gets none.

    Returns:
        `torch.Tensor` of shape `(B,)`, float32, >= 0.

    Raises:
        ValueError: If the shapes differ.
    """
    _refuse_other_shape("output", output, "target", target)
    return reduce_samples((output.float() - target.detach().float()).square(), "mean")


def weighted_loss(errors: Tensor, weights: Tensor) -> Tensor:
    """
    `mean(w * ||target - out||^2)` over the samples. Not divided by the sum of the weights: what a weight means must not
    depend on the company that a sample has in its batch.

    Args:
        errors (`torch.Tensor` of shape `(B,)`): From [`squared_errors`].
        weights (`torch.Tensor` of shape `(B,)`): >= 0; gets no gradient.

    Returns:
        `torch.Tensor`: The loss, 0-d.

    Raises:
        ValueError: If the shapes are not both `(B,)`.
    """
    if errors.dim() != 1 or errors.shape != weights.shape:  # (B,) against (B, 1) would average over all pairs
        raise ValueError(
            f"errors and weights must have the same shape (B,), but have {tuple(errors.shape)} and "
            f"{tuple(weights.shape)}"
        )
    return (weights.detach().to(errors) * errors).mean()


def reward_weights(rewards: Tensor) -> Tensor:
    """
    The weights of the base loss and of KL-O: the rewards themselves.

    Args:
        rewards (`torch.Tensor` of shape `(N,)`): One that is not finite does not count, and gets the weight 0.

    Returns:
        `torch.Tensor` of shape `(N,)`, float32, >= 0.

    Raises:
        ValueError: For negative rewards. A negative weight pushes the network away from its target without bound.
    """
    negative = rewards < 0  # NaN is not, and minus infinity does not count
    negative &= rewards.isfinite()
    if bool(negative.any()):
        smallest = float(rewards[negative].min())
        raise ValueError(
            f"{int(negative.sum())} of {len(rewards)} rewards are negative, the smallest is {smallest:.4g}: as weights of a regression they push the model away "
            f'from its own images without bound. Take sft_kl = "kl_d" with sft_gamma >= {math.ceil(-smallest * 1e4) / 1e4} (or a smaller one: what is still negative then gets weight '
            '0), shift the reward, or take sft_loss = "filtered".'
        )
    return _masked(rewards.float(), rewards)


def shifted_reward_weights(rewards: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """
    The weights of KL-D, `max(r + gamma, 0)`: the forward KL to the pretrained model shifts every weight towards uniform
    (DPOK, arXiv:2305.16381, Lemma 4.3; the clip at 0 is its appendix B).

    Args:
        rewards (`torch.Tensor` of shape `(N,)`): One that is not finite does not count, and gets the weight 0.
        gamma (`float`): Weight of the KL.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The weights `(N,)`, float32, >= 0; and the share of the rewards that count,
        0-d, that were clipped because `r + gamma < 0`. NaN if none counts.
    """
    shifted = rewards.float() + gamma
    clipped = (shifted < 0)[rewards.isfinite()].float().mean()
    return _masked(shifted.clamp(min=0.0), rewards), clipped


def _masked(weights: Tensor, rewards: Tensor) -> Tensor:
    return torch.where(rewards.isfinite(), weights, 0.0)


def _refuse_other_shape(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.shape != other.shape or x.dim() < 2:
        raise ValueError(
            f"{name} and {other_name} must have one shape (B, ...), but have {tuple(x.shape)} and {tuple(other.shape)}"
        )
