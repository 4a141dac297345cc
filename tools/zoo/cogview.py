"""CogView4 (GLM) and CogView3-Plus (T5)."""

from __future__ import annotations

from diffusers import (
    AutoencoderKL,
    CogVideoXDDIMScheduler,
    CogView3PlusTransformer2DModel,
    CogView4Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from tokenizers.processors import TemplateProcessing
from transformers import Qwen2Tokenizer

from zoo.inputs import SPECIAL, picture
from zoo.language_models import qwen_tokenizer
from zoo.registry import argument, component
from zoo.stable_diffusion import WIDTH, autoencoder_kl


CHANNELS = 4
SPECIAL.update(
    {"CogView*": {"max_sequence_length": 16}, "CogView4Control*": {"control_image": picture()}},
)


def _settings() -> dict:
    return {
        "patch_size": 2,
        "out_channels": CHANNELS,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "text_embed_dim": WIDTH,
        "time_embed_dim": 8,
        "condition_dim": 2,
        "pos_embed_max_size": 8,
        "sample_size": 8,
    }


@component("CogView4Transformer2DModel")
def cogview4_transformer() -> CogView4Transformer2DModel:
    return CogView4Transformer2DModel(in_channels=CHANNELS, **_settings(), rope_axes_dim=(8, 8))


@argument("transformer", "CogView4Control*")
def cogview4_control_transformer() -> CogView4Transformer2DModel:
    """The control picture's latents are channels beside the noisy ones."""
    return CogView4Transformer2DModel(in_channels=2 * CHANNELS, **_settings(), rope_axes_dim=(8, 8))


@component("CogView3PlusTransformer2DModel")
def cogview3_transformer() -> CogView3PlusTransformer2DModel:
    return CogView3PlusTransformer2DModel(in_channels=CHANNELS, **_settings())


@argument("tokenizer", "CogView4*")
def glm_tokenizer() -> Qwen2Tokenizer:
    """Begins each text with a token of its own, as GLM's does, so that no text is empty."""
    tokenizer = qwen_tokenizer()
    start = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, tokenizer.convert_tokens_to_ids(start))]
    )
    return tokenizer


@argument("vae", "CogView*")
def cogview_vae() -> AutoencoderKL:
    return autoencoder_kl(latent_channels=CHANNELS, scaling_factor=1.0, shift_factor=0.0)


@argument("scheduler", "CogView4*")
def cogview4_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
    )


@argument("scheduler", "CogView3*")
def cogview3_scheduler() -> CogVideoXDDIMScheduler:
    return CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", set_alpha_to_one=True
    )
