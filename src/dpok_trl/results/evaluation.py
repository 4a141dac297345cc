"""The tuned policy against the pretrained model: same prompts, same seeds, same judges, and how far it has moved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpok_trl.core.trajectory import Trajectory
from dpok_trl.policy.policy import Policy
from dpok_trl.rewards.base import RewardFunction, score


@dataclass(frozen=True)
class Estimate:
    """A mean over images and its standard error, s / sqrt(n) with s from n - 1 (NaN for one image)."""

    mean: float
    standard_error: float

    def __str__(self) -> str:
        if math.isnan(self.standard_error):
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} ± {self.standard_error:.3f}"


def estimate(values: torch.Tensor) -> Estimate:
    """Mean and standard error of `values` of shape `(n,)`."""
    values = values.double()
    deviation = values.std().item() if len(values) > 1 else math.nan
    return Estimate(values.mean().item(), deviation / math.sqrt(len(values)))


@dataclass(frozen=True)
class Comparison:
    """What [`compare`] found, for `n` pairs of images. Row `i` of every field belongs to `prompts[i]` and `seeds[i]`.

    Args:
        prompts (`list[str]` of length `n`)
        seeds (`list[int]` of length `n`)
        base_scores, tuned_scores (`dict[str, torch.Tensor]`): For each scorer the `(n,)` scores of the pretrained model's images, and of the
            tuned policy's.
        path_kl (`torch.Tensor` of shape `(n,)`): KL(tuned || pretrained) in nats, summed over the actions (stochastic steps) of the tuned policy's
            own sample and over the latent's dimensions. Its mean estimates the KL between the two distributions of whole denoising paths, which
            bounds the KL between their images from above (DPOK, https://arxiv.org/abs/2305.16381, Lemma 4.2).
        base_images, tuned_images (`torch.Tensor` of shape `(n, 3, H, W)`): In [0, 1], on the CPU.
    """

    prompts: list[str]
    seeds: list[int]
    base_scores: dict[str, torch.Tensor]
    tuned_scores: dict[str, torch.Tensor]
    path_kl: torch.Tensor
    base_images: torch.Tensor
    tuned_images: torch.Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    def base(self, name: str) -> Estimate:
        return estimate(self.base_scores[name])

    def tuned(self, name: str) -> Estimate:
        return estimate(self.tuned_scores[name])

    def difference(self, name: str) -> Estimate:
        """Tuned minus pretrained. The standard error is that of the paired differences: both drew from the same seeds."""
        return estimate(self.tuned_scores[name] - self.base_scores[name])

    @property
    def kl(self) -> Estimate:
        """The path KL, in nats."""
        return estimate(self.path_kl)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """The cells of [`~Comparison.table`], header first."""
        rows = [(f"{len(self)} images, same seeds", "pretrained", "tuned", "difference")]
        for name in self.tuned_scores:
            difference = str(self.difference(name))
            sign = "" if difference.startswith("-") else "+"
            rows.append((name, str(self.base(name)), str(self.tuned(name)), sign + difference))
        rows.append(("path KL (nats)", "0", str(self.kl), ""))
        return rows

    def table(self) -> str:
        """Means ± standard errors, as aligned text that is a Markdown table as well."""
        rows = self.rows()
        widths = [max(len(row[column]) for row in rows) for column in range(4)]

        rule = ("-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:]))
        lines = []
        for row in (rows[0], rule, *rows[1:]):
            numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("| " + " | ".join([row[0].ljust(widths[0]), *numbers]) + " |")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the images, for JSON."""
        scores = {}
        for name in self.tuned_scores:
            parts = {"base": self.base(name), "tuned": self.tuned(name), "difference": self.difference(name)}
            scores[name] = {
                **{part: {"mean": e.mean, "standard_error": e.standard_error} for part, e in parts.items()},
                "base_values": self.base_scores[name].tolist(),
                "tuned_values": self.tuned_scores[name].tolist(),
            }
        kl = {"mean": self.kl.mean, "standard_error": self.kl.standard_error, "values": self.path_kl.tolist()}
        return {"images": len(self), "prompts": self.prompts, "seeds": self.seeds, "scores": scores, "path_kl": kl}


@torch.no_grad()
def compare(
    policy: Policy,
    prompts: Sequence[str],
    seeds: Sequence[int],
    scorers: Mapping[str, RewardFunction],
    batch_size: int,
    metadata: Sequence[Any] | None = None,
) -> Comparison:
    """Draws every prompt with every seed, from the tuned policy and from the pretrained model, and lets the scorers judge both.

    Args:
        policy ([`Policy`]): The raw policy, not a wrapped one. Sampled with its own settings (steps, guidance, noise).
        prompts (`Sequence[str]`)
        seeds (`Sequence[int]`): Image `i` of a prompt is drawn from `seeds[i]`, tuned and pretrained alike.
        scorers (`Mapping[str, Callable]`): Reward functions `(images, prompts, metadata) -> rewards`, by the name they have in the table.
        batch_size (`int`): Images drawn at a time.
        metadata (`Sequence`, *optional*): One for each prompt, for the scorers; `{}` by default.

    Returns:
        [`Comparison`] of `len(prompts) * len(seeds)` pairs, prompt by prompt.

    Raises:
        `ValueError`: Without a prompt or seed, for a seed that comes twice, or where prompts and metadata differ in number.
        [`RewardError`]: If a scorer fails.
    """
    if not prompts or not seeds or batch_size < 1:
        raise ValueError(
            f"a comparison needs a prompt, a seed and a batch size, got {len(prompts)}, {len(seeds)} and {batch_size}"
        )
    if len(set(seeds)) < len(seeds):
        raise ValueError(
            f"{len(seeds)} seeds, but only {len(set(seeds))} different ones: repeated images would make the standard errors too small"
        )
    metadata = [{} for _ in prompts] if metadata is None else metadata
    if len(metadata) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts and {len(metadata)} metadata entries are not one for one")
    pairs = [(prompt, seed, extra) for prompt, extra in zip(prompts, metadata, strict=True) for seed in seeds]
    base_scores: dict[str, list[torch.Tensor]] = {name: [] for name in scorers}
    tuned_scores: dict[str, list[torch.Tensor]] = {name: [] for name in scorers}
    path_kl, base_images, tuned_images = [], [], []
    for start in range(0, len(pairs), batch_size):
        batch_prompts, batch_seeds, batch_metadata = zip(*pairs[start : start + batch_size], strict=True)
        tuned = policy.rollout(batch_prompts, batch_seeds)
        path_kl.append(path_kl_to_reference(policy, tuned).cpu())
        with policy.reference():
            base = policy.rollout(batch_prompts, batch_seeds)
        for trajectory, scores, images in ((tuned, tuned_scores, tuned_images), (base, base_scores, base_images)):
            for name, scorer in scorers.items():
                scores[name].append(score(scorer, trajectory.images, batch_prompts, batch_metadata)[0])
            images.append(trajectory.images.cpu())
    return Comparison(
        prompts=[prompt for prompt, _, _ in pairs],
        seeds=[seed for _, seed, _ in pairs],
        base_scores={name: torch.cat(scores) for name, scores in base_scores.items()},
        tuned_scores={name: torch.cat(scores) for name, scores in tuned_scores.items()},
        path_kl=torch.cat(path_kl),
        base_images=torch.cat(base_images),
        tuned_images=torch.cat(tuned_images),
    )


@torch.no_grad()
def path_kl_to_reference(policy: Policy, trajectory: Trajectory) -> torch.Tensor:
    """KL(policy || pretrained) in nats along recorded paths: the closed form of each stochastic step, summed over steps and dimensions.

    Args:
        policy ([`Policy`])
        trajectory ([`Trajectory`]): Of this policy; on another's paths the sum estimates no KL.

    Returns:
        `torch.Tensor` of shape `(B,)`, float32. In expectation over the policy's paths this is the KL between the two path distributions,
        the sum in DPOK's Lemma 4.2, whatever reduction the policy trains with.
    """
    tuned = policy(trajectory)
    with policy.reference():
        base = policy(trajectory)
    steps = [t.distribution.kl(b.distribution, "sum") for t, b in zip(tuned, base, strict=True)]
    return torch.stack(steps).sum(dim=0)
