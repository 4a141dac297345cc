"""What answers in a rollout, and writes down what a replay needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpok_trl.core.gaussian import Gaussian, Reduction
from dpok_trl.core.grid import SchedulerGrid, predict_on_grid
from dpok_trl.core.transitions import Transition
from dpok_trl.policy.casts import Casts
from dpok_trl.policy.errors import UnsupportedPipelineError
from dpok_trl.policy.features import MiddleFeatures
from dpok_trl.policy.interception import Networks
from dpok_trl.policy.memo import Encoded
from dpok_trl.policy.nested import template


@dataclass(frozen=True)
class Recording:
    """What a replay needs beside the trajectory's latents. Opaque outside this layer.

    Args:
        device (`torch.device`): Where the pipeline computes and the generators draw.
        dtypes (`dict[str, torch.dtype]`): Of the denoisers, as the pipeline sees them.
        modules (`dict[str, list[torch.nn.Module]]`): All of each component.
        scheduler (`str`): Class and config of the scheduler.
        grid ([`SchedulerGrid`]): Of the steps that the pipeline walked: an image-to-image pipeline starts in the middle of its scheduler's.
        begin (`int`): Where in the scheduler's grid.
        rules (`tuple[Transition, ...]`): For each step, its transition.
        templates (`list[list]`): For each step and each call of a denoiser in it, the shape of the output.
        encoded (`list`): For each call of `encode_prompt`, its record; `None` for one that was passed on.
        fp32_latents (`bool`): Latents are fp32 between the steps, whatever the pipeline's dtype.
        generator_states (`list[list[torch.Tensor]]`): Of each sample after each step, where the pipeline itself draws between the steps; else empty.
    """

    device: torch.device
    dtypes: Mapping[str, torch.dtype]
    modules: Mapping[str, Sequence[torch.nn.Module]]
    scheduler: str
    grid: SchedulerGrid
    begin: int
    rules: tuple[Transition, ...]
    templates: list[list[Any]]
    encoded: list[Encoded | None]
    fp32_latents: bool
    generator_states: list[list[torch.Tensor]]

    def distribution(
        self, model_output: torch.Tensor, sample: torch.Tensor, step: int | torch.Tensor
    ) -> tuple[Gaussian, torch.Tensor]:
        """Of x_{t-1}, and the predicted x_0. `step` of shape `(B,)`: for each sample its own; actions are all of one rule."""
        x0, eps = predict_on_grid(self.grid, model_output, sample, step)
        rule = self.rules[step if isinstance(step, int) else int(step[0])]
        return rule(sample, x0, eps, self.grid.levels(step)), x0.to(sample.dtype)


class Recorder:
    """Answers in a rollout: runs everything, draws x_{t-1} from our Gaussian, and writes down what a replay needs.

    `choose_steps` reads the grid off the scheduler, once its timesteps are set, from the position `begin` on, and says which transition each step
    makes and which steps are actions. `middle` reads features for a value function along the way.
    """

    def __init__(
        self,
        networks: Networks,
        choose_steps: Callable[[Any, int], tuple[SchedulerGrid, tuple[Transition, ...], frozenset[int]]],
        generators: list[torch.Generator],
        reduction: Reduction,
        scheduler: str,
        fp32_latents: bool,
        middle: MiddleFeatures | None = None,
    ):
        self.networks = networks
        self.choose_steps = choose_steps
        self.generators = generators
        self.global_seed = generators[0].initial_seed()
        self.reduction = reduction
        self.casts = Casts() if fp32_latents else None
        # what each step was given, and at the end what the last one returned, (B, *)
        self.latents: list[torch.Tensor] = []
        self.next_latents: list[torch.Tensor] = []  # what each step returned
        self.log_probs: dict[int, torch.Tensor] = {}  # step -> (B,)
        self.features: list[torch.Tensor] = []  # of each step (B, C), if `middle` reads them
        self._middle = middle
        self._scheduler = scheduler
        self._templates: list[list[Any]] = []
        self._encoded: list[Encoded | None] = []
        self._calls: list[Any] = []  # the denoiser calls of the step in progress
        self._timesteps: list[Any] = []
        self._generator_states: list[list[torch.Tensor]] = []
        self._draws_between_steps = False
        # the last returned latents, and how often they were written to
        self._returned: tuple[torch.Tensor, int | None] | None = None

    def prepare_scheduler(self, scheduler: Any) -> None:
        pass

    def encode_prompt(self, args: tuple, kwargs: dict) -> Any:
        if self.networks.memo is None:
            return self.networks.encode_prompt(*args, **kwargs)
        output, record = self.networks.memo(args, kwargs)
        self._encoded.append(record)
        return output

    def denoise(self, name: str, args: tuple, kwargs: dict) -> Any:
        if self.casts is not None:
            args, kwargs = self.casts.arguments(len(self._templates), args, kwargs)
        output = self.networks.run(name, args, kwargs)
        self._calls.append(template(output, name))
        if self._middle is not None:
            self._middle.end_call(name, output)
        return output

    def step(self, scheduler: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor) -> Any:
        if not self._timesteps:
            self._begin(scheduler, timestep)
        elif not self._draws_between_steps:
            self._draws_between_steps = not _equal(self._generator_states[-1], self._states_of_generators())
        index = len(self._timesteps)
        if len(sample) != len(self.generators):
            raise UnsupportedPipelineError(
                f"the latents have {len(sample)} rows for {len(self.generators)} prompts: the pipeline gives `scheduler.step` several rows of one sample (frames of a "
                "video, windows of a panorama), whose order is not known."
            )
        if model_output.shape != sample.shape:
            raise UnsupportedPipelineError(
                f"`scheduler.step` got a model output of shape {tuple(model_output.shape)} for latents of shape {tuple(sample.shape)}: the network predicts its variance "
                "too (take a scheduler with variance_type='fixed_small'), or the pipeline cuts the batch."
            )
        if index == len(self.recording.grid):
            raise UnsupportedPipelineError(
                f"the pipeline calls `scheduler.step` more often than its scheduler has timesteps ({len(self.recording.grid)}): it repeats steps, gives "
                "frames schedules of their own (diffusion forcing), or denoises a second stream (sound) beside. Such a walk is no sequence of denoising steps and cannot be tuned; use the family's "
                "plain text-to-image or text-to-video pipeline."
            )
        if self._middle is not None:
            self.features.append(self._middle.end_step())
        self._timesteps.append(timestep)
        self._templates.append(self._calls)
        self._calls = []
        self.latents.append(self._state(sample))
        distribution, x0 = self.recording.distribution(model_output, sample, index)
        dtype = sample.dtype if self.casts is None else torch.float32
        next_sample = distribution.sample(self.generators, dtype=dtype)
        if index in self._actions:
            # of the rounded value that is stored, or bf16 alone moves the log-probability by hundreds of nats
            self.log_probs[index] = distribution.log_prob(next_sample, self.reduction)
        self.next_latents.append(next_sample.clone())  # some pipelines write into what they got
        advance(scheduler, self.recording.begin + index)
        if self.casts is not None:
            next_sample = self.casts.latents(index, index == len(self.recording.grid) - 1, sample, next_sample)
        self._returned = (next_sample, _version(next_sample))
        self._generator_states.append(self._states_of_generators())
        return next_sample, x0

    def _states_of_generators(self) -> list[torch.Tensor]:
        return [generator.get_state() for generator in self.generators]

    def _begin(self, scheduler: Any, timestep: Any) -> None:
        begin = _begin_index(scheduler, timestep)
        grid, rules, self._actions = self.choose_steps(scheduler, begin)
        self.recording = Recording(
            device=self.networks.device,
            dtypes=self.networks.dtypes,
            modules=self.networks.modules,
            scheduler=self._scheduler,
            grid=grid,
            begin=begin,
            rules=rules,
            templates=self._templates,
            encoded=self._encoded,
            fp32_latents=self.casts is not None,
            generator_states=self._generator_states,
        )

    def _state(self, sample: torch.Tensor) -> torch.Tensor:
        """What a step was given: what the last one returned, unless the pipeline changed it in between (inpainting does)."""
        if not self.next_latents:
            return sample.clone()
        action = self.next_latents[-1]
        returned, version = self._returned
        unchanged = sample is returned and _version(sample) == version
        return action if unchanged or torch.equal(sample, action) else sample.clone()

    def finish(self) -> None:
        """Checks the walk, when the call has ended.

        Raises:
            [`UnsupportedPipelineError`]: If the pipeline did not walk its scheduler's grid in order.
        """
        self.latents.append(self.next_latents[-1])
        if not self._draws_between_steps:
            self._generator_states.clear()  # a replay then need not draw in order
        visited = torch.stack([torch.as_tensor(t).flatten()[0].double().cpu() for t in self._timesteps])
        grid = self.recording.grid.timesteps
        # Each must be no further from its own than from any other: a pipeline may round it to its own dtype, and Karras sigmas may give two steps the
        # same rounded timestep.
        distances = (grid[None] - visited[:, None]).abs()
        if (distances.diagonal() > distances.amin(dim=1)).any():
            raise UnsupportedPipelineError(
                f"the pipeline gives `scheduler.step` the timesteps {_shortened(visited)}, and those of its scheduler are {_shortened(grid)}. A policy needs "
                "the steps of the scheduler, each once and in order."
            )


def _version(tensor: torch.Tensor) -> int | None:
    """How often a tensor was written to, which torch does not count in inference mode."""
    return None if tensor.is_inference() else tensor._version


def _equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def _shortened(timesteps: torch.Tensor) -> str:
    values = [f"{value:.4g}" for value in timesteps.tolist()]
    return ", ".join(values if len(values) <= 8 else [*values[:4], "...", *values[-3:]])


def _begin_index(scheduler: Any, timestep: Any) -> int:
    """Where in the scheduler's timesteps the pipeline starts: image-to-image leaves out the first ones."""
    begin = getattr(scheduler, "begin_index", None)
    if begin is not None:
        return begin
    first = torch.as_tensor(timestep).flatten()[0].double().cpu()
    distances = (scheduler.timesteps.double().cpu() - first).abs()
    return int((distances == distances.min()).nonzero()[0])


def advance(scheduler: Any, grid_index: int) -> None:
    # Our `step` runs in place of the scheduler's, which counts; `scale_model_input` of sigma schedulers reads the count.
    if "_step_index" in scheduler.__dict__:
        scheduler._step_index = grid_index + 1
