"""Whether a run can fit on its device: the sums of docs/configuration.md#memory, before anything is moved there."""

from __future__ import annotations

import logging

import torch
from diffusers import DiffusionPipeline

from dpok_trl.policy.hooks import PipelineHooks
from dpok_trl.training.config import DPOKConfig


logger = logging.getLogger(__name__)

GIB = 2**30
# bytes for each parameter that is trained
FULL_PRECISION, GRADIENT = 4, 4
ADAM, ADAM_8BIT = 8, 2


def least_memory(config: DPOKConfig, pipe: DiffusionPipeline, hooks: PipelineHooks | None = None) -> int:
    """Bytes that weights, gradients and optimizer take at least. Activations, a LoRA adapter, rewards and a value function come on top."""
    denoisers = (PipelineHooks() if hooks is None else hooks).denoisers(pipe)
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    stored = sum(parameter.nbytes for part in modules.values() for parameter in part.parameters())
    if config.train_use_lora:
        return stored
    trained = sum(parameter.numel() for part in denoisers.values() for parameter in part.parameters())
    optimizer = ADAM_8BIT if config.train_use_8bit_adam else ADAM
    # what is stored remains, as the frozen copy
    return stored + trained * (FULL_PRECISION + GRADIENT + optimizer)


def total_memory(device: torch.device) -> int | None:
    """Of a GPU, in bytes; `None` for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def warn_of_memory(
    config: DPOKConfig, pipe: DiffusionPipeline, device: torch.device, hooks: PipelineHooks | None = None
) -> None:
    """Says so if a run cannot fit: a sum of parameters, which is there before the minutes of loading and sampling."""
    there = total_memory(device)
    if there is None:
        return
    needed = least_memory(config, pipe, hooks)
    if needed <= there:
        return
    ways = ["model_dtype = 'bf16'"]
    if not config.train_use_lora:
        ways.insert(0, "train_use_lora = True")
        if not config.train_use_8bit_adam:
            ways.append("train_use_8bit_adam = True")
    logger.warning(
        "weights%s take at least %.1f GiB, and %s has %.1f GiB: this will run out of memory. Less is taken with %s. See Memory in docs/configuration.md.",
        "" if config.train_use_lora else ", gradients and optimizer",
        needed / GIB,
        device,
        there / GIB,
        " or ".join(ways),
    )
