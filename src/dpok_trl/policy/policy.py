"""The policy: any diffusers text-to-image pipeline, through its own `__call__`."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from torch import nn

from dpok_trl.core.gaussian import Reduction
from dpok_trl.core.grid import SchedulerGrid
from dpok_trl.core.trajectory import Trajectory
from dpok_trl.core.transitions import Transition
from dpok_trl.policy.errors import ReplayError, UnsupportedPipelineError
from dpok_trl.policy.features import VALUE_INPUTS, MiddleFeatures, prompt_embeddings
from dpok_trl.policy.hooks import PipelineHooks
from dpok_trl.policy.interception import Networks, blackens_images, call_pipeline
from dpok_trl.policy.memo import PromptMemo
from dpok_trl.policy.mixed import MixedReplayer
from dpok_trl.policy.recorder import Recorder, Recording
from dpok_trl.policy.refusals import refuse_caches, refuse_offloading, refuse_unknown_arguments
from dpok_trl.policy.replayer import ReplayedStep, Replayer
from dpok_trl.policy.schedulers import (
    make_transition,
    policy_scheduler,
    read_grid,
    refuse_scheduler,
    scheduler_note,
)
from dpok_trl.policy.tuning import Tuned


logger = logging.getLogger(__name__)


class Policy(nn.Module):
    """A diffusion pipeline as a Gaussian policy over denoising steps (DPOK, https://arxiv.org/abs/2305.16381, section 4.1).

    `rollout` samples; `forward` is the *replay*: it enters the pipeline again, walks the recorded path and runs the network on the
    selected steps only, with gradients. Both run the same code, so the ratio of new to old probability is exactly 1 before the first
    update. `forward` being the replay, `accelerator.prepare(policy)` gives data-parallel wrappers their hooks: train through the
    prepared module.

    Args:
        pipe (`DiffusionPipeline`): Used in place and left as it was found after every call.
        tuned ([`~dpok_trl.policy.tuning.Tuned`], *optional*): What of it is trained. Default: its denoisers, with the adapters that they have.
        call_kwargs (`dict`, *optional*): Arguments of the pipeline's call that are the same for every sample: `num_inference_steps`,
            `guidance_scale`, `height` ... A `negative_prompt` given as one string is repeated for each sample, and so is the picture that an
            image-to-image or inpainting pipeline starts from.
        kind (`str`, defaults to `"auto"`): The transition: `"ancestral"`, `"cps"`, `"flow_sde"`; `"auto"` is `"cps"` for schedulers whose own step puts new
            noise on x_0 (consistency models, `stochastic_sampling=True`), `"flow_sde"` for other flow-matching ones and `"ancestral"` for the rest.
        eta (`float`, defaults to 1.0): Noise of `"ancestral"` and `"cps"`, in (0, 1].
        noise_level (`float`, defaults to 0.7): `a` of `"flow_sde"`.
        min_std (`float`, defaults to 0.0): Steps with a standard deviation of at most this are no actions. They are sampled like the rest and
            never trained on. Deterministic steps (std 0) are never actions.
        log_prob_reduction (`"mean"` or `"sum"`, defaults to `"mean"`): Over the latent's dimensions. The sum is the true density.
        fp32_latents (`bool`, defaults to `False`): On a pipeline in half precision, keep the latents in fp32 between the steps. The networks
            compute in the pipeline's dtype as before.
        hooks ([`PipelineHooks`], *optional*): For a pipeline that departs from what all others do.

    Raises:
        [`UnsupportedPipelineError`]: No denoiser, a combined pipeline, or one with CPU offloading; at a rollout, a cache hook.
        [`UnsupportedSchedulerError`]: For a scheduler whose steps are no Gaussian Markov transitions.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        tuned: Tuned | None = None,
        *,
        call_kwargs: dict[str, Any] | None = None,
        kind: str = "auto",
        eta: float = 1.0,
        noise_level: float = 0.7,
        min_std: float = 0.0,
        log_prob_reduction: Reduction = "mean",
        fp32_latents: bool = False,
        hooks: PipelineHooks | None = None,
    ):
        super().__init__()
        self.pipe = pipe
        self.hooks = PipelineHooks() if hooks is None else hooks
        self.tuned = Tuned(self.hooks.denoisers(pipe)) if tuned is None else tuned
        self.networks = nn.ModuleDict(self.tuned.modules)
        refuse_offloading(pipe, self.networks.modules())
        self.call_kwargs = dict(call_kwargs or {})
        refuse_unknown_arguments(pipe, self.call_kwargs)
        self.kind, self.eta, self.noise_level, self.min_std = kind, eta, noise_level, min_std
        self.log_prob_reduction: Reduction = log_prob_reduction
        self.fp32_latents = fp32_latents
        self.offloaded: frozenset[str] = frozenset()  # components that are off the device
        encode_prompt = getattr(pipe, "encode_prompt", None)
        self.memo = PromptMemo(encode_prompt) if encode_prompt is not None and not self.tuned.text_encoders else None
        self.networks.eval()
        refuse_scheduler(policy_scheduler(pipe.scheduler))
        if note := scheduler_note(pipe.scheduler):
            logger.warning("%s", note)
        if fp32_latents and getattr(pipe, "controlnet", None) is not None:
            raise UnsupportedPipelineError(
                f"{type(pipe).__name__} hands its latents to a ControlNet too, which would get them in fp32. Set sample_fp32_latents = False."
            )
        if blackens_images(pipe):
            logger.warning(
                "the safety checker of %s is off while the policy samples: an image that it blackens would be rewarded as the policy's own",
                type(pipe).__name__,
            )

    def train(self, mode: bool = True) -> Policy:
        """Does nothing: the denoiser stays in eval mode, or dropout would make the replay another draw than the rollout (and some
        transformers take another path in train mode). Gradient checkpointing works in eval mode."""
        return self

    def with_call(self, **call_kwargs: Any) -> Policy:
        """The same networks with other arguments of the call: train with `num_inference_steps=10`, evaluate `policy.with_call(num_inference_steps=50)`."""
        return Policy(
            self.pipe,
            self.tuned,
            call_kwargs={**self.call_kwargs, **call_kwargs},
            kind=self.kind,
            eta=self.eta,
            noise_level=self.noise_level,
            min_std=self.min_std,
            log_prob_reduction=self.log_prob_reduction,
            fp32_latents=self.fp32_latents,
            hooks=self.hooks,
        )

    # ---------------------------------------------------------------- rollout

    @torch.no_grad()
    def rollout(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        arguments: Mapping[str, Sequence[Any]] | None = None,
        window: Collection[int] | Callable[[int], Collection[int]] | None = None,
        value_input: str | None = None,
    ) -> Trajectory:
        """Draws one image for each prompt with the current policy.

        Sample `i` is what the untouched pipeline draws for `prompts[i]` with `torch.Generator().manual_seed(seeds[i])`, if its scheduler
        makes the same transition: x_T and the steps' noise come from that one generator in the pipeline's own order.

        Args:
            prompts (`Sequence[str]` of length `B`)
            seeds (`Sequence[int]` of length `B`): One for each sample, whatever the batch.
            arguments (`Mapping[str, Sequence]`, *optional*): Arguments of the call that differ from sample to sample (`image`, `mask_image` ...), of
                length `B` each; the pipeline gets lists.
            window (`Collection[int]` or `Callable`, *optional*): The steps that are stochastic, counted from 0 (MixGRPO,
                https://arxiv.org/abs/2507.21802); the others follow the deterministic ODE. A function gets the number of steps that can be actions, and
                returns positions among them. Default: all.
            value_input (`"latents"` or `"features"`, *optional*): What a value function is to see of the trajectory
                ([`~dpok_trl.policy.features.value_inputs`]). What is drawn does not depend on it.

        Returns:
            [`Trajectory`]

        Raises:
            `ValueError`: If `prompts`, `seeds` and `arguments` differ in length, or no step is stochastic.
            [`UnsupportedPipelineError`]: If what a value function is to see cannot be read from this pipeline.
        """
        if len(prompts) != len(seeds) or len(prompts) == 0:
            raise ValueError(f"one seed for each prompt is needed: got {len(prompts)} prompts and {len(seeds)} seeds")
        arguments = {name: list(values) for name, values in (arguments or {}).items()}
        refuse_unknown_arguments(self.pipe, arguments)
        for name, values in arguments.items():
            if len(values) != len(prompts):
                raise ValueError(
                    f"'{name}' has {len(values)} values for {len(prompts)} prompts; one for each is needed"
                )
        if value_input not in (None, *VALUE_INPUTS):
            raise ValueError(f"value_input must be one of {', '.join(VALUE_INPUTS)} or None, but is {value_input!r}")
        networks = self._networks()
        middle = MiddleFeatures(networks.denoisers, len(prompts)) if value_input == "features" else None
        recorder = Recorder(
            networks,
            lambda scheduler, begin: self._choose_steps(scheduler, begin, window),
            _generators(seeds, networks.device),
            self.log_prob_reduction,
            self._scheduler_identity(),
            self.fp32_latents,
            middle,
        )
        call = {**self._call_kwargs(prompts, recorder.generators, arguments), "output_type": "pt"}
        with nullcontext() if middle is None else middle.listening():
            output = call_pipeline(self.pipe, recorder, networks, call)
        if not recorder.latents:
            raise UnsupportedPipelineError(f"{type(self.pipe).__name__} never called `scheduler.step`")
        recorder.finish()
        steps = tuple(sorted(recorder.log_probs))
        return Trajectory(
            prompts=list(prompts),
            seeds=list(seeds),
            images=_checked_images(self.hooks.images(output), len(prompts)),
            latents=tuple(recorder.latents),
            next_latents=tuple(recorder.next_latents),
            steps=steps,
            log_probs=torch.stack([recorder.log_probs[step] for step in steps], dim=1),
            arguments=arguments,
            recording=recorder.recording,
            prompt_embeddings=prompt_embeddings(recorder.recording.encoded) if value_input == "latents" else None,
            features=None if middle is None else torch.stack([recorder.features[step] for step in steps], dim=1),
        )

    # ---------------------------------------------------------------- replay

    def forward(
        self,
        trajectory: Trajectory,
        samples: Sequence[int] | None = None,
        steps: Sequence[int] | None = None,
        verify: bool = False,
        each: Sequence[int] | None = None,
    ) -> list[ReplayedStep]:
        """Replays steps of a trajectory under the current policy, with gradients if gradients are on.

        Memory grows with the number of steps; the fixed cost of a replay (walking the pipeline's loop without its network) is shared.

        Args:
            trajectory ([`Trajectory`])
            samples (`Sequence[int]`, *optional*): Rows, in any order; all by default. At the composition of the rollout the
                log-probabilities are equal to the recorded ones bit for bit; in another batch shape kernels round differently.
            steps (`Sequence[int]`, *optional*): From `trajectory.steps`; all of them by default.
            verify (`bool`): Compare the latents that arrive at each selected step with the recorded ones (one device sync a step).
            each (`Sequence[int]`, *optional*): In place of `steps`: the step of each of the `samples`, in one forward pass. Not every pipeline can where they
                differ; see [`~Policy.mixing_error`].

        Returns:
            `list[ReplayedStep]`: One for each step, ascending; a single one with `each`.

        Raises:
            [`ReplayError`]: If the pipeline leaves the recorded path, or detaches the gradient.
        """
        if each is not None and (
            steps is not None or len(each) != (len(trajectory) if samples is None else len(samples))
        ):
            raise ValueError(
                f"`each` takes the place of `steps` and has one step for each sample; got {len(each)} for {len(trajectory) if samples is None else len(samples)} "
                f"samples, and steps = {steps}."
            )
        steps = sorted(set(each) if each is not None else trajectory.steps if steps is None else steps)
        unknown = [step for step in steps if step not in trajectory.steps]
        if unknown or not steps:
            raise ValueError(
                f"steps {steps} are not all actions of this trajectory, which are {list(trajectory.steps)}"
            )
        now = self._scheduler_identity()
        if now != trajectory.recording.scheduler:
            raise ReplayError(
                f"the pipeline's scheduler was changed between rollout and replay: it was {trajectory.recording.scheduler} and is {now}. Sample again "
                "with the scheduler that is there now, or put the other one back."
            )
        rows = range(len(trajectory)) if samples is None else samples
        generators = _generators([trajectory.seeds[row] for row in rows], trajectory.recording.device)
        prompts = [trajectory.prompts[row] for row in rows]
        arguments = {name: [values[row] for row in rows] for name, values in trajectory.arguments.items()}
        networks, reduction = self._networks(trajectory.recording), self.log_prob_reduction
        if each is not None and len(steps) > 1:
            replayer = MixedReplayer(networks, trajectory, rows, each, reduction, verify, generators)
        else:
            some = None if tuple(rows) == tuple(range(len(trajectory))) else rows
            replayer = Replayer(networks, trajectory, some, steps, reduction, verify, generators)
        call = {**self._call_kwargs(prompts, generators, arguments), "output_type": "latent"}
        try:
            call_pipeline(self.pipe, replayer, networks, call)
        except (AttributeError, KeyError) as error:
            raise ReplayError(
                f"{type(self.pipe).__name__} fails in a replay and not in the rollout ({type(error).__name__}: {error}). If it looks inside the network, at attention "
                "maps for instance: in a replay the network runs on the selected steps only, so use the family's plain pipeline. If the error comes from a hook or "
                "callback of your own, mend it there."
            ) from error
        return [replayer.outputs[step] for step in sorted(replayer.outputs)]

    @torch.no_grad()
    def mixing_error(self, trajectory: Trajectory, samples: Sequence[int]) -> float | None:
        """A trial: replays `samples` at steps of their own in one forward pass, and compares with a replay of each step.

        Returns:
            `float`: The largest difference of a log-probability. `None` if the pipeline cannot do it.
        """
        if len(trajectory.latents) < 3:
            logger.info("a call of a single step has no two timesteps to mix")
            return None
        steps, count = trajectory.steps, len(samples)
        # every step once: what a pipeline does by the position in its loop (guidance that ends early, say) shows at some of them only
        rounds = [[steps[(start + row) % len(steps)] for row in range(count)] for start in range(0, len(steps), count)]
        try:
            mixed = torch.stack([self(trajectory, samples, each=each)[0].log_prob for each in rounds])
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError, IndexError, AssertionError) as error:
            # whatever a pipeline does with a timestep that is a vector: to fail is an answer here
            logger.info("%s takes one timestep at a time: %s", type(self.pipe).__name__, error)
            return None
        apart = {
            step: replayed.log_prob for step, replayed in zip(steps, self(trajectory, samples, steps), strict=True)
        }
        expected = torch.stack([torch.stack([apart[step][row] for row, step in enumerate(each)]) for each in rounds])
        return (mixed - expected).abs().max().item()

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it the policy is the reference of the KL: the pretrained model, unless the reference has been moved
        ([`~dpok_trl.policy.tuning.Tuned.move_reference`]). Restored afterwards, also after an exception.

        Run it under `torch.no_grad()`; no backward pass may happen inside.
        """
        with self.tuned.reference_answers():
            yield

    @contextmanager
    def pretrained(self) -> Iterator[None]:
        """Within it the policy is the pretrained model: the adapters are off, or the frozen copies answer. Else as [`~Policy.reference`]."""
        with self.tuned.pretrained_answers():
            yield

    # ---------------------------------------------------------------- internals

    def _networks(self, recording: Recording | None = None) -> Networks:
        tuned = self.tuned
        if recording is None:
            dtypes = {name: tuned.frozen.get(name, module).dtype for name, module in tuned.denoisers.items()}
            device = self.pipe._execution_device
            parts = {name: part for name, part in self.pipe.components.items() if isinstance(part, nn.Module)}
            modules = {name: list(part.modules()) for name, part in {**parts, **tuned.denoisers}.items()}
            refuse_offloading(self.pipe, chain.from_iterable(modules[name] for name in tuned.modules))
            refuse_caches({name: modules[name] for name in tuned.denoisers})
        else:
            dtypes, device, modules = recording.dtypes, recording.device, recording.modules
        return Networks(
            denoisers=tuned.answering,
            dtypes=dtypes,
            device=device,
            modules=modules,
            master_weights=bool(tuned.frozen) and tuned.answering is tuned.denoisers,
            absent=self.offloaded,
            memo=self.memo,
            encode_prompt=self.pipe.encode_prompt if tuned.text_encoders else None,
            hooks=self.hooks,
        )

    def _call_kwargs(
        self, prompts: Sequence[str], generators: list[torch.Generator], arguments: dict[str, list[Any]]
    ) -> dict[str, Any]:
        kwargs = dict(self.call_kwargs)
        if isinstance(kwargs.get("negative_prompt"), str):
            kwargs["negative_prompt"] = [kwargs["negative_prompt"]] * len(prompts)
        if "strength" in inspect.signature(type(self.pipe).__call__).parameters:
            # The picture that samples start from. Given once, it would be encoded with the first sample's generator for all of them.
            for name in ("image", "mask_image"):
                if isinstance(kwargs.get(name), Image):
                    kwargs[name] = [kwargs[name]] * len(prompts)
        return {**kwargs, **arguments, "prompt": list(prompts), "generator": generators, "return_dict": False}

    def _scheduler_identity(self) -> str:
        scheduler = self.pipe.scheduler
        settings = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
        # what setters such as `set_shift` write; counters of the walk are integers
        settings.update({key: value for key, value in vars(scheduler).items() if isinstance(value, float)})
        return f"{type(scheduler).__name__}({', '.join(f'{key}={value}' for key, value in settings.items())})"

    def _choose_steps(
        self, scheduler: Any, begin: int, window: Collection[int] | Callable[[int], Collection[int]] | None
    ) -> tuple[SchedulerGrid, tuple[Transition, ...], frozenset[int]]:
        grid = read_grid(scheduler).starting_at(begin)
        transition = make_transition(grid, self.kind, self.eta, self.noise_level)
        stds = transition.std(grid.levels(torch.arange(len(grid)))).tolist()
        possible = [index for index, std in enumerate(stds) if std > self.min_std]
        if not possible:
            raise ValueError(
                f"no step is an action: the largest standard deviation of the {len(stds)} steps is {max(stds):.4g}, and only steps above min_std = "
                f"{self.min_std} count. "
                + (
                    f"Lower it, or raise eta (given: {self.eta})."
                    if max(stds) > 0
                    else "Take more steps (or, from a picture, a larger strength): the last one ends without noise."
                )
            )
        if window is None:
            inside = set(range(len(grid)))
        elif callable(window):
            inside = {possible[position] for position in window(len(possible)) if position < len(possible)}
        else:
            inside = set(window)
        actions = frozenset(inside & set(possible))
        if not actions:
            raise ValueError(
                f"the stochastic window ({sorted(inside) or 'beyond the last step'}) holds none of the {len(possible)} steps that can be actions: {possible}. "
                "Choose another window, or lower min_std."
            )
        ode = replace(transition, kind="ode")
        return grid, tuple(transition if index in inside else ode for index in range(len(grid))), actions


# --------------------------------------------------------------------------------------------------------------------------------------


def _checked_images(images: Any, count: int) -> torch.Tensor:
    """Images as float32 `(B, 3, H, W)`, videos as `(B, F, 3, H, W)`, in [0, 1]: what every reward is given."""
    shape = tuple(images.shape) if isinstance(images, torch.Tensor) else ()
    if len(shape) not in (4, 5) or shape[0] != count or shape[-3] != 3:
        raise UnsupportedPipelineError(
            f"images of shape ({count}, 3, H, W) or videos of shape ({count}, F, 3, H, W) are needed, and the pipeline gave {shape or type(images).__name__}. "
            "If they stand elsewhere in its output, say so with `PipelineHooks.images`."
        )
    images = images.float()
    if not images.isfinite().all():
        raise FloatingPointError(
            "the pipeline gave images with NaN or infinite values. Usual causes: a VAE that overflows in fp16 (use bf16, or keep the VAE in "
            "fp32), or an adapter that has diverged (a lower learning rate)."
        )
    return images


def _generators(seeds: Sequence[int], device: torch.device) -> list[torch.Generator]:
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]
