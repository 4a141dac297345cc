"""Images of an evaluation, of one model at a time: drawn from fixed seeds, judged, and kept as numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from PIL import Image

from dpok_trl.core.trajectory import Trajectory
from dpok_trl.policy.policy import Policy
from dpok_trl.results.prompt_sets import PromptSet
from dpok_trl.rewards.base import score_batch
from dpok_trl.rewards.binding import BoundReward, RewardInputs, TrainerState
from dpok_trl.rewards.diversity import thumbnails


Features = Callable[[Sequence[Image.Image]], torch.Tensor]

SHOWN = 16  # pairs of pictures that are kept of a set: four hundred of 1024 pixels would be gigabytes


@dataclass(frozen=True)
class Drawn:
    """What one of the two models drew for the `n` images of a set, and what the rewards said.

    Args:
        scores (`dict[str, torch.Tensor]`): By reward, `(n,)`, float32; NaN where it failed (NaN or infinite) and where it does not apply.
        failed (`dict[str, int]`): By reward, the images for which it applies and failed.
        features (`torch.Tensor` of shape `(n, D)`, *optional*): What the diversity compares; `None` for videos.
        path_kl (`torch.Tensor` of shape `(n,)`, *optional*): See [`path_kl`]; `None` for the pretrained model.
        pictures (`torch.Tensor` of shape `(shown, 3, H, W)`, uint8): Of the rows that are shown.
    """

    scores: dict[str, torch.Tensor]
    failed: dict[str, int]
    features: torch.Tensor | None
    path_kl: torch.Tensor | None
    pictures: torch.Tensor


@dataclass(frozen=True)
class Part:
    """Some rows of a [`Drawn`], as one process has them."""

    rows: list[int]
    scores: torch.Tensor  # (rows, rewards)
    applies: torch.Tensor
    features: torch.Tensor | None
    path_kl: torch.Tensor | None
    pictures: dict[int, torch.Tensor]


class Draws:
    """Draws the images of an evaluation, always from the same seeds, and asks the rewards.

    Args:
        policy ([`Policy`]): The raw policy, not a wrapped one. Sampled with its own settings, all steps stochastic.
        rewards (`Sequence[BoundReward]`): All of them; asked about a batch, or about all images of a prompt where they `wants_groups`.
        images_per_prompt (`int`)
        batch_size (`int`): Images drawn at a time.
        seed (`int`): Image `i` of a set is drawn from seed `seed + i`: no two images of a set share their noise, and their errors are independent.
        call_columns (`Sequence[str]`): Entries of the metadata that are arguments of the pipeline's call.
        features (`Callable`): From pictures to vectors `(B, D)`, for the diversity.
        process_index, num_processes (`int`): Batches are dealt out to processes, each as it would be in a single one: the numbers are the same.
        collect (`Callable`): Runs the work of this process and returns the parts of all.
        drawing, scoring (`Callable[[], ContextManager]`): Entered around every call of the policy, and around every round of rewards.
    """

    def __init__(
        self,
        policy: Policy,
        rewards: Sequence[BoundReward],
        *,
        images_per_prompt: int,
        batch_size: int,
        seed: int = 0,
        call_columns: Sequence[str] = (),
        features: Features = thumbnails,
        process_index: int = 0,
        num_processes: int = 1,
        collect: Callable[[Callable[[], list[Part]]], list[Part]] = lambda work: work(),
        drawing: Callable[[], AbstractContextManager] = nullcontext,
        scoring: Callable[[], AbstractContextManager] = nullcontext,
    ):
        for name, value in (("images_per_prompt", images_per_prompt), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} = {value}, but an evaluation needs at least 1.")
        self.policy, self.rewards = policy, list(rewards)
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
    def draw(self, prompts: PromptSet, *, pretrained: bool, state: TrainerState | None = None) -> Drawn:
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
        parts = self.collect(lambda: [self._draw_unit(prompts, unit, pretrained, state) for unit in units])
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

    def _draw_unit(
        self, prompts: PromptSet, unit: list[list[int]], pretrained: bool, state: TrainerState | None
    ) -> Part:
        seeds, shown = self.seeds(prompts), set(self.shown(prompts))
        together = [reward.wants_groups for reward in self.rewards]
        said: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in self.rewards]
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
            self._ask(inputs, said, [not one for one in together])
            batches.append(inputs)
            if trajectory.images.ndim == 4:
                features.append(self.features(inputs.pictures).float().cpu())
        whole = _joined_inputs(batches)
        self._ask(whole, said, together)
        rows = [row for batch in unit for row in batch]
        columns = [[torch.cat(answers) for answers in zip(*parts, strict=True)] for parts in said]
        nothing = torch.empty(len(rows), 0)  # an evaluation may go without rewards, for the KL and the pictures
        return Part(
            rows,
            torch.stack([values for values, _ in columns], dim=1) if columns else nothing,
            torch.stack([applies for _, applies in columns], dim=1) if columns else nothing,
            torch.cat(features) if features else None,
            torch.cat(kl) if kl else None,
            {row: _bytes(whole.images[index]) for index, row in enumerate(rows) if row in shown},
        )

    def _ask(
        self, inputs: RewardInputs, said: list[list[tuple[torch.Tensor, torch.Tensor]]], which: list[bool]
    ) -> None:
        if not any(which):
            return
        with self.scoring():
            for reward, asked, answers in zip(self.rewards, which, said, strict=True):
                if asked:
                    scored = score_batch(reward, inputs)
                    answers.append((scored.values, scored.applies))

    def _joined(self, parts: Sequence[Part], shown: Sequence[int]) -> Drawn:
        order = torch.tensor([row for part in parts for row in part.rows]).argsort()

        def join(name: str) -> torch.Tensor | None:
            found = [getattr(part, name) for part in parts]
            return None if found[0] is None else torch.cat(found)[order]

        values, applies = join("scores"), join("applies").bool()
        finite = values.isfinite()
        values = torch.where(finite & applies, values, torch.nan)
        names = [reward.name for reward in self.rewards]
        pictures = {row: picture for part in parts for row, picture in part.pictures.items()}
        return Drawn(
            scores={name: values[:, column] for column, name in enumerate(names)},
            failed={name: int((applies & ~finite)[:, column].sum()) for column, name in enumerate(names)},
            features=join("features"),
            path_kl=join("path_kl"),
            pictures=torch.stack([pictures[row] for row in shown]),
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
