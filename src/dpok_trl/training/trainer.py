"""`DPOKTrainer`: the loop of DPOK (arXiv 2305.16381, algorithm 1) on `accelerate.Accelerator`, with the API of TRL's DDPOTrainer."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from peft import LoraConfig
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm
from transformers import TrainerCallback

from dpok_trl.core.advantages import (
    PerPromptStatTracker,
    batch_advantages,
    clip_advantages,
    group_advantages,
    leave_one_out_advantages,
    raw_advantages,
    value_advantages,
)
from dpok_trl.core.gaussian import Gaussian
from dpok_trl.core.objectives import (
    OBJECTIVES,
    kl_mask_loss,
    kl_mask_metrics,
    noise_kl,
    probability_ratio,
    ratio_metrics,
    reinforce_loss,
)
from dpok_trl.core.trajectory import Transitions
from dpok_trl.policy.ddpo_pipeline import DefaultDPOKStableDiffusionPipeline
from dpok_trl.policy.hooks import PipelineHooks
from dpok_trl.policy.loading import load_pipeline
from dpok_trl.policy.replayer import ReplayedStep
from dpok_trl.prompts import prompt_source
from dpok_trl.results.evaluation import Evaluation
from dpok_trl.results.runlog import RunLog
from dpok_trl.results.trackers import log_samples_to
from dpok_trl.rewards.binding import TrainerState
from dpok_trl.rewards.combining import RewardSet
from dpok_trl.training.batches import SampledBatch
from dpok_trl.training.building import build_policy, encoders_off_the_device
from dpok_trl.training.callbacks import Callbacks
from dpok_trl.training.checkpoint import Checkpoints
from dpok_trl.training.config import DPOKConfig
from dpok_trl.training.config_checks import kept_of_group, selected_steps
from dpok_trl.training.critic import Critic
from dpok_trl.training.evaluating import Evaluator
from dpok_trl.training.experience import Experience
from dpok_trl.training.gradients import prompt_gradient_cosines
from dpok_trl.training.interruption import Interruption
from dpok_trl.training.kl import adapted_weight
from dpok_trl.training.memory import warn_of_memory
from dpok_trl.training.processes import together
from dpok_trl.training.publishing import PublishingMixin
from dpok_trl.training.ratio import RatioError, refuse_ratio
from dpok_trl.training.scoring import Scoring
from dpok_trl.training.setup import make_accelerator, make_optimizer, settle_output_dir
from dpok_trl.training.sft_config import DPOKSFTConfig
from dpok_trl.training.tracking import begin_report, logged_samples, report, start_trackers
from dpok_trl.training.window import sde_window


logger = logging.getLogger(__name__)


class DPOKTrainer(PublishingMixin):
    """Fine-tunes a diffusers text-to-image pipeline by reinforcement learning with a KL term to the pretrained model (DPOK).

    Args:
        config ([`DPOKConfig`])
        reward_function: A reward, a list of them, or a dict from names to them. A reward is a function (of `(images, prompts, prompt_metadata)` as in DDPO, or
            bound by the names of its parameters, see docs/rewards.md), the name of a shipped one (`"image-reward"`), `"module:function"`, or the address of
            a server (`"http://..."`).
        prompt_function: A DDPO callable `() -> (prompt, metadata)`, a list of prompts, or a `datasets.Dataset` with a "prompt" column.
        sd_pipeline: Any diffusers text-to-image pipeline, a [`DefaultDPOKStableDiffusionPipeline`], a Hub id or a folder. It is used in place:
            after training its denoiser holds the tuned adapter; all other weights are as they were, and frozen.
        image_samples_hook (`Callable`, *optional*): `(prompt_image_data, global_step, tracker) -> None`, called on the main process after each
            round of sampling. `prompt_image_data` holds, for each sampling batch, `[images, prompts, metadata, rewards, reward_metadata]`;
            without a configured tracker, `tracker` writes `log_images` to the output folder.
        peft_config (`peft.LoraConfig`, or a mapping from component names to them, *optional*): The adapter to add. Without it an adapter that the
            pipeline already has is trained on, or else one on the attention projections is added (`train_lora_rank`).
        pipeline_hooks ([`PipelineHooks`], *optional*): For a pipeline of your own that departs from what all others do.
        eval_prompts (*optional*): What `evaluate` and `eval_freq` go over: a list of prompts or (prompt, metadata) pairs, a `datasets.Dataset` with a "prompt"
            column, or a dict from names of sets to them: `{"training": [...], "held-out": [...], "paraphrased": [...]}`.
        eval_reward_function (*optional*): Rewards that are not trained on, in any form that `reward_function` takes; for evaluations only.
        callbacks (`Sequence[transformers.TrainerCallback]`, *optional*): Instances or classes, see docs/callbacks.md.

    Raises:
        `ValueError`: For settings and pipelines that cannot work; the message says what to change.
    """

    _tag_names = ["dpok-trl", "dpok"]  # noqa: RUF012 (as DDPOTrainer has it)
    _is_supervised = False  # DPOKSFTTrainer is

    def __init__(
        self,
        config: DPOKConfig,
        reward_function: Any,
        prompt_function: Any,
        sd_pipeline: DiffusionPipeline | DefaultDPOKStableDiffusionPipeline | str | Path,
        image_samples_hook: Callable[[Any, int, Any], Any] | None = None,
        *,
        peft_config: LoraConfig | Mapping[str, LoraConfig] | None = None,
        pipeline_hooks: PipelineHooks | None = None,
        eval_prompts: Any = None,
        eval_reward_function: Any = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
    ):
        if not isinstance(config, DPOKConfig) or isinstance(config, DPOKSFTConfig) != self._is_supervised:
            needed = "DPOKSFTConfig" if self._is_supervised else "DPOKConfig"
            raise TypeError(
                f"{type(self).__name__} needs a {needed}, given: {type(config).__name__}. A preset is one by {needed}.preset(name)."
            )
        wrapper = sd_pipeline if isinstance(sd_pipeline, DefaultDPOKStableDiffusionPipeline) else None
        if wrapper is not None and not wrapper.use_lora:
            config = replace(config, train_use_lora=False)  # where DDPO says it
        self.config = config
        self.image_samples_callback = image_samples_hook
        self.accelerator = make_accelerator(config)
        self.reward_fn = reward_function
        self.output_dir = settle_output_dir(config, self.accelerator)
        torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
        self.prompts = prompt_source(
            prompt_function,
            images_per_prompt=config.sample_num_images_per_prompt,
            weight_column=config.sample_weight_column,
            seed=config.seed,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )

        set_seed(config.seed)  # the adapter is initialised alike on all processes
        self.pipeline = load_pipeline(sd_pipeline if wrapper is None else wrapper.sd_pipeline, config.model_dtype)
        self.sd_pipeline = self.pipeline if wrapper is None else wrapper  # DDPO's name
        warn_of_memory(config, self.pipeline, self.accelerator.device, pipeline_hooks)
        self.policy = build_policy(config, self.pipeline, peft_config, pipeline_hooks, self.accelerator.device)
        self.tuned = self.policy.tuned
        # A forward pass meets only the expert of its timestep, and the last layers of some networks are of no use to it.
        ddp = self.accelerator.ddp_handler or DistributedDataParallelKwargs()
        self.accelerator.ddp_handler = replace(ddp, find_unused_parameters=True)
        set_seed(config.seed, device_specific=True)

        self.trainable_layers = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        optimizer = make_optimizer(config, self.trainable_layers)
        lr_scheduler = get_scheduler(
            config.train_lr_scheduler,
            optimizer,
            num_warmup_steps=config.train_lr_warmup_steps,
            num_training_steps=(config.num_epochs - config.value_warmup_epochs)
            * config.train_num_inner_epochs
            * self._updates_per_pass(),
        )
        self.prepared_policy, self.optimizer, self.lr_scheduler = self.accelerator.prepare(
            self.policy, optimizer, lr_scheduler
        )
        if isinstance(self.prepared_policy, DistributedDataParallel):
            # Training changes no buffer of a denoiser, and processes may do different numbers of forward passes: they must not wait there.
            self.prepared_policy.broadcast_buffers = False
        self.stat_tracker = None
        if config.per_prompt_stat_tracking:
            self.stat_tracker = PerPromptStatTracker(
                config.per_prompt_stat_tracking_buffer_size, config.per_prompt_stat_tracking_min_count
            )

        self.critic = Critic(config, self.accelerator) if config.train_adv_type == "value" else None
        self.kl_weight = config.kl_weight  # changes with a warm-up or a target_kl
        self.experience = Experience(config, self.accelerator, self.policy, self.prepared_policy)

        self.first_epoch = 0
        self.global_step = 0
        self.seconds = 0.0  # of training, over all resumed parts
        self.last_metrics: dict[str, float] = {}
        self._shown: dict[str, float] = {}  # beside the progress bar: means of the epoch
        self._updated = False  # by this trainer; before that the ratio is 1
        self.run_log = RunLog(self.output_dir) if self.accelerator.is_main_process else None
        self.checkpoints = Checkpoints(self)
        self.evaluator = Evaluator(self, eval_prompts, eval_reward_function)
        self.callbacks = Callbacks(self, callbacks or ())

    # ---------------------------------------------------------------- the loop

    def train(self, epochs: int | None = None, resume_from_checkpoint: bool | str | Path | None = None) -> None:
        """Trains until `epochs` rounds (default: `config.num_epochs`) are done.

        Args:
            epochs (`int`, *optional*): Rounds in all, those before a resumed checkpoint included.
            resume_from_checkpoint (`bool` or path, *optional*): `True`: the newest whole checkpoint in `output_dir`. A path: that checkpoint, or
                the newest whole one in that folder. Default: `config.resume_from`.

        Raises:
            `ValueError`: If the output folder holds another run, or there is nothing to resume from.
            [`RewardError`]: On every process, if the reward fails on one.
            [`~dpok_trl.RatioError`]: If the ratio is not 1 before the first update.
            `FloatingPointError`: If the loss or the gradient becomes NaN or infinite.
            `KeyboardInterrupt`: After a Ctrl-C or SIGTERM, when the running epoch is finished and saved; after a second Ctrl-C at once.
        """
        resume = resume_from_checkpoint
        if resume is None and self.first_epoch == 0:
            resume = self.config.resume_from
        if resume:
            self.checkpoints.resume(self.output_dir if resume is True else Path(resume))
        elif self.first_epoch == 0:
            self.checkpoints.refuse_other_run()
        self.open_repository()
        self.accelerator.wait_for_everyone()
        start_trackers(self.accelerator, self.config)
        begin_report(self)
        if self.config.output_dir is None:
            self.accelerator.print(f"Everything this run leaves goes to {self.output_dir}")
        last = self.config.num_epochs if epochs is None else epochs
        started = time.monotonic() - self.seconds
        progress = tqdm(
            range(self.first_epoch, last),
            initial=self.first_epoch,
            total=last,
            desc="epochs",
            disable=not self._shows_progress,
        )
        if self.first_epoch >= last:
            logger.warning(
                "nothing is left to train: %d of %d epochs are done. Raise num_epochs to go on.",
                self.first_epoch,
                last,
            )
        self.callbacks.train_begin(last)
        interrupted = False
        with Interruption(self.accelerator) as interruption:
            for epoch in progress:
                self.callbacks.epoch_begin(epoch)
                self.global_step = self.step(epoch, self.global_step)
                self.first_epoch = epoch + 1
                self.seconds = time.monotonic() - started
                progress.set_postfix({name: f"{value:.4g}" for name, value in self._shown.items()})
                self.callbacks.epoch_end(epoch)
                interrupted = self._evaluate_and_save(epoch, last, interruption)
                if interrupted or self.callbacks.control.should_training_stop:
                    break
        progress.close()
        self.callbacks.train_end()
        report(self)
        for tracker in self.accelerator.trackers:
            tracker.finish()  # not `end_training`: it ends the process group, which `save_model` and another `train` still need
        if interrupted:
            raise KeyboardInterrupt(
                f"stopped after epoch {self.first_epoch} of {last}, which is saved. To go on: trainer.train(resume_from_checkpoint=True), or resume_from = "
                f"'{self.output_dir}' in the configuration (dpok-trl train --resume_from {self.output_dir})"
            )
        self.push_at_end()

    def _evaluate_and_save(self, epoch: int, last: int, interruption: Interruption) -> bool:
        """What is due after an epoch, by the settings, at the end of the run, or because a callback asks for it. Returns whether the run was asked to stop: then
        there is no evaluation, for whoever sent the signal may not wait long."""
        callbacks, freq = self.callbacks, self.config.save_freq
        ends = epoch + 1 == last or callbacks.control.should_training_stop
        interrupted = interruption.requested()
        if not interrupted:
            try:
                metrics = self.evaluator.after_epoch(epoch, last=ends, asked=callbacks.control.should_evaluate)
            except Exception:
                self.checkpoints.save()  # what was trained is not at fault; what fails in an evaluation fails on all processes
                raise
            if metrics is not None:
                callbacks.evaluated(metrics)
            interrupted = interruption.requested()
        ends = ends or interrupted or callbacks.control.should_training_stop  # early stopping decides by evaluations
        if ends or callbacks.control.should_save or (freq and (epoch + 1) % freq == 0):
            self.checkpoints.save()
            callbacks.saved()
            if interrupted or not ends:  # the end has a push of its own
                self.push_saved()
        return interrupted

    def step(self, epoch: int, global_step: int) -> int:
        """One round: sample, score, and update on what was sampled. Returns the number of optimizer steps done so far."""
        if self.config.kl_warmup_epochs:
            self.kl_weight = self.config.kl_weight if epoch >= self.config.kl_warmup_epochs else 0.0
        batches, metrics = self.sample(epoch)
        prompts, rewards, reward_metrics = self.scoring.gather(batches)
        metrics = {"images": (epoch + 1) * len(rewards), **reward_metrics, **metrics}
        values = None
        if self.critic is not None:
            values, value_metrics = self.critic.values(batches, rewards)
            metrics.update(value_metrics)
        advantages = self.advantages(prompts, rewards, values)
        self._log_round(epoch, global_step, batches, metrics)
        for batch in batches:
            batch.trajectory = batch.trajectory.without_images()  # as large as all latents, and the update needs none

        started = time.monotonic()
        kl = []
        with encoders_off_the_device(self.policy, self.config.sample_offload_encoders):
            self.experience.add(epoch, batches, advantages)
            metrics = self._gradient_cosines(epoch)
            if self.critic is not None:
                metrics.update(self.critic.fit(self.experience.buffer.sampled, epoch))
            passes = self.config.train_num_inner_epochs if epoch >= self.config.value_warmup_epochs else 0
            for update_metrics in self._passes(epoch, global_step, passes):
                global_step = self.global_step
                kl += [update_metrics["kl"]] if "kl" in update_metrics else []
        if kl:
            metrics.update(self._end_of_round_kl(epoch, sum(kl) / len(kl)))
        self.experience.buffer.make_room()  # for evaluations and the next samples
        self._log({"epoch": epoch, **metrics, "time/update": time.monotonic() - started}, global_step)
        self._shown = {"reward": reward_metrics["reward"]} | ({"kl": sum(kl) / len(kl)} if kl else {})
        return global_step

    def _passes(self, epoch: int, global_step: int, passes: int) -> Iterator[dict[str, float]]:
        """The optimizer steps of a round, one for each item: its metrics. A callback may end them early."""
        self.global_step = global_step
        for inner_epoch in range(passes):
            for update in self._updates(epoch, inner_epoch):
                self.callbacks.step_begin()
                metrics = self._update(update)
                self.global_step += 1
                ends = self.callbacks.step_end(epoch)
                self._log({"epoch": epoch, "inner_epoch": inner_epoch, **metrics}, self.global_step)
                yield metrics
                if ends:
                    return

    def _gradient_cosines(self, epoch: int) -> dict[str, float]:
        """See [`prompt_gradient_cosines`]; of this process's prompts, before the round's first update."""
        config, scaler = self.config, self.accelerator.scaler
        if not config.log_gradient_cosine_freq or epoch % config.log_gradient_cosine_freq:
            return {}
        with self.accelerator.no_sync(self.prepared_policy):
            metrics = prompt_gradient_cosines(
                self.prepared_policy,
                self.experience.buffer.newest.training,
                self.trainable_layers,
                timestep_fraction=config.train_timestep_fraction,
                random=np.random.default_rng([config.seed, epoch]),
                loss_scale=1.0 if scaler is None else scaler.get_scale(),
            )
        if not metrics:
            logger.warning(
                "log_gradient_cosine_freq = %d, but the round of epoch %d has one prompt in this process: there is nothing to compare",
                config.log_gradient_cosine_freq,
                epoch,
            )
        return metrics

    def _end_of_round_kl(self, epoch: int, kl: float) -> dict[str, float]:
        """Adapts the KL's weight and moves its reference, where the config says so."""
        config = self.config
        metrics = {"kl_weight": self.kl_weight}
        if config.kl_type == "gaussian":
            trajectory = self.experience.buffer.newest.training[0].trajectory
            dimensions = trajectory.latents[0][0].numel() if config.train_log_prob_reduction == "mean" else 1
            metrics["kl_path"] = kl * dimensions * len(trajectory.steps)
        if config.target_kl is not None:
            self.kl_weight = adapted_weight(self.kl_weight, metrics["kl_path"], config.target_kl)
        if config.reference_update_epochs is not None and (epoch + 1) % config.reference_update_epochs == 0:
            self.tuned.move_reference()
            self.experience.forget_references()
        return metrics

    def evaluate(self, prompts: Any = None, reward_function: Any = None, **settings: Any) -> Evaluation:
        """Tuned against pretrained, from the same seeds, on all processes. Disturbs nothing: the run goes on as it would have.

        Args:
            prompts: As `eval_prompts`, which are the default.
            reward_function: Held-out rewards; `eval_reward_function` by default.
            sets (`str` or `Sequence[str]`, *optional*): Names of the sets to go over. Default: all.
            images_per_prompt, num_steps, batch_size (`int`, *optional*): `eval_num_images_per_prompt`, `eval_num_steps` and `eval_batch_size` by default.
            seed (`int`, defaults to 0): Image `i` of a set is drawn from seed `seed + i`.

        Raises:
            `ValueError`: Without prompts, for a set that there is not, and where the set "held-out" has prompts that are trained on, or "training" has none.
            [`RewardError`]: On every process, if a reward raises on one.
        """
        return self.evaluator.evaluate(prompts, reward_function, **settings)

    # ---------------------------------------------------------------- sampling and rewards

    def sample(self, epoch: int) -> tuple[list[SampledBatch], dict[str, float]]:
        """Rolls the policy out over this process's sampling batches of an epoch and scores them.

        Returns the scored batches and the timings. Seeds follow from (seed, epoch, process, batch), so each process draws its own noise and a
        resumed run draws what an uninterrupted one would have drawn.
        """
        with together(self.accelerator):
            try:
                sampled = self._sample_and_score(epoch)
            except Exception:
                self.scoring.cancel()
                raise
        return sampled

    def _sample_and_score(self, epoch: int) -> tuple[list[SampledBatch], dict[str, float]]:
        batches = []
        started = time.monotonic()
        state = TrainerState(epoch, self.global_step)
        for index in self._progress(range(self.config.sample_num_batches_per_epoch), "rollout"):
            prompts, metadata = self.prompts.draw(self.config.sample_batch_size)
            with self.accelerator.autocast():
                trajectory = self.policy.rollout(
                    prompts,
                    self._seeds(epoch, index),
                    self._arguments(metadata),
                    sde_window(self.config, epoch),
                    self.config.value_input if self.critic is not None else None,
                )
            batch = SampledBatch(trajectory, tuple(metadata))
            self.scoring.begin(batch, state)
            batches.append(batch)
        sampled = time.monotonic()
        self.scoring.finish(batches)
        return batches, {"time/rollout": sampled - started, "time/reward": time.monotonic() - sampled}

    @property
    def reward_fn(self) -> Any:
        """The rewards as they were given (DDPO's name). Others may be set."""
        return self._reward_fn

    @reward_fn.setter
    def reward_fn(self, reward_function: Any) -> None:
        self._reward_fn = reward_function
        self.scoring = Scoring(reward_function, self.config, self.accelerator)

    @property
    def rewards(self) -> RewardSet:
        """The rewards of the run."""
        return self.scoring.rewards

    def compute_rewards(
        self, prompt_image_pairs: Sequence[Sequence[Any]], is_async: bool = False
    ) -> tuple[tuple, tuple]:
        """Scores batches of images, as DDPO's method of this name.

        Args:
            prompt_image_pairs: For each batch `[images, prompts, prompt_metadata]`.
            is_async (`bool`): In threads, one for each batch.

        Returns:
            `tuple[tuple, tuple]`: The rewards `(B,)` (the total of several; NaN for an image that a reward failed for) and the reward metadata of each batch.
        """
        rewards, metadata = zip(*self.scoring.compute(prompt_image_pairs, is_async), strict=True)
        return rewards, metadata

    def advantages(
        self, prompts: Sequence[str], rewards: torch.Tensor, values: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Advantages of the samples of all processes by `per_prompt_stat_tracking` or `train_adv_type`, clipped. A sample whose reward is not finite has the
        advantage 0 and is out of every statistic.

        Args:
            prompts (`Sequence[str]` of length `N`)
            rewards (`torch.Tensor` of shape `(N,)`)
            values (`torch.Tensor` of shape `(N, S)`, *optional*): V at each step, for `train_adv_type = "value"`.

        Returns:
            `torch.Tensor` of shape `(N,)`, or `(N, S)` with `values`.
        """
        kind, scale = self.config.train_adv_type, self.config.train_adv_scale
        counts = rewards.isfinite()
        advantages = torch.zeros_like(rewards if values is None else values)
        if kind in ("group", "leave_one_out"):
            # an image whose companions were all left out has nothing to be compared with
            left = Counter(prompt for prompt, one in zip(prompts, counts.tolist(), strict=True) if one)
            counts = counts & torch.tensor([left[prompt] != 1 for prompt in prompts])
            if not counts.any():
                return advantages
        prompts, rewards = (
            [prompt for prompt, one in zip(prompts, counts.tolist(), strict=True) if one],
            rewards[counts],
        )
        if self.stat_tracker is not None:
            found = self.stat_tracker.update(prompts, rewards, scale)
        elif kind == "group":
            found = group_advantages(rewards, prompts, scale)
        elif kind == "leave_one_out":
            found = leave_one_out_advantages(rewards, prompts, scale)
        elif kind == "value":
            found = value_advantages(rewards, values[counts], scale)
        elif kind == "none":
            found = raw_advantages(rewards, scale)
        else:
            found = batch_advantages(rewards, scale)
        advantages[counts] = clip_advantages(found, self.config.train_adv_clip_max)
        return advantages

    # ---------------------------------------------------------------- the update

    def calculate_loss(self, transitions: Transitions) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and metrics of one forward pass: `reward_weight` times the policy gradient plus `kl_weight` times the KL to the reference.

        Departs from DDPO's method of this name in its argument: a record that the policy can replay instead of loose tensors, so that one
        trainer serves every pipeline.
        """
        (replayed,) = self.prepared_policy(transitions.trajectory, transitions.samples, each=transitions.steps)
        loss, metrics = self._policy_loss(replayed, transitions)
        loss = self.config.reward_weight * loss
        if transitions.reference is not None:
            kl = self._kl(replayed, transitions.reference).mean()
            if self.config.kl_gradient != "reward":  # there the advantages have it
                loss = loss + self.kl_weight * kl
            metrics["kl"] = kl.detach()
        return loss, {"loss": loss.detach(), **metrics}

    def _policy_loss(
        self, replayed: ReplayedStep, transitions: Transitions
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        config, advantage = self.config, transitions.advantage
        clip_range = config.train_clip_range if config.train_objective in OBJECTIVES else None
        metrics = ratio_metrics(replayed.log_prob, transitions.old_log_prob, clip_range)
        if config.train_objective == "reinforce":
            return reinforce_loss(replayed.log_prob, advantage), metrics
        ratio = probability_ratio(replayed.log_prob, transitions.old_log_prob)
        if clip_range is not None:
            return self.loss(advantage, clip_range, ratio), metrics
        divergence = replayed.distribution.detach().kl(transitions.old, config.train_log_prob_reduction)
        of_mask = (ratio, advantage, divergence, config.train_kl_threshold)
        return kl_mask_loss(*of_mask), {**metrics, **kl_mask_metrics(*of_mask)}

    def loss(self, advantages: torch.Tensor, clip_range: float, ratio: torch.Tensor) -> torch.Tensor:
        """The policy's part of the loss for the objectives that clip (`dpok`, `ppo`): a scalar from advantages and ratios of shape `(n,)`."""
        return OBJECTIVES[self.config.train_objective](ratio, advantages, clip_range)

    def _kl(self, replayed: ReplayedStep, reference: Gaussian | torch.Tensor) -> torch.Tensor:
        if self.config.kl_type == "gaussian":
            return replayed.distribution.kl(reference, self.config.train_log_prob_reduction)
        return noise_kl(replayed.model_output, reference, self.config.train_log_prob_reduction)

    def _updates(self, epoch: int, inner_epoch: int) -> Iterator[list[Transitions]]:
        """The optimizer steps of one pass, each a list of transitions: one forward and backward pass each."""
        charge_weight = self.kl_weight / self.config.reward_weight
        return self.experience.updates(epoch, inner_epoch, charge_weight, lambda plan: self._progress(plan, "update"))

    def _update(self, update: list[Transitions]) -> dict[str, float]:
        """One optimizer step; gradients are averaged over its forward passes and over the processes."""
        values = defaultdict(list)
        for index, transitions in enumerate(update):
            last = index == len(update) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.prepared_policy):
                loss, metrics = self.calculate_loss(transitions)
                self.accelerator.backward(loss / len(update))
            for name, value in metrics.items():
                values[name].append(value)
        grad_norm = self.accelerator.clip_grad_norm_(self.trainable_layers, self.config.train_max_grad_norm)
        metrics = self._reduce({**values, "grad_norm": [grad_norm]})
        try:
            self._check_update(metrics)
        except (FloatingPointError, RatioError):
            self.optimizer.zero_grad()  # or a later update would take these gradients in
            raise
        learning_rate = self.lr_scheduler.get_last_lr()[0]
        self.callbacks.call("on_pre_optimizer_step")
        self.optimizer.step()
        self.callbacks.call("on_optimizer_step")
        if not self.accelerator.optimizer_step_was_skipped:  # fp16 found an overflow and lowers its loss scale
            self.lr_scheduler.step()
        self.optimizer.zero_grad()
        return {**metrics, "learning_rate": learning_rate}

    def _check_update(self, metrics: dict[str, float]) -> None:
        """Stops the run before a bad gradient reaches the adapter."""
        scaler = self.accelerator.scaler
        # A loss scaler leaves out a step that overflows and goes on at a lower scale, but not for ever.
        gradient_counts = scaler is None or scaler.get_scale() < 1
        for name, what in [("loss", "loss"), ("grad_norm", "norm of the gradient")][: 1 + gradient_counts]:
            if not math.isfinite(metrics[name]):
                raise FloatingPointError(
                    f"the {what} is {metrics[name]} in optimizer step {self.global_step + 1}. The adapter was not updated, and the last "
                    "checkpoint is whole. Usual causes: fp16 overflow (use bf16), a learning rate too high, or a step of tiny std (raise "
                    "sample_min_std)."
                )
        if self.experience.first_is_on_policy and not self._updated:
            refuse_ratio(metrics["policy/ratio_deviation_max"], self.experience.ratio_tolerance)
        self._updated = True

    def _reduce(self, values: dict[str, list[torch.Tensor]]) -> dict[str, float]:
        """Means over forward passes and processes; of a `_max` the largest."""
        means = torch.stack([torch.stack(column).mean() for column in values.values()])
        largest = torch.stack([torch.stack(column).amax() for column in values.values()])
        gathered = self.accelerator.gather(torch.stack([means, largest])[None]).cpu()  # one device sync an update
        result = {}
        for column, name in enumerate(values):
            result[name] = (
                gathered[:, 1, column].amax() if name.endswith("_max") else gathered[:, 0, column].mean()
            ).item()
        return result

    # ---------------------------------------------------------------- the log

    def _log_round(self, epoch: int, global_step: int, batches: list[SampledBatch], metrics: dict[str, float]) -> None:
        self._log({"epoch": epoch, **metrics}, global_step)
        if not self.accelerator.is_main_process:
            return
        if self.config.sample_grid_freq and epoch % self.config.sample_grid_freq == 0:
            samples = logged_samples(self, batches, epoch, global_step)
            log_samples_to(self.accelerator.trackers, samples, self.run_log.log_samples(samples))
        if self.image_samples_callback is not None:
            tracker = self.accelerator.trackers[0] if self.accelerator.trackers else self.run_log
            data = [
                [b.trajectory.images, tuple(b.trajectory.prompts), b.metadata, b.rewards, b.scores.info]
                for b in batches
            ]
            self.image_samples_callback(data, global_step, tracker)

    def _log(self, metrics: dict[str, float], global_step: int) -> None:
        self.last_metrics.update(metrics)
        self.accelerator.log(metrics, step=global_step)
        if self.accelerator.is_main_process:
            self.run_log.log(metrics, global_step)
        self.callbacks.log(metrics, global_step)

    # ---------------------------------------------------------------- small parts

    def _updates_per_pass(self) -> int:
        """Optimizer steps of a pass, for the length of the learning-rate schedule; as if every step of the grid, or of the window in it, were
        stochastic, since the grid is known only once the pipeline has run."""
        config = self.config
        groups = config.sample_batch_size * config.sample_num_batches_per_epoch // config.sample_num_images_per_prompt
        samples = groups * kept_of_group(config)
        batches = samples // (config.train_batch_size * config.train_gradient_accumulation_steps)
        stochastic = config.sample_sde_window_size or config.sample_num_steps
        steps = selected_steps(stochastic, config.train_timestep_fraction)
        return batches * math.ceil(steps / (config.train_timesteps_per_update or steps))

    def _arguments(self, metadata: Sequence[Any]) -> dict[str, list[Any]]:
        """The arguments of the pipeline's call that come with the prompts."""
        columns = self.config.sample_call_columns or []
        for entry in metadata if columns else []:
            missing = [column for column in columns if not (isinstance(entry, dict) and column in entry)]
            if missing:
                has = ", ".join(map(str, entry)) if isinstance(entry, dict) else f"no dict: {entry!r}"
                raise ValueError(
                    f"sample_call_columns names {', '.join(missing)}, which the metadata of a prompt does not have (it has {has})."
                )
        return {column: [entry[column] for entry in metadata] for column in columns}

    def _seeds(self, epoch: int, batch: int) -> list[int]:
        entropy = [self.config.seed, epoch, self.accelerator.process_index, batch]
        return np.random.default_rng(entropy).integers(2**63, size=self.config.sample_batch_size).tolist()

    def _progress(self, items: Any, description: str) -> tqdm:
        return tqdm(items, desc=description, leave=False, disable=not self._shows_progress)

    @property
    def _shows_progress(self) -> bool:
        return self.accelerator.is_local_main_process and not self.callbacks.show_progress
