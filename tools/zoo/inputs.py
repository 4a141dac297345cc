"""The arguments of a tiny call, from the signature of the pipeline's `__call__`."""

from __future__ import annotations

import inspect
from fnmatch import fnmatchcase
from typing import Any

from diffusers import DiffusionPipeline
from PIL import Image


STEPS = 4
SIZE = 16  # pixels

# argument of a call -> value, given to every pipeline whose call has an argument of that name
COMMON: dict[str, Any] = {
    "num_inference_steps": STEPS,
    "guidance_scale": 3.0,
    "height": SIZE,
    "width": SIZE,
}

# pattern of pipeline names -> arguments that go over COMMON; `None` takes one out. Of several matching patterns the longer goes over the shorter.
SPECIAL: dict[str, dict[str, Any]] = {}


def picture(seed: int = 0, size: int = SIZE, mode: str = "RGB") -> Image.Image:
    """A picture with a gradient: no two rows or columns alike."""
    channels = [Image.linear_gradient("L").rotate(90 * (index + seed)).resize((size, size)) for index in range(3)]
    return Image.merge("RGB", channels).convert(mode)


def call_arguments(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Arguments of a tiny call, without the prompt."""
    name = type(pipe).__name__
    taken = inspect.signature(type(pipe).__call__).parameters
    arguments = {key: value for key, value in COMMON.items() if key in taken}
    for pattern in sorted((p for p in SPECIAL if fnmatchcase(name, p)), key=len):
        arguments.update(SPECIAL[pattern])
    return {key: value for key, value in arguments.items() if value is not None}
