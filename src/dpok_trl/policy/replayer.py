"""What answers in a replay: teacher-forces the recorded path and runs the network on the selected steps only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpok_trl.core.gaussian import Gaussian, Reduction
from dpok_trl.core.trajectory import Trajectory
from dpok_trl.policy.casts import Casts
from dpok_trl.policy.errors import ReplayError
from dpok_trl.policy.interception import LastStepReached, Networks
from dpok_trl.policy.nested import any_tensor, stub
from dpok_trl.policy.recorder import Recording, advance


@dataclass(frozen=True)
class ReplayedStep:
    """One selected step of a replay.

    Args:
        log_prob (`torch.Tensor` of shape `(n,)`): Of the recorded action, float32.
        distribution ([`Gaussian`]): The distribution of x_{t-1}.
        model_output (`torch.Tensor` of shape `(n, *)`): What `step` was given, guidance included.
    """

    log_prob: torch.Tensor
    distribution: Gaussian
    model_output: torch.Tensor

    def detach(self) -> ReplayedStep:
        """The same without its graph."""
        return ReplayedStep(self.log_prob.detach(), self.distribution.detach(), self.model_output.detach())


class Replayer:
    """Answers in a replay: teacher-forces the recorded path and runs the network on the selected steps only.

    Pipelines run under `no_grad`; gradient mode is switched on between the denoiser's call and the end of `step` on a selected step,
    and the pipeline's own code in between (guidance, chunking) is recorded by autograd with it. Where text encoders train, it is on from
    `encode_prompt` to the end: what the pipeline does to the embeddings before the loop has to be recorded too.
    """

    def __init__(
        self,
        networks: Networks,
        trajectory: Trajectory,
        samples: Sequence[int] | None,
        steps: Sequence[int],
        reduction: Reduction,
        verify: bool,
        generators: Sequence[torch.Generator],
    ):
        self.generators = generators
        self.networks = networks
        self.trajectory = trajectory
        self.recording: Recording = trajectory.recording
        self.global_seed = trajectory.seeds[0]
        self.samples = samples
        self.num_samples = len(trajectory) if samples is None else len(samples)
        self.steps = frozenset(steps)
        self.last = max(steps)
        self.reduction = reduction
        self.verify = verify
        self.with_grad = torch.is_grad_enabled()
        self.text_grad = self.with_grad and networks.memo is None and networks.encode_prompt is not None
        self.casts = Casts() if self.recording.fp32_latents else None
        self.outputs: dict[int, ReplayedStep] = {}
        # on the device once, and not once for each step
        self._rows = None if samples is None else torch.tensor(samples, device=trajectory.latents[0].device)
        self._step_index = 0  # of the loop
        self._call_index = 0
        self._encode_index = 0

    def prepare_scheduler(self, scheduler: Any) -> None:
        pass

    def state(self, index: int) -> torch.Tensor:
        """The recorded latents that the loop's step `index` starts from."""
        return self._rows_of(self.trajectory.latents[index])

    def action(self, index: int) -> torch.Tensor:
        """What `scheduler.step` returns in the loop's step `index`."""
        return self._rows_of(self.trajectory.next_latents[index])

    def grid_index(self, index: int) -> int | torch.Tensor:
        """Where in the grid the samples are in the loop's step `index`."""
        return index

    def _rows_of(self, latents: torch.Tensor) -> torch.Tensor:
        # A copy: some pipelines write into what they get.
        return latents.clone() if self._rows is None else latents[self._rows]

    def encode_prompt(self, args: tuple, kwargs: dict) -> Any:
        if self.networks.memo is None:
            torch.set_grad_enabled(self.with_grad)
            encoded = self.networks.encode_prompt(*args, **kwargs)
            if self.with_grad and not any_tensor(encoded, lambda x: x.requires_grad):
                raise ReplayError(
                    "the prompt embeddings carry no gradient: this pipeline's `encode_prompt` runs under `no_grad`, so its text encoders cannot be "
                    "trained. Set train_text_encoder = False."
                )
            return encoded
        if self._encode_index >= len(self.recording.encoded):
            raise ReplayError("the pipeline encodes more prompts in the replay than it did in the rollout")
        record = self.recording.encoded[self._encode_index]
        self._encode_index += 1
        return self.networks.memo(args, kwargs)[0] if record is None else record.select(self.samples)

    def denoise(self, name: str, args: tuple, kwargs: dict) -> Any:
        if self.casts is not None:
            args, kwargs = self.casts.arguments(self._step_index, args, kwargs)
        if self._step_index in self.steps:
            torch.set_grad_enabled(self.with_grad)
            return self.networks.run(name, args, kwargs)
        calls = self.recording.templates[self._step_index]
        if self._call_index >= len(calls):
            raise ReplayError(
                f"step {self._step_index} calls the denoiser more often in the replay than in the rollout ({len(calls)} times)"
            )
        template = calls[self._call_index]
        self._call_index += 1
        return stub(template, self.num_samples, len(self.trajectory))

    def step(self, scheduler: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor) -> Any:
        index = self._step_index
        self._step_index += 1
        self._call_index = 0
        advance(scheduler, self.recording.begin + index)
        if self.recording.generator_states:  # the pipeline draws between the steps, after our noise
            states = self.recording.generator_states[index]
            for generator, sample_index in zip(self.generators, self.samples or range(self.num_samples), strict=True):
                generator.set_state(states[sample_index])
        action = self.action(index)
        if index in self.steps:
            self._check(index, model_output, sample)
            torch.set_grad_enabled(self.with_grad)  # a pipeline may leave a `no_grad` of its own behind the denoiser
            distribution, _ = self.recording.distribution(model_output, sample, self.grid_index(index))
            log_prob = distribution.log_prob(action, self.reduction)
            self.outputs[index] = ReplayedStep(log_prob, distribution, model_output)
            torch.set_grad_enabled(self.text_grad)
            if index == self.last:
                raise LastStepReached
        if self.casts is not None:
            action = self.casts.latents(index, index == len(self.recording.grid) - 1, sample, action)
        return action, None  # no x_0: the network has not run, and a pipeline that needs it between steps fails loudly

    def _check(self, step_index: int, model_output: torch.Tensor, sample: torch.Tensor) -> None:
        if self.with_grad and not model_output.requires_grad:
            raise ReplayError(
                f"the model output of step {step_index} carries no gradient. Either nothing trainable lies in the denoiser, or the "
                "pipeline cuts it off (a `.detach()` or `torch.inference_mode()` in a custom `__call__`, or `torch.no_grad()` around its guidance): take that out."
            )
        shape = (self.num_samples, *self.trajectory.latents[0].shape[1:])
        if sample.shape != shape:
            raise ReplayError(f"step {step_index} got latents of shape {tuple(sample.shape)}, recorded were {shape}")
        if self.verify and not torch.equal(sample, recorded := self.state(step_index)):
            difference = (sample.float() - recorded.float()).abs().max().item()
            raise ReplayError(
                f"step {step_index} got other latents than in the rollout (largest difference {difference:.3g}). The pipeline keeps a "
                "state between calls, or writes into its arguments."
            )
