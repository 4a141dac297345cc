"""LoRA adapters as files: diffusers' own where the family has one, peft's where it has none."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from dpok_trl.policy.lora import adapter_name


LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that `load_lora_weights` looks for
PEFT_FILE = "adapter_model.safetensors"  # the name that `PeftModel.from_pretrained` looks for
PEFT_PREFIX = "base_model.model."  # of every key in it


def text_encoders_with_lora(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The text encoders whose adapters the family's LoRA file can hold."""
    names = [name for name in pipe.components if name.startswith("text_encoder") and _has_place(pipe, name)]
    return {name: getattr(pipe, name) for name in names if getattr(pipe, name) is not None}


def refuse_unloadable(name: str, encoder: nn.Module) -> None:
    """Raises `ValueError` for a text encoder whose adapter diffusers can write, but not read again: better before training than after."""
    try:
        convert_state_dict_to_peft(convert_state_dict_to_diffusers(lora_state_dict(encoder)))
    except ValueError as error:
        raise ValueError(
            f"diffusers cannot load an adapter of `{name}`, a {type(encoder).__name__} ({error}). It can for CLIP text encoders with the attention projections (q_proj ...) among the targets. Choose those, or set train_text_encoder = False."
        ) from error


def save_lora(pipe: DiffusionPipeline, modules: Mapping[str, nn.Module], folder: str | Path) -> None:
    """Writes the adapters of a pipeline with their metadata. Without it a loader cannot know `lora_alpha`, and an adapter with alpha != rank
    comes back at another strength.

    * `pytorch_lora_weights.safetensors` for `pipe.load_lora_weights(folder)`, which holds all components that the family's loader knows;
    * `pytorch_lora_weights_<name>.safetensors` for a second network of the same kind (the second expert of Wan 2.2:
      `pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights_transformer_2.safetensors", load_into_transformer_2=True)`);
    * `<name>/adapter_model.safetensors` and its config for `peft.PeftModel.from_pretrained(pipe.<name>, f"{folder}/<name>")`, where diffusers has no
      LoRA file for the family.
    """
    together: dict[str, Any] = {}
    for name, module in modules.items():
        place = _place_of(pipe, name)
        if place == name:
            together.update(_arguments(name, module))
        elif place is not None:
            type(pipe).save_lora_weights(str(folder), **_arguments(place, module), weight_name=file_of(name))
        else:
            _save_peft(module, Path(folder) / name)
    if together:
        type(pipe).save_lora_weights(str(folder), **together)


def load_lora(pipe: DiffusionPipeline, modules: Mapping[str, nn.Module], folder: str | Path) -> None:
    """Reads what [`save_lora`] wrote into the adapters of `modules`, in place.

    Raises:
        `ValueError`: If keys or shapes are not those of the adapters.
    """
    for name, module in modules.items():
        place = _place_of(pipe, name)
        if place is None:
            file, prefix = Path(folder) / name / PEFT_FILE, PEFT_PREFIX
        elif place == name:
            file, prefix = Path(folder) / LORA_FILE, f"{name}."
        else:
            file, prefix = Path(folder) / file_of(name), f"{place}."
        tensors = {key.removeprefix(prefix): value for key, value in load_file(file).items() if key.startswith(prefix)}
        load_lora_state_dict(module, tensors)


def loading_code(pipe: DiffusionPipeline, names: Iterable[str], repository: str) -> str:
    """The lines of Python that load what [`save_lora`] wrote for the components `names` into a stock `pipe`."""
    lines = []
    for name in names:
        place = _place_of(pipe, name)
        if place == name:
            lines.append(f'pipe.load_lora_weights("{repository}")')
        elif place is not None:
            lines.append(
                f'pipe.load_lora_weights("{repository}", weight_name="{file_of(name)}", load_into_{name}=True)'
            )
        else:
            lines.append("from peft import PeftModel")
            lines.append(f'pipe.{name} = PeftModel.from_pretrained(pipe.{name}, "{repository}", subfolder="{name}")')
    return "\n".join(dict.fromkeys(lines))


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


def file_of(name: str) -> str:
    return LORA_FILE.replace(".", f"_{name}.")


def _place_of(pipe: DiffusionPipeline, name: str) -> str | None:
    """Under which name the family's LoRA file holds the adapter of a component; `None` if it has no place for it."""
    if _has_place(pipe, name):
        return name
    kind = type(getattr(pipe, name))
    alike = [
        other for other in pipe.components if type(getattr(pipe, other, None)) is kind and _has_place(pipe, other)
    ]
    return alike[0] if alike else None


def _has_place(pipe: DiffusionPipeline, name: str) -> bool:
    save = getattr(type(pipe), "save_lora_weights", None)
    if save is None:
        return False
    accepted = inspect.signature(save).parameters
    return f"{name}_lora_layers" in accepted and f"{name}_lora_adapter_metadata" in accepted


def _arguments(place: str, module: nn.Module) -> dict[str, Any]:
    tensors = {key: value.contiguous() for key, value in lora_state_dict(module).items()}
    return {f"{place}_lora_layers": tensors, f"{place}_lora_adapter_metadata": _metadata(module)}


def _metadata(module: nn.Module) -> dict[str, Any]:
    metadata = module.peft_config[adapter_name(module)].to_dict()
    # peft holds names in sets, whose order differs from process to process, and so would the bytes of the file
    return {key: sorted(value) if isinstance(value, set) else value for key, value in metadata.items()}


def _save_peft(module: nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {PEFT_PREFIX + key: value.contiguous() for key, value in lora_state_dict(module).items()}
    save_file(tensors, folder / PEFT_FILE, metadata={"format": "pt"})
    module.peft_config[adapter_name(module)].save_pretrained(str(folder))
