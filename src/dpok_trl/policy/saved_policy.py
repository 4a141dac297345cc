"""A tuned model from its folder, to be sampled as in its training."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from dpok_trl.policy.loading import load_pipeline, load_trained
from dpok_trl.policy.policy import Policy
from dpok_trl.policy.saved import saved_settings


# argument of `Policy` or of the pipeline's call -> setting of the run
NOISE = {
    "kind": "sample_transition",
    "eta": "sample_eta",
    "noise_level": "sample_noise_level",
    "min_std": "sample_min_std",
    "fp32_latents": "sample_fp32_latents",
}
CALL = {"num_inference_steps": "sample_num_steps", "guidance_scale": "sample_guidance_scale"}
CALL_KWARGS = "sample_call_kwargs/"


def load_policy(
    base: DiffusionPipeline | str | Path,
    folder: Path,
    device: torch.device,
    dtype: str | None = None,
    **call: Any,
) -> Policy:
    """The tuned policy with its pretrained model: noise and arguments of the call as the run had them, where the folder says so.

    Args:
        base: The pretrained pipeline.
        folder (`Path`): What [`~dpok_trl.policy.saved.find_model`] returns.
        dtype (`"fp32"`, `"bf16"` or `"fp16"`, *optional*): Of the base; as `load_pipeline` has it.
        call: Arguments of the pipeline's call that are to be other than in the run; `None` stands for that of the run.
    """
    settings = saved_settings(folder)
    pipe = load_pipeline(base, dtype)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    tuned = load_trained(pipe, folder)
    noise = {argument: settings[name] for argument, name in NOISE.items() if name in settings}
    return Policy(pipe, tuned, call_kwargs=_call_arguments(pipe, settings, call), **noise)


def _call_arguments(pipe: DiffusionPipeline, settings: dict[str, Any], call: dict[str, Any]) -> dict[str, Any]:
    arguments = {
        name.removeprefix(CALL_KWARGS): value for name, value in settings.items() if name.startswith(CALL_KWARGS)
    }
    accepted = inspect.signature(type(pipe).__call__).parameters
    for name, setting in CALL.items():
        if name in accepted and settings.get(setting) is not None:
            arguments[name] = settings[setting]
    if settings.get("negative_prompts"):
        arguments["negative_prompt"] = settings["negative_prompts"]
    arguments.update((name, value) for name, value in call.items() if value is not None)
    return arguments
