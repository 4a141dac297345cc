"""FLUX.2 and FLUX.2 Klein: text from several layers of a language model, latents patched by the VAE's own batch norm."""

from __future__ import annotations

from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from transformers import Qwen2Tokenizer

from zoo.inputs import SPECIAL
from zoo.language_models import qwen_tokenizer
from zoo.registry import argument, component
from zoo.stable_diffusion import WIDTH


LATENT_CHANNELS = 4
TEXT_LAYERS = (1, 2)  # of the language model; their hidden states stand side by side
TEXT_LENGTH = 32  # bytes
# The real template begins with a system message, behind which a tiny number of tokens would end before the prompt.
PROMPT_ONLY = (
    "{% for message in messages if message.role == 'user' %}{% for part in message.content %}{{ part.text }}"
    "{% endfor %}{% endfor %}"
)


@component("Flux2Transformer2DModel")
def flux2_transformer(**kwargs) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        **{
            "in_channels": 4 * LATENT_CHANNELS,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": len(TEXT_LAYERS) * WIDTH,
            "timestep_guidance_channels": 16,
            "axes_dims_rope": (2, 2, 2, 2),
            **kwargs,
        }
    )


@argument("transformer", "Flux2Klein*")
def klein_transformer() -> Flux2Transformer2DModel:
    return flux2_transformer(guidance_embeds=False)


@component("AutoencoderKLFlux2")
@argument("vae", "Flux2*")
def flux2_vae() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=16,
    )


@argument("tokenizer", "Flux2Pipeline")
def flux2_tokenizer() -> Qwen2Tokenizer:
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = PROMPT_ONLY
    return tokenizer


SPECIAL.update({"Flux2*": {"max_sequence_length": TEXT_LENGTH, "text_encoder_out_layers": TEXT_LAYERS}})
