"""The pipeline's own `__call__`, entered again: what is swapped for the time of one call, and who answers.

Two things are intercepted, the scheduler's `step` and the call of the denoiser (and, to save work, `encode_prompt`). A `Recorder`
answers them in a rollout, a `Replayer` in a replay. Everything else, guidance, rescaling, sign, chunking, is the pipeline's own code,
which is why no model family needs code of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput

from dpok_trl.core.gaussian import Gaussian, Reduction
from dpok_trl.core.trajectory import Trajectory
from dpok_trl.core.transitions import Transition
from dpok_trl.policy.memo import Encoded, PromptMemo
from dpok_trl.policy.schedulers import SchedulerGrid, next_distribution


DENOISER_NAMES = ("unet", "transformer", "transformer_2")


class ReplayError(RuntimeError):
    """A replay does not walk the path of its rollout; the message says where it left it."""


class _LastStepReached(Exception):
    """Leaves the pipeline's `__call__` after the last selected step: nothing behind it is needed, decoding least of all."""


@dataclass
class StepOutput(BaseOutput):
    """What our `step` returns; indexable, as the schedulers' own outputs are."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class Answers(Protocol):
    """Who answers the intercepted calls. Without a `memo`, `encode_prompt` is left to the pipeline."""

    memo: PromptMemo | None

    def step(self, scheduler: Any, model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor: ...

    def denoise(self, denoiser: torch.nn.Module, args: tuple, kwargs: dict) -> Any: ...

    def encode_prompt(self, args: tuple, kwargs: dict) -> Any: ...


class DenoiserProxy:
    """Stands before a denoiser: a call goes to `answer`, everything else (config, dtype, cache_context ...) to the denoiser.

    A plain object, not a module and not a patched `forward`, so that compilation, hooks and sharding of the denoiser are left alone.
    """

    def __init__(self, denoiser: torch.nn.Module, answer: Callable[[torch.nn.Module, tuple, dict], Any]):
        self._denoiser = denoiser
        self._answer = answer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._answer(self._denoiser, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)


@contextmanager
def intercepted(pipe: DiffusionPipeline, answers: Answers) -> Iterator[None]:
    """Swaps scheduler, denoisers and `encode_prompt` of `pipe` for one call, and takes the swap out again whatever happens.

    The scheduler is a shallow copy of the user's own with `step` replaced on the instance: pipelines compare its exact type, and its
    timesteps are set anew in every call. Everything goes through `pipe.__dict__`, since attribute assignment on a pipeline rewrites
    the config that `save_pretrained` writes.
    """
    scheduler = copy.copy(pipe.scheduler)

    def step(model_output, timestep, sample, *args, generator=None, return_dict=True, **kwargs):
        next_sample = answers.step(scheduler, model_output, sample)
        return StepOutput(next_sample) if return_dict else (next_sample,)

    scheduler.step = step
    swapped: dict[str, Any] = {"scheduler": scheduler, "_progress_bar_config": {"disable": True}}
    if getattr(pipe, "safety_checker", None) is not None:
        swapped["safety_checker"] = (
            None  # it turns images black, and a black image would be rewarded as the policy's own
        )
    for name in DENOISER_NAMES:
        if getattr(pipe, name, None) is not None:
            swapped[name] = DenoiserProxy(getattr(pipe, name), answers.denoise)
    if answers.memo is not None:
        swapped["encode_prompt"] = lambda *args, **kwargs: answers.encode_prompt(args, kwargs)

    kept = {name: pipe.__dict__[name] for name in swapped if name in pipe.__dict__}
    pipe.__dict__.update(swapped)
    try:
        yield
    finally:
        for name in swapped:
            if name in kept:
                pipe.__dict__[name] = kept[name]
            else:
                del pipe.__dict__[name]


def _advance(scheduler: Any, step_index: int) -> None:
    # Our `step` runs in place of the scheduler's, which counts; `scale_model_input` of sigma schedulers reads the count.
    if "_step_index" in scheduler.__dict__:
        scheduler._step_index = step_index + 1


# --------------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recording:
    """What a replay needs beside the trajectory's latents. Opaque to everybody but this module and the policy.

    Args:
        device (`torch.device`): Where the generators draw.
        grid ([`SchedulerGrid`]) and transition ([`Transition`]): Of the rollout.
        templates (`list[list]`): For each step and each call of a denoiser in it, the shape of the output.
        encoded (`list`): For each call of `encode_prompt`, its record; `None` for one that was passed on.
    """

    device: torch.device
    grid: SchedulerGrid
    transition: Transition
    templates: list[list[Any]]
    encoded: list[Encoded | None]


class Recorder:
    """Answers in a rollout: runs everything, draws x_{t-1} from our Gaussian, and writes down what a replay needs.

    `choose_steps` reads grid and transition off the scheduler, once its timesteps are set, and says which steps are actions.
    """

    def __init__(
        self,
        choose_steps: Callable[[Any], tuple[SchedulerGrid, Transition, frozenset[int]]],
        generators: list[torch.Generator],
        reduction: Reduction,
        memo: PromptMemo | None,
    ):
        self.choose_steps = choose_steps
        self.generators = generators
        self.reduction = reduction
        self.memo = memo
        self.latents: list[torch.Tensor] = []  # x_T and what each step returned, (B, *)
        self.log_probs: dict[int, torch.Tensor] = {}  # step -> (B,)
        self._templates: list[list[Any]] = []
        self._encoded: list[Encoded | None] = []
        self._calls: list[Any] = []  # the denoiser calls of the step in progress

    def recording(self) -> Recording:
        return Recording(self.generators[0].device, self._grid, self._transition, self._templates, self._encoded)

    def encode_prompt(self, args: tuple, kwargs: dict) -> Any:
        output, record = self.memo(args, kwargs)
        self._encoded.append(record)
        return output

    def denoise(self, denoiser: torch.nn.Module, args: tuple, kwargs: dict) -> Any:
        output = denoiser(*args, **kwargs)
        self._calls.append(_template(output))
        return output

    def step(self, scheduler: Any, model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        if not self.latents:
            self._grid, self._transition, self._actions = self.choose_steps(scheduler)
            self.latents.append(sample.clone())
        step_index = len(self._templates)
        self._templates.append(self._calls)
        self._calls = []
        distribution = next_distribution(self._grid, self._transition, model_output, sample, step_index)
        next_sample = distribution.sample(self.generators, dtype=sample.dtype)
        if step_index in self._actions:
            # of the rounded value that is stored, or bf16 alone moves the log-probability by hundreds of nats
            self.log_probs[step_index] = distribution.log_prob(next_sample, self.reduction)
        self.latents.append(next_sample.clone())  # some pipelines write into what they got
        _advance(scheduler, step_index)
        return next_sample


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


class Replayer:
    """Answers in a replay: teacher-forces the recorded path and runs the network on the selected steps only.

    Pipelines run under `no_grad`; gradient mode is switched on between the denoiser's call and the end of `step` on a selected step,
    and the pipeline's own code in between (guidance, chunking) is recorded by autograd with it.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        samples: Sequence[int] | None,
        steps: Sequence[int],
        reduction: Reduction,
        memo: PromptMemo | None,
        verify: bool,
    ):
        self.trajectory = trajectory
        self.recording: Recording = trajectory.recording
        self.samples = samples
        self.num_samples = len(trajectory) if samples is None else len(samples)
        self.steps = frozenset(steps)
        self.last = max(steps)
        self.reduction = reduction
        self.memo = memo
        self.verify = verify
        self.with_grad = torch.is_grad_enabled()
        self.outputs: dict[int, ReplayedStep] = {}
        # on the device once, and not once for each step
        self._rows = None if samples is None else torch.tensor(samples, device=trajectory.latents[0].device)
        self._step_index = 0
        self._call_index = 0
        self._encode_index = 0

    def latents(self, index: int) -> torch.Tensor:
        """A copy of the recorded latents of the replayed samples: some pipelines write into what they get."""
        latents = self.trajectory.latents[index]
        return latents.clone() if self._rows is None else latents[self._rows]

    def encode_prompt(self, args: tuple, kwargs: dict) -> Any:
        if self._encode_index >= len(self.recording.encoded):
            raise ReplayError("the pipeline encodes more prompts in the replay than it did in the rollout")
        record = self.recording.encoded[self._encode_index]
        self._encode_index += 1
        return self.memo.encode_prompt(*args, **kwargs) if record is None else record.select(self.samples)

    def denoise(self, denoiser: torch.nn.Module, args: tuple, kwargs: dict) -> Any:
        if self._step_index in self.steps:
            torch.set_grad_enabled(self.with_grad)
            return denoiser(*args, **kwargs)
        calls = self.recording.templates[self._step_index]
        if self._call_index >= len(calls):
            raise ReplayError(
                f"step {self._step_index} calls the denoiser more often in the replay than in the rollout ({len(calls)} times)"
            )
        template = calls[self._call_index]
        self._call_index += 1
        return _stub(template, self.num_samples, len(self.trajectory))

    def step(self, scheduler: Any, model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        step_index = self._step_index
        self._step_index += 1
        self._call_index = 0
        _advance(scheduler, step_index)
        action = self.latents(step_index + 1)
        if step_index not in self.steps:
            return action
        self._check(step_index, model_output, sample)
        distribution = next_distribution(
            self.recording.grid, self.recording.transition, model_output, sample, step_index
        )
        log_prob = distribution.log_prob(action, self.reduction)
        self.outputs[step_index] = ReplayedStep(log_prob, distribution, model_output)
        torch.set_grad_enabled(False)
        if step_index == self.last:
            raise _LastStepReached
        return action

    def _check(self, step_index: int, model_output: torch.Tensor, sample: torch.Tensor) -> None:
        if self.with_grad and not model_output.requires_grad:
            raise ReplayError(
                f"the model output of step {step_index} carries no gradient. Either nothing trainable lies in the denoiser, or the "
                "pipeline detaches it (a `.detach()` or an inner `torch.inference_mode()` in a custom `__call__`)."
            )
        recorded = self.latents(step_index)
        if sample.shape != recorded.shape:
            raise ReplayError(
                f"step {step_index} got latents of shape {tuple(sample.shape)}, recorded were {tuple(recorded.shape)}"
            )
        if self.verify and not torch.equal(sample, recorded):
            difference = (sample.float() - recorded.float()).abs().max().item()
            raise ReplayError(
                f"step {step_index} got other latents than in the rollout (largest difference {difference:.3g}). The pipeline keeps a "
                "state between calls, or writes into its arguments."
            )


def call_pipeline(pipe: DiffusionPipeline, answers: Answers, call_kwargs: dict[str, Any]) -> Any:
    """Calls `pipe` with `answers` in place; `None` if the call was left after the last selected step."""
    grad_mode = torch.is_grad_enabled()
    # Pipelines may write into their list arguments (Z-Image does), so each call gets its own.
    arguments = {name: list(value) if isinstance(value, list) else value for name, value in call_kwargs.items()}
    try:
        with intercepted(pipe, answers), torch.no_grad():
            return pipe(**arguments)
    except _LastStepReached:
        return None
    finally:
        torch.set_grad_enabled(grad_mode)


def _template(output: Any) -> Any:
    """The shape of a denoiser's output, without its values."""
    if isinstance(output, torch.Tensor):
        return output.new_empty(0), tuple(output.shape)
    if isinstance(output, BaseOutput):
        return type(output), {name: _template(value) for name, value in output.items()}
    return type(output), [_template(value) for value in output]


def _stub(template: Any, num_samples: int, num_recorded: int) -> Any:
    """Zeros in the shape of a recorded output, for another number of samples."""
    kind, content = template
    if isinstance(kind, torch.Tensor):
        batch, remainder = divmod(content[0] * num_samples, num_recorded)
        if remainder:
            raise ReplayError(
                f"a denoiser output of shape {content} cannot be cut to {num_samples} of {num_recorded} samples"
            )
        return kind.new_zeros((batch, *content[1:]))
    if isinstance(content, dict):
        return kind(**{name: _stub(value, num_samples, num_recorded) for name, value in content.items()})
    if kind is list and len(content) % num_recorded == 0:  # one entry per sample (Z-Image)
        entries = [content[0]] * (len(content) // num_recorded * num_samples)
        return [_stub(entry, 1, 1) for entry in entries]
    return kind(_stub(value, num_samples, num_recorded) for value in content)
