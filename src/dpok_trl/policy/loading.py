"""Pipelines by name."""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
from accelerate.utils import compare_versions
from diffusers import DiffusionPipeline


# diffusers 0.40 renamed it, and 0.39 drops what it does not know
DTYPE_ARGUMENT = "dtype" if compare_versions("diffusers", ">=", "0.40") else "torch_dtype"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_pipeline(pipeline: DiffusionPipeline | str | Path, dtype: str | None = None) -> DiffusionPipeline:
    """A pipeline, or one loaded from a Hub id or folder, as it is: rollouts walk on a scheduler of their own where its is no policy.

    Args:
        dtype (`"fp32"`, `"bf16"` or `"fp16"`, *optional*): Of a pipeline that is loaded. Default: diffusers' own.

    Raises:
        `ValueError`: For anything else, for a `dtype` with a pipeline that has been loaded already, and for a class that is not diffusers' own.
        `OSError`: For a name that is neither a folder nor a pipeline of the Hub.
    """
    if isinstance(pipeline, DiffusionPipeline):
        if dtype is not None:
            raise ValueError(
                f"model_dtype = '{dtype}' is for pipelines given by name, and this {type(pipeline).__name__} has been loaded. Load it in that dtype: "
                f"`from_pretrained(..., {DTYPE_ARGUMENT}={DTYPES[dtype]})`."
            )
        return pipeline
    if not isinstance(pipeline, (str, Path)):
        raise ValueError(
            f"sd_pipeline must be a diffusers pipeline, a Hub id or a folder; given: {type(pipeline).__name__}. A loaded pipeline comes from "
            "`DiffusionPipeline.from_pretrained(...)`."
        )
    given = {} if dtype is None else {DTYPE_ARGUMENT: DTYPES[dtype]}
    try:
        return DiffusionPipeline.from_pretrained(str(pipeline), **given)
    except AttributeError as error:  # what diffusers raises for a class that it does not have
        name = DiffusionPipeline.load_config(str(pipeline))["_class_name"]
        if not isinstance(name, str) or hasattr(diffusers, name):
            raise
        raise ValueError(
            f"the class {name} is not diffusers' own: load it yourself (`{name}.from_pretrained(...)`) and hand over the object."
        ) from error
    except OSError as error:
        if Path(pipeline).exists():
            raise
        raise OSError(f"there is no folder {pipeline} here, and as a Hub id: {error}") from error
