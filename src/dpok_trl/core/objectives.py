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


def ratio_metrics(log_prob: Tensor, old_log_prob: Tensor, clip_range: float | None) -> Metrics:
    """
    How far the policy has moved from the one that drew the actions.

    Arguments as for [`probability_ratio`] and [`dpok_loss`]; `clip_range` is `None` for a loss without a clip.

    Returns:
        `dict[str, torch.Tensor]`: Detached and 0-d: `policy/ratio_mean`, `policy/ratio_deviation_max` (the largest
        `|r - 1|`), `policy/clip_fraction` (the share with `|r - 1| > c`; only with a `clip_range`) and
        `policy/approx_kl` (`mean((log_prob - old_log_prob)^2) / 2`, in the units of the log-probability, squared).
    """
    difference = _difference(log_prob.detach(), old_log_prob)
    ratio = difference.exp()
    deviation = (ratio - 1.0).abs()
    metrics = {"policy/ratio_mean": ratio.mean(), "policy/ratio_deviation_max": deviation.max()}
    if clip_range is not None:
        metrics["policy/clip_fraction"] = (deviation > clip_range).to(ratio.dtype).mean()
    metrics["policy/approx_kl"] = 0.5 * difference.square().mean()
    return metrics


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


# The losses of a ratio and a clip range; the two below need other things.
OBJECTIVES: dict[str, Objective] = {"dpok": dpok_loss, "ppo": ppo_loss}


def kl_mask_loss(ratio: Tensor, advantage: Tensor, divergence: Tensor, threshold: float) -> Tensor:
    """
    Flow-DPPO's loss: `mean(-A * r)` without the transitions that have moved too far and would move further.

    A transition is dropped where `divergence >= threshold` and its update would increase it: `A > 0` with `r > 1`, or
    `A < 0` with `r < 1` (arXiv:2606.11025). An update that brings the policy back always passes, as in [`ppo_loss`],
    and how far a transition has moved is measured by the distribution and not by the one action that was drawn.

    A dropped transition has no gradient. It counts as `-A`, its value at ratio 1: so the loss stays finite when such a
    ratio overflows, and its gradient is its derivative.

    Args:
        ratio (`torch.Tensor` of shape `(B,)`):
            From [`probability_ratio`]; carries the gradient.
        advantage (`torch.Tensor` of shape `(B,)`):
            As in [`dpok_loss`]; gets no gradient.
        divergence (`torch.Tensor` of shape `(B,)`):
            `KL(new || old)` of the step, >= 0, from [`dpok_trl.core.gaussian.Gaussian.kl`]; gets no gradient.
        threshold (`float` > 0):
            In the units of `divergence`, i.e. of its reduction: Flow-DPPO's 1e-5 on the mean over dimensions is 0.16
            nats per step for D = 16384.

    Returns:
        `torch.Tensor`: The loss, 0-d, in the dtype of `ratio`.

    Raises:
        ValueError: If the shapes are not all `(B,)` or if `threshold` is not positive.
    """
    dropped = kl_mask(ratio, advantage, divergence, threshold)
    kept_ratio = torch.where(dropped, torch.ones_like(ratio), ratio)
    return (-advantage.detach().to(ratio.dtype) * kept_ratio).mean()


def kl_mask(ratio: Tensor, advantage: Tensor, divergence: Tensor, threshold: float) -> Tensor:
    """
    Which transitions [`kl_mask_loss`] drops; arguments and errors are its own.

    Returns:
        `torch.BoolTensor` of shape `(B,)`; its mean is the metric `policy/mask_fraction`.
    """
    _refuse_broadcast("ratio", ratio, "advantage", advantage)
    _refuse_broadcast("ratio", ratio, "divergence", divergence)
    if not threshold > 0.0:
        raise ValueError(f"threshold must be > 0, but is {threshold}; 1e-5 is the published value")
    goes_further = ((ratio > 1.0) & (advantage > 0.0)) | ((ratio < 1.0) & (advantage < 0.0))
    return goes_further & (divergence >= threshold)


def kl_mask_metrics(ratio: Tensor, advantage: Tensor, divergence: Tensor, threshold: float) -> Metrics:
    """
    `policy/mask_fraction`: the share of transitions that [`kl_mask_loss`] drops, detached and 0-d. Arguments as there.
    """
    return {"policy/mask_fraction": kl_mask(ratio, advantage, divergence, threshold).to(ratio.dtype).mean()}


def reinforce_loss(log_prob: Tensor, advantage: Tensor) -> Tensor:
    """
    The policy gradient as it is, `mean(-A * log p)` (DPOK, arXiv:2305.16381, Lemma 4.1).

    Only its gradient means anything, and only under the policy that drew the actions: without a ratio nothing corrects
    for a policy that has moved since. At ratio 1 the gradients of [`dpok_loss`], [`ppo_loss`] and [`kl_mask_loss`] are
    the same.

    Args:
        log_prob (`torch.Tensor` of shape `(B,)`):
            Of the recorded actions under the policy that is trained; carries the gradient.
        advantage (`torch.Tensor` of shape `(B,)`):
            As in [`dpok_loss`]; gets no gradient.

    Returns:
        `torch.Tensor`: The loss, 0-d, float32 (float64 if `log_prob` is).

    Raises:
        ValueError: If the shapes are not both `(B,)`.
    """
    _refuse_broadcast("log_prob", log_prob, "advantage", advantage)
    log_prob = _at_least_float32(log_prob)
    return (-advantage.detach().to(log_prob.dtype) * log_prob).mean()


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
        `torch.Tensor` of shape `(B,)`, float32 (float64 if `model_output` is), >= 0.

    Raises:
        ValueError: If the shapes differ.
    """
    if model_output.shape != reference_output.shape or model_output.dim() < 2:
        raise ValueError(
            "model_output and reference_output must have one shape (B, ...), but have "
            f"{tuple(model_output.shape)} and {tuple(reference_output.shape)}"
        )
    model_output = _at_least_float32(model_output)
    return reduce_samples((model_output - reference_output.to(model_output.dtype)).square(), reduction)


def _difference(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    _refuse_broadcast("log_prob", log_prob, "old_log_prob", old_log_prob)
    log_prob = _at_least_float32(log_prob)
    return log_prob - old_log_prob.detach().to(log_prob.dtype)


def _at_least_float32(x: Tensor) -> Tensor:
    # float64 passes through only so that the mathematics can be checked against finite differences.
    return x if x.dtype == torch.float64 else x.float()


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
