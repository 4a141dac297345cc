"""Pipelines by name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, DiffusionPipeline, PNDMScheduler


logger = logging.getLogger(__name__)


def load_pipeline(pipeline: DiffusionPipeline | str | Path) -> DiffusionPipeline:
    """A pipeline, or one loaded from a Hub id or folder. In a loaded one, PNDM (Stable Diffusion 1.5's default) becomes DDIM.

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
    loaded = DiffusionPipeline.from_pretrained(str(pipeline))
    if isinstance(loaded.scheduler, PNDMScheduler):
        logger.info(
            "PNDM steps depend on earlier model outputs and are no policy; sampling with DDIM instead, as DDPO did"
        )
        loaded.scheduler = as_ddim(loaded.scheduler)
    return loaded


def as_ddim(scheduler: Any) -> DDIMScheduler:
    """DDIM on the noise schedule and spacing of another scheduler."""
    # DDIM's own defaults for keys that the other config lacks would clamp x_0 in latent space.
    defaults = {"clip_sample": False, "set_alpha_to_one": False}
    return DDIMScheduler.from_config(
        scheduler.config, **{k: v for k, v in defaults.items() if k not in scheduler.config}
    )
