"""FLUX.1: latents packed into tokens, guidance as a condition of the network, a schedule that depends on the number of tokens."""

from __future__ import annotations

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from zoo.inputs import SPECIAL, picture
from zoo.registry import argument, component
from zoo.sd3 import flow_scheduler
from zoo.stable_diffusion import TOKENS, WIDTH, autoencoder_kl


LATENT_CHANNELS = 4
PACKED_CHANNELS = 4 * LATENT_CHANNELS  # two by two latents are one token


def flux_transformer(**kwargs) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        **{
            "in_channels": PACKED_CHANNELS,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "axes_dims_rope": (4, 2, 2),
            "joint_attention_dim": WIDTH,
            "pooled_projection_dim": WIDTH,
            "guidance_embeds": True,
            **kwargs,
        }
    )


@component("FluxTransformer2DModel")
def flux_dev_transformer() -> FluxTransformer2DModel:
    return flux_transformer()


@argument("transformer", "FluxFill*")
def flux_fill_transformer() -> FluxTransformer2DModel:
    """It sees the masked picture, packed as the latents are, and every pixel of the mask under a token."""
    pixels_of_a_token = (2 * 2) ** 2
    return flux_transformer(in_channels=2 * PACKED_CHANNELS + pixels_of_a_token, out_channels=PACKED_CHANNELS)


@argument("vae", "Flux*", "Chroma*")
def flux_vae() -> AutoencoderKL:
    return autoencoder_kl(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159, scaling_factor=0.3611)


@argument("scheduler", "Flux*")
def flux_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return flow_scheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)


SPECIAL.update(
    {
        "Flux*": {"max_sequence_length": TOKENS},
        "Flux*Img2Img*": {"image": picture(), "strength": 0.75},
        "Flux*Inpaint*": {"image": picture(), "mask_image": picture(1, mode="L"), "strength": 0.75},
        "FluxFill*": {"image": picture(), "mask_image": picture(1, mode="L")},
    }
)
