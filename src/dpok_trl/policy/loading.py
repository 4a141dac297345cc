"""Pipelines by name."""

from __future__ import annotations

from pathlib import Path

from diffusers import DiffusionPipeline


def load_pipeline(pipeline: DiffusionPipeline | str | Path) -> DiffusionPipeline:
    """A pipeline, or one loaded from a Hub id or folder, as it is: rollouts walk on a scheduler of their own where its is no policy.

    Raises:
        `ValueError`: For anything else.
    """
    if isinstance(pipeline, DiffusionPipeline):
        return pipeline
    if not isinstance(pipeline, (str, Path)):
        raise ValueError(
            f"sd_pipeline must be a diffusers pipeline, a Hub id or a folder; given: {type(pipeline).__name__}. A loaded pipeline comes from "
            "`DiffusionPipeline.from_pretrained(...)`."
        )
    return DiffusionPipeline.from_pretrained(str(pipeline))
