"""LoRA adapters of a network: add, cast, disable. Their files: `lora_files.py`."""

from __future__ import annotations

import copy
import difflib
import logging
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from diffusers.training_utils import cast_training_params
from diffusers.utils import recurse_remove_peft_layers
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


logger = logging.getLogger(__name__)

ADAPTER_NAME = "default"
# The attention projections as networks name them: diffusers' denoisers (rank and alpha as in DDPO and in DPOK's official code), the text
# encoders of transformers, and T5.
ATTENTION_NAMES = (
    ("to_q", "to_k", "to_v", "to_out.0"),
    ("q_proj", "k_proj", "v_proj", "out_proj", "o_proj"),
    ("q", "k", "v", "o"),
)


def default_lora_config(module: nn.Module, rank: int, alpha: int | None = None) -> LoraConfig:
    """The adapter that is trained when no `peft_config` is given: attention projections (every linear layer of a network that names them in no
    known way), Gaussian initialisation, alpha = rank unless given."""
    return LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        init_lora_weights="gaussian",
        target_modules=_attention_projections(module),
    )


def _attention_projections(module: nn.Module) -> list[str]:
    names = [name for name, part in module.named_modules() if not list(part.children())]
    for known in ATTENTION_NAMES:
        present = [target for target in known if any(name.endswith(f".{target}") for name in names)]
        if present:
            return present
    logger.warning(
        "%s has no attention projections of a known name: the adapter goes on all of its linear layers",
        type(module).__name__,
    )
    return [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]


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


def refuse_adapter(component: nn.Module, name: str, trained: Iterable[nn.Module]) -> None:
    """Raises `ValueError` if a component that is not trained has an active adapter of its own: it would be missing from what is saved. A ControlNet may
    share layers with a trained network."""
    shared = {layer for module in trained for layer in adapter_layers(module)}
    active = [
        adapter for layer in adapter_layers(component) if layer not in shared for adapter in layer.active_adapters
    ]
    if active:
        raise ValueError(
            f"`{name}` has the active adapter '{active[0]}', which is not trained and would be missing from the saved one. Fuse it into "
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
        if config.target_modules is None:
            config.target_modules = _attention_projections(module)
        refuse_unmatched(config, module)
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
    if config is not None:
        _measure_magnitudes(module, name)
    return name


def _measure_magnitudes(module: nn.Module, name: str) -> None:
    """DoRA divides its magnitudes by norms that it computes in fp32. Those that peft measured in the dtype of a half-precision base are rounded, and
    with them the untouched adapter would not be the pretrained model."""
    for layer in adapter_layers(module):
        if name in layer.lora_magnitude_vector:
            layer.lora_magnitude_vector[name].update_layer(
                base_layer=layer.get_base_layer(),
                lora_A=layer.lora_A[name].weight,
                lora_B=layer.lora_B[name].weight,
                scaling=layer.scaling[name],
            )


def remove_adapter(module: nn.Module) -> None:
    """Takes out what [`prepare_adapter`] put in."""
    recurse_remove_peft_layers(module)
    del module.peft_config
    module._hf_peft_config_loaded = False


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
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"peft_config must be a peft.LoraConfig, given: {type(config).__name__}. Other adapters have no place in a LoRA file."
        )
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


def refuse_unmatched(config: LoraConfig, module: nn.Module) -> None:
    """Raises `ValueError` for targets that no module of the network has: peft drops them in silence as long as another one matches."""
    names = [name for name, _ in module.named_modules() if name]
    targets = config.target_modules
    if targets == "all-linear":
        return
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ValueError(f"target_modules = {targets!r} is not a regular expression ({error}).") from error
        unmatched = [] if any(pattern.fullmatch(name) for name in names) else [targets]
    else:
        unmatched = [t for t in sorted(targets) if not any(n == t or n.endswith(f".{t}") for n in names)]
    if not unmatched:
        return
    linear = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    endings = {".".join(name.split(".")[-length:]) for name in linear for length in (1, 2)}
    endings = sorted(ending for ending in endings if not ending.isdigit())
    near = [close for t in unmatched for close in difflib.get_close_matches(t, endings, n=3, cutoff=0.4)]
    raise ValueError(
        f"target_modules of the peft_config match nothing in {type(module).__name__}: {', '.join(unmatched)}. The nearest names of its linear layers: "
        f"{', '.join(dict.fromkeys(near)) or ', '.join(endings[:8])}."
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
