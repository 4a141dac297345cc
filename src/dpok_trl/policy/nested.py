"""Nested inputs and outputs of networks: tuples, lists, dicts and model outputs of tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from diffusers.utils import BaseOutput

from dpok_trl.policy.errors import ReplayError, UnsupportedPipelineError


def map_tensors(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """The same nesting of tuples, lists, dicts and model outputs, with every tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, BaseOutput) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        fields = {f.name: map_tensors(getattr(value, f.name), change) for f in dataclasses.fields(value)}
        return type(value)(**fields)
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(item, change) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    return value


def any_tensor(value: Any, test: Callable[[torch.Tensor], bool]) -> bool:
    """Whether a tensor in the nesting passes a test."""
    found: list[bool] = []
    map_tensors(value, lambda x: found.append(test(x)))
    return any(found)


def template(output: Any, name: str) -> Any:
    """The shape of a denoiser's output, without its values."""
    if isinstance(output, torch.Tensor):
        return output.new_empty(0), tuple(output.shape)
    if output is None:
        return None, None
    if isinstance(output, BaseOutput):
        return type(output), {key: template(value, name) for key, value in output.items()}
    if not isinstance(output, (list, tuple)):
        raise UnsupportedPipelineError(
            f"`{name}` returns a {type(output).__name__} beside its prediction: a state (such as a key-value cache) that goes from step to step. A step of "
            "such a policy depends on more than its latents and cannot be replayed alone; use the family's pipeline without the cache."
        )
    return type(output), [template(value, name) for value in output]


def num_rows(template: Any) -> int:
    """Rows of the batch of a recorded output, or entries of a list of them."""
    kind, content = template
    while not isinstance(kind, torch.Tensor):
        if kind is list:
            return len(content)
        kind, content = next(iter(content.values())) if isinstance(content, dict) else content[0]
    return content[0]


def stub(template: Any, num_samples: int, num_recorded: int) -> Any:
    """Zeros in the shape of a recorded output, for another number of samples."""
    kind, content = template
    if kind is None:
        return None
    if isinstance(kind, torch.Tensor):
        batch, remainder = divmod(content[0] * num_samples, num_recorded)
        if remainder:
            raise ReplayError(
                f"a denoiser output of shape {content} cannot be cut to {num_samples} of {num_recorded} samples"
            )
        return kind.new_zeros((batch, *content[1:]))
    if isinstance(content, dict):
        return kind(**{name: stub(value, num_samples, num_recorded) for name, value in content.items()})
    if kind is list and len(content) % num_recorded == 0:  # one entry per sample (Z-Image)
        entries = [content[0]] * (len(content) // num_recorded * num_samples)
        return [stub(entry, 1, 1) for entry in entries]
    return kind(stub(value, num_samples, num_recorded) for value in content)
