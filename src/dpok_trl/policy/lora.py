"""LoRA adapters of a pipeline: add, cast, disable, export."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn


ADAPTER_NAME = "default"
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that `load_lora_weights` looks for
# The attention projections, which every diffusers denoiser names alike; rank and alpha as in DDPO and in DPOK's official code.
DEFAULT_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def default_lora_config(rank: int = 4, alpha: int | None = None) -> LoraConfig:
    """The adapter that is trained when no `peft_config` is given: attention projections, Gaussian initialisation, alpha = rank."""
    return LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        init_lora_weights="gaussian",
        target_modules=DEFAULT_TARGETS,
    )


def adapter_layers(module: nn.Module) -> list[BaseTunerLayer]:
    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


def adapter_name(module: nn.Module) -> str | None:
    """The adapter of `module` that is active, `None` without one.

    Raises:
        `ValueError`: If several are active: it would not be clear which one to train, nor what the reference is.
    """
    names = list(dict.fromkeys(name for layer in adapter_layers(module) for name in layer.active_adapters))
    if len(names) > 1:
        raise ValueError(
            f"{type(module).__name__} has {len(names)} active adapters ({', '.join(names)}); exactly one can be trained. Fuse the others "
            "into the base first (`pipe.fuse_lora(adapter_names=[...])`, then `pipe.unload_lora_weights()`), or deactivate them with "
            "`pipe.set_adapters`."
        )
    return names[0] if names else None


def prepare_adapter(module: nn.Module, config: LoraConfig | None) -> str:
    """Makes exactly one adapter of `module` trainable, in fp32 on whatever base, and freezes the rest. Returns its name.

    An adapter that is already there is trained on. Without one, `config` (default: [`default_lora_config`]) is injected under the
    name `"default"`.

    Raises:
        `ValueError`: If there is an adapter already and `config` is given as well.
    """
    module.requires_grad_(False)
    name = adapter_name(module)
    if name is None:
        name = ADAPTER_NAME
        config = (
            copy.deepcopy(config) if config is not None else default_lora_config()
        )  # one of its own for each denoiser
        config.base_model_name_or_path = None
        inject_adapter_in_model(config, module, adapter_name=name)
        # diffusers' own bookkeeping, which its loaders, `disable_adapters` and `save_lora_weights` ask
        module._hf_peft_config_loaded = True
    elif config is not None:
        raise ValueError(
            f"{type(module).__name__} already has the adapter '{name}', and a `peft_config` was given for a new one. Leave `peft_config` "
            "out to go on training the loaded adapter, or call `pipe.unload_lora_weights()` first to start afresh."
        )
    for parameter_name, parameter in module.named_parameters():
        if f".{name}." in parameter_name and "lora_" in parameter_name:
            parameter.requires_grad_(True)
    cast_training_params(module, torch.float32)
    return name


@contextmanager
def adapters_disabled(modules: list[nn.Module]) -> Iterator[None]:
    """Runs the base model. Which adapters were on and what required gradients is restored, also after an exception.

    No backward pass may run inside: peft switches the adapters' gradients off with them.
    """
    layers = [layer for module in modules for layer in adapter_layers(module) if not layer.disable_adapters]
    trainable = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter in trainable:
            parameter.requires_grad_(True)


def lora_state_dict(module: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of the adapter of `module`, in peft's layout."""
    return get_peft_model_state_dict(module, adapter_name=adapter_name(module))


def load_lora_state_dict(module: nn.Module, state_dict: dict[str, torch.Tensor]) -> None:
    """Writes weights in peft's layout into the adapter of `module`, in place.

    Raises:
        `ValueError`: If keys or shapes are not those of the adapter.
    """
    expected = lora_state_dict(module)
    if {k: v.shape for k, v in expected.items()} != {k: v.shape for k, v in state_dict.items()}:
        raise ValueError(
            f"the saved adapter does not fit: it has {len(state_dict)} tensors, this one has {len(expected)}, or their shapes differ. "
            "Use the `peft_config` (or LoRA rank) that it was trained with."
        )
    set_peft_model_state_dict(module, state_dict, adapter_name=adapter_name(module))


def save_lora(pipe: DiffusionPipeline, denoisers: dict[str, nn.Module], folder: str | Path) -> None:
    """Writes `pytorch_lora_weights.safetensors` with the adapter's metadata, which `pipe.load_lora_weights(folder)` reads.

    Without the metadata a loader cannot know `lora_alpha`, and an adapter with alpha != rank comes back at another strength.
    """
    refuse_unsaveable(pipe, list(denoisers))
    arguments: dict[str, Any] = {}
    for name, module in denoisers.items():
        arguments[f"{name}_lora_layers"] = {k: v.contiguous() for k, v in lora_state_dict(module).items()}
        arguments[f"{name}_lora_adapter_metadata"] = _metadata(module)
    type(pipe).save_lora_weights(str(folder), **arguments)


def refuse_unsaveable(pipe: DiffusionPipeline, names: list[str]) -> None:
    """Raises `ValueError` if diffusers has no LoRA file for this family: better before training than after."""
    save = getattr(type(pipe), "save_lora_weights", None)
    if save is None:
        raise ValueError(
            f"{type(pipe).__name__} has no `save_lora_weights`: diffusers cannot store a LoRA of this family."
        )
    accepted = inspect.signature(save).parameters
    missing = [
        name
        for name in names
        if f"{name}_lora_layers" not in accepted or f"{name}_lora_adapter_metadata" not in accepted
    ]
    if missing:
        raise ValueError(f"{type(pipe).__name__}.save_lora_weights cannot store an adapter of {', '.join(missing)}.")


def _metadata(module: nn.Module) -> dict[str, Any]:
    return module.peft_config[adapter_name(module)].to_dict()
