"""From the network's output and a scheduler's grid to the distribution of the next latents.

Legend, on any grid: ``x = alpha * x0 + sigma * eps``; a prime (``next_``) marks the less noisy end of the step; and
``r = alpha * sigma' / (alpha' * sigma)`` in [0, 1] is the ratio of the two noise-to-signal ratios.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .gaussian import Gaussian


PredictionType = Literal["epsilon", "sample", "v_prediction", "flow_prediction"]
TransitionKind = Literal["ancestral", "cps", "flow_sde"]

# alpha and sigma come from float32 tables, so alpha = 1 - sigma holds to float32 rounding only.
FLOW_TOLERANCE = 1e-6
# The longest step of the flow SDE, in units of 1 - sigma at its beginning. On grids of 4 or more steps that begin at 1
# no later step is longer, whatever the shift; on those that begin at a shifted 0.999 (DPM-Solver's, UniPC's) the first
# one is, 100-fold at 10 steps.
MAX_STEP_PER_HEADROOM = 3.0


@dataclass(frozen=True, eq=False)
class NoiseLevels:
    """
    The two ends of a denoising step: `x = alpha * x0 + sigma * eps` before it, `next_alpha`, `next_sigma` after it.

    All four are float64 CPU tensors of one shape: `()` when the whole batch takes the same step, `(B,)` when each
    sample takes its own. Variance preserving grids have `alpha^2 + sigma^2 = 1`, variance exploding ones `alpha = 1`,
    flow matching `alpha = 1 - sigma`.

    Raises:
        ValueError: If dtype, device or shapes differ from that, if there is nothing to denoise (`sigma <= 0`), if
            no signal is left after the step (`next_alpha <= 0`), or if the step adds noise.
    """

    alpha: Tensor
    sigma: Tensor
    next_alpha: Tensor
    next_sigma: Tensor

    def __post_init__(self) -> None:
        levels = (self.alpha, self.sigma, self.next_alpha, self.next_sigma)
        for level in levels:
            if level.dtype != torch.float64 or level.device.type != "cpu":
                raise ValueError(
                    f"noise levels must be float64 on the cpu, but one is {level.dtype} on {level.device}"
                )
        if len({level.shape for level in levels}) != 1 or self.alpha.dim() > 1:
            raise ValueError(
                f"noise levels must all have shape () or all (B,), but have {[tuple(level.shape) for level in levels]}"
            )
        if not bool(((self.alpha >= 0) & (self.sigma > 0) & (self.next_alpha > 0) & (self.next_sigma >= 0)).all()):
            raise ValueError(
                "noise levels need alpha >= 0, sigma > 0, next_alpha > 0 and next_sigma >= 0, but are "
                f"{[level.tolist() for level in levels]}"
            )
        if not bool((self.alpha * self.next_sigma <= self.next_alpha * self.sigma).all()):
            raise ValueError(
                "a denoising step must not add noise, but sigma/alpha rises to next_sigma/next_alpha in "
                f"{[level.tolist() for level in levels]} (alpha, sigma, next_alpha, next_sigma)"
            )

    @property
    def is_flow(self) -> bool:
        """Whether both ends lie on the straight path of flow matching, `alpha = 1 - sigma`."""
        here = (self.alpha - (1.0 - self.sigma)).abs() <= FLOW_TOLERANCE
        there = (self.next_alpha - (1.0 - self.next_sigma)).abs() <= FLOW_TOLERANCE
        return bool((here & there).all())


def predict_x0_eps(
    model_output: Tensor, sample: Tensor, levels: NoiseLevels, prediction_type: PredictionType
) -> tuple[Tensor, Tensor]:
    """
    Splits the noisy latents into the clean latents and the noise that the network sees in them.

    Args:
        model_output (`torch.Tensor` of shape `(B, *)`):
            What the pipeline hands to `scheduler.step`, i.e. after its own guidance; any floating dtype.
        sample (`torch.Tensor` of shape `(B, *)`):
            The noisy latents x_t, on the scheduler's scale (before `scale_model_input`).
        levels (`NoiseLevels`):
            Of shape `()` or `(B,)`.
        prediction_type (`"epsilon"`, `"sample"`, `"v_prediction"` or `"flow_prediction"`):
            What the network predicts: eps, x0, `v = alpha * eps - sigma * x0` (arXiv:2202.00512, appendix D; off the
            unit circle, e.g. on a variance exploding grid, of the latents rescaled to it, as diffusers' Euler does),
            or the velocity `eps - x0`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: x0 and eps, of shape `(B, *)`, float32.

    Raises:
        ValueError: If the shapes differ, if `"epsilon"` is asked for without any signal (alpha = 0), or if
            `"flow_prediction"` is asked for off the flow path.
    """
    if model_output.shape != sample.shape:
        raise ValueError(
            f"the model output must have the shape of the latents, {tuple(sample.shape)}, but has "
            f"{tuple(model_output.shape)}; a network that also predicts its variance (twice the channels) is not "
            "supported unless its pipeline drops the second half before scheduler.step"
        )
    output, x = model_output.float(), sample.float()
    alpha, sigma = levels.alpha, levels.sigma
    if prediction_type == "epsilon":
        if bool((alpha == 0).any()):
            raise ValueError(
                'prediction_type "epsilon" cannot start from pure noise (alpha = 0: zero terminal SNR), because x0 '
                'would be 0/0; use a network of prediction_type "v_prediction" or rescale_betas_zero_snr=False'
            )
        return (x - scaled(sigma, output)) / _coefficient(alpha, x), output
    if prediction_type == "sample":
        return output, (x - scaled(alpha, output)) / _coefficient(sigma, x)
    if prediction_type == "v_prediction":
        norm = (alpha.square() + sigma.square()).sqrt()
        cosine, sine = alpha / norm, sigma / norm
        x0 = scaled(cosine / norm, x) - scaled(sine, output)
        return x0, scaled(cosine, output) + scaled(sine / norm, x)
    if prediction_type == "flow_prediction":
        if not levels.is_flow:
            raise ValueError(
                'prediction_type "flow_prediction" needs a flow grid (alpha = 1 - sigma), but alpha is '
                f"{alpha.tolist()} at sigma {sigma.tolist()}; set use_flow_sigmas=True on the scheduler"
            )
        return x - scaled(sigma, output), x + scaled(1.0 - sigma, output)
    raise ValueError(f"prediction_type must be one of {get_args(PredictionType)}, but is {prediction_type!r}")


@dataclass(frozen=True)
class Transition:
    """
    A rule that turns (x0, eps) and the two ends of a step into the distribution of the next latents.

    Args:
        kind (`"ancestral"`, `"cps"`, `"flow_sde"` or `"ode"`):
            `"ancestral"`: `std = eta * sigma' * sqrt(1 - r^2)`,
                `mean = alpha' * x0 + sigma' * sqrt((1 - eta^2) + eta^2 * r^2) * eps`. The same formula is DDIM with
                `eta` (arXiv:2010.02502, eq. 12 and 16), and at `eta=1` DDPM, Euler-ancestral and first-order
                SDE-DPM-Solver++. In this form nothing cancels at zero terminal SNR, where the textbook
                `sqrt(1 - alpha'^2 - std^2)` in float32 is off by 1e-3.
            `"cps"`: coefficients-preserving sampling, `std = sigma' * sin(eta * pi / 2)`,
                `mean = alpha' * x0 + sigma' * cos(eta * pi / 2) * eps`. At `eta=1` it is diffusers'
                `FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)`.
            `"flow_sde"`: the Euler-Maruyama step of the SDE that shares the flow ODE's marginals (Flow-GRPO,
                arXiv:2505.05470), with `g = noise_level * sqrt(sigma / (1 - sigma))`, `dt = sigma' - sigma < 0`,
                velocity `v = eps - x0`: `std = g * sqrt(-dt)` and
                `mean = x * (1 + g^2 dt / (2 sigma)) + v * (1 + g^2 (1 - sigma) / (2 sigma)) dt`. Flow grids only.
            `"ode"`: the step without noise, `std = 0`, `mean = alpha' * x0 + sigma' * eps`: DDIM at `eta=0`, and on a
                flow grid the Euler step of the ODE. For steps that are no actions: nothing can be learned from them.
        eta (`float` in (0, 1], defaults to 1.0):
            The amount of noise of `"ancestral"` and `"cps"`; the others take no notice of it.
        noise_level (`float` > 0, defaults to 0.7):
            The amount of noise of `"flow_sde"`, Flow-GRPO's `a`; the others take no notice of it.

    Raises:
        ValueError: If an argument is out of its range; for `"ode"`, which has no noise, no number is.
    """

    kind: TransitionKind | Literal["ode"]
    eta: float = 1.0
    noise_level: float = 0.7

    def __post_init__(self) -> None:
        if self.kind == "ode":
            return
        if self.kind not in get_args(TransitionKind):
            raise ValueError(f"kind must be one of {get_args(TransitionKind)}, but is {self.kind!r}")
        if not 0.0 < self.eta <= 1.0:
            raise ValueError(
                f"eta must be in (0, 1], but is {self.eta}: without noise (eta = 0) the denoising steps are "
                "deterministic and have no log-probability to learn from; 1.0 is the usual value"
            )
        if not 0.0 < self.noise_level < math.inf:
            raise ValueError(
                f"noise_level must be > 0 and finite, but is {self.noise_level}: without noise the denoising steps "
                "are deterministic and have no log-probability to learn from; 0.7 is the usual value"
            )

    def std(self, levels: NoiseLevels) -> Tensor:
        """The true standard deviation of the step: a float64 CPU `torch.Tensor` of the shape of `levels`."""
        if self.kind == "ancestral":
            ratio = levels.alpha * levels.next_sigma / (levels.next_alpha * levels.sigma)
            return self.eta * levels.next_sigma * (1.0 - ratio.square()).sqrt()
        if self.kind == "cps":
            return levels.next_sigma * math.sin(self.eta * math.pi / 2)
        if self.kind == "ode":
            return torch.zeros_like(levels.next_sigma)
        return (self._diffusion(levels) * (levels.sigma - levels.next_sigma)).sqrt()

    def __call__(self, sample: Tensor, x0: Tensor, eps: Tensor, levels: NoiseLevels) -> Gaussian:
        """
        The distribution of the next latents.

        Args:
            sample (`torch.Tensor` of shape `(B, *)`): The noisy latents x_t.
            x0 (`torch.Tensor` of shape `(B, *)`): The clean latents that the network predicts.
            eps (`torch.Tensor` of shape `(B, *)`): The noise that the network predicts.
            levels (`NoiseLevels`): Of shape `()` or `(B,)`.

        Returns:
            [`Gaussian`]: Of the shape of `sample`, float32.

        Raises:
            ValueError: If the shapes differ, or for `"flow_sde"` off the flow path.
        """
        if not sample.shape == x0.shape == eps.shape:
            raise ValueError(
                "sample, x0 and eps must have one shape, but have "
                f"{tuple(sample.shape)}, {tuple(x0.shape)} and {tuple(eps.shape)}"
            )
        x0, eps = x0.float(), eps.float()
        std = self.std(levels)
        if self.kind == "ancestral":
            ratio = levels.alpha * levels.next_sigma / (levels.next_alpha * levels.sigma)
            kept = levels.next_sigma * ((1.0 - self.eta**2) + self.eta**2 * ratio.square()).sqrt()
            mean = scaled(levels.next_alpha, x0) + scaled(kept, eps)
        elif self.kind == "cps":
            kept = levels.next_sigma * _cosine_of_quarter_turns(self.eta)
            mean = scaled(levels.next_alpha, x0) + scaled(kept, eps)
        elif self.kind == "ode":
            mean = scaled(levels.next_alpha, x0) + scaled(levels.next_sigma, eps)
        else:
            dt = levels.next_sigma - levels.sigma
            drift = self._diffusion(levels) / (2.0 * levels.sigma)
            velocity = (1.0 + drift * (1.0 - levels.sigma)) * dt
            mean = scaled(1.0 + drift * dt, sample.float()) + scaled(velocity, eps - x0)
        return Gaussian(mean, std.expand(sample.shape[0]).to(torch.float32))

    def _diffusion(self, levels: NoiseLevels) -> Tensor:
        """g^2 of the flow SDE, float64, of the shape of `levels`; 0 on a step that ends without noise."""
        if not levels.is_flow:
            raise ValueError(
                'kind "flow_sde" needs a flow grid (alpha = 1 - sigma), but alpha is '
                f'{levels.alpha.tolist()} at sigma {levels.sigma.tolist()}; use kind "ancestral" with this scheduler'
            )
        headroom, next_headroom = 1.0 - levels.sigma, 1.0 - levels.next_sigma
        # g^2 diverges at sigma = 1, where Flow-GRPO takes the denominator of the step's other end. Departs from it in
        # doing the same just below 1: there the published step would overshoot and reverse x.
        overshoots = levels.sigma - levels.next_sigma > MAX_STEP_PER_HEADROOM * headroom
        diffusion = self.noise_level**2 * levels.sigma / torch.where(overshoots, next_headroom, headroom)
        # Departs from Flow-GRPO, which adds noise on the last step too and so leaves it in the image.
        return torch.where(levels.next_sigma == 0, 0.0, diffusion)


def _cosine_of_quarter_turns(turns: float) -> float:
    """cos(turns * pi / 2), exactly 0 at 1: floating point gives 6e-17 there, which is a dependence on eps."""
    return 0.0 if turns == 1.0 else math.cos(turns * math.pi / 2)


def _coefficient(value: Tensor, like: Tensor) -> Tensor | float:
    """`value` (float64, CPU) ready to multiply `like`: a Python number costs no copy to the device."""
    if value.dim() == 0:
        return float(value)
    if value.shape[0] != like.shape[0]:
        raise ValueError(f"noise levels for {value.shape[0]} samples cannot serve a batch of {like.shape[0]}")
    column = value.to(device=like.device, dtype=torch.float32, non_blocking=True)
    return column.reshape(-1, *[1] * (like.dim() - 1))


def scaled(value: Tensor, x: Tensor) -> Tensor:
    """`value * x` for a `value` of shape `()` or `(B,)`, float64 on the CPU, as noise levels are."""
    return x * _coefficient(value, x)
