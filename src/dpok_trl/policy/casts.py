"""Latents in fp32 on a pipeline in half precision."""

from __future__ import annotations

from typing import Any

import torch

from dpok_trl.policy.nested import map_tensors


class Casts:
    """Lets a half-precision pipeline walk on fp32 latents.

    Each argument of a denoiser is given in the dtype it had in the first step, when the latents still had the pipeline's own, and the last
    latents go to the decoder in that dtype again. So a timestep that is fp32 stays fp32, and no list of argument names is needed.
    """

    def __init__(self) -> None:
        self._dtypes: dict[int | str, torch.dtype] = {}  # position or name of an argument -> the dtype of its tensors
        self._latents: torch.dtype | None = None

    def arguments(self, step: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of a denoiser's call in a step, cast back where fp32 latents went into them."""
        if step == 0:
            for name, value in [*enumerate(args), *kwargs.items()]:
                map_tensors(value, lambda x, name=name: self._dtypes.setdefault(name, x.dtype))
            return args, kwargs
        return (
            tuple(self._cast(index, value) for index, value in enumerate(args)),
            {name: self._cast(name, value) for name, value in kwargs.items()},
        )

    def latents(self, step: int, last: bool, sample: torch.Tensor, next_sample: torch.Tensor) -> torch.Tensor:
        """What `step` returns to the pipeline."""
        if step == 0:
            self._latents = sample.dtype
        return next_sample.to(self._latents) if last else next_sample

    def _cast(self, name: int | str, value: Any) -> Any:
        dtype = self._dtypes.get(name)
        if dtype is None or not dtype.is_floating_point:
            return value
        return map_tensors(value, lambda x: x.to(dtype) if x.is_floating_point() else x)
