"""What the policy learns from: rounds of samples as training batches, with all that an update asks of the policies behind them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from dpok_trl.core.advantages import best_and_worst, leave_one_out
from dpok_trl.core.objectives import OBJECTIVES
from dpok_trl.core.trajectory import Trajectory, Transitions
from dpok_trl.policy.policy import Policy
from dpok_trl.training.batches import SampledBatch, TrainingBatch, Update, cut_batches, plan_updates
from dpok_trl.training.buffer import Buffer, Round
from dpok_trl.training.config import DPOKConfig
from dpok_trl.training.kl import kl_of_actions
from dpok_trl.training.processes import largest
from dpok_trl.training.ratio import anchor, check_ratio
from dpok_trl.training.window import sde_window


logger = logging.getLogger(__name__)


class Experience:
    """
    Args:
        config ([`DPOKConfig`])
        accelerator (`Accelerator`)
        policy ([`Policy`]): The raw one, for rollouts, trials and the reference.
        prepared (`torch.nn.Module`): The prepared one, for replays.
    """

    def __init__(self, config: DPOKConfig, accelerator: Accelerator, policy: Policy, prepared: torch.nn.Module):
        self.config, self.accelerator, self.policy, self.prepared = config, accelerator, policy, prepared
        self.buffer = Buffer(config.train_buffer_rounds)
        # Whether old log-probabilities come from a replay; None: not decided yet.
        self.reanchor = config.train_reanchor
        self.ratio_checked = False
        self.first_is_on_policy = False  # the first update is on samples of the policy as it is: every ratio is 1
        # steps that were tried -> whether one forward pass takes them together
        self.mixes: dict[tuple[int, ...], bool] = {}

    @property
    def ratio_tolerance(self) -> float:
        """What rounding may do to a ratio: a tenth of the clip, or a thousandth where nothing is clipped."""
        return self.config.train_clip_range / 10 if self.config.train_objective in OBJECTIVES else 1e-3

    # ---------------------------------------------------------------- a new round

    def add(self, epoch: int, batches: list[SampledBatch], advantages: torch.Tensor) -> None:
        """Takes a round of this process in.

        Args:
            advantages (`torch.Tensor` of shape `(N,)` or `(N, S)`): Of all processes.

        Raises:
            [`~dpok_trl.RatioError`]: In the first round, if the ratio is not 1.
        """
        self.buffer.rounds.append(Round(epoch, batches, self.training_batches(batches, advantages)))

    def training_batches(self, batches: list[SampledBatch], advantages: torch.Tensor) -> list[TrainingBatch]:
        """Of a round, with old log-probabilities that a replay reproduces, and with the advantages of their actions."""
        config = self.config
        count = sum(len(batch.trajectory) for batch in batches)
        first = self.accelerator.process_index * count
        cut = cut_batches(batches, advantages[first : first + count], self._kept(batches), config.train_batch_size)
        if not self.ratio_checked:
            self.reanchor = check_ratio(
                self.prepared,
                cut[0],
                reanchor=self.reanchor,
                compiled=config.torch_compile,
                tolerance=self.ratio_tolerance,
                reduction=config.train_log_prob_reduction,
                largest=lambda values: largest(self.accelerator, values),
            )
            self.ratio_checked = True
            self.first_is_on_policy = not self.buffer.rounds  # rounds of a checkpoint are another policy's
        steps = cut[0].trajectory.steps
        if config.train_mixed_timesteps and steps not in self.mixes:  # a stochastic window moves
            self.mixes[steps] = can_mix(
                self.policy, cut[0].trajectory, cut[0].samples, self.accelerator, self.ratio_tolerance
            )
        charged = config.kl_gradient != "paper"
        keep = charged or config.train_objective == "kl_mask"
        if self.reanchor or keep:
            anchor(self.prepared, cut, with_grad=config.torch_compile, keep_distributions=keep)
        if charged:
            self._charge_kl(cut)
        if config.train_objective != "kl_mask":
            for batch in cut:
                batch.old.clear()  # they have served
        return cut

    def _kept(self, batches: Sequence[SampledBatch]) -> torch.Tensor:
        """Which samples are trained on: the best and the worst of each group, or all."""
        config = self.config
        if config.train_keep_best is None and config.train_keep_worst is None:
            return torch.ones(sum(len(batch.trajectory) for batch in batches), dtype=torch.bool)
        rewards = torch.cat([batch.rewards for batch in batches])
        groups = torch.arange(len(rewards)) // config.sample_num_images_per_prompt
        return best_and_worst(rewards, groups, config.train_keep_best or 0, config.train_keep_worst or 0)

    def _charge_kl(self, batches: list[TrainingBatch]) -> None:
        """Charges each action with the KL that it answers for ([`kl_of_actions`]), against what the other samples of the round are charged with at that step."""
        self.ask_reference([[(batch, (step,)) for step in batch.trajectory.steps] for batch in batches])
        own = torch.cat([kl_of_actions(batch, self.config.kl_gradient == "reward") for batch in batches])
        charges = leave_one_out(self.accelerator.gather(own))
        first = self.accelerator.process_index * len(own)
        parts = charges[first : first + len(own)].split([len(batch.samples) for batch in batches])
        for batch, charge in zip(batches, parts, strict=True):
            batch.charges = charge

    # ---------------------------------------------------------------- updates

    def updates(
        self,
        epoch: int,
        inner_epoch: int,
        charge_weight: float,
        progress: Callable[[list[Update]], Iterable[Update]] = iter,
    ) -> Iterator[list[Transitions]]:
        """The optimizer steps of one pass, each a list of transitions: one forward and backward pass each.

        Args:
            charge_weight (`float`): See [`TrainingBatch.transitions`].
            progress (`Callable`): Shows how far the pass is.
        """
        config = self.config
        batches = self.buffer.training
        plan = plan_updates(
            batches,
            count=len(self.buffer.newest.training),
            timestep_fraction=config.train_timestep_fraction,
            accumulation=config.train_gradient_accumulation_steps,
            timesteps_per_update=config.train_timesteps_per_update,
            random=np.random.default_rng([config.seed, epoch, inner_epoch, self.accelerator.process_index]),
            mixed=all(self.mixes.get(batch.trajectory.steps, False) for batch in batches),
        )
        if config.kl_weight > 0:
            self.ask_reference(plan)
        for update in progress(plan):
            yield [batch.transitions(steps, charge_weight) for batch, steps in update]

    @torch.no_grad()
    def ask_reference(self, plan: list[Update]) -> None:
        """The reference's answer at every planned transition: once for each, all steps of a batch in one replay."""
        wanted: dict[int, tuple[TrainingBatch, set[int]]] = {}
        for batch, steps in (pair for update in plan for pair in update):
            if new := set(steps) - set(batch.references):
                wanted.setdefault(id(batch), (batch, set()))[1].update(new)
        exact = self.config.kl_type == "gaussian"
        with self.policy.reference():
            for batch, steps in wanted.values():
                answers = self.prepared(batch.trajectory, batch.samples, sorted(steps))
                for step, answer in zip(sorted(steps), answers, strict=True):
                    batch.references[step] = answer.distribution if exact else answer.model_output

    def forget_references(self) -> None:
        """The reference has moved: what it said is out of date."""
        for batch in self.buffer.training:
            batch.references.clear()

    # ---------------------------------------------------------------- checkpoints

    def save(self, folder: Path) -> None:
        """Called on all processes."""
        self.buffer.save(folder, self.accelerator.process_index)

    def load(self, folder: Path) -> None:
        """Called on all processes. Each batch is walked once more, for shapes and embeddings; what is drawn then is thrown away."""

        def walk(prompts: Sequence[str], seeds: Sequence[int], epoch: int) -> Trajectory:
            with self.accelerator.autocast():
                return self.policy.rollout(prompts, seeds, window=sde_window(self.config, epoch))

        self.buffer.load(folder, self.accelerator.process_index, walk)


def can_mix(
    policy: Policy, trajectory: Trajectory, samples: Sequence[int], accelerator: Accelerator, tolerance: float
) -> bool:
    """A trial of several timesteps in one forward pass; all processes decide alike."""
    with accelerator.autocast():
        error = policy.mixing_error(trajectory, samples)
    error = largest(accelerator, torch.tensor([math.inf if error is None else error], device=accelerator.device))
    if error <= tolerance:
        return True
    logger.warning(
        "train_mixed_timesteps: the call of %s %s for samples at different timesteps in one forward pass, so training batches stay at one timestep each",
        type(policy.pipe).__name__,
        "fails"
        if math.isinf(error)
        else f"gives log-probabilities that are off by {error:.3g} (allowed: {tolerance:.3g})",
    )
    return False
