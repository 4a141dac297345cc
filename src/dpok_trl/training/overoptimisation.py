"""A reward that rises while others fall: what a run looks like that learns to please its judge."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dpok_trl.results.estimates import Estimate, Mean, over_prompts
from dpok_trl.results.evaluation import Evaluation
from dpok_trl.results.prompt_sets import TRAINING
from dpok_trl.training.sft_config import DPOKSFTConfig


if TYPE_CHECKING:
    from dpok_trl.training.trainer import DPOKTrainer


WINDOW = 3  # evaluations; what happened between the first and the last of them counts


@dataclass(frozen=True)
class Snapshot:
    """What the tuned model scored in an evaluation, and when that took place.

    Args:
        epoch, global_step (`int`)
        groups (`dict[str, list[list[int]]]`): By set, the rows of each prompt.
        scores (`dict[str, dict[str, torch.Tensor]]`): By set and reward, of each row; not finite where there is no reward.
    """

    epoch: int
    global_step: int
    groups: dict[str, list[list[int]]]
    scores: dict[str, dict[str, torch.Tensor]]

    @classmethod
    def of(cls, evaluation: Evaluation, epoch: int, global_step: int) -> Snapshot:
        """The numbers alone: an evaluation holds pictures."""
        sets = evaluation.sets.items()
        groups = {name: comparison.groups() for name, comparison in sets}
        return cls(epoch, global_step, groups, {name: comparison.tuned.scores for name, comparison in sets})

    def state_dict(self) -> dict[str, Any]:
        """In plain lists and numbers, for JSON."""
        scores = {where: {name: one.tolist() for name, one in of.items()} for where, of in self.scores.items()}
        return {"epoch": self.epoch, "global_step": self.global_step, "groups": self.groups, "scores": scores}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Snapshot:
        """From what [`~Snapshot.state_dict`] gave."""
        scores = {
            where: {name: torch.tensor(one) for name, one in of.items()} for where, of in state["scores"].items()
        }
        return cls(state["epoch"], state["global_step"], state["groups"], scores)


@dataclass(frozen=True)
class Change:
    """How the mean of a reward on a set of prompts has changed, image by image."""

    where: str
    before: float
    after: float
    by: Estimate

    @property
    def in_standard_errors(self) -> float:
        """0 where no error can be estimated."""
        if math.isnan(self.by.standard_error) or self.by.mean == 0:
            return 0.0
        if self.by.standard_error == 0:  # all images changed alike
            return math.copysign(math.inf, self.by.mean)
        return self.by.mean / self.by.standard_error

    def __str__(self) -> str:
        return f"{self.where} from {self.before:.3f} to {self.after:.3f} (by {self.by})"


def over_optimisation(first: Snapshot, last: Snapshot, weights: Mapping[str, float], advice: str) -> str | None:
    """Says so where a reward that is trained on rose and something held out fell, each by more than the standard error of its change.

    What is trained on is looked at on the set "training", if there is one, else on all sets. Held out is every other reward on every set, and, beside a set
    "training", the trained rewards on the other sets. Of a reward with a negative weight, rising is falling.

    Args:
        first, last ([`Snapshot`])
        weights (`Mapping[str, float]`): Of the rewards that are trained on.
        advice (`str`): How to hold the policy closer to the pretrained model; see [`stronger_kl`].

    Returns:
        `str`: Both changes, the largest in standard errors, and what to do; `None` if all is well.
    """
    has_training_set = TRAINING in last.scores
    rises, falls = [], []
    for where, reward, change in _changes(first, last):
        trained = reward in weights
        sign = -1.0 if trained and weights[reward] < 0 else 1.0
        if trained and (where == TRAINING or not has_training_set):
            rises += [(sign * change.in_standard_errors, change)]
        if not trained or (has_training_set and where != TRAINING):
            falls += [(-sign * change.in_standard_errors, change)]
    rise = max(rises, key=lambda pair: pair[0], default=(0.0, None))
    fall = max(falls, key=lambda pair: pair[0], default=(0.0, None))
    if rise[0] <= 1 or fall[0] <= 1:
        return None
    return (
        f"over-optimisation: between epoch {first.epoch} and epoch {last.epoch} what is trained on got better, {rise[1]}, and what is held out got worse, {fall[1]}. "
        f"Look at the pictures. Then {advice}, add the held-out reward to those that are trained on, or stop and take a checkpoint from "
        f"about step {first.global_step} (epoch {first.epoch})."
    )


def stronger_kl(trainer: DPOKTrainer) -> str:
    """What holds the policy of this run closer to the pretrained model, as advice."""
    config = trainer.config
    if isinstance(config, DPOKSFTConfig):
        if config.sft_kl == "none":
            return "set sft_kl to 'kl_d' or 'kl_o' (now 'none')"
        return f"raise sft_gamma (now {config.sft_gamma:g})"
    if config.target_kl is not None:
        return f"lower target_kl (now {config.target_kl:g})"
    return f"raise kl_weight (now {trainer.kl_weight:g})"


def _changes(first: Snapshot, last: Snapshot) -> Iterator[tuple[str, str, Change]]:
    for where, scores in last.scores.items():
        for reward, after in scores.items():
            yield (
                where,
                reward,
                _change(f"{reward} on {where}", last.groups[where], first.scores[where][reward], after),
            )


def _change(where: str, groups: list[list[int]], before: torch.Tensor, after: torch.Tensor) -> Change:
    scores = [torch.where(values.isfinite(), values.double(), torch.nan) for values in (before, after)]
    change = scores[1] - scores[0]
    keep = change.isfinite().tolist()
    groups = [[row for row in rows if keep[row]] for rows in groups]
    means = [over_prompts(groups, Mean(values)).mean for values in scores]
    return Change(where, *means, over_prompts(groups, Mean(change)))
