"""A diffusion pipeline whose training is known in closed form: latents are Gaussian at every step, and so is everything that DPOK asks of them.

The denoiser is affine in its latents, `eps(x, t) = slope_t x + shift_t` for each of `D` coordinates on its own, so a DDIM step with `eta = 1` is
`x' = A x + B + s z` with `A`, `B` affine in the parameters. Then the mean and the variance of x_t follow from two recursions, and the reward, the KL of each step,
the objective and its gradient are formulas in them ([`Chain`]). The pipeline itself ([`GaussianPipeline`]) is one that the trainer takes as it takes any other.

Legend, for one step: `x` before it and `x'` after it; `abar` cumulative signal, `s` standard deviation of the step. `theta` of shape `(2, S, D)` float64 holds
slopes and shifts of the `S` steps in the order of denoising.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, DDIMScheduler, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import nn


D = 2  # coordinates of x: latents are (B, 1, 1, D), images (B, 3, 1, D)
ABAR = (
    0.95,
    0.8,
    0.55,
    0.3,
    0.1,
)  # cumulative signal of the timesteps 0 ... 4; the walk is 4, 3, 2, 1 and ends at the level of 0
STEPS = len(ABAR) - 1
DATA_MEAN, DATA_STD = (0.4, -0.3), (0.6, 0.9)  # of x_0 as the pretrained model has it
PIXELS = 40.0  # units of x_0 in the range of a pixel: an image is 0.5 + x_0 / 40, within [0, 1] for |x_0| < 20


class GaussianDenoiser(ModelMixin, ConfigMixin):
    """`eps = slope[t] * x + shift[t]`; made as the best denoiser of data that are N(DATA_MEAN, DATA_STD^2)."""

    @register_to_config
    def __init__(self, steps: int = STEPS, coordinates: int = D):
        super().__init__()
        theta = pretrained()
        self.slope = nn.Parameter(theta[0].float())
        self.shift = nn.Parameter(theta[1].float())

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        row = self.config.steps - timestep.long()
        slope, shift = (table[row].reshape(-1, 1, 1, self.config.coordinates) for table in (self.slope, self.shift))
        return slope * sample + shift


class GaussianPipeline(DiffusionPipeline):
    """Text-to-image in form: the prompt says nothing, and an image is x_0 as grey pixels, in a row, without a clamp."""

    def __init__(self, unet: GaussianDenoiser, scheduler: DDIMScheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def encode_prompt(self, prompt: list[str]) -> torch.Tensor:
        """What a value function sees of a prompt; the denoiser has no use for it."""
        return torch.ones(len(prompt), 1)

    @torch.no_grad()
    def __call__(self, prompt, generator=None, num_inference_steps=STEPS, output_type="pt", return_dict=True):
        shape = (len(prompt), 1, 1, self.unet.config.coordinates)
        latents = randn_tensor(shape, generator=generator, device=self._execution_device)
        self.encode_prompt(prompt)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            noise = self.unet(latents, t)
            latents = self.scheduler.step(noise, t, latents, eta=1.0, generator=generator, return_dict=False)[0]
        return ((0.5 + latents / PIXELS).expand(-1, 3, -1, -1),)


def gaussian_pipeline() -> GaussianPipeline:
    abar = torch.tensor((1.0, *ABAR), dtype=torch.float64)
    betas = (1.0 - abar[1:] / abar[:-1]).tolist()
    scheduler = DDIMScheduler(
        num_train_timesteps=len(ABAR), trained_betas=betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    return GaussianPipeline(GaussianDenoiser(), scheduler)


def x0_of(images: torch.Tensor) -> torch.Tensor:
    """`(B, D)` float64, up to the rounding of float32 pixels."""
    return (images[:, 0, 0].double() - 0.5) * PIXELS


def pretrained() -> torch.Tensor:
    """theta of the best denoiser: `E[eps | x] = sqrt(1 - abar) (x - sqrt(abar) mean) / (abar std^2 + 1 - abar)`."""
    abar = torch.tensor(ABAR[:0:-1], dtype=torch.float64)[:, None]
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (DATA_MEAN, DATA_STD))
    slope = (1.0 - abar).sqrt() / (abar * std.square() + 1.0 - abar)
    return torch.stack([slope, -slope * abar.sqrt() * mean])


@dataclass(frozen=True)
class Chain:
    """The same chain as formulas, float64, written from the DDIM paper and without the package.

    The reward is `sum_d linear_d x_0d - curvature_d x_0d^2 / 2`, and `J = reward_weight E[reward] - kl_weight sum_t E[KL_t]` (DPOK, eq. 8, maximised).
    """

    linear: tuple[float, ...]
    curvature: tuple[float, ...] = (0.0,) * D
    reward_weight: float = 1.0
    kl_weight: float = 0.0

    def reward(self, x0: torch.Tensor) -> torch.Tensor:
        linear, curvature = self.coefficients()
        return (linear * x0 - 0.5 * curvature * x0.square()).sum(-1)

    def steps(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For each step `(keep, gain, s)`: the mean of x' is `keep x + gain eps`. DDIM with eta = 1 (arXiv:2010.02502, eq. 12 and 16)."""
        levels = torch.tensor(ABAR[::-1], dtype=torch.float64)
        abar, after = levels[:-1], levels[1:]
        variance = (1 - after) / (1 - abar) * (1 - abar / after)
        keep = (after / abar).sqrt()
        gain = (1 - after - variance).sqrt() - keep * (1 - abar).sqrt()
        return keep, gain, variance.sqrt()

    def affine(self, theta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`A` and `B` of all steps, `(S, D)` each."""
        keep, gain, _ = self.steps()
        return keep[:, None] + gain[:, None] * theta[0], gain[:, None] * theta[1]

    def moments(self, theta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of x before each step, and of x_0 at the end: `(S + 1, D)` each."""
        scale, offset = self.affine(theta)
        mean, variance = [torch.zeros(D, dtype=torch.float64)], [torch.ones(D, dtype=torch.float64)]
        for a, b, s in zip(scale, offset, self.steps()[2], strict=True):
            mean.append(a * mean[-1] + b)
            variance.append(a.square() * variance[-1] + s.square())
        return torch.stack(mean), torch.stack(variance)

    def mean_reward(self, theta: torch.Tensor) -> torch.Tensor:
        linear, curvature = self.coefficients()
        mean, variance = (moment[-1] for moment in self.moments(theta))
        return (linear * mean - 0.5 * curvature * (variance + mean.square())).sum()

    def kl(self, theta: torch.Tensor, states: torch.Tensor | None = None) -> torch.Tensor:
        """`E[KL_t]` of each step in nats, `(S,)`. `states`: the parameters that x_t is drawn with, by default `theta`."""
        mean, variance = (moment[:-1] for moment in self.moments(theta if states is None else states))
        slope, shift = theta - pretrained()
        _, gain, s = self.steps()
        squares = slope.square() * (variance + mean.square()) + 2 * slope * shift * mean + shift.square()
        return (gain.square() / (2 * s.square())) * squares.sum(-1)

    def objective(self, theta: torch.Tensor) -> torch.Tensor:
        return self.reward_weight * self.mean_reward(theta) - self.kl_weight * self.kl(theta).sum()

    def gradient(self, theta: torch.Tensor, kl_gradient: str) -> torch.Tensor:
        """Of `J`. `"paper"` holds the distribution of x_t in the KL (eq. 9); `"exact"` and `"reward"` are the gradient of `J` itself."""
        with torch.enable_grad():
            moving = theta * 1.0 if theta.requires_grad else theta.clone().requires_grad_()
            states = theta if kl_gradient == "paper" else moving
            objective = self.reward_weight * self.mean_reward(moving) - self.kl_weight * self.kl(moving, states).sum()
            return torch.autograd.grad(objective, moving, create_graph=theta.requires_grad)[0]

    def optimum(self) -> torch.Tensor:
        """The theta of the largest `J`."""
        theta = pretrained().requires_grad_()
        solver = torch.optim.LBFGS(
            [theta], max_iter=1000, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
        )

        def closure() -> torch.Tensor:
            solver.zero_grad()
            loss = -self.objective(theta)
            loss.backward()
            return loss

        solver.step(closure)
        return self.stationary_point("exact", theta.detach())

    def stationary_point(self, kl_gradient: str, start: torch.Tensor) -> torch.Tensor:
        """Where [`~Chain.gradient`] is 0, by Newton's method from a theta that is near."""
        theta = start.clone()
        for _ in range(20):
            value = self.gradient(theta, kl_gradient)
            if value.abs().max() < 1e-12:
                return theta
            slope = torch.autograd.functional.jacobian(lambda point: self.gradient(point, kl_gradient), theta)
            theta = theta - torch.linalg.solve(slope.reshape(theta.numel(), -1), value.flatten()).view_as(theta)
        raise RuntimeError(
            f"no stationary point of {kl_gradient}: the gradient is {value.abs().max():.3g} after 20 steps"
        )

    def value(self, theta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`E[reward | x_t] = (linear x_t - curvature x_t^2 / 2 + constant) summed over d`, for each step: `(S, D)` each."""
        scale, offset = self.affine(theta)
        linear, curvature = self.coefficients()
        constant = torch.zeros(D, dtype=torch.float64)
        before = []
        for a, b, s in reversed(list(zip(scale, offset, self.steps()[2], strict=True))):
            constant = constant + linear * b - 0.5 * curvature * (b.square() + s.square())
            linear = (linear - curvature * b) * a
            curvature = curvature * a.square()
            before.append((linear, curvature, constant))
        return tuple(torch.stack(column) for column in zip(*reversed(before), strict=True))

    def simulate(self, theta: torch.Tensor, samples: int, seed: int) -> torch.Tensor:
        """Paths `(S + 1, samples, D)`: x before each step, and x_0."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(STEPS + 1, samples, D, generator=generator, dtype=torch.float64)
        scale, offset = self.affine(theta)
        path = [noise[0]]
        for step, s in enumerate(self.steps()[2]):
            path.append(scale[step] * path[-1] + offset[step] + s * noise[step + 1])
        return torch.stack(path)

    def sample_gradients(
        self, theta: torch.Tensor, path: torch.Tensor, kl_gradient: str, baseline: torch.Tensor | float = 0.0
    ) -> torch.Tensor:
        """What each path, drawn with `theta`, says of the gradient of `J`: `(samples, 2, S, D)`, by REINFORCE and the KL of each step.

        `baseline`: of the reward, `(S, samples)` or a number. Of `"reward"` this is one of several unbiased estimators: each action is charged with its own
        log-ratio and with the exact KL of the later steps. A charge counts against the mean charge of the other paths at that step.
        """
        _, gain, s = (column[:, None, None] for column in self.steps())
        scale, offset = (table[:, None] for table in self.affine(theta))
        slope, shift = (table[:, None] for table in theta - pretrained())
        x = path[:-1]
        noise = (path[1:] - scale * x - offset) / s
        moved = gain * (slope * x + shift) / s  # means of policy and reference, apart by this many standard deviations
        kl = 0.5 * moved.square().sum(-1)  # (S, samples)
        later = kl.flip(0).cumsum(0).flip(0) - kl
        log_ratio = (moved * noise).sum(-1) + kl
        charge = {"paper": 0.0 * kl, "exact": later, "reward": later + log_ratio}[kl_gradient]
        charge = (charge - charge.mean(1, keepdim=True)) * (len(path[0]) / (len(path[0]) - 1))
        credit = self.reward_weight * (self.reward(path[-1]) - baseline) - self.kl_weight * charge
        to_output = credit[..., None] * noise * gain / s
        if kl_gradient != "reward":
            to_output = to_output - self.kl_weight * moved * gain / s
        return torch.stack([to_output * x, to_output]).permute(2, 0, 1, 3)

    def coefficients(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(self.linear, dtype=torch.float64), torch.tensor(self.curvature, dtype=torch.float64)
