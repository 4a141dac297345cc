"""Images of an evaluation, of one model at a time: drawn from fixed seeds, judged, and kept as numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from numbers import Integral

import torch
from PIL import Image

from dpok_trl.core.trajectory import Trajectory
from dpok_trl.policy.policy import Policy
from dpok_trl.results.prompt_sets import PromptSet
from dpok_trl.rewards.base import score_batch
from dpok_trl.rewards.binding import BoundReward, RewardInputs, TrainerState
from dpok_trl.rewards.combining import RewardSet
from dpok_trl.rewards.diversity import thumbnails


Features = Callable[[Sequence[Image.Image]], torch.Tensor]

SHOWN = 16  # pairs of pictures that are kept of a set: four hundred of 1024 pixels would be gigabytes
WAITING_BYTES = 2**29  # of images that wait for the rewards: 42 of 1024 pixels


@dataclass(frozen=True)
class ModelSamples:
    """What one of the two models drew for the `n` images of a set, and what the rewards said.

    Args:
        scores (`dict[str, torch.Tensor]`): By reward, `(n,)`, float32; NaN where it failed (NaN or infinite) and where it does not apply.
        failed (`dict[str, int]`): By reward, the images for which it applies and failed.
        features (`torch.Tensor` of shape `(n, D)`, *optional*): What the diversity compares; `None` for videos.
        path_kl (`torch.Tensor` of shape `(n,)`, *optional*): See [`path_kl`]; `None` for the pretrained model.
        pictures (`torch.Tensor` of shape `(shown, 3, H, W)`, uint8, *optional*): Of the rows that are shown; `None` on all processes but the main one.
    """

    scores: dict[str, torch.Tensor]
    failed: dict[str, int]
    features: torch.Tensor | None
    path_kl: torch.Tensor | None
    pictures: torch.Tensor | None


@dataclass(frozen=True)
class SampledRows:
    """Some rows of a [`ModelSamples`], as one process has them."""

    rows: list[int]
    scores: torch.Tensor  # (rows, rewards)
    applies: torch.Tensor
    features: torch.Tensor | None
    path_kl: torch.Tensor | None
    pictures: dict[int, torch.Tensor]


@dataclass(frozen=True)
class _Unjudged:
    """Images of a unit, before the rewards were asked: batch by batch."""

    rows: list[int]
    batches: list[RewardInputs]
    features: torch.Tensor | None
    path_kl: torch.Tensor | None


class EvaluationSampler:
    """Draws the images of an evaluation, always from the same seeds, and asks the rewards.

    Args:
        policy ([`Policy`]): The raw policy, not a wrapped one. Sampled with its own settings, all steps stochastic.
        reward_sets (`Sequence[RewardSet]`): Asked about a batch, or about all images of a prompt where they `wants_groups`.
        images_per_prompt (`int`)
        batch_size (`int`): Images drawn at a time.
        seed (`int`): Image `i` of a set is drawn from seed `seed + i`: no two images of a set share their noise, and their errors are independent.
        call_columns (`Sequence[str]`): Entries of the metadata that are arguments of the pipeline's call.
        features (`Callable`): From pictures to vectors `(B, D)`, for the diversity.
        process_index, num_processes (`int`): Batches are dealt out to processes, each as it would be in a single one: the numbers are the same.
        collect (`Callable`): Runs the work of this process and returns what all have sampled; pictures may be left out on all processes but the main one.
        drawing (`Callable[[], ContextManager]`): Entered around every call of the policy.
        scoring (`Callable[[RewardSet], ContextManager]`): Entered when a set of rewards is asked, about as many images as may wait together.
    """

    def __init__(
        self,
        policy: Policy,
        reward_sets: Sequence[RewardSet],
        *,
        images_per_prompt: int,
        batch_size: int,
        seed: int = 0,
        call_columns: Sequence[str] = (),
        features: Features = thumbnails,
        process_index: int = 0,
        num_processes: int = 1,
        collect: Callable[[Callable[[], list[SampledRows]]], list[SampledRows]] = lambda work: work(),
        drawing: Callable[[], AbstractContextManager] = nullcontext,
        scoring: Callable[[RewardSet], AbstractContextManager] = lambda rewards: nullcontext(),
    ):
        refuse_less_than_one(images_per_prompt=images_per_prompt, batch_size=batch_size)
        self.policy, self.reward_sets = policy, list(reward_sets)
        self.rewards = [reward for one in self.reward_sets for reward in one.rewards]
        self.images_per_prompt, self.batch_size, self.seed = images_per_prompt, batch_size, seed
        self.call_columns, self.features = tuple(call_columns), features
        self.process_index, self.num_processes, self.collect = process_index, num_processes, collect
        self.drawing, self.scoring = drawing, scoring

    def seeds(self, prompts: PromptSet) -> list[int]:
        return [self.seed + row for row in range(len(prompts) * self.images_per_prompt)]

    def shown(self, prompts: PromptSet) -> list[int]:
        """Rows of the pictures that are kept: evenly spaced, so that nobody has chosen."""
        count = len(prompts) * self.images_per_prompt
        return [index * count // min(SHOWN, count) for index in range(min(SHOWN, count))]

    @torch.no_grad()
    def sample(self, prompts: PromptSet, *, pretrained: bool, state: TrainerState | None = None) -> ModelSamples:
        """
        Raises:
            [`RewardError`]: If a reward raises, or returns something else than one number (or `None`) per image.
        """
        for entry in prompts.metadata if self.call_columns else ():
            missing = [name for name in self.call_columns if not (isinstance(entry, dict) and name in entry)]
            if missing:
                raise ValueError(
                    f"a prompt of the set '{prompts.name}' comes without {', '.join(missing)}, which the pipeline's call is to get; it has {entry!r}."
                )
        units = self._units(prompts)[self.process_index :: self.num_processes]
        parts = self.collect(lambda: self._sample_units(prompts, units, pretrained, state))
        return self._joined(parts, self.shown(prompts))

    def _units(self, prompts: PromptSet) -> list[list[list[int]]]:
        """Rows in batches, in units that stay on one process: single batches, or all images of a prompt if a reward is to see them together."""
        count, size = len(prompts) * self.images_per_prompt, self.batch_size
        if not any(reward.wants_groups for reward in self.rewards):
            return [[list(range(first, min(first + size, count)))] for first in range(0, count, size)]
        units = []
        for first in range(0, count, self.images_per_prompt):
            end = first + self.images_per_prompt
            units.append([list(range(start, min(start + size, end))) for start in range(first, end, size)])
        return units

    def _sample_units(
        self, prompts: PromptSet, units: list[list[list[int]]], pretrained: bool, state: TrainerState | None
    ) -> list[SampledRows]:
        """Images wait for the rewards, which may have to be moved to the device to be asked."""
        parts: list[SampledRows] = []
        waiting: list[_Unjudged] = []
        shown = set(self.shown(prompts))
        for number, unit in enumerate(units, start=1):
            waiting.append(self._draw_unit(prompts, unit, pretrained, state))
            size = sum(batch.images.nbytes for one in waiting for batch in one.batches)
            if size >= WAITING_BYTES or number == len(units):
                parts += self._judged(waiting, shown)
                waiting = []
        return parts

    def _draw_unit(
        self, prompts: PromptSet, unit: list[list[int]], pretrained: bool, state: TrainerState | None
    ) -> _Unjudged:
        seeds = self.seeds(prompts)
        kl, features, batches = [], [], []
        for rows in unit:
            entries = [row // self.images_per_prompt for row in rows]
            metadata = tuple(prompts.metadata[entry] for entry in entries)
            with self.drawing(), self.policy.pretrained() if pretrained else nullcontext():
                trajectory = self.policy.rollout(
                    [prompts.prompts[entry] for entry in entries],
                    [seeds[row] for row in rows],
                    {column: [entry[column] for entry in metadata] for column in self.call_columns},
                )
            if not pretrained:
                with self.drawing():
                    kl.append(path_kl(self.policy, trajectory).cpu())
            inputs = RewardInputs(trajectory.images, tuple(trajectory.prompts), metadata, state)
            batches.append(inputs)
            if trajectory.images.ndim == 4:
                features.append(self.features(inputs.pictures).float().cpu())
        return _Unjudged(
            [row for batch in unit for row in batch],
            batches,
            torch.cat(features) if features else None,
            torch.cat(kl) if kl else None,
        )

    def _judged(self, waiting: Sequence[_Unjudged], shown: set[int]) -> list[SampledRows]:
        whole = [_joined_inputs(one.batches) for one in waiting]
        columns: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in waiting]
        for rewards in self.reward_sets:
            with self.scoring(rewards):
                for one, inputs, found in zip(waiting, whole, columns, strict=True):
                    found += [
                        _ask(reward, [inputs] if reward.wants_groups else one.batches) for reward in rewards.rewards
                    ]
        parts = []
        for one, inputs, found in zip(waiting, whole, columns, strict=True):
            nothing = torch.empty(
                len(one.rows), 0
            )  # an evaluation may go without rewards, for the KL and the pictures
            parts.append(
                SampledRows(
                    one.rows,
                    torch.stack([values for values, _ in found], dim=1) if found else nothing,
                    torch.stack([applies for _, applies in found], dim=1) if found else nothing,
                    one.features,
                    one.path_kl,
                    {row: _bytes(inputs.images[index]) for index, row in enumerate(one.rows) if row in shown},
                )
            )
        return parts

    def _joined(self, parts: Sequence[SampledRows], shown: Sequence[int]) -> ModelSamples:
        order = torch.tensor([row for part in parts for row in part.rows]).argsort()

        def join(name: str) -> torch.Tensor | None:
            found = [getattr(part, name) for part in parts]
            return None if found[0] is None else torch.cat(found)[order]

        values, applies = join("scores"), join("applies").bool()
        finite = values.isfinite()
        values = torch.where(finite & applies, values, torch.nan)
        names = [reward.name for reward in self.rewards]
        pictures = {row: picture for part in parts for row, picture in part.pictures.items()}
        return ModelSamples(
            scores={name: values[:, column] for column, name in enumerate(names)},
            failed={name: int((applies & ~finite)[:, column].sum()) for column, name in enumerate(names)},
            features=join("features"),
            path_kl=join("path_kl"),
            pictures=torch.stack([pictures[row] for row in shown]) if pictures else None,
        )


def path_kl(policy: Policy, trajectory: Trajectory) -> torch.Tensor:
    """KL(policy || pretrained) in nats along recorded paths: the closed form of each stochastic step, summed over steps and dimensions.

    Args:
        policy ([`Policy`])
        trajectory ([`Trajectory`]): Of this policy; on another's paths the sum estimates no KL.

    Returns:
        `torch.Tensor` of shape `(B,)`, float32. In expectation over the policy's paths this is the KL between the two path distributions,
        the sum in DPOK's Lemma 4.2 (https://arxiv.org/abs/2305.16381), whatever reduction the policy trains with. It bounds the KL between the
        distributions of images from above.
    """
    with torch.no_grad():
        tuned = policy(trajectory)
        with policy.pretrained():
            base = policy(trajectory)
    steps = [t.distribution.kl(b.distribution, "sum") for t, b in zip(tuned, base, strict=True)]
    return torch.stack(steps).sum(dim=0)


# --------------------------------------------------------------------------------------------------------------------------------------


def refuse_less_than_one(**given: int | None) -> None:
    """Raises `ValueError` for a setting, by its name, that is no whole number of at least 1; `None` is none."""
    for name, value in given.items():
        if value is not None and (not isinstance(value, Integral) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} = {value!r}, but an evaluation needs a whole number of at least 1.")


def _ask(reward: BoundReward, batches: Sequence[RewardInputs]) -> tuple[torch.Tensor, torch.Tensor]:
    """What a reward says of some batches, and of which images it says anything."""
    scored = [score_batch(reward, inputs) for inputs in batches]
    return torch.cat([one.values for one in scored]), torch.cat([one.applies for one in scored])


def _joined_inputs(batches: Sequence[RewardInputs]) -> RewardInputs:
    if len(batches) == 1:
        return batches[0]
    return RewardInputs(
        torch.cat([batch.images for batch in batches]),
        tuple(prompt for batch in batches for prompt in batch.prompts),
        tuple(entry for batch in batches for entry in batch.metadata),
        batches[0].trainer_state,
    )


def _bytes(image: torch.Tensor) -> torch.Tensor:
    return (image.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8)
