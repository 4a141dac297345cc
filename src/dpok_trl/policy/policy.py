"""The policy: any diffusers text-to-image pipeline, through its own `__call__`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from dpok_trl.core.gaussian import Reduction
from dpok_trl.core.trajectory import Trajectory
from dpok_trl.core.transitions import Transition
from dpok_trl.policy.lora import adapter_name, adapters_disabled
from dpok_trl.policy.memo import PromptMemo
from dpok_trl.policy.reentry import DENOISER_NAMES, Recorder, ReplayedStep, Replayer, call_pipeline
from dpok_trl.policy.schedulers import SchedulerGrid, make_transition, read_grid


# Arguments of a pipeline's call that would be overridden or have no effect.
OWN_ARGUMENTS = {
    "prompt": "prompts are given to the rollout",
    "generator": "each sample has a generator of its own; give seeds to the rollout",
    "num_images_per_prompt": "repeat the prompt instead",
    "eta": "the noise of the steps is the policy's own `eta`",
    "output_type": "images are always tensors",
    "return_dict": "the output is taken apart by the policy",
}


class UnsupportedPipelineError(ValueError):
    """The pipeline cannot be a policy as it is; the message says why and what to do."""


class Policy(nn.Module):
    """A diffusion pipeline as a Gaussian policy over denoising steps (DPOK, https://arxiv.org/abs/2305.16381, section 4.1).

    `rollout` samples; `forward` is the *replay*: it enters the pipeline again, walks the recorded path and runs the network on the
    selected steps only, with gradients. Both run the same code, so the ratio of new to old probability is exactly 1 before the first
    update. `forward` being the replay, `accelerator.prepare(policy)` gives data-parallel wrappers their hooks: train through the
    prepared module.

    Args:
        pipe (`DiffusionPipeline`): Used in place and left as it was found after every call.
        call_kwargs (`dict`, *optional*): Arguments of the pipeline's call that are the same for every sample: `num_inference_steps`,
            `guidance_scale`, `height` ... A `negative_prompt` given as one string is repeated for each sample.
        kind (`str`, defaults to `"auto"`): The transition: `"ancestral"`, `"cps"`, `"flow_sde"`; `"auto"` is `"flow_sde"` for flow-matching
            schedulers and `"ancestral"` for the rest.
        eta (`float`, defaults to 1.0): Noise of `"ancestral"` and `"cps"`, in (0, 1].
        noise_level (`float`, defaults to 0.7): `a` of `"flow_sde"`.
        min_std (`float`, defaults to 0.0): Steps with a standard deviation of at most this are no actions. They are sampled like the rest and
            never trained on. Deterministic steps (std 0) are never actions.
        log_prob_reduction (`"mean"` or `"sum"`, defaults to `"mean"`): Over the latent's dimensions. The sum is the true density.

    Raises:
        [`UnsupportedPipelineError`]: No denoiser, or a combined pipeline; at a rollout, a cache hook.
        [`UnsupportedSchedulerError`]: At the first rollout, for a scheduler whose steps are no Gaussian Markov transitions.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        *,
        call_kwargs: dict[str, Any] | None = None,
        kind: str = "auto",
        eta: float = 1.0,
        noise_level: float = 0.7,
        min_std: float = 0.0,
        log_prob_reduction: Reduction = "mean",
    ):
        super().__init__()
        self.pipe = pipe
        self.denoisers = nn.ModuleDict(find_denoisers(pipe))
        self.call_kwargs = dict(call_kwargs or {})
        refuse_unknown_arguments(pipe, self.call_kwargs)
        self.kind, self.eta, self.noise_level, self.min_std = kind, eta, noise_level, min_std
        self.log_prob_reduction: Reduction = log_prob_reduction
        encode_prompt = getattr(pipe, "encode_prompt", None)
        self.memo = PromptMemo(encode_prompt) if encode_prompt is not None else None
        self.denoisers.eval()

    def train(self, mode: bool = True) -> Policy:
        """Does nothing: the denoiser stays in eval mode, or dropout would make the replay another draw than the rollout (and some
        transformers take another path in train mode). Gradient checkpointing works in eval mode."""
        return self

    # ---------------------------------------------------------------- rollout

    @torch.no_grad()
    def rollout(self, prompts: Sequence[str], seeds: Sequence[int]) -> Trajectory:
        """Draws one image for each prompt with the current policy.

        Sample `i` is what the untouched pipeline draws for `prompts[i]` with `torch.Generator().manual_seed(seeds[i])`, if its scheduler
        makes the same transition: x_T and the steps' noise come from that one generator in the pipeline's own order.

        Args:
            prompts (`Sequence[str]` of length `B`)
            seeds (`Sequence[int]` of length `B`): One for each sample, whatever the batch.

        Returns:
            [`Trajectory`]

        Raises:
            `ValueError`: If `prompts` and `seeds` differ in length, or no step is stochastic.
        """
        if len(prompts) != len(seeds) or len(prompts) == 0:
            raise ValueError(f"one seed for each prompt is needed: got {len(prompts)} prompts and {len(seeds)} seeds")
        refuse_caches(self.pipe)
        generators = _generators(seeds, self.pipe._execution_device)
        recorder = Recorder(self._choose_steps, generators, self.log_prob_reduction, self.memo)
        output = call_pipeline(
            self.pipe,
            recorder,
            {**self._call_kwargs(prompts, generators), "output_type": "pt", "return_dict": False},
        )
        if not recorder.latents:
            raise UnsupportedPipelineError(f"{type(self.pipe).__name__} never called `scheduler.step`")
        steps = tuple(sorted(recorder.log_probs))
        return Trajectory(
            prompts=list(prompts),
            seeds=list(seeds),
            images=_checked_images(output[0], len(prompts)),
            latents=tuple(recorder.latents),
            steps=steps,
            log_probs=torch.stack([recorder.log_probs[step] for step in steps], dim=1),
            recording=recorder.recording(),
        )

    # ---------------------------------------------------------------- replay

    def forward(
        self,
        trajectory: Trajectory,
        samples: Sequence[int] | None = None,
        steps: Sequence[int] | None = None,
        verify: bool = False,
    ) -> list[ReplayedStep]:
        """Replays steps of a trajectory under the current policy, with gradients if gradients are on.

        Memory grows with the number of steps; the fixed cost of a replay (walking the pipeline's loop without its network) is shared.

        Args:
            trajectory ([`Trajectory`])
            samples (`Sequence[int]`, *optional*): Rows, in any order; all by default. At the composition of the rollout the
                log-probabilities are equal to the recorded ones bit for bit; in another batch shape kernels round differently.
            steps (`Sequence[int]`, *optional*): From `trajectory.steps`; all of them by default.
            verify (`bool`): Compare the latents that arrive at each selected step with the recorded ones (one device sync a step).

        Returns:
            `list[ReplayedStep]`: One for each step, ascending.

        Raises:
            [`ReplayError`]: If the pipeline leaves the recorded path, or detaches the gradient.
        """
        steps = trajectory.steps if steps is None else sorted(steps)
        unknown = [step for step in steps if step not in trajectory.steps]
        if unknown or not steps:
            raise ValueError(
                f"steps {list(steps)} are not all actions of this trajectory, which are {list(trajectory.steps)}"
            )
        rows = range(len(trajectory)) if samples is None else samples
        if samples is not None and tuple(samples) == tuple(range(len(trajectory))):
            samples = None
        replayer = Replayer(trajectory, samples, steps, self.log_prob_reduction, self.memo, verify)
        generators = _generators([trajectory.seeds[row] for row in rows], trajectory.recording.device)
        prompts = [trajectory.prompts[row] for row in rows]
        call_pipeline(
            self.pipe,
            replayer,
            {**self._call_kwargs(prompts, generators), "output_type": "latent", "return_dict": False},
        )
        return [replayer.outputs[step] for step in steps]

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it the policy is the pretrained model: the adapters are off. Restored afterwards, also after an exception.

        Run it under `torch.no_grad()`; no backward pass may happen inside.
        """
        for name, module in self.denoisers.items():
            if adapter_name(module) is None:
                raise UnsupportedPipelineError(
                    f"`{name}` of {type(self.pipe).__name__} has no active LoRA adapter, so nothing can be trained and there is no reference to "
                    f"compare with. Add one first: `pipe.{name}.add_adapter(LoraConfig(...))`."
                )
        with adapters_disabled(list(self.denoisers.values())):
            yield

    # ---------------------------------------------------------------- internals

    def _call_kwargs(self, prompts: Sequence[str], generators: list[torch.Generator]) -> dict[str, Any]:
        kwargs = dict(self.call_kwargs)
        if isinstance(kwargs.get("negative_prompt"), str):
            kwargs["negative_prompt"] = [kwargs["negative_prompt"]] * len(prompts)
        return {**kwargs, "prompt": list(prompts), "generator": generators}

    def _choose_steps(self, scheduler: Any) -> tuple[SchedulerGrid, Transition, frozenset[int]]:
        grid = read_grid(scheduler)
        transition = make_transition(grid, self.kind, self.eta, self.noise_level)
        stds = transition.std(grid.levels(torch.arange(len(grid.timesteps))))
        actions = frozenset(index for index, std in enumerate(stds.tolist()) if std > self.min_std)
        if not actions:
            raise ValueError(
                f"no step is an action: the largest standard deviation of the {len(stds)} steps is {stds.max().item():.4g}, and only steps "
                f"above min_std = {self.min_std} count. Lower it, or raise eta (given: {self.eta})."
            )
        return grid, transition, actions


# --------------------------------------------------------------------------------------------------------------------------------------


def _checked_images(images: Any, count: int) -> torch.Tensor:
    """Images as float32 `(B, 3, H, W)` in [0, 1]: what every reward is given."""
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or images.shape[:2] != (count, 3):
        shape = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise UnsupportedPipelineError(f"images of shape ({count}, 3, H, W) are needed, and the pipeline gave {shape}")
    images = images.float()
    if not images.isfinite().all():
        raise FloatingPointError(
            "the pipeline gave images with NaN or infinite values. Usual causes: a VAE that overflows in fp16 (use bf16, or keep the VAE in "
            "fp32), or an adapter that has diverged (a lower learning rate)."
        )
    return images


def _generators(seeds: Sequence[int], device: torch.device) -> list[torch.Generator]:
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def find_denoisers(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The networks that the denoising loop calls, by component name.

    Raises:
        [`UnsupportedPipelineError`]: If there is none, or the pipeline is made of other pipelines.
    """
    inner = [name for name, value in vars(pipe).items() if isinstance(value, DiffusionPipeline)]
    if inner:
        raise UnsupportedPipelineError(
            f"{type(pipe).__name__} is made of other pipelines ({', '.join(inner)}). Tune the inner one and put it back."
        )
    denoisers = {name: getattr(pipe, name) for name in DENOISER_NAMES if getattr(pipe, name, None) is not None}
    if not denoisers:
        raise UnsupportedPipelineError(
            f"{type(pipe).__name__} has none of the components {', '.join(DENOISER_NAMES)}; it has {', '.join(pipe.components)}."
        )
    return denoisers


def refuse_unknown_arguments(pipe: DiffusionPipeline, call_kwargs: dict[str, Any]) -> None:
    """Raises `ValueError` for arguments that the policy sets itself, or that the pipeline's call does not name: many calls end in `**kwargs`
    and would drop them."""
    for name in call_kwargs:
        if name in OWN_ARGUMENTS:
            raise ValueError(f"'{name}' cannot be an argument of the call: {OWN_ARGUMENTS[name]}.")
    named = [
        name for name, p in inspect.signature(type(pipe).__call__).parameters.items() if p.kind is not p.VAR_KEYWORD
    ]
    for name in call_kwargs:
        if name not in named:
            close = difflib.get_close_matches(name, named, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise ValueError(
                f"the call of {type(pipe).__name__} takes no '{name}'.{hint} It takes: {', '.join(named[1:])}."
            )


def refuse_caches(pipe: DiffusionPipeline) -> None:
    """Raises [`UnsupportedPipelineError`] where a cache hook would reuse one step's activations in another: a replay skips steps."""
    for name, module in find_denoisers(pipe).items():
        for part in module.modules():
            registry = getattr(part, "_diffusers_hook", None)
            stateful = [] if registry is None else [h for h in registry.hooks.values() if h._is_stateful]
            if stateful:
                raise UnsupportedPipelineError(
                    f"`{name}` has the cache hook {type(stateful[0]).__name__}, which carries activations from step to "
                    "step; a step of such a policy depends on more than its latents and cannot be replayed alone. Take the hook out first "
                    "(`disable_cache()`)."
                )
