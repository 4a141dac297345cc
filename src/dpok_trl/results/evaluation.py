"""The tuned policy against the pretrained model: same prompts, same seeds, same judges, and how far it has moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dpok_trl.policy.policy import Policy
from dpok_trl.results import evaluation_files
from dpok_trl.results.drawing import Drawn, Draws, Features
from dpok_trl.results.estimates import Estimate, best_of, mean_distance, mean_of, over_prompts
from dpok_trl.results.prompt_sets import PromptSet, read_prompt_sets
from dpok_trl.rewards.binding import BoundReward
from dpok_trl.rewards.combining import RewardSet
from dpok_trl.rewards.diversity import thumbnails


ROUNDING = 1e-9  # relative; a score of 1 is reached by images that all score 1


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
            if math.fsum(map(statistic, groups)) / len(groups) >= tuned - ROUNDING * abs(tuned):
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
        """Writes `evaluation.md`, `evaluation.json`, `grid.png` and some pictures of the tuned model. Returns the folder."""
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
