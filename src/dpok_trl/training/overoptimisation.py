"""A reward that rises while others fall: what a run looks like that learns to please its judge."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from dpok_trl.results.estimates import Estimate, mean_of, over_prompts
from dpok_trl.results.evaluation import Comparison, Evaluation
from dpok_trl.results.prompt_sets import TRAINING


WINDOW = 3  # evaluations; what happened between the first and the last of them counts


@dataclass(frozen=True)
class Snapshot:
    """An evaluation and when it took place."""

    epoch: int
    global_step: int
    evaluation: Evaluation


@dataclass(frozen=True)
class Change:
    """How the mean of a reward on a set of prompts has changed, image by image."""

    where: str
    before: float
    after: float
    by: Estimate

    @property
    def errors(self) -> float:
        """The change in standard errors; 0 where no error can be estimated."""
        if math.isnan(self.by.standard_error) or self.by.mean == 0:
            return 0.0
        if self.by.standard_error == 0:  # all images changed alike
            return math.copysign(math.inf, self.by.mean)
        return self.by.mean / self.by.standard_error

    def __str__(self) -> str:
        return f"{self.where} from {self.before:.3f} to {self.after:.3f} (by {self.by})"


def over_optimisation(first: Snapshot, last: Snapshot, weights: Mapping[str, float], kl_weight: float) -> str | None:
    """Says so where a reward that is trained on rose and something held out fell, each by more than the standard error of its change.

    What is trained on is looked at on the set "training", if there is one, else on all sets. Held out is every other reward on every set, and, beside a set
    "training", the trained rewards on the other sets. Of a reward with a negative weight, rising is falling.

    Args:
        first, last ([`Snapshot`])
        weights (`Mapping[str, float]`): Of the rewards that are trained on.
        kl_weight (`float`): For the advice.

    Returns:
        `str`: Both changes, the largest in standard errors, and what to do; `None` if all is well.
    """
    has_training_set = TRAINING in last.evaluation.sets
    rises, falls = [], []
    for where, reward, change in _changes(first.evaluation, last.evaluation):
        trained = reward in weights
        sign = -1.0 if trained and weights[reward] < 0 else 1.0
        if trained and (where == TRAINING or not has_training_set):
            rises += [(sign * change.errors, change)]
        if not trained or (has_training_set and where != TRAINING):
            falls += [(-sign * change.errors, change)]
    rise = max(rises, key=lambda pair: pair[0], default=(0.0, None))
    fall = max(falls, key=lambda pair: pair[0], default=(0.0, None))
    if rise[0] <= 1 or fall[0] <= 1:
        return None
    return (
        f"over-optimisation: between epoch {first.epoch} and epoch {last.epoch} what is trained on got better, {rise[1]}, and what is held out got worse, {fall[1]}. "
        f"Look at the pictures. Then raise kl_weight (now {kl_weight:g}), add the held-out reward to those that are trained on, or stop and take a checkpoint from "
        f"about step {first.global_step} (epoch {first.epoch})."
    )


def _changes(first: Evaluation, last: Evaluation) -> Iterator[tuple[str, str, Change]]:
    for where, now in last.sets.items():
        before = first.sets[where]
        for reward in now.rewards:
            yield where, reward, _change(where, reward, before, now)


def _change(where: str, reward: str, before: Comparison, now: Comparison) -> Change:
    scores = [
        torch.where(one.tuned.scores[reward].isfinite(), one.tuned.scores[reward].double(), torch.nan)
        for one in (before, now)
    ]
    change = scores[1] - scores[0]
    keep = change.isfinite().tolist()
    groups = [[row for row in rows if keep[row]] for rows in now.groups()]
    means = [over_prompts(groups, mean_of(values)).mean for values in scores]
    return Change(f"{reward} on {where}", *means, over_prompts(groups, mean_of(change)))
