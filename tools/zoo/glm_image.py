"""GLM-Image: a picture's tokens come from a language model, the diffusion transformer draws after them.

The language model is left out: `prior_token_ids` are given, as a caller may who made them with `generate_prior_tokens`.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, GlmImageTransformer2DModel
from transformers import T5EncoderModel

from zoo.hunyuan import byt5_encoder
from zoo.inputs import SIZE, SPECIAL
from zoo.registry import argument, component
from zoo.stable_diffusion import WIDTH, autoencoder_kl


CHANNELS = 4
CODEBOOK = 32
TOKENS = (SIZE // 4) ** 2  # of a picture: a token is a patch of two by two latents
SPECIAL.update(
    {
        "GlmImage*": {
            "prior_token_ids": torch.arange(2 * TOKENS).remainder(CODEBOOK - 1).reshape(2, TOKENS),
            "max_sequence_length": 32,
        }
    }
)


@component("GlmImageTransformer2DModel")
def glm_image_transformer() -> GlmImageTransformer2DModel:
    return GlmImageTransformer2DModel(
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=2,
        prior_vq_quantizer_codebook_size=CODEBOOK,
    )


@argument("vae", "GlmImage*")
def glm_image_vae() -> AutoencoderKL:
    return autoencoder_kl(
        latent_channels=CHANNELS, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 1.5, 2.0, 0.5]
    )


@argument("text_encoder", "GlmImage*")
def glm_image_text_encoder() -> T5EncoderModel:
    """Reads what stands in quotes, letter by letter."""
    return byt5_encoder()


@argument("processor", "GlmImage*")
@argument("vision_language_encoder", "GlmImage*")
def left_out() -> None:
    return None


@argument("scheduler", "GlmImage*")
def glm_image_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
    )
