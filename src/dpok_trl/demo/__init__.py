"""The demo: a small world of coloured shapes (`world`) and a tiny Stable Diffusion pretrained on it, shipped in `assets`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dpok_trl.policy.shipped import SHIPPED_PIPELINE


if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


def demo_pipeline_path() -> Path:
    """Folder of the shipped pipeline, for `StableDiffusionPipeline.from_pretrained` or `sd_pipeline=`."""
    return SHIPPED_PIPELINE


def load_demo_pipeline() -> StableDiffusionPipeline:
    """The shipped `StableDiffusionPipeline` in fp32 on the CPU, with its sampling progress bar turned off.

    32x32 pictures by default; `num_inference_steps=10, guidance_scale=1.0, eta=1.0` is what its numbers are given for.
    """
    # Not at the top: `dpok_trl.demo.world` needs neither diffusers nor transformers.
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    silenced = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in silenced:
        log.disable_progress_bar()
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(SHIPPED_PIPELINE, local_files_only=True)
    finally:
        for log in silenced:
            log.enable_progress_bar()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
