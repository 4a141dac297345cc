"""One denoising step as a distribution: drawing, scoring and KL exist once, for every scheduler.

Legend: a step is the policy's action ``x_{t-1} ~ N(mean, std^2 I)`` (DPOK, arXiv:2305.16381, section 4.1).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


Reduction = Literal["mean", "sum"]

Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True, eq=False)
class Gaussian:
    """
    A batch of isotropic normal distributions, one per sample.

    Args:
        mean (`torch.Tensor` of shape `(B, *)`, float32):
            The means, on the model's device. Gradients flow through it.
        std (`torch.Tensor` of shape `(B,)`, float32, on the CPU):
            The true standard deviations, finite and >= 0. They belong to the scheduler's grid and never to the
            network, so they stay on the CPU, where asking whether one is zero does not make a GPU wait. 0 means
            that the step is deterministic: it can be drawn (the mean) but has no density.

    Raises:
        ValueError: If a shape, a dtype or a device is not as above, or if a `std` is negative or not finite.
    """

    mean: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        if self.mean.dtype != torch.float32 or self.std.dtype != torch.float32:
            raise ValueError(
                f"a Gaussian is computed in torch.float32, but mean is {self.mean.dtype} and std is {self.std.dtype}; "
                "cast both with .float() first"
            )
        if self.mean.dim() < 2 or self.std.shape != self.mean.shape[:1]:
            raise ValueError(
                f"a Gaussian needs mean of shape (B, ...) and std of shape (B,), but mean has shape "
                f"{tuple(self.mean.shape)} and std has shape {tuple(self.std.shape)}; give one std per sample"
            )
        if self.std.device.type != "cpu":
            raise ValueError(f"std must be on the cpu, but is on {self.std.device}; call .cpu() on it once per grid")
        if not bool(torch.isfinite(self.std).all()) or bool((self.std < 0).any()):
            raise ValueError(f"std must be finite and >= 0, but is {self.std.tolist()}")

    def sample(self, generator: Generators = None, dtype: torch.dtype | None = None) -> Tensor:
        """
        Draws `mean + std * noise`: computed in float32, then rounded once to `dtype`.

        The noise is drawn exactly as `diffusers.utils.torch_utils.randn_tensor` draws it (in `dtype`, on the
        generator's device; from a list, one draw of shape `(1, *)` per sample and in order), so that an untouched
        pipeline with the same generators draws the same numbers. A deterministic step (std 0) consumes its noise
        too, as diffusers' own steps do, and returns the mean.

        Args:
            generator (`torch.Generator` or a list of B of them, *optional*):
                The source of the noise; the global one by default. CPU generators may serve any device.
            dtype (`torch.dtype`, *optional*, defaults to float32):
                The dtype of the result: the one in which the pipeline keeps its latents.

        Returns:
            `torch.Tensor` of shape `(B, *)` and of `dtype`.

        Raises:
            ValueError: If a list of generators is not as long as the batch, or a generator cannot serve the device.
        """
        dtype = self.mean.dtype if dtype is None else dtype
        noise = _draw_noise(self.mean.shape, generator, self.mean.device, dtype)
        return (self.mean + self._column(self.std) * noise.float()).to(dtype)

    def log_prob(self, x: Tensor, reduction: Reduction = "mean") -> Tensor:
        """
        The log-density of `x`, per sample.

        Score the values that the pipeline goes on with, i.e. the rounded ones: the rounding of bf16 latents alone
        moves the log-density by hundreds of nats (sum).

        Args:
            x (`torch.Tensor` of shape `(B, *)`):
                The points, of exactly the shape of `mean`; any floating dtype, computed in float32.
            reduction (`"mean"` or `"sum"`, defaults to `"mean"`):
                Over the dimensions of a sample. `"sum"` is the true log-density in nats; `"mean"` divides it by
                their number D, which published clip ranges assume (1e-4 is 1.64 nats at D = 16384).

        Returns:
            `torch.Tensor` of shape `(B,)`, float32, on the device of `mean`.

        Raises:
            ValueError: If the shapes differ or if a `std` is 0.
        """
        self._refuse_other_shape("x", x)
        self._refuse_zero_std("log_prob")
        squares = reduce_samples((x.float() - self.mean).square(), reduction)
        std = self.std.double()
        normalizer = (std.log() + 0.5 * math.log(2.0 * math.pi)) * self._scale(reduction)
        return squares * self._device(-0.5 / std.square()) - self._device(normalizer)

    def kl(self, other: "Gaussian", reduction: Reduction = "mean") -> Tensor:
        """
        KL(self || other) in closed form, per sample (DPOK, Lemma 4.2: the per-step term of the KL bound).

        With equal standard deviations, as with a policy and its reference on one grid, this is exactly
        `||mean - other.mean||^2 / (2 std^2)`.

        Args:
            other (`Gaussian`): The distribution to compare with, of the same shape.
            reduction (`"mean"` or `"sum"`, defaults to `"mean"`): As in [`Gaussian.log_prob`]; `"sum"` is in nats.

        Returns:
            `torch.Tensor` of shape `(B,)`, float32, >= 0, on the device of `mean`.

        Raises:
            ValueError: If the shapes differ or if a `std` of either is 0.
        """
        self._refuse_other_shape("other.mean", other.mean)
        self._refuse_zero_std("kl")
        other._refuse_zero_std("kl")
        squares = reduce_samples((self.mean - other.mean).square(), reduction)
        std, other_std = self.std.double(), other.std.double()
        # Exactly 0 where the two are equal: log 1 = 0 and 1 - 1 = 0.
        spread = (other_std / std).log() + 0.5 * ((std / other_std).square() - 1.0)
        return squares * self._device(0.5 / other_std.square()) + self._device(spread * self._scale(reduction))

    def log_ratio(self, other: "Gaussian", x: Tensor, reduction: Reduction = "mean") -> Tensor:
        """
        `self.log_prob(x) - other.log_prob(x)`, without the cancellation of the two.

        For distributions of one standard deviation it is `((mean - other.mean) * (2 x - mean - other.mean)) / (2 std^2)`. Its
        expectation over draws of `self` is [`Gaussian.kl`].

        Args:
            other (`Gaussian`): Of the same shape and the same `std`, as a policy and its reference on one grid.
            x (`torch.Tensor` of shape `(B, *)`): The points; any floating dtype, computed in float32.
            reduction (`"mean"` or `"sum"`, defaults to `"mean"`): As in [`Gaussian.log_prob`].

        Returns:
            `torch.Tensor` of shape `(B,)`, float32, on the device of `mean`.

        Raises:
            ValueError: If shapes or standard deviations differ, or if a `std` is 0.
        """
        self._refuse_other_shape("x", x)
        self._refuse_other_shape("other.mean", other.mean)
        self._refuse_zero_std("log_ratio")
        if not torch.equal(self.std, other.std):
            raise ValueError(
                f"log_ratio needs distributions of one std, but they are {self.std.tolist()} and {other.std.tolist()}; "
                "subtract the two log_prob instead"
            )
        products = (self.mean - other.mean) * (2.0 * x.float() - self.mean - other.mean)
        return reduce_samples(products, reduction) * self._device(0.5 / self.std.double().square())

    def detach(self) -> "Gaussian":
        """The same distribution without its graph."""
        return Gaussian(self.mean.detach(), self.std)

    def _scale(self, reduction: Reduction) -> int:
        """How often a per-dimension constant counts under `reduction`."""
        return 1 if reduction == "mean" else self.mean[0].numel()

    def _device(self, per_sample: Tensor) -> Tensor:
        return per_sample.to(device=self.mean.device, dtype=torch.float32, non_blocking=True)

    def _column(self, per_sample: Tensor) -> Tensor:
        return self._device(per_sample).reshape(-1, *[1] * (self.mean.dim() - 1))

    def _refuse_other_shape(self, name: str, x: Tensor) -> None:
        # No broadcasting: (B,) against (B, 1) would become (B, B) without a word.
        if x.shape != self.mean.shape:
            raise ValueError(
                f"{name} must have exactly the shape of the mean, {tuple(self.mean.shape)}, but has {tuple(x.shape)}"
            )

    def _refuse_zero_std(self, what: str) -> None:
        zeros = (self.std == 0).nonzero().flatten().tolist()
        if zeros:
            raise ValueError(
                f"{what} needs std > 0, but std is 0 for the samples {zeros} of a batch of {len(self.std)}: a "
                "deterministic step has no density. Leave such steps (often the last one of the grid) out of the "
                "transitions, or use a kind and an eta with noise there"
            )


def reduce_samples(x: Tensor, reduction: Reduction) -> Tensor:
    """Reduces a `(B, *)` tensor over the dimensions of each sample, to shape `(B,)`."""
    if reduction == "mean":
        return x.flatten(1).mean(dim=1)
    if reduction == "sum":
        return x.flatten(1).sum(dim=1)
    raise ValueError(f'reduction must be "mean" or "sum", but is {reduction!r}')


def _draw_noise(shape: torch.Size, generator: Generators, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Standard normal noise, number for number that of `diffusers.utils.torch_utils.randn_tensor`."""
    if generator is None:
        return torch.randn(shape, device=device, dtype=dtype)
    generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
    if not isinstance(generator, torch.Generator) and len(generators) != shape[0]:
        raise ValueError(
            f"a list of generators needs one per sample: {shape[0]} samples, {len(generators)} generators given"
        )
    for one in generators:
        if one.device.type not in ("cpu", device.type):
            raise ValueError(f"a generator on {one.device} cannot draw noise for {device}; use one on cpu or {device}")
    shapes = [shape] if len(generators) == 1 else [torch.Size((1, *shape[1:]))] * len(generators)
    draws = [
        torch.randn(part, generator=one, device=one.device, dtype=dtype)
        for part, one in zip(shapes, generators, strict=True)
    ]
    return (draws[0] if len(draws) == 1 else torch.cat(draws)).to(device)
