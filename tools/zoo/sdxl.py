"""Stable Diffusion XL: two text encoders side by side, sizes as a condition, a scheduler that counts noise in sigmas."""

from __future__ import annotations

from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

from zoo.inputs import SPECIAL, picture
from zoo.registry import argument
from zoo.stable_diffusion import WIDTH, unet


SIZE_EMBEDDING = 8


def unet_xl(**kwargs) -> UNet2DConditionModel:
    return unet(
        **{
            "attention_head_dim": (2, 4),
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 1),
            "cross_attention_dim": 2 * WIDTH,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": SIZE_EMBEDDING,
            "projection_class_embeddings_input_dim": 6 * SIZE_EMBEDDING + WIDTH,
            **kwargs,
        }
    )


@argument("unet", "StableDiffusionXL*")
def unet_sdxl() -> UNet2DConditionModel:
    return unet_xl()


@argument("scheduler", "StableDiffusionXL*")
def euler_scheduler(**kwargs) -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        **{"steps_offset": 1, "timestep_spacing": "leading", **kwargs},
    )


@argument("add_watermarker", "*")
def no_watermark() -> bool:
    return False


SPECIAL.update(
    {
        "StableDiffusion*Img2Img*": {"image": picture(), "strength": 0.75, "height": None, "width": None},
        "StableDiffusion*Inpaint*": {"image": picture(), "mask_image": picture(1, mode="L"), "strength": 0.75},
    }
)
