"""The rewards of a run at work: asked while sampling goes on or after it, gathered over the processes, and logged."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from dpok_trl.rewards.base import RewardError
from dpok_trl.rewards.binding import RewardInputs, TrainerState
from dpok_trl.rewards.combining import RewardSet, join_scores
from dpok_trl.training.batches import SampledBatch
from dpok_trl.training.building import on_the_device
from dpok_trl.training.config import DPOKConfig
from dpok_trl.training.setup import reward_threads


class Scoring:
    """
    Args:
        rewards: What the user gave; see [`RewardSet`].
        config ([`DPOKConfig`]): Its `reward_` settings, `sample_category_column`, `async_reward_computation` and `max_workers`.
        accelerator (`Accelerator`)

    Raises:
        `ValueError`: For rewards and settings that do not go together.
    """

    def __init__(self, rewards: Any, config: DPOKConfig, accelerator: Accelerator):
        self.rewards = RewardSet(
            rewards, config.reward_weights, config.reward_aggregation, config.reward_on_error, accelerator.device
        )
        self.accelerator = accelerator
        self.category_column = config.sample_category_column
        self.offload = config.reward_offload
        if self.offload and not self.rewards.have_networks:
            raise ValueError(
                "reward_offload = True needs a reward that can be moved (a torch.nn.Module, or anything else with `to`), given: "
                f"{', '.join(self.rewards.names)}. Set it to False."
            )
        if self.offload:
            self.rewards.to("cpu")  # where they are between two rounds of scoring
        # in threads while sampling goes on: what waits for another machine or the CPU, and what the user says
        threaded = [config.async_reward_computation or reward.overlaps for reward in self.rewards.rewards]
        self.early = [index for index, one in enumerate(threaded) if one]
        self.late = [index for index, one in enumerate(threaded) if not one]
        self._jobs: list[tuple[int, Future]] = []  # of the round in progress
        self._make_executor = partial(reward_threads, config, accelerator.device)
        self.executor: ThreadPoolExecutor | None = self._make_executor() if self.early else None

    def begin(self, batch: SampledBatch, state: TrainerState) -> None:
        """A batch is there: its overlapping rewards may start.

        Raises:
            `ValueError`: If a prompt of it has no `sample_category_column`: here, and not in `gather`, where the other processes would wait.
        """
        if self.category_column is not None:
            categories_of(batch.metadata, self.category_column)
        batch.inputs = RewardInputs(batch.trajectory.images, tuple(batch.trajectory.prompts), batch.metadata, state)
        for _, job in self._jobs:
            if job.done():
                job.result()  # one that failed ends the round now, and not when all is sampled
        if self.executor is not None:
            batch.jobs = [
                (index, self.executor.submit(self.rewards.score, batch.inputs, [index])) for index in self.early
            ]
            self._jobs += batch.jobs

    def finish(self, batches: Sequence[SampledBatch]) -> None:
        """All batches are there: asks the other rewards, and waits for those that have begun.

        Raises:
            [`RewardError`]: See [`RewardSet.score`].
        """
        late = []
        with on_the_device(self.rewards, self.accelerator.device) if self.offload else nullcontext():
            for batch in batches:
                late.append([(self.late, self.rewards.score(batch.inputs, self.late))] if self.late else [])
        for batch, parts in zip(batches, late, strict=True):
            batch.scores = join_scores([*parts, *(([index], job.result()) for index, job in batch.jobs)])
            batch.rewards, _ = self.rewards.total(batch.scores.values, batch.scores.applies, batch.inputs.prompts)

    def cancel(self) -> None:
        """Takes back what has not begun: a round has failed."""
        self._jobs = []
        if self.executor is not None:
            self.executor.shutdown(wait=False, cancel_futures=True)
            self.executor = self._make_executor()

    def gather(self, batches: Sequence[SampledBatch]) -> tuple[list[str], torch.Tensor, dict[str, float]]:
        """Of all processes, process after process.

        Returns:
            `tuple[list[str], torch.Tensor, dict[str, float]]`: The prompts; the rewards `(N,)`, NaN for an image that does not count; the metrics.

        Raises:
            [`RewardError`]: If no image counts.
        """
        device = self.accelerator.device
        local = [torch.cat([getattr(batch.scores, name) for batch in batches]) for name in ("values", "applies")]
        values, applies = (self.accelerator.gather(one.to(device)).cpu() for one in local)
        prompts = gather_object([prompt for batch in batches for prompt in batch.trajectory.prompts])
        rewards, counts = self.rewards.total(values, applies, prompts)
        self._refuse_failed_round(values, applies, counts)
        # With normalize_then_sum the images of a prompt in other batches count too: these are the rewards that are trained on.
        first = self.accelerator.process_index * len(local[0])
        parts = rewards[first : first + len(local[0])].split([len(batch.inputs) for batch in batches])
        for batch, part in zip(batches, parts, strict=True):
            batch.rewards = part
            batch.inputs, batch.jobs = None, []  # pictures that nobody needs any more
        self._jobs = []
        metrics = {
            "images_left_out": int((~counts).sum()),
            "reward": rewards[counts].mean().item(),
            "reward_std": rewards[counts].std(correction=0).item(),
        }
        metrics.update(self._category_metrics(batches, rewards))
        return prompts, rewards, {**metrics, **self._metrics(batches, values, applies)}

    def _category_metrics(self, batches: Sequence[SampledBatch], rewards: torch.Tensor) -> dict[str, float]:
        """The mean reward of each category, over its images of all processes that count."""
        if self.category_column is None:
            return {}
        categories = gather_object(
            [category for batch in batches for category in categories_of(batch.metadata, self.category_column)]
        )
        images: dict[str, list[int]] = {}
        for image, (category, counts) in enumerate(zip(categories, rewards.isfinite().tolist(), strict=True)):
            if category is not None and counts:
                images.setdefault(category, []).append(image)
        return {f"reward/{category}": rewards[rows].mean().item() for category, rows in sorted(images.items())}

    def _refuse_failed_round(self, values: torch.Tensor, applies: torch.Tensor, counts: torch.Tensor) -> None:
        """Stops the run where a reward failed for all images that a process asked it about: its server is down, say. All processes see the same values, and
        all stop."""
        said = []
        for column, name in enumerate(self.rewards.names):
            failed = applies[:, column] & ~values[:, column].isfinite()
            for process, (asked, bad) in enumerate(
                zip(*(one.chunk(self.accelerator.num_processes) for one in (applies[:, column], failed)), strict=True)
            ):
                if asked.any() and torch.equal(asked, bad):
                    raise RewardError(
                        f"none of the {int(asked.sum())} rewards that {name} gave in this round on process {process} is finite: there is nothing to learn from, "
                        "whatever reward_on_error says."
                    )
            said.append(f"{name} applies to {int(applies[:, column].sum())} and failed for {int(failed.sum())}")
        if not counts.any():
            raise RewardError(
                f"none of the {len(values)} images of the round has a reward that counts: {'; '.join(said)}."
            )

    def _metrics(
        self, batches: Sequence[SampledBatch], values: torch.Tensor, applies: torch.Tensor
    ) -> dict[str, float]:
        """Of each reward: mean and standard deviation of what is finite, how many are not, and the seconds of this process."""
        metrics: dict[str, float] = {}
        for column, name in enumerate(self.rewards.names):
            asked = values[applies[:, column], column]
            finite = asked[asked.isfinite()]
            if len(finite):
                metrics[f"rewards/{name}/mean"] = finite.mean().item()
                metrics[f"rewards/{name}/std"] = finite.std(correction=0).item()
            metrics[f"rewards/{name}/nonfinite"] = len(asked) - len(finite)
            metrics[f"rewards/{name}/seconds"] = sum(batch.scores.seconds[column] for batch in batches)
        logged = gather_object([batch.scores.metrics for batch in batches])
        for name in dict.fromkeys(name for one in logged for name in one):
            numbers = [number for one in logged for number in one.get(name, [])]
            metrics[name] = sum(numbers) / len(numbers)
        return metrics

    def compute(self, prompt_image_pairs: Sequence[Sequence[Any]], is_async: bool) -> list[tuple[torch.Tensor, Any]]:
        """Total and info for batches `[images, prompts, metadata]` of somebody else's."""

        def score(pair: Sequence[Any]) -> tuple[torch.Tensor, Any]:
            scores = self.rewards.score(RewardInputs(pair[0], tuple(pair[1]), tuple(pair[2])))
            return self.rewards.total(scores.values, scores.applies, pair[1])[0], scores.info

        if not is_async:
            return [score(pair) for pair in prompt_image_pairs]
        with ThreadPoolExecutor(len(prompt_image_pairs)) as executor:
            return list(executor.map(score, prompt_image_pairs))


def categories_of(metadata: Sequence[Any], column: str) -> list[str | None]:
    """The category of each image, as the name that its metric gets; `None` where the entry is `None`.

    Raises:
        `ValueError`: If the metadata of a prompt has no such entry.
    """
    for entry in metadata:
        if not (isinstance(entry, dict) and column in entry):
            has = ", ".join(map(str, entry)) if isinstance(entry, dict) else f"no dict: {entry!r}"
            raise ValueError(
                f"sample_category_column = {column!r}, which the metadata of a prompt does not have (it has {has or 'nothing'}). Name a column of the prompts, "
                "or leave it out."
            )
    return [None if entry[column] is None else str(entry[column]) for entry in metadata]
