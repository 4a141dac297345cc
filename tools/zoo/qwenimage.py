"""Qwen-Image: a video VAE over single frames, Qwen2.5-VL, packed latents, guidance that keeps each token's norm."""

from __future__ import annotations

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageControlNetModel,
    QwenImageTransformer2DModel,
)
from diffusers.models.autoencoders.vae import DecoderOutput
from torch.nn.functional import avg_pool3d

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
        "QwenImageEdit*": {"height": 128, "width": 128, "image": [picture(0), picture(1)]},  # one for each prompt
        "QwenImageEditInpaint*": {"image": [picture(0), picture(1)], "mask_image": picture(mode="L"), "strength": 0.8},
        "QwenImageControlNet*": {"control_image": picture()},
        "QwenImageControlNetInpaint*": {"control_image": picture(), "control_mask": picture(mode="L")},
        "QwenImageLayered*": {
            "image": picture(mode="RGBA"),
            "height": None,
            "width": None,
            "layers": 2,
            "resolution": 640,
        },
    }
)


@component("AutoencoderKLQwenImage")
def autoencoder_kl_qwenimage() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(**_vae_settings(CHANNELS))


def _vae_settings(channels: int) -> dict:
    return {
        "base_dim": 8,
        "z_dim": channels,
        "dim_mult": [1, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [True],
        "latents_mean": [0.1, -0.2] * (channels // 2),
        "latents_std": [1.5, 0.5] * (channels // 2),
    }


class PooledVAE(AutoencoderKLQwenImage):
    """To 1/64, by a coarse picture: some pipelines scale whatever they get to about a million pixels."""

    POOLED = 32

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.temperal_downsample = [False] * 6  # from its length the pipelines know the factor

    def encode(self, x, return_dict=True):
        return super().encode(avg_pool3d(x, (1, self.POOLED, self.POOLED)), return_dict)

    def decode(self, z, return_dict=True):
        coarse = super().decode(z, return_dict=False)[0]
        fine = coarse.repeat_interleave(self.POOLED, dim=-2).repeat_interleave(self.POOLED, dim=-1)
        return DecoderOutput(sample=fine) if return_dict else (fine,)


@argument("vae", "QwenImageEdit*")
def vae_for_megapixels() -> PooledVAE:
    return PooledVAE(**_vae_settings(CHANNELS))


@argument("vae", "QwenImageLayered*")
def vae_with_alpha() -> PooledVAE:
    """More channels than a picture with alpha has, or the pipeline takes the picture for latents."""
    return PooledVAE(**_vae_settings(2 * CHANNELS), input_channels=4)


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
    settings = {**_settings(), "in_channels": 8 * CHANNELS, "out_channels": 2 * CHANNELS}
    return QwenImageTransformer2DModel(**settings, use_additional_t_cond=True, use_layer3d_rope=True)


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
