"""From config and pipeline to the policy of a run."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import nn

from dpok_trl.policy.hooks import PipelineHooks
from dpok_trl.policy.policy import Policy
from dpok_trl.policy.refusals import refuse_offloading
from dpok_trl.policy.saved_policy import NOISE
from dpok_trl.policy.tuning import tune
from dpok_trl.rewards.combining import RewardSet
from dpok_trl.training.config import DPOKConfig


logger = logging.getLogger(__name__)


def build_policy(
    config: DPOKConfig,
    pipe: DiffusionPipeline,
    peft_config: LoraConfig | Mapping[str, LoraConfig] | None,
    hooks: PipelineHooks | None,
    device: torch.device,
) -> Policy:
    """Moves the pipeline to `device`, makes what is to be trained trainable, and wraps the pipeline.

    Raises:
        `ValueError`: For settings that do not fit the pipeline; the message says what to change.
    """
    if peft_config is not None and (config.train_lora_rank is not None or config.train_lora_alpha is not None):
        raise ValueError(
            "a peft_config was given, and train_lora_rank or train_lora_alpha too. The config has both numbers; leave the settings out."
        )
    if peft_config is not None and not config.train_use_lora:
        raise ValueError(
            "a peft_config was given, and train_use_lora = False trains the denoiser's own weights. Leave out the one or the other."
        )
    hooks = PipelineHooks() if hooks is None else hooks
    denoisers = hooks.denoisers(pipe)
    refuse_offloading(pipe, nn.ModuleDict(denoisers).modules())  # which cannot be moved
    pipe.to(device)
    tuned = tune(
        pipe,
        denoisers,
        peft_config=peft_config,
        rank=config.train_lora_rank,
        alpha=config.train_lora_alpha,
        text_encoders=config.train_text_encoder,
        full=not config.train_use_lora,
    )
    for denoiser in tuned.denoisers.values():
        if config.train_gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
    if config.torch_compile:
        for network in [*tuned.denoisers.values(), *tuned.frozen.values()]:
            network.compile(backend=config.torch_compile_backend, mode=config.torch_compile_mode)
    if config.sample_vae_slicing:
        _vae_that_knows(pipe, "slicing").enable_slicing()
    if config.sample_vae_tiling:
        _vae_that_knows(pipe, "tiling").enable_tiling()
    return Policy(
        pipe,
        tuned,
        call_kwargs=_call_kwargs(config, pipe),
        log_prob_reduction=config.train_log_prob_reduction,
        hooks=hooks,
        **{argument: getattr(config, setting) for argument, setting in NOISE.items()},
    )


def _vae_that_knows(pipe: DiffusionPipeline, option: str) -> torch.nn.Module:
    vae = pipe.components.get("vae")
    if not hasattr(vae, f"use_{option}"):
        what = "there is no VAE" if vae is None else f"{type(vae).__name__} knows no {option}"
        raise ValueError(f"sample_vae_{option} = True, but {what} in this {type(pipe).__name__}. Set it to False.")
    return vae


def _call_kwargs(config: DPOKConfig, pipe: DiffusionPipeline) -> dict[str, Any]:
    kwargs = {"num_inference_steps": config.sample_num_steps, **config.sample_call_kwargs}
    if "guidance_scale" in inspect.signature(type(pipe).__call__).parameters:
        kwargs["guidance_scale"] = config.sample_guidance_scale
    elif config.sample_guidance_scale != DPOKConfig.sample_guidance_scale:
        raise ValueError(
            f"sample_guidance_scale = {config.sample_guidance_scale}, but the call of {type(pipe).__name__} takes no guidance_scale. Leave it out, and set "
            "the pipeline's own argument in sample_call_kwargs."
        )
    else:
        logger.info("the call of %s takes no guidance_scale: sample_guidance_scale is not used", type(pipe).__name__)
    if config.negative_prompts:
        kwargs["negative_prompt"] = config.negative_prompts
    return kwargs


@contextmanager
def encoders_off_the_device(policy: Policy, offload: bool) -> Iterator[None]:
    """Within it the text encoders are in the CPU's memory: a replay has the embeddings of its rollout."""
    pipe = policy.pipe
    encoders = {
        name: component
        for name, component in pipe.components.items()
        if offload and name.startswith("text_encoder") and isinstance(component, torch.nn.Module)
    }
    device = pipe._execution_device
    policy.offloaded = frozenset(encoders)
    try:
        for encoder in encoders.values():
            encoder.to("cpu")
        yield
    finally:
        for encoder in encoders.values():
            encoder.to(device)
        policy.offloaded = frozenset()


@contextmanager
def on_the_device(rewards: RewardSet, device: torch.device) -> Iterator[None]:
    """Within it rewards that are kept off the device are on it."""
    rewards.to(device)
    try:
        yield
    finally:
        rewards.to("cpu")
