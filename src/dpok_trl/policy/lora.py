"""LoRA adapters of a pipeline: add, cast, disable, export."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn


ADAPTER_NAME = "default"
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that `load_lora_weights` looks for
# The attention projections, which every diffusers denoiser names alike; rank and alpha as in DDPO and in DPOK's official code.
DEFAULT_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def default_lora_config(rank: int, alpha: int | None = None) -> LoraConfig:
    """The adapter that is trained when no `peft_config` is given: attention projections, Gaussian initialisation, alpha = rank unless given."""
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


def refuse_adapter(component: nn.Module, name: str) -> None:
    """Raises `ValueError` if a component that is not trained has an active adapter: it would be missing from what is saved."""
    if adapter_name(component) is not None:
        raise ValueError(
            f"`{name}` has the active adapter '{adapter_name(component)}', which is not trained and would be missing from the saved one. Fuse it into "
            f"the base first: `pipe.fuse_lora(components=['{name}'])`, then `pipe.unload_lora_weights()`."
        )


def prepare_adapter(module: nn.Module, config: LoraConfig | None = None) -> str:
    """Makes exactly one adapter of `module` trainable, in fp32 on whatever base, and freezes the rest. Returns its name.

    Args:
        config (`LoraConfig`, *optional*): The adapter to add, under the name `"default"`. `None`: go on with the one that is there.

    Raises:
        `ValueError`: If there is an adapter already and `config` is given as well, or neither; for settings of `config` that would change or
            train weights beside the adapter's, or have no effect.
    """
    name = adapter_name(module)
    if name is None and config is None:
        raise ValueError(
            f"{type(module).__name__} has no active adapter, and no `peft_config` was given for a new one."
        )
    if name is None:
        refuse_unsuitable(config)
        name = ADAPTER_NAME
        config = copy.deepcopy(config)  # one of its own for each denoiser
        config.base_model_name_or_path = None
        inject_adapter_in_model(config, module, adapter_name=name)
        # diffusers' own bookkeeping, which its loaders, `disable_adapters` and `save_lora_weights` ask
        module._hf_peft_config_loaded = True
    elif config is not None:
        raise ValueError(
            f"{type(module).__name__} already has the adapter '{name}', and a `peft_config` was given for a new one. Leave `peft_config` "
            "out to go on training the loaded adapter, or call `pipe.unload_lora_weights()` first to start afresh."
        )
    else:
        refuse_altered(module, name)
    module.requires_grad_(False)
    for parameter_name, parameter in module.named_parameters():
        if f".{name}." in parameter_name and "lora_" in parameter_name:
            parameter.requires_grad_(True)
    cast_training_params(module, torch.float32)
    return name


def refuse_altered(module: nn.Module, name: str) -> None:
    """Raises `ValueError` for a loaded adapter that does not act at full strength: what is trained would not be what its file says."""
    config = module.peft_config[name]
    for layer in adapter_layers(module):
        if layer.disable_adapters:
            raise ValueError(
                f"the adapter '{name}' of {type(module).__name__} is disabled. Call `pipe.enable_lora()` first."
            )
        if layer.merged:
            raise ValueError(
                f"the adapter '{name}' of {type(module).__name__} is fused into the base. Call `pipe.unfuse_lora()` first."
            )
        if name not in layer.scaling:
            continue
        rank = layer.r[name]
        strength = layer.lora_alpha[name] / (math.sqrt(rank) if config.use_rslora else rank)
        if not math.isclose(layer.scaling[name], strength):
            raise ValueError(
                f"the adapter '{name}' of {type(module).__name__} is scaled by {layer.scaling[name] / strength:.3g}, which its file would not hold. "
                f"Call `pipe.set_adapters('{name}', 1.0)` first."
            )


def refuse_unsuitable(config: LoraConfig) -> None:
    """Raises `ValueError` for LoRA settings that would be dropped in silence, or under which adapter-off is not the pretrained model."""
    if config.lora_dropout:
        raise ValueError(
            f"lora_dropout = {config.lora_dropout}: a replay with dropout is another draw than its rollout, so the denoiser stays in eval mode and "
            "dropout would do nothing. Set it to 0."
        )
    if config.bias != "none":
        raise ValueError(
            f"bias = '{config.bias}' trains biases of the base, and the reference would move with them. Set bias='none'."
        )
    if config.modules_to_save:
        raise ValueError(
            f"modules_to_save = {config.modules_to_save}: whole modules cannot be trained beside the adapter. Leave it out."
        )
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f"init_lora_weights = {config.init_lora_weights!r} changes the base weights, and adapter-off would no longer be the pretrained model. "
            "Use True or 'gaussian'."
        )


@contextmanager
def adapters_disabled(modules: list[nn.Module]) -> Iterator[None]:
    """Runs the base model. Which adapters were on and what required gradients is restored, also after an exception.

    No backward pass may run inside: peft switches the adapters' gradients off with them.
    """
    layers = [layer for module in modules for layer in adapter_layers(module) if not layer.disable_adapters]
    before = {parameter: parameter.requires_grad for module in modules for parameter in module.parameters()}
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, requires_grad in before.items():
            parameter.requires_grad_(requires_grad)


def lora_state_dict(module: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of the adapter of `module`, in peft's layout."""
    return get_peft_model_state_dict(module, adapter_name=adapter_name(module))


def load_lora_state_dict(module: nn.Module, state_dict: dict[str, torch.Tensor]) -> None:
    """Writes weights in peft's layout into the adapter of `module`, in place.

    Raises:
        `ValueError`: If keys or shapes are not those of the adapter.
    """
    expected = lora_state_dict(module)
    shapes, saved = ({key: tuple(value.shape) for key, value in d.items()} for d in (expected, state_dict))
    differing = sorted(key for key in shapes.keys() | saved.keys() if shapes.get(key) != saved.get(key))
    if differing:
        key = differing[0]
        raise ValueError(
            f"the saved adapter does not fit: {len(differing)} tensors differ, the first is {key}, of shape {saved.get(key, 'nothing')} in the file "
            f"and {shapes.get(key, 'nothing')} here. Use the `peft_config` (or train_lora_rank) that it was trained with."
        )
    set_peft_model_state_dict(module, state_dict, adapter_name=adapter_name(module))


def load_lora(denoisers: Mapping[str, nn.Module], folder: str | Path) -> None:
    """Reads what [`save_lora`] wrote into the adapters of `denoisers`, in place."""
    tensors = load_file(Path(folder) / LORA_FILE)
    for name, module in denoisers.items():
        prefix = f"{name}."
        load_lora_state_dict(module, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})


def save_lora(pipe: DiffusionPipeline, denoisers: Mapping[str, nn.Module], folder: str | Path) -> None:
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
    metadata = module.peft_config[adapter_name(module)].to_dict()
    # peft holds names in sets, whose order differs from process to process, and so would the bytes of the file
    return {key: sorted(value) if isinstance(value, set) else value for key, value in metadata.items()}
