"""Pipelines by name."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_pipeline(pipeline: DiffusionPipeline | str | Path, dtype: str | None = None) -> DiffusionPipeline:
    """A pipeline, or one loaded from a Hub id or folder, as it is: rollouts walk on a scheduler of their own where its is no policy.

    Args:
        dtype (`"fp32"`, `"bf16"` or `"fp16"`, *optional*): Of a pipeline that is loaded. Default: diffusers' own.

    Raises:
        `ValueError`: For anything else, and for a `dtype` with a pipeline that has been loaded already.
    """
    if isinstance(pipeline, DiffusionPipeline):
        if dtype is not None:
            raise ValueError(
                f"model_dtype = '{dtype}' is for pipelines given by name, and this {type(pipeline).__name__} has been loaded. Load it in that dtype: "
                f"`from_pretrained(..., torch_dtype={DTYPES[dtype]})`."
            )
        return pipeline
    if not isinstance(pipeline, (str, Path)):
        raise ValueError(
            f"sd_pipeline must be a diffusers pipeline, a Hub id or a folder; given: {type(pipeline).__name__}. A loaded pipeline comes from "
            "`DiffusionPipeline.from_pretrained(...)`."
        )
    given = {} if dtype is None else {"torch_dtype": DTYPES[dtype]}
    return DiffusionPipeline.from_pretrained(str(pipeline), **given)
