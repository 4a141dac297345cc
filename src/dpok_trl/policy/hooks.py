"""The one place where a pipeline may depart from what all others do."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn

from dpok_trl.policy.errors import UnsupportedPipelineError


DENOISER_NAMES = ("unet", "transformer", "transformer_2")


class PipelineHooks:
    """How a pipeline is entered. Subclass it for a pipeline of your own that does one of these things in its own way, and hand an instance to
    [`Policy`], [`check_pipeline`] or [`DPOKTrainer`].

    Why it exists: re-entering a pipeline needs to know three things that no attribute tells, where its networks are, how it is called and where its
    images come out. All pipelines that diffusers calls text-to-image agree on them, so this package never subclasses it.
    """

    def denoisers(self, pipe: DiffusionPipeline) -> dict[str, nn.Module]:
        """The networks that the denoising loop calls, by the attribute of `pipe` that holds them.

        Raises:
            [`UnsupportedPipelineError`]: If there is none, or the pipeline is made of other pipelines.
        """
        inner = [name for name, value in vars(pipe).items() if isinstance(value, DiffusionPipeline)]
        if inner:
            raise UnsupportedPipelineError(
                f"{type(pipe).__name__} is made of other pipelines ({', '.join(inner)}). Tune the inner one and put it back."
            )
        found = {name: getattr(pipe, name) for name in DENOISER_NAMES if getattr(pipe, name, None) is not None}
        if not found:
            raise UnsupportedPipelineError(
                f"{type(pipe).__name__} has none of the components {', '.join(DENOISER_NAMES)}; it has {', '.join(pipe.components)}. If one of them is "
                "the network of its denoising loop, say so with `PipelineHooks.denoisers`."
            )
        if getattr(pipe, "scheduler", None) is None:
            raise UnsupportedPipelineError(
                f"{type(pipe).__name__} has no component `scheduler`, whose steps would be the actions of a policy."
            )
        return found

    def call(self, pipe: DiffusionPipeline, arguments: dict[str, Any]) -> Any:
        """Enters the pipeline. `arguments` are those of its call: `prompt` and `generator` (lists of length `B`), `output_type`, `return_dict=False`, and
        what the user gave."""
        return pipe(**arguments)

    def images(self, output: Any) -> torch.Tensor:
        """The images `(B, 3, H, W)` or videos `(B, F, 3, H, W)`, in [0, 1], from what the call returned."""
        if type(output) is dict:  # an output of diffusers is one too, that can be asked for its first entry
            raise UnsupportedPipelineError(
                f"the pipeline gave a dict of {', '.join(output)} in place of a tuple with the images. Say where they are with `PipelineHooks.images`."
            )
        images = output[0]
        if isinstance(images, np.ndarray):  # of older pipelines, channels last
            return torch.from_numpy(images).movedim(-1, -3)
        return images
