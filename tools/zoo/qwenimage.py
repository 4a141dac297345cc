"""Qwen-Image: a video VAE over single frames, Qwen2.5-VL, packed latents, guidance that keeps each token's norm."""

from __future__ import annotations

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageControlNetModel,
    QwenImageTransformer2DModel,
)

from zoo.inputs import SPECIAL, picture
from zoo.registry import argument, component
from zoo.stable_diffusion import WIDTH


CHANNELS = 4  # of the latents
GUIDED = {"true_cfg_scale": 3.0, "negative_prompt": "blurry", "guidance_scale": None}
SPECIAL.update(
    {
        "QwenImage*": GUIDED,
        "QwenImageImg2Img*": {"image": picture(), "strength": 0.8},
        "QwenImageInpaint*": {"image": picture(), "mask_image": picture(mode="L"), "strength": 0.8},
        "QwenImageEdit*": {"image": picture()},
        "QwenImageEditInpaint*": {"image": picture(), "mask_image": picture(mode="L"), "strength": 0.8},
        "QwenImageControlNet*": {"control_image": picture()},
        "QwenImageControlNetInpaint*": {"control_image": picture(), "control_mask": picture(mode="L")},
        "QwenImageLayered*": {"image": picture(mode="RGBA"), "layers": 2, "resolution": 640},
    }
)


@component("AutoencoderKLQwenImage")
def autoencoder_kl_qwenimage(**kwargs) -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 1.5, 2.0, 0.5],
        **kwargs,
    )


@argument("vae", "QwenImageLayered*")
def vae_with_alpha() -> AutoencoderKLQwenImage:
    return autoencoder_kl_qwenimage(input_channels=4)


def _settings() -> dict:
    return {
        "patch_size": 2,
        "in_channels": 4 * CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "axes_dims_rope": (4, 6, 6),
    }


@component("QwenImageTransformer2DModel")
def qwenimage_transformer() -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(**_settings())


@argument("transformer", "QwenImageLayered*")
def layered_transformer() -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(**_settings(), use_additional_t_cond=True, use_layer3d_rope=True)


@component("QwenImageControlNetModel")
def qwenimage_controlnet() -> QwenImageControlNetModel:
    return QwenImageControlNetModel(**_settings())


@argument("controlnet", "QwenImageControlNetInpaint*")
def qwenimage_inpainting_controlnet() -> QwenImageControlNetModel:
    return QwenImageControlNetModel(**_settings(), extra_condition_channels=4)


@argument("scheduler", "QwenImage*")
def qwenimage_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
