"""Kandinsky 5: pictures and videos, latents with the channels last."""

from __future__ import annotations

from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, Kandinsky5Transformer3DModel

from zoo.hunyuan import hunyuan_video_vae
from zoo.image_transformers import fill_zeros
from zoo.inputs import SPECIAL, picture
from zoo.packed_flow import PooledKL, one_level_vae
from zoo.registry import argument, component
from zoo.stable_diffusion import WIDTH


CHANNELS = 4
SPECIAL.update(
    {
        # the sizes are from a list in the pipeline, and its videos are eight times as large as their latents
        "Kandinsky5?2I*": {"height": 640, "width": 1408, "num_inference_steps": 2},
        "Kandinsky5I2I*": {"image": [picture(seed, size=64) for seed in range(2)]},
        "Kandinsky5?2V*": {"num_frames": 5, "height": 32, "width": 32},
        "Kandinsky5I2V*": {"image": [picture(seed, size=32) for seed in range(2)], "num_frames": 17},
    }
)


def kandinsky5_transformer(**kwargs) -> Kandinsky5Transformer3DModel:
    model = Kandinsky5Transformer3DModel(
        **{
            "in_visual_dim": CHANNELS,
            "out_visual_dim": CHANNELS,
            "in_text_dim": WIDTH,
            "in_text_dim2": WIDTH,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 1,
            "axes_dims": (4, 6, 6),
            **kwargs,
        }
    )
    fill_zeros(model)
    return model


@component("Kandinsky5Transformer3DModel")
def kandinsky5_text_transformer() -> Kandinsky5Transformer3DModel:
    return kandinsky5_transformer()


@argument("transformer", "Kandinsky5I2*")
def kandinsky5_picture_conditioned_transformer() -> Kandinsky5Transformer3DModel:
    return kandinsky5_transformer(visual_cond=True)


@argument("vae", "Kandinsky5?2I*")
def kandinsky5_picture_vae() -> PooledKL:
    return one_level_vae(pooled=8, latent_channels=CHANNELS, scaling_factor=0.3611, shift_factor=0.1159)


@argument("vae", "Kandinsky5?2V*")
def kandinsky5_video_vae() -> AutoencoderKLHunyuanVideo:
    return hunyuan_video_vae(levels=4)


@argument("scheduler", "Kandinsky5*")
def kandinsky5_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=5.0)
