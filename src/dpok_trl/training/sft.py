"""`DPOKSFTTrainer`: the supervised baseline of DPOK (arXiv 2305.16381, section 4.3), with the config, prompts and rewards of [`DPOKTrainer`]."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from dpok_trl.core.advantages import best_and_worst
from dpok_trl.core.gaussian import Gaussian
from dpok_trl.core.supervised import (
    noisy_latents,
    reward_weights,
    shifted_reward_weights,
    squared_errors,
    target_on_grid,
    weighted_loss,
)
from dpok_trl.core.trajectory import Trajectory
from dpok_trl.core.transitions import NoiseLevels
from dpok_trl.policy.ddpo_pipeline import DefaultDPOKStableDiffusionPipeline
from dpok_trl.policy.nested import num_rows
from dpok_trl.rewards.binding import RewardInputs, TrainerState
from dpok_trl.training.batches import SampledBatch, plan_updates
from dpok_trl.training.config_checks import selected_steps
from dpok_trl.training.experience import can_mix
from dpok_trl.training.sft_config import DPOKSFTConfig, kept_of
from dpok_trl.training.sft_data import (
    DATA_FOLDER,
    SupervisedData,
    check_dataset,
    column_rewards,
    data_file,
    encode_images,
    link_or_copy,
    pixels_of,
)
from dpok_trl.training.trainer import DPOKTrainer


logger = logging.getLogger(__name__)

# By how much a log-probability (mean over dimensions) may differ where a forward pass takes several timesteps together.
MIXING_TOLERANCE = 1e-3
UNGUIDED = (1.0, 0.0)  # guidance scales that stand for none: most calls guide above 1, some above 0


@dataclass(frozen=True)
class DataRows:
    """Images that are trained on together, as [`plan_updates`] asks for them: `samples` are rows of the data, `trajectory.steps` the steps to choose from."""

    trajectory: Trajectory
    samples: tuple[int, ...]


@dataclass(frozen=True)
class Regression:
    """What one forward and backward pass eats.

    Args:
        trajectory (`Trajectory`): Its latents are `x_t` of each sample, at every step: whichever is replayed starts from them.
        steps (`tuple[int, ...]` of length `n`): The step of each sample.
        target (`torch.Tensor` of shape `(n, *)`): What the network should predict there.
        weights (`torch.Tensor` of shape `(n,)`)
    """

    trajectory: Trajectory
    steps: tuple[int, ...]
    target: torch.Tensor
    weights: torch.Tensor


class DPOKSFTTrainer(DPOKTrainer):
    """Fine-tunes a diffusers text-to-image pipeline by regression on its own images, weighted by their rewards: what the paper compares RL with.

    The images are drawn once from the pretrained model (again and again with `sft_redraw_epochs`), or given. Each pass draws noise levels from the
    sampling grid and regresses on them without guidance. See docs/sft.md.

    Args:
        config ([`DPOKSFTConfig`])
        reward_function, prompt_function, sd_pipeline, image_samples_hook: As for [`DPOKTrainer`]. With `train_dataset`, `prompt_function` is `None`, and
            so is `reward_function` if that has a column "reward".
        train_dataset (`datasets.Dataset`, *optional*): Images to learn from instead of drawn ones: columns "image" (PIL, of the size that the
            pipeline draws), "prompt", and *optionally* "reward".
        kwargs: The other arguments of [`DPOKTrainer`].

    Raises:
        `ValueError`: For settings, pipelines and data that cannot work; the message says what to change.
    """

    _tag_names = ["dpok-trl", "sft"]  # noqa: RUF012 (as DDPOTrainer has it)
    config: DPOKSFTConfig

    _is_supervised = True

    def __init__(
        self,
        config: DPOKSFTConfig,
        reward_function: Any,
        prompt_function: Any,
        sd_pipeline: DiffusionPipeline | DefaultDPOKStableDiffusionPipeline | str | Path,
        image_samples_hook: Callable[[Any, int, Any], Any] | None = None,
        *,
        train_dataset: Any = None,
        **kwargs: Any,
    ):
        self.train_dataset = train_dataset
        if train_dataset is not None:
            reward_function = self._settle_dataset(config, reward_function, prompt_function)
            prompt_function = train_dataset
            if reward_function is column_rewards and kwargs.get("eval_prompts") is not None:
                raise ValueError(
                    'eval_prompts are drawn and judged anew, and the column "reward" of train_dataset judges its own images only. Give a reward_function in the place of '
                    "the column, or leave eval_prompts out and evaluate what is saved with dpok-trl evaluate."
                )
        super().__init__(config, reward_function, prompt_function, sd_pipeline, image_samples_hook, **kwargs)
        self.data: SupervisedData | None = None
        self._template: Trajectory | None = None  # of a rollout of `train_batch_size`
        self._image_shape: tuple[int, ...] = ()  # of one that the pipeline draws
        self._mixed = False  # whether one forward pass takes several timesteps
        self._unguided_scale = UNGUIDED[0]
        self.accelerator.register_save_state_pre_hook(self._save_data)
        self.accelerator.register_load_state_pre_hook(self._load_data)

    def _settle_dataset(self, config: DPOKSFTConfig, reward_function: Any, prompt_function: Any) -> Any:
        """Checks what goes with a dataset, and returns the reward."""
        if prompt_function is not None:
            raise ValueError(
                "train_dataset has the prompts of its images: give prompt_function=None, or leave train_dataset out."
            )
        if config.sft_redraw_epochs is not None:
            raise ValueError(
                f"sft_redraw_epochs = {config.sft_redraw_epochs} draws images from the model, and train_dataset gives them. Leave one of the two out."
            )
        if config.sample_weight_column is not None:
            raise ValueError(
                f"sample_weight_column = {config.sample_weight_column!r} says how often a prompt is drawn, and train_dataset gives the images. Leave it out."
            )
        check_dataset(self.train_dataset, 1)
        has_rewards = "reward" in self.train_dataset.column_names
        if has_rewards == (reward_function is not None):
            what = (
                'has a column "reward", and a reward_function was given too'
                if has_rewards
                else 'has no column "reward"'
            )
            raise ValueError(f"train_dataset {what}: give either the column or the function.")
        return column_rewards if has_rewards else reward_function

    # ---------------------------------------------------------------- the loop

    def step(self, epoch: int, global_step: int) -> int:
        """One epoch: `train_num_inner_epochs` passes over the images, which are drawn first where it is time to. Returns the number of optimizer steps done so
        far."""
        redraw = self.config.sft_redraw_epochs
        if self.data is None or (redraw is not None and epoch % redraw == 0):
            self.data = self._draw(epoch, global_step)
        started = time.monotonic()
        losses = []
        for metrics in self._passes(epoch, global_step, self.config.train_num_inner_epochs):
            losses.append(metrics["loss"])
        global_step = self.global_step
        self._log({"epoch": epoch, "time/update": time.monotonic() - started}, global_step)
        self._shown = {"reward": self.last_metrics["reward"], "loss": sum(losses) / len(losses)}
        return global_step

    def _draw(self, epoch: int, global_step: int) -> SupervisedData:
        """Draws and scores images with the model as it is, and keeps of them what the updates need, in a file."""
        if self.train_dataset is not None:
            self._settle_template()  # here, where all processes are: its trial waits for the others
        batches, metrics = self.sample(epoch)
        _, rewards, reward_metrics = self.scoring.gather(batches)
        metrics = {**reward_metrics, **metrics, **self._weight_metrics(rewards)}
        draws = 1 if self.config.sft_redraw_epochs is None else epoch // self.config.sft_redraw_epochs + 1
        # of a dataset the first batch has pictures
        shown = [batch for batch in batches if len(batch.trajectory.images) == len(batch.trajectory)]
        self._log_round(epoch, global_step, shown, {"images": draws * len(rewards), **metrics})
        data = SupervisedData(
            x0=torch.cat([batch.trajectory.latents[-1].cpu() for batch in batches]).contiguous(),
            prompts=[prompt for batch in batches for prompt in batch.trajectory.prompts],
            seeds=[seed for batch in batches for seed in batch.trajectory.seeds],
            rewards=torch.cat([batch.rewards for batch in batches]).float(),
            epoch=epoch,
            process=self.accelerator.process_index,
        )
        data.save(self.output_dir / DATA_FOLDER)
        return data

    # ---------------------------------------------------------------- the weights

    def _weights(self, rewards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weights `(N,)` for rewards of shape `(N,)`, and with KL-D the share that was clipped."""
        if self.config.sft_loss == "filtered":
            return rewards.isfinite().float(), None
        if self.config.sft_kl == "kl_d":
            return shifted_reward_weights(rewards, self.config.sft_gamma)
        return reward_weights(rewards), None

    def _weight_metrics(self, rewards: torch.Tensor) -> dict[str, float]:
        """Of the images of all processes, so that all stop where a reward is negative."""
        weights, clipped = self._weights(rewards)
        if not weights.any():
            raise ValueError(
                f"all {len(rewards)} images have weight 0 (rewards from {rewards.min():.4g} to {rewards.max():.4g}, sft_gamma = {self.config.sft_gamma}): nothing would be "
                "learned. Raise sft_gamma with sft_kl = 'kl_d', or shift the reward."
            )
        metrics = {"sft/weight_mean": weights[rewards.isfinite()].mean().item()}
        return metrics if clipped is None else {**metrics, "sft/clipped_fraction": clipped.item()}

    def _rows_kept(self, rewards: torch.Tensor) -> np.ndarray:
        """The rows of this process's data that are trained on."""
        config = self.config
        if config.sft_loss != "filtered":
            return np.arange(len(rewards))
        in_groups = self.train_dataset is None and config.sample_num_images_per_prompt > 1
        size = config.sample_num_images_per_prompt if in_groups else len(rewards)
        groups = [row // size for row in range(len(rewards))]
        return best_and_worst(rewards, groups, kept_of(size, config.sft_keep_fraction), 0).nonzero().flatten().numpy()

    # ---------------------------------------------------------------- the update

    def calculate_loss(self, item: Regression) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and metrics of one forward pass: the weighted squared error, and with KL-O `sft_gamma` times the squared difference from the pretrained model's
        output."""
        reference = None
        with self._unguided():
            if self.config.sft_kl == "kl_o":
                with torch.no_grad(), self.policy.reference():
                    (answer,) = self.prepared_policy(item.trajectory, each=item.steps)
                reference = answer.model_output
            (replayed,) = self.prepared_policy(item.trajectory, each=item.steps)
        errors = squared_errors(replayed.model_output, item.target)
        loss = weighted_loss(errors, item.weights)
        metrics = {"sft/mse": errors.detach().mean()}
        if reference is not None:
            kl = squared_errors(replayed.model_output, reference).mean()
            loss = loss + self.config.sft_gamma * kl
            metrics["kl_o"] = kl.detach()
        return loss, {"loss": loss.detach(), **metrics}

    @contextmanager
    def _unguided(self) -> Iterator[None]:
        """Within it the policy runs without guidance: it is the network alone that is regressed on its target."""
        guided = self.policy.call_kwargs
        if "guidance_scale" in guided:
            self.policy.call_kwargs = {**guided, "guidance_scale": self._unguided_scale}
        try:
            yield
        finally:
            self.policy.call_kwargs = guided

    def _updates(self, epoch: int, inner_epoch: int) -> Iterator[list[Regression]]:
        """The optimizer steps of one pass over the images, in an order and with noise that follow from (seed, epoch, pass, process). What does not fill a
        training batch is left out of this pass."""
        config, data = self.config, self.data
        template = self._settle_template()
        if data.x0.shape[1:] != template.latents[-1].shape[1:]:
            raise ValueError(
                f"the images that this run has drawn have latents of shape {tuple(data.x0.shape[1:])}, and those of the pipeline have "
                f"{tuple(template.latents[-1].shape[1:])}: it is another pipeline, or draws another size. Resume with the one that the run began with."
            )
        random = np.random.default_rng([config.seed, epoch, inner_epoch, self.accelerator.process_index])
        rows = random.permutation(self._rows_kept(data.rewards)).tolist()
        size = config.train_batch_size
        batches = [DataRows(template, tuple(rows[at : at + size])) for at in range(0, len(rows) - size + 1, size)]
        plan = plan_updates(
            batches,
            count=len(batches),
            timestep_fraction=config.train_timestep_fraction,
            accumulation=config.train_gradient_accumulation_steps,
            timesteps_per_update=config.train_timesteps_per_update,
            random=random,
            mixed=self._mixed,
        )
        noise = torch.Generator().manual_seed(int(random.integers(2**63)))  # on the CPU: the same on every device
        weights, _ = self._weights(data.rewards)
        for update in self._progress(plan, "update"):
            yield [self._regression(batch, steps, weights, noise) for batch, steps in update]

    def _regression(
        self, batch: DataRows, steps: tuple[int, ...], weights: torch.Tensor, noise: torch.Generator
    ) -> Regression:
        """Images at steps of their own, or all at the same."""
        rows, template, grid = list(batch.samples), batch.trajectory, batch.trajectory.recording.grid
        device = template.latents[0].device
        x0 = self.data.x0[rows]
        eps = torch.randn(x0.shape, generator=noise).to(device)
        x0, each = x0.to(device), torch.tensor(steps)
        x = noisy_latents(x0, eps, grid.levels(each)).to(template.latents[0].dtype)
        trajectory = replace(
            template,
            prompts=[self.data.prompts[row] for row in rows],
            latents=(x,) * len(template.latents),
            next_latents=(x,) * len(template.next_latents),
        )
        return Regression(trajectory, steps, target_on_grid(grid, x0, eps, each), weights[rows].to(device))

    def _unguided_rollout(self, prompts: Sequence[str]) -> Trajectory:
        """Of these prompts, at the guidance scale at which the network runs once for each sample: 1 in most calls, 0 in some."""
        scales = UNGUIDED if "guidance_scale" in self.policy.call_kwargs else UNGUIDED[:1]
        for self._unguided_scale in scales:
            with self._unguided(), self.accelerator.autocast():
                drawn = self.policy.rollout(prompts, range(len(prompts)))
            rows = sum(map(num_rows, drawn.recording.templates[-1]))
            if rows == len(prompts):
                return drawn
        self._unguided_scale = UNGUIDED[0]
        logger.warning(
            "the call of %s runs its network on %d rows for %d samples also without guidance: what guides it beside guidance_scale stays on, and the guided output is what is "
            "trained. Turn it off in sample_call_kwargs, if you can.",
            type(self.pipeline).__name__,
            rows,
            len(prompts),
        )
        return drawn

    def _settle_template(self) -> Trajectory:
        """An unguided rollout of a training batch, made once in a process: replays of noisy latents walk its path. Any prompts will do."""
        if self._template is not None:
            return self._template
        size = self.config.train_batch_size
        if self.train_dataset is None:
            prompts = self.data.prompts
        else:
            prompts = list(self.train_dataset.select_columns("prompt")[:size]["prompt"])
        prompts = (prompts * size)[:size]
        drawn = self._unguided_rollout(prompts)
        if any(state is not action for state, action in zip(drawn.latents[1:], drawn.next_latents, strict=True)):
            raise ValueError(
                f"{type(self.pipeline).__name__} changes the latents between the steps (inpainting does), so it cannot be trained on noisy latents of a choice. Take "
                "DPOKTrainer, or the family's text-to-image pipeline."
            )
        self._image_shape = tuple(drawn.images.shape[1:])
        if self.config.train_mixed_timesteps:
            with self._unguided():
                self._mixed = can_mix(self.policy, drawn, range(size), self.accelerator, MIXING_TOLERANCE)
        steps = tuple(
            range(1, len(drawn.next_latents))
        )  # the first one starts from the noise that the pipeline draws itself
        if not steps:
            raise ValueError(
                f"the call of {type(self.pipeline).__name__} walks a single step, which starts from the noise that the pipeline draws itself. Raise sample_num_steps."
            )
        recording = replace(
            drawn.recording,
            encoded=[None] * len(drawn.recording.encoded),  # a replay encodes the prompts that it is given
            rules=(_any_gaussian,) * len(drawn.next_latents),
        )
        self._template = replace(
            drawn.without_images(),
            steps=steps,
            log_probs=drawn.log_probs.new_zeros((size, len(steps))),
            recording=recording,
        )
        return self._template

    def _updates_per_pass(self) -> int:
        """Optimizer steps of a pass, for the length of the learning-rate schedule."""
        config = self.config
        drawn = config.sample_batch_size * config.sample_num_batches_per_epoch
        if self.train_dataset is not None:
            check_dataset(self.train_dataset, self.accelerator.num_processes)
            drawn = len(self.train_dataset) // self.accelerator.num_processes
        batches = config.images_kept(drawn, self.train_dataset is None) // config.train_batch_size
        steps = selected_steps(config.sample_num_steps - 1, config.train_timestep_fraction)
        parts = math.ceil(steps / (config.train_timesteps_per_update or steps))
        return math.ceil(batches / config.train_gradient_accumulation_steps) * parts

    # ---------------------------------------------------------------- a dataset

    def _sample_and_score(self, epoch: int) -> tuple[list[SampledBatch], dict[str, float]]:
        if self.train_dataset is None:
            return super()._sample_and_score(epoch)
        started, waited = time.monotonic(), 0.0
        processes = self.accelerator.num_processes
        own = range(self.accelerator.process_index, len(self.train_dataset) // processes * processes, processes)
        batches = []
        size = self.config.sample_batch_size
        for start in self._progress(range(0, len(own), size), "encode"):
            rows = list(own[start : start + size])
            batch = self._encoded(rows)
            begun = time.monotonic()
            self.scoring.begin(batch, TrainerState(epoch, self.global_step))
            self.scoring.finish([batch])
            waited += time.monotonic() - begun
            if batches:  # the pictures of a whole dataset would not fit in memory
                batch.inputs = RewardInputs(
                    batch.inputs.images[:0].clone(), batch.inputs.prompts, batch.inputs.metadata
                )
                batch.trajectory = batch.trajectory.without_images()
            batches.append(batch)
        return batches, {"time/rollout": time.monotonic() - started - waited, "time/reward": waited}

    def _encoded(self, rows: list[int]) -> SampledBatch:
        """Rows of the dataset as if they had been drawn."""
        template = self._settle_template()
        entries = [self.train_dataset[row] for row in rows]
        images = pixels_of([entry["image"] for entry in entries], self._image_shape, rows)
        trajectory = replace(
            template,
            prompts=[entry["prompt"] for entry in entries],
            seeds=rows,
            images=images,
            latents=(encode_images(self.pipeline, images, template.latents[-1]),),
            next_latents=(),
        )
        metadata = [{name: entry[name] for name in entry if name not in ("image", "prompt")} for entry in entries]
        return SampledBatch(trajectory, tuple(metadata))

    # ---------------------------------------------------------------- checkpoints

    def _save_data(self, models: list, weights: list, output_dir: str) -> None:
        """Each process puts its images beside its random state."""
        process = self.accelerator.process_index
        source = data_file(self.output_dir / DATA_FOLDER, process)
        link_or_copy(source, data_file(Path(output_dir) / DATA_FOLDER, process))

    def _load_data(self, models: list, input_dir: str) -> None:
        self.data = SupervisedData.load(Path(input_dir) / DATA_FOLDER, self.accelerator.process_index)
        self.data.save(self.output_dir / DATA_FOLDER)  # for the checkpoints to come


def _any_gaussian(sample: torch.Tensor, x0: torch.Tensor, eps: torch.Tensor, levels: NoiseLevels) -> Gaussian:
    """In the place of a step's transition, where the network is asked and no step is taken: also the last step, without noise, can be trained on."""
    return Gaussian(x0.float(), torch.ones(len(x0)))
