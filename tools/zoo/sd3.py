"""Stable Diffusion 3: a joint transformer over pictures and text, two CLIPs and a T5, flow matching."""

from __future__ import annotations

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from transformers import T5EncoderModel

from zoo.inputs import SPECIAL
from zoo.registry import argument, component
from zoo.stable_diffusion import TOKENS, WIDTH, autoencoder_kl
from zoo.text import t5_encoder


INPAINT_CHANNELS = 16


def sd3_transformer(**kwargs) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        **{
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_projection_dim": 16,
            "joint_attention_dim": 2 * WIDTH,
            "pooled_projection_dim": 2 * WIDTH,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
            **kwargs,
        }
    )


@component("SD3Transformer2DModel")
def sd3_medium() -> SD3Transformer2DModel:
    return sd3_transformer()


@argument("transformer", "StableDiffusion3Inpaint*")
def sd3_inpaint_transformer() -> SD3Transformer2DModel:
    """With the number of channels that this pipeline insists on."""
    return sd3_transformer(in_channels=INPAINT_CHANNELS, out_channels=INPAINT_CHANNELS)


@argument("text_encoder_3", "StableDiffusion3*")
def wide_t5() -> T5EncoderModel:
    """As wide as both CLIPs side by side, which the pipeline pads to the width of the T5."""
    return t5_encoder(d_model=2 * WIDTH)


@argument("vae", "StableDiffusion3*")
def sd3_vae(**kwargs) -> AutoencoderKL:
    return autoencoder_kl(
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5305, **kwargs
    )


@argument("vae", "StableDiffusion3Inpaint*")
def sd3_inpaint_vae() -> AutoencoderKL:
    return sd3_vae(latent_channels=INPAINT_CHANNELS)


@component("FlowMatchEulerDiscreteScheduler")
def flow_scheduler(**kwargs) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **kwargs})


SPECIAL.update({"StableDiffusion3*": {"max_sequence_length": TOKENS}})
