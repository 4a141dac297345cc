"""PixArt-Alpha and PixArt-Sigma: a transformer with a learned variance that its pipelines cut off."""

from __future__ import annotations

from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

from zoo.inputs import SPECIAL
from zoo.registry import argument, component
from zoo.stable_diffusion import WIDTH


SPECIAL.update({"PixArt*": {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 16}})


def pixart_transformer(**kwargs) -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        caption_channels=WIDTH,
        **{"sample_size": 8, **kwargs},
    )


@component("PixArtTransformer2DModel")
def pixart_sigma_transformer() -> PixArtTransformer2DModel:
    return pixart_transformer(use_additional_conditions=False)


@argument("transformer", "PixArtAlpha*")
def pixart_alpha_transformer() -> PixArtTransformer2DModel:
    """With the size of the picture and its aspect ratio as conditions: the pipeline gives them to networks of a sample size of 128."""
    return pixart_transformer(use_additional_conditions=True, sample_size=128)


@argument("scheduler", "PixArt*")
def pixart_scheduler() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
