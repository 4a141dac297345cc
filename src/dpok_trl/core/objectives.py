"""The losses of the policy update: pure functions of log-probabilities and advantages.

Legend: ``A`` advantage, ``r = p_new(x_{t-1} | x_t) / p_old(x_{t-1} | x_t)`` probability ratio, ``c`` clip range. A loss
is what an optimizer minimises. The KL term is added by the caller: [`dpok_trl.core.gaussian.Gaussian.kl`] is the exact
one, [`noise_kl`] that of DPOK's published code.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .gaussian import Reduction, reduce_samples


LARGEST_LOG_RATIO = 80.0  # exp(80) = 5.5e34; float32 ends at 3.4e38

Metrics = dict[str, Tensor]
Objective = Callable[[Tensor, Tensor, float], Tensor]


def probability_ratio(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """
    `r = exp(log_prob - old_log_prob)`, exactly 1 where they are equal.

    Args:
        log_prob (`torch.Tensor` of shape `(B,)`):
            Of the recorded actions under the policy that is trained; carries the gradient.
        old_log_prob (`torch.Tensor` of shape `(B,)`):
            Of the same actions under the policy that drew them; gets no gradient.

    Returns:
        `torch.Tensor` of shape `(B,)`: float32 (float64 if `log_prob` is).

    Raises:
        ValueError: If the shapes are not both `(B,)`.
    """
    # Without the clamp a ratio that overflows would have the gradient 0 * inf = NaN where the clip means 0.
    return _difference(log_prob, old_log_prob).clamp(max=LARGEST_LOG_RATIO).exp()


def ratio_metrics(log_prob: Tensor, old_log_prob: Tensor, clip_range: float) -> Metrics:
    """
    How far the policy has moved from the one that drew the actions.

    Arguments as for [`probability_ratio`] and [`dpok_loss`].

    Returns:
        `dict[str, torch.Tensor]`: Detached and 0-d: `policy/ratio_mean`, `policy/ratio_deviation_max` (the largest
        `|r - 1|`), `policy/clip_fraction` (the share with `|r - 1| > c`) and `policy/approx_kl`
        (`mean((log_prob - old_log_prob)^2) / 2`, in the units of the log-probability, squared).
    """
    difference = _difference(log_prob.detach(), old_log_prob)
    ratio = difference.exp()
    deviation = (ratio - 1.0).abs()
    return {
        "policy/ratio_mean": ratio.mean(),
        "policy/ratio_deviation_max": deviation.max(),
        "policy/clip_fraction": (deviation > clip_range).to(ratio.dtype).mean(),
        "policy/approx_kl": 0.5 * difference.square().mean(),
    }


def dpok_loss(ratio: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """
    The loss of DPOK's published code: `mean(-A * clamp(r, 1 - c, 1 + c))`.

    Without PPO's pessimistic maximum (arXiv:2305.16381, appendix A.6; google-research/dpok, train_online_pg.py). So
    the gradient of a transition is 0 whenever `|r - 1| > c`, also where an update would bring the ratio back: `A > 0`
    with `r < 1 - c`, and `A < 0` with `r > 1 + c`. [`ppo_loss`] keeps those.

    Args:
        ratio (`torch.Tensor` of shape `(B,)`):
            From [`probability_ratio`]; carries the gradient.
        advantage (`torch.Tensor` of shape `(B,)`):
            How much better than expected the trajectories turned out; gets no gradient.
        clip_range (`float` > 0):
            `c`. In units of the log-probability's reduction: 1e-4 on the mean over dimensions is a trust region of
            1.64 nats per step for SD 1.5 at 512x512 (D = 16384) and of 6.55 for SDXL at 1024x1024.

    Returns:
        `torch.Tensor`: The loss, 0-d, in the dtype of `ratio`.

    Raises:
        ValueError: If the shapes are not both `(B,)` or if `clip_range` is not positive.
    """
    advantage = _checked(ratio, advantage, clip_range)
    return (-advantage * ratio.clamp(1.0 - clip_range, 1.0 + clip_range)).mean()


def ppo_loss(ratio: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """
    PPO's clipped loss: `mean(max(-A * r, -A * clamp(r, 1 - c, 1 + c)))` (arXiv:1707.06347, eq. 7; DDPO uses it).

    The gradient of a transition is 0 only where the ratio has left the clip range in the direction of the advantage.
    Arguments, result and errors are those of [`dpok_loss`].
    """
    advantage = _checked(ratio, advantage, clip_range)
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1.0 - clip_range, 1.0 + clip_range)).mean()


OBJECTIVES: dict[str, Objective] = {"dpok": dpok_loss, "ppo": ppo_loss}


def noise_kl(model_output: Tensor, reference_output: Tensor, reduction: Reduction = "mean") -> Tensor:
    """
    The KL term of DPOK's published code: the squared difference of two network outputs, without a weight.

    The exact KL of a step is this times `(d mean / d output)^2 / (2 std^2)`, which varies 77-fold over the steps of a
    50-step DDIM grid (eta 1). A coefficient chosen for one of the two is not one for the other.

    Args:
        model_output (`torch.Tensor` of shape `(B, *)`): Of the policy, guided as in sampling; carries the gradient.
        reference_output (`torch.Tensor` of shape `(B, *)`): Of the pretrained model at the same latents.
        reduction (`"mean"` or `"sum"`, defaults to `"mean"`): Over the dimensions of a sample; the published code has
            `"mean"`.

    Returns:
        `torch.Tensor` of shape `(B,)`, float32, >= 0.

    Raises:
        ValueError: If the shapes differ.
    """
    if model_output.shape != reference_output.shape or model_output.dim() < 2:
        raise ValueError(
            "model_output and reference_output must have one shape (B, ...), but have "
            f"{tuple(model_output.shape)} and {tuple(reference_output.shape)}"
        )
    return reduce_samples((model_output.float() - reference_output.float()).square(), reduction)


def _difference(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    _refuse_broadcast("log_prob", log_prob, "old_log_prob", old_log_prob)
    # float64 passes through only so that the mathematics can be checked against finite differences.
    log_prob = log_prob if log_prob.dtype == torch.float64 else log_prob.float()
    return log_prob - old_log_prob.detach().to(log_prob.dtype)


def _checked(ratio: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """The advantage, ready to multiply the ratio."""
    _refuse_broadcast("ratio", ratio, "advantage", advantage)
    if not clip_range > 0.0:
        raise ValueError(f"clip_range must be > 0, but is {clip_range}; 1e-4 is the published value")
    return advantage.detach().to(ratio.dtype)


def _refuse_broadcast(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    # (B,) against (B, 1) would average over all pairs without a word.
    if x.dim() != 1 or x.shape != other.shape:
        raise ValueError(
            f"{name} and {other_name} must have the same shape (B,), but have {tuple(x.shape)} and {tuple(other.shape)}"
        )
