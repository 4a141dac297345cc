"""The pipeline's own `__call__`, entered again: what is swapped for the time of one call, and who answers.

Two things are intercepted, the scheduler's `step` and the call of the denoiser (and, to save work, `encode_prompt`). A `Recorder`
answers them in a rollout, a `Replayer` in a replay. Everything else, guidance, rescaling, sign, chunking, is the pipeline's own code,
which is why no model family needs code of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput

from dpok_trl.policy.errors import ReplayError, UnsupportedPipelineError
from dpok_trl.policy.hooks import PipelineHooks
from dpok_trl.policy.memo import PromptMemo
from dpok_trl.policy.nested import map_tensors
from dpok_trl.policy.schedulers import policy_scheduler


class LastStepReached(Exception):
    """Leaves the pipeline's `__call__` after the last selected step: nothing behind it is needed, decoding least of all."""


@dataclass
class StepOutput(BaseOutput):
    """What our `step` returns; indexable, as the schedulers' own outputs are."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class Answers(Protocol):
    """Who answers the intercepted calls. `global_seed` is for what a pipeline draws beside the generators it is given."""

    global_seed: int

    def prepare_scheduler(self, scheduler: Any) -> None: ...

    def step(
        self, scheduler: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]: ...

    def denoise(self, name: str, args: tuple, kwargs: dict) -> Any: ...

    def encode_prompt(self, args: tuple, kwargs: dict) -> Any: ...


@dataclass(frozen=True)
class Networks:
    """The networks of a pipeline that a call of it meets.

    Args:
        denoisers (`Mapping[str, torch.nn.Module]`): Those that answer, by attribute of the pipeline.
        dtypes (`Mapping[str, torch.dtype]`): What the pipeline takes their dtype for: the one it was loaded in. Asked for once, since diffusers looks at
            every module of a network for an answer.
        device (`torch.device`): Likewise.
        modules (`Mapping[str, Sequence[torch.nn.Module]]`): All modules of each component, listed once: in every call a pipeline looks through them for
            hooks, thousands of them in a large network, and walking the tree is most of that work.
        master_weights (`bool`): The denoisers are kept in fp32, whatever the pipeline's dtype (full fine-tuning).
        absent (`Collection[str]`): Components that are off the device; a replay needs none of them.
        memo ([`PromptMemo`], *optional*): Stands in for `encode_prompt`. `None`: text encoders train, or there is no such method.
        encode_prompt (`Callable`, *optional*): The pipeline's own, where gradients are to reach the text encoders.
        hooks ([`PipelineHooks`]): How the pipeline is entered.
    """

    denoisers: Mapping[str, torch.nn.Module]
    dtypes: Mapping[str, torch.dtype]
    device: torch.device
    modules: Mapping[str, Sequence[torch.nn.Module]]
    master_weights: bool
    absent: Collection[str]
    memo: PromptMemo | None
    encode_prompt: Callable[..., Any] | None
    hooks: PipelineHooks

    def run(self, name: str, args: tuple, kwargs: dict) -> Any:
        """Calls a denoiser. One with master weights takes and gives what the pipeline expects."""
        module, seen = self.denoisers[name], self.dtypes[name]
        if not self.master_weights or seen == torch.float32:
            return module(*args, **kwargs)
        wide = map_tensors((args, kwargs), lambda x: x.to(torch.float32) if x.dtype == seen else x)
        return map_tensors(module(*wide[0], **wide[1]), lambda x: x.to(seen) if x.dtype == torch.float32 else x)


class Proxy:
    """Stands before a component: a call goes to `answer`, everything else (config, cache_context ...) to the component.

    A plain object, not a module and not a patched `forward`, so that compilation, hooks and sharding of the component are left alone.

    Args:
        answer (`Callable`): Of `(args, kwargs)`.
        known (`Any`): Attributes of the component that need not be asked for in each call: `device`, `dtype`.
    """

    def __init__(
        self,
        component: torch.nn.Module,
        answer: Callable[[tuple, dict], Any],
        modules: Sequence[torch.nn.Module],
        **known: Any,
    ):
        self._component = component
        self._answer = answer
        self._listed = modules
        self.__dict__.update(known)

    @property
    def __class__(self) -> type:
        return type(self._component)  # pipelines ask `isinstance`

    def modules(self) -> Iterator[torch.nn.Module]:
        return iter(self._listed)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._answer(args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._component, name)


@contextmanager
def intercepted(pipe: DiffusionPipeline, answers: Answers, networks: Networks) -> Iterator[None]:
    """Swaps scheduler, denoisers and `encode_prompt` of `pipe` for one call, and takes the swap out again whatever happens.

    The scheduler is a shallow copy of the user's own with `step` replaced on the instance: pipelines compare its exact type, and its
    timesteps are set anew in every call. Everything goes through `pipe.__dict__`, since attribute assignment on a pipeline rewrites
    the config that `save_pretrained` writes.
    """
    scheduler = policy_scheduler(pipe.scheduler)

    def step(model_output, timestep, sample, *args, generator=None, return_dict=True, **kwargs):
        _refuse_arguments_of_step(pipe, args, kwargs)
        next_sample, x0 = answers.step(scheduler, model_output, timestep, sample)
        return StepOutput(next_sample, x0) if return_dict else (next_sample, x0)

    step.__signature__ = inspect.signature(scheduler.step)  # pipelines look at it
    scheduler.step = step
    answers.prepare_scheduler(scheduler)
    swapped: dict[str, Any] = {"scheduler": scheduler, "_progress_bar_config": {"disable": True}}
    for name, modules in networks.modules.items():
        component = networks.denoisers[name] if name in networks.denoisers else getattr(pipe, name)
        known = {"device": networks.device}
        if name in networks.denoisers:
            answer, known["dtype"] = _denoise_as(answers, name), networks.dtypes[name]
        elif name in networks.absent:
            answer = _absent(name)
        else:
            answer = _passed_on(component)
        swapped[name] = Proxy(component, answer, modules, **known)
    if blackens_images(pipe):
        swapped["safety_checker"] = None
    if networks.memo is not None or networks.encode_prompt is not None:
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


# Arguments of `scheduler.step` that only say how much noise to draw, which is the policy's own matter.
NOISE_ARGUMENTS = frozenset({"eta", "s_churn", "s_tmin", "s_tmax", "s_noise", "variance_noise", "noise"})


def _refuse_arguments_of_step(pipe: DiffusionPipeline, args: tuple, kwargs: dict) -> None:
    """Raises [`UnsupportedPipelineError`] for arguments of `scheduler.step` that make it another step than the one of its grid."""
    given = {name: value for name, value in kwargs.items() if value is not None and value is not False}
    unknown = [name for name in given if name not in NOISE_ARGUMENTS]
    if args or unknown:
        raise UnsupportedPipelineError(
            f"{type(pipe).__name__} hands `scheduler.step` more than the model output, the timestep and the latents ({', '.join(unknown) or 'positional arguments'}), so its "
            "steps are not those of the scheduler's grid. Use the family's plain text-to-image or text-to-video pipeline."
        )


def blackens_images(pipe: DiffusionPipeline) -> bool:
    """Whether a safety checker turns images black, which would be rewarded as the policy's own, and the pipeline can do without."""
    return getattr(pipe, "safety_checker", None) is not None and "requires_safety_checker" in pipe.config


def _denoise_as(answers: Answers, name: str) -> Callable[[tuple, dict], Any]:
    return lambda args, kwargs: answers.denoise(name, args, kwargs)


def _passed_on(component: torch.nn.Module) -> Callable[[tuple, dict], Any]:
    return lambda args, kwargs: component(*args, **kwargs)


def _absent(name: str) -> Callable[[tuple, dict], Any]:
    def refuse(args: tuple, kwargs: dict) -> Any:
        raise ReplayError(
            f"the pipeline calls `{name}` in a replay, and it is off the device between sampling phases. Set sample_offload_encoders = False."
        )

    return refuse


@contextmanager
def _global_random(seed: int, device: torch.device) -> Iterator[None]:
    """Some pipelines draw from torch's global generators beside the ones they are given: rollout and replay draw the same there, and the
    caller's stream is not touched."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def call_pipeline(pipe: DiffusionPipeline, answers: Answers, networks: Networks, arguments: dict[str, Any]) -> Any:
    """Calls `pipe` with `answers` in place; `None` if the call was left after the last selected step."""
    grad_mode = torch.is_grad_enabled()
    # Pipelines may write into their list arguments (Z-Image does), so each call gets its own.
    arguments = {name: list(value) if isinstance(value, list) else value for name, value in arguments.items()}
    try:
        with (
            intercepted(pipe, answers, networks),
            torch.no_grad(),
            _global_random(answers.global_seed, networks.device),
        ):
            return networks.hooks.call(pipe, arguments)
    except LastStepReached:
        return None
    finally:
        torch.set_grad_enabled(grad_mode)
