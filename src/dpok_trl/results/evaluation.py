"""The tuned policy against the pretrained model: same prompts, same seeds, same judges, and how far it has moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dpok_trl.policy.policy import Policy
from dpok_trl.results import evaluation_files
from dpok_trl.results.drawing import EvaluationSampler, Features, ModelSamples
from dpok_trl.results.estimates import BestOf, EquivalentN, Estimate, Mean, MeanDistance, equivalent_n, over_prompts
from dpok_trl.results.prompt_sets import PromptSet, read_prompt_sets
from dpok_trl.results.provenance import public_word, versions
from dpok_trl.rewards.binding import TrainerState
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
        base, tuned ([`ModelSamples`]): Of the pretrained model and of the tuned policy.
    """

    prompts: list[str]
    seeds: list[int]
    images_per_prompt: int
    categories: list[str] | None
    held_out: tuple[str, ...]
    shown: list[int]
    base: ModelSamples
    tuned: ModelSamples

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
        return over_prompts(self.groups(name, category), Mean(self.base.scores[name]))

    def tuned_reward(self, name: str, category: str | None = None) -> Estimate:
        return over_prompts(self.groups(name, category), Mean(self.tuned.scores[name]))

    def difference(self, name: str, category: str | None = None) -> Estimate:
        """Tuned minus pretrained, image by image: both drew from the same seeds."""
        change = self.tuned.scores[name].double() - self.base.scores[name].double()
        return over_prompts(self.groups(name, category), Mean(change))

    @cached_property
    def kl(self) -> Estimate:
        """The path KL, in nats."""
        return over_prompts(self.groups(), Mean(self.tuned.path_kl))

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
        base, tuned = MeanDistance(self.base.features), MeanDistance(self.tuned.features)
        return tuple(over_prompts(self.groups(), statistic) for statistic in (base, tuned, tuned - base))

    def best_of(self, name: str, n: int) -> Estimate:
        """The pretrained model's best image of `n`, by this reward: the mean over prompts of an unbiased estimate of E[max]. It costs `n` images and no
        training."""
        return over_prompts(self.groups(name), BestOf(self.base.scores[name], n))

    def largest_n(self, name: str) -> int:
        """The largest `n` that [`~Comparison.best_of`] can be asked for, for all prompts that have an image."""
        return min((len(rows) for rows in self.groups(name) if rows), default=0)

    def equivalent_n(self, name: str) -> EquivalentN:
        """Of how many images of the pretrained model the best is as good as one of the tuned model; with the range that the standard error leaves."""
        groups, tuned, base = self.groups(name), Mean(self.tuned.scores[name]), self.base.scores[name]
        rounding = ROUNDING * abs(self.tuned_reward(name).mean)

        def difference_to(n: int) -> Estimate:
            difference = over_prompts(groups, tuned - BestOf(base, n))
            return replace(difference, mean=0.0) if abs(difference.mean) <= rounding else difference

        return equivalent_n(difference_to, self.largest_n(name))


@dataclass(frozen=True)
class Evaluation:
    """What [`evaluate`] found.

    Args:
        sets (`dict[str, Comparison]`): By the names of the sets of prompts.
        call (`dict`): Arguments of the pipeline's call.
        about (`dict`): What was evaluated: of `model`, `base`, `checkpoint`, `epoch`, `step`, `date` and `versions` those that are known. Of paths only their names.
    """

    sets: dict[str, Comparison]
    call: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)

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


def compare_models(
    sampler: EvaluationSampler,
    sets: Sequence[PromptSet],
    held_out: Sequence[str],
    category_column: str | None,
    *,
    base: dict[str, ModelSamples] | None = None,
    state: TrainerState | None = None,
    **about: Any,
) -> Evaluation:
    """Samples every set from both models.

    Args:
        sampler ([`EvaluationSampler`])
        sets (`Sequence[PromptSet]`)
        held_out (`Sequence[str]`): Names of rewards.
        category_column (`str`, *optional*)
        base (`dict[str, ModelSamples]`, *optional*): What the pretrained model has drawn already, by the names of the sets; what it draws now is added.
        state ([`TrainerState`], *optional*): For rewards.
        about: What is known of the model; see [`Evaluation`].
    """
    base = {} if base is None else base
    found = {}
    for one in sets:
        tuned = sampler.sample(one, pretrained=False, state=state)
        if one.name not in base:
            base[one.name] = sampler.sample(one, pretrained=True, state=state)
        found[one.name] = _side_by_side(sampler, one, base[one.name], tuned, held_out, category_column)
    about = {
        "base": sampler.policy.pipe.config.get("_name_or_path"),
        **about,
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        "versions": versions(),
    }
    about |= {name: public_word(str(about[name])) for name in ("model", "base") if about.get(name) is not None}
    known = {name: value for name, value in about.items() if value is not None}
    return Evaluation(found, dict(sampler.policy.call_kwargs), known)


def _side_by_side(
    sampler: EvaluationSampler,
    prompts: PromptSet,
    base: ModelSamples,
    tuned: ModelSamples,
    held_out: Sequence[str],
    category_column: str | None,
) -> Comparison:
    each = sampler.images_per_prompt
    categories = prompts.categories(category_column)
    return Comparison(
        prompts=[prompt for prompt in prompts.prompts for _ in range(each)],
        seeds=sampler.seeds(prompts),
        images_per_prompt=each,
        categories=None if categories is None else [category for category in categories for _ in range(each)],
        held_out=tuple(held_out),
        shown=sampler.shown(prompts),
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
        policy ([`Policy`]): `trainer.policy`, or made of a pipeline: `Policy(load_tuned("me/rabbit-lora"), call_kwargs={"num_inference_steps": 50})`. The raw
            policy, not a wrapped one. `policy.with_call(num_inference_steps=50)` evaluates at other steps than were trained with.
        prompts: A list of prompts (strings, or pairs with metadata), a `datasets.Dataset` with a "prompt" column, or a dict from names of sets to them:
            `{"training": [...], "held-out": [...], "paraphrased": [...]}`.
        rewards, held_out_rewards: Those that were trained on, and others: in any form that the trainer takes (a function, a name, an address, a list, a
            dict from names, a [`~dpok_trl.rewards.combining.RewardSet`]).
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
    if not isinstance(policy, Policy):
        raise TypeError(
            f"evaluate() needs a Policy, and this is a {type(policy).__name__}. A trainer has one, trainer.policy; of a pipeline with its adapter make one: "
            "Policy(pipe, call_kwargs={'num_inference_steps': 50})."
        )
    sets = read_prompt_sets(prompts)
    reward_sets, held_out = bind_rewards(rewards, held_out_rewards, policy.pipe.device)
    sampler = EvaluationSampler(
        policy,
        reward_sets,
        images_per_prompt=images_per_prompt,
        batch_size=batch_size,
        seed=seed,
        call_columns=call_columns,
        features=features,
    )
    return compare_models(sampler, sets, held_out, category_column)


def bind_rewards(rewards: Any, held_out_rewards: Any, device: torch.device | str) -> tuple[list[RewardSet], list[str]]:
    """The sets of rewards of an evaluation, and the names of the held-out ones.

    Raises:
        `ValueError`: If a reward is among both.
    """
    trained, held_out = (
        given if given is None or isinstance(given, RewardSet) else RewardSet(given, device=device)
        for given in (rewards, held_out_rewards)
    )
    names = [] if held_out is None else held_out.names
    both = sorted(set(names) & set([] if trained is None else trained.names))
    if both:
        raise ValueError(
            f"{', '.join(both)} is trained on and among the held-out rewards too. A reward of another kind gets another name by a dict: {{'name': reward}}."
        )
    return [one for one in (trained, held_out) if one is not None], names
