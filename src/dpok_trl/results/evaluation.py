"""The tuned policy against the pretrained model: same prompts, same seeds, same judges, and how far it has moved."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dpok_trl.core.trajectory import Trajectory
from dpok_trl.policy.policy import Policy
from dpok_trl.results import evaluation_files
from dpok_trl.results.estimates import Estimate, best_of, mean_distance, mean_of, over_prompts
from dpok_trl.results.prompt_sets import PromptSet, read_prompt_sets
from dpok_trl.rewards.base import score_batch
from dpok_trl.rewards.binding import BoundReward, RewardInputs, TrainerState
from dpok_trl.rewards.combining import RewardSet
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
class Comparison:
    """Tuned against pretrained on one set of prompts: `n` pairs of images, prompt by prompt. Row `i` of everything is `prompts[i]` with `seeds[i]`.

    Estimates are means over prompts with a standard error ([`~dpok_trl.results.estimates.over_prompts`]). A pair of which one image has no finite reward is
    out of all that is said of this reward.

    Args:
        prompts (`list[str]` of length `n`)
        seeds (`list[int]` of length `n`)
        images_per_prompt (`int`)
        categories (`list[str]` of length `n`, *optional*)
        held_out (`tuple[str, ...]`): The rewards that are not trained on.
        shown (`list[int]`): Rows of which there are pictures, evenly spaced.
        base, tuned ([`Drawn`]): Of the pretrained model and of the tuned policy.
    """

    prompts: list[str]
    seeds: list[int]
    images_per_prompt: int
    categories: list[str] | None
    held_out: tuple[str, ...]
    shown: list[int]
    base: Drawn
    tuned: Drawn

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def rewards(self) -> list[str]:
        """Their names, those that are trained on first."""
        return list(self.tuned.scores)

    @cached_property
    def category_names(self) -> list[str]:
        return list(dict.fromkeys(self.categories or []))

    def groups(self, reward: str | None = None, category: str | None = None) -> list[list[int]]:
        """The rows of each prompt, of one category if one is given; of a reward only the pairs of which both are finite."""
        finite = torch.ones(len(self), dtype=torch.bool)
        if reward is not None:
            finite = self.base.scores[reward].isfinite() & self.tuned.scores[reward].isfinite()
        keep = finite.tolist()
        groups = []
        for first in range(0, len(self), self.images_per_prompt):
            if category is None or (self.categories is not None and self.categories[first] == category):
                groups.append([row for row in range(first, first + self.images_per_prompt) if keep[row]])
        return groups

    def base_reward(self, name: str, category: str | None = None) -> Estimate:
        return over_prompts(self.groups(name, category), mean_of(self.base.scores[name]))

    def tuned_reward(self, name: str, category: str | None = None) -> Estimate:
        return over_prompts(self.groups(name, category), mean_of(self.tuned.scores[name]))

    def difference(self, name: str, category: str | None = None) -> Estimate:
        """Tuned minus pretrained, image by image: both drew from the same seeds."""
        change = self.tuned.scores[name].double() - self.base.scores[name].double()
        return over_prompts(self.groups(name, category), mean_of(change))

    @cached_property
    def kl(self) -> Estimate:
        """The path KL, in nats."""
        return over_prompts(self.groups(), mean_of(self.tuned.path_kl))

    @property
    def has_diversity(self) -> bool:
        return self.images_per_prompt > 1 and self.tuned.features is not None

    def diversity(self) -> tuple[Estimate, Estimate, Estimate]:
        """The mean distance between two images of a prompt, pretrained, tuned, and the difference.

        Raises:
            `ValueError`: With one image per prompt, and for videos.
        """
        if not self.has_diversity:
            raise ValueError(
                f"diversity compares the images of a prompt, and there is {self.images_per_prompt} of each."
                if self.images_per_prompt < 2
                else "diversity compares still pictures, and these are videos."
            )
        base, tuned = mean_distance(self.base.features), mean_distance(self.tuned.features)
        statistics = (base, tuned, lambda rows: tuned(rows) - base(rows))
        return tuple(over_prompts(self.groups(), statistic, smallest=2) for statistic in statistics)

    def best_of(self, name: str, n: int) -> Estimate:
        """The pretrained model's best image of `n`, by this reward: the mean over prompts of an unbiased estimate of E[max]. It costs `n` images and no
        training."""
        return over_prompts(self.groups(name), best_of(self.base.scores[name], n), smallest=n)

    def most_of(self, name: str) -> int:
        """The largest `n` that [`~Comparison.best_of`] can be asked for, for all prompts that have an image."""
        return min((len(rows) for rows in self.groups(name) if rows), default=0)

    def equivalent_n(self, name: str) -> int | None:
        """The smallest `n` whose best-of-n of the pretrained model reaches the tuned mean; `None` if even the largest does not, or there is none."""
        tuned, groups, most = (
            self.tuned_reward(name).mean,
            [rows for rows in self.groups(name) if rows],
            self.most_of(name),
        )
        for n in range(1, most + 1):
            statistic = best_of(self.base.scores[name], n)
            if math.fsum(map(statistic, groups)) / len(groups) >= tuned:
                return n
        return None


@dataclass(frozen=True)
class Evaluation:
    """What [`evaluate`] found.

    Args:
        sets (`dict[str, Comparison]`): By the names of the sets of prompts.
        call (`dict`): Arguments of the pipeline's call.
    """

    sets: dict[str, Comparison]
    call: dict[str, Any]

    def table(self) -> str:
        """Every set, reward and category: pretrained, tuned and paired difference, as aligned text that is Markdown as well."""
        return evaluation_files.tables(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures, for JSON; what is not finite is `None`."""
        return evaluation_files.as_dict(self)

    def save(self, folder: str | Path) -> Path:
        """Writes `evaluation.md`, `evaluation.json` and `grid.png`. Returns the folder."""
        return evaluation_files.save(self, folder)

    def metrics(self) -> dict[str, float]:
        """`eval/<set>/...`, without what could not be computed."""
        metrics: dict[str, float] = {}
        for name, comparison in self.sets.items():
            for reward in comparison.rewards:
                for part, found in (
                    ("base", comparison.base_reward(reward)),
                    ("tuned", comparison.tuned_reward(reward)),
                    ("difference", comparison.difference(reward)),
                ):
                    metrics[f"eval/{name}/{reward}/{part}"] = found.mean
            metrics[f"eval/{name}/kl"] = comparison.kl.mean
            if comparison.has_diversity:
                metrics[f"eval/{name}/diversity"] = comparison.diversity()[1].mean
        return {name: value for name, value in metrics.items() if math.isfinite(value)}


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


def compared(
    draws: Draws, prompts: PromptSet, base: Drawn, tuned: Drawn, held_out: Sequence[str], category_column: str | None
) -> Comparison:
    """The two draws of a set, side by side."""
    each = draws.images_per_prompt
    categories = prompts.categories(category_column)
    return Comparison(
        prompts=[prompt for prompt in prompts.prompts for _ in range(each)],
        seeds=draws.seeds(prompts),
        images_per_prompt=each,
        categories=None if categories is None else [category for category in categories for _ in range(each)],
        held_out=tuple(held_out),
        shown=draws.shown(prompts),
        base=base,
        tuned=tuned,
    )


def evaluate(
    policy: Policy,
    prompts: Any,
    rewards: Any = None,
    *,
    held_out_rewards: Any = None,
    images_per_prompt: int = 4,
    batch_size: int = 4,
    seed: int = 0,
    call_columns: Sequence[str] = (),
    category_column: str | None = None,
    features: Features = thumbnails,
) -> Evaluation:
    """Draws every prompt from the tuned policy and from the pretrained model, with the same seeds and noise, and lets rewards judge both.

    Args:
        policy ([`Policy`]): The raw policy, not a wrapped one. `policy.with_call(num_inference_steps=50)` evaluates at other steps than were trained with.
        prompts: A list of prompts (strings, or pairs with metadata), a `datasets.Dataset` with a "prompt" column, or a dict from names of sets to them:
            `{"training": [...], "held-out": [...], "paraphrased": [...]}`.
        rewards, held_out_rewards: Those that were trained on, and others: in any form that the trainer takes (a function, a name, an address, a list, a
            dict from names).
        images_per_prompt (`int`): With one, there is no diversity.
        batch_size (`int`): Images drawn at a time.
        seed (`int`): Image `i` of a set is drawn from seed `seed + i`.
        call_columns (`Sequence[str]`): Entries of the prompts' metadata that are arguments of the pipeline's call.
        category_column (`str`, *optional*): Entry of the metadata, or column of the dataset, by which the rewards are shown too.
        features (`Callable`): From a list of PIL pictures to vectors `(B, D)`: what the diversity compares. Default: thumbnails of 8 x 8 colours.

    Returns:
        [`Evaluation`]

    Raises:
        `ValueError` or `TypeError`: For prompts and rewards that cannot be used; the message says why.
        [`RewardError`]: If a reward fails in another way than by a number that is not finite. Those are counted and left out.
    """
    sets = read_prompt_sets(prompts)
    bound, held_out = bind_rewards(rewards, held_out_rewards, policy.pipe.device)
    draws = Draws(
        policy,
        bound,
        images_per_prompt=images_per_prompt,
        batch_size=batch_size,
        seed=seed,
        call_columns=call_columns,
        features=features,
    )
    found = {}
    for one in sets:
        tuned = draws.draw(one, pretrained=False)
        base = draws.draw(one, pretrained=True)
        found[one.name] = compared(draws, one, base, tuned, held_out, category_column)
    return Evaluation(found, dict(policy.call_kwargs))


def bind_rewards(
    rewards: Any, held_out_rewards: Any, device: torch.device | str
) -> tuple[list[BoundReward], list[str]]:
    """All rewards of an evaluation, and the names of the held-out ones.

    Raises:
        `ValueError`: If a reward is among both.
    """
    sets = [
        None if given is None else given if isinstance(given, RewardSet) else RewardSet(given, device=device)
        for given in (rewards, held_out_rewards)
    ]
    trained, held_out = ([] if one is None else one.rewards for one in sets)
    both = sorted({one.name for one in trained} & {one.name for one in held_out})
    if both:
        raise ValueError(
            f"{', '.join(both)} is trained on and among the held-out rewards too. A reward of another kind gets another name by a dict: {{'name': reward}}."
        )
    return [*trained, *held_out], [one.name for one in held_out]


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
