"""The pipeline's own `__call__`, entered again: what is swapped for the time of one call, and who answers.

Two things are intercepted, the scheduler's `step` and the call of the denoiser (and, to save work, `encode_prompt`). A `Recorder`
answers them in a rollout, a `Replayer` in a replay. Everything else, guidance, rescaling, sign, chunking, is the pipeline's own code,
which is why no model family needs code of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput

from dpok_trl.core.gaussian import Gaussian, Reduction
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


@dataclass
class Recording:
    """What a rollout leaves for its replays: the grid, the shape of every denoiser output, the encoded prompts.

    Opaque to everybody but this module and the policy.
    """

    device: torch.device | None = None  # where the generators draw
    grid: SchedulerGrid | None = None
    transition: Transition | None = None
    templates: list[list[Any]] = field(default_factory=list)  # per step, per denoiser call
    encoded: list[Encoded | None] = field(default_factory=list)  # per call of encode_prompt
    latents: list[torch.Tensor] = field(default_factory=list)  # x_T and what each step returned, (B, *)
    log_probs: dict[int, torch.Tensor] = field(default_factory=dict)  # step -> (B,)


class Recorder:
    """Answers in a rollout: runs everything, draws x_{t-1} from our Gaussian, and writes down what a replay needs."""

    def __init__(
        self,
        read_grid: Callable[[Any], tuple[SchedulerGrid, Transition, frozenset[int]]],
        generators: list[torch.Generator],
        reduction: Reduction,
        memo: PromptMemo | None,
    ):
        self.read_grid = read_grid
        self.generators = generators
        self.reduction = reduction
        self.memo = memo
        self.recording = Recording()
        self.actions: frozenset[int] = frozenset()
        self._calls: list[Any] = []  # the denoiser calls of the step in progress

    def encode_prompt(self, args: tuple, kwargs: dict) -> Any:
        output, record = self.memo(args, kwargs)
        self.recording.encoded.append(record)
        return output

    def denoise(self, denoiser: torch.nn.Module, args: tuple, kwargs: dict) -> Any:
        output = denoiser(*args, **kwargs)
        self._calls.append(_template(output))
        return output

    def step(self, scheduler: Any, model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        recording = self.recording
        if recording.grid is None:
            recording.grid, recording.transition, self.actions = self.read_grid(scheduler)
            recording.latents.append(sample.clone())
        step_index = len(recording.templates)
        recording.templates.append(self._calls)
        self._calls = []
        distribution = next_distribution(recording.grid, recording.transition, model_output, sample, step_index)
        next_sample = distribution.sample(self.generators, dtype=sample.dtype)
        if step_index in self.actions:
            # of the rounded value that is stored, or bf16 alone moves the log-probability by hundreds of nats
            recording.log_probs[step_index] = distribution.log_prob(next_sample, self.reduction)
        recording.latents.append(next_sample.clone())  # some pipelines write into what they got
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
        recording: Recording,
        samples: Sequence[int] | None,
        steps: Sequence[int],
        reduction: Reduction,
        memo: PromptMemo | None,
        verify: bool,
    ):
        self.recording = recording
        self.samples = samples
        self.num_samples = len(recording.latents[0]) if samples is None else len(samples)
        self.steps = frozenset(steps)
        self.last = max(steps)
        self.reduction = reduction
        self.memo = memo
        self.verify = verify
        self.with_grad = torch.is_grad_enabled()
        self.outputs: dict[int, ReplayedStep] = {}
        self._step_index = 0
        self._call_index = 0
        self._encode_index = 0

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.samples is None else tensor[torch.tensor(self.samples, device=tensor.device)]

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
        return _stub(template, self.num_samples, len(self.recording.latents[0]))

    def step(self, scheduler: Any, model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        step_index = self._step_index
        self._step_index += 1
        self._call_index = 0
        _advance(scheduler, step_index)
        action = self.rows(self.recording.latents[step_index + 1])
        if step_index not in self.steps:
            return action.clone()
        self._check(step_index, model_output, sample)
        distribution = next_distribution(
            self.recording.grid, self.recording.transition, model_output, sample, step_index
        )
        log_prob = distribution.log_prob(action, self.reduction)
        self.outputs[step_index] = ReplayedStep(log_prob, distribution, model_output)
        torch.set_grad_enabled(False)
        if step_index == self.last:
            raise _LastStepReached
        return action.clone()

    def _check(self, step_index: int, model_output: torch.Tensor, sample: torch.Tensor) -> None:
        if self.with_grad and not model_output.requires_grad:
            raise ReplayError(
                f"the model output of step {step_index} carries no gradient. Either nothing trainable lies in the denoiser, or the "
                "pipeline detaches it (a `.detach()` or an inner `torch.inference_mode()` in a custom `__call__`)."
            )
        recorded = self.rows(self.recording.latents[step_index])
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
