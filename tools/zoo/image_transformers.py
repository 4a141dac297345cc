"""Text-to-image transformers with a language model as text encoder: PRX, Krea 2, ERNIE-Image, OmniGen."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Krea2Transformer2DModel,
    OmniGenTransformer2DModel,
    PRXTransformer2DModel,
)
from transformers import Qwen2Tokenizer, T5GemmaConfig, T5GemmaEncoderModel, T5GemmaModuleConfig
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

from zoo.inputs import SPECIAL
from zoo.language_models import VOCABULARY, language_settings, qwen_tokenizer
from zoo.registry import argument, component
from zoo.stable_diffusion import TOKENS, WIDTH, autoencoder_kl


CHANNELS = 4
SPECIAL.update(
    {
        # its call gives the network one timestep for each half of a guided batch, which fits one prompt only
        "PRX*": {"use_resolution_binning": False, "guidance_scale": 1.0},
        "PRXPipeline": {"skip_text_cleaning": True},
        "ErnieImage*": {"use_pe": False},
    }
)


def fill_zeros(model: torch.nn.Module) -> None:
    """Random numbers into weights that are zero before training: behind them, nothing else would have a gradient."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)


@component("PRXTransformer2DModel")
def prx_transformer(**kwargs) -> PRXTransformer2DModel:
    model = PRXTransformer2DModel(
        **{
            "in_channels": CHANNELS,
            "patch_size": 2,
            "context_in_dim": WIDTH,
            "hidden_size": 32,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 1,
            "axes_dim": [8, 8],
            **kwargs,
        }
    )
    fill_zeros(model)
    return model


@argument("transformer", "PRXPixel*")
def prx_pixel_transformer() -> PRXTransformer2DModel:
    return prx_transformer(in_channels=3, patch_size=4)


@component("T5GemmaEncoder")
def t5_gemma_encoder() -> T5GemmaEncoder:
    settings = T5GemmaModuleConfig(**language_settings())
    config = T5GemmaConfig(encoder=settings, decoder=settings, is_encoder_decoder=False, vocab_size=VOCABULARY)
    return T5GemmaEncoderModel(config).encoder


argument("text_encoder", "PRX*")(t5_gemma_encoder)


@argument("tokenizer", "PRX*")
def prx_tokenizer() -> Qwen2Tokenizer:
    tokenizer = qwen_tokenizer()
    tokenizer.model_max_length = TOKENS
    return tokenizer


@component("Krea2Transformer2DModel")
def krea2_transformer() -> Krea2Transformer2DModel:
    return Krea2Transformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=WIDTH,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )


@argument("text_encoder_select_layers", "Krea2*")
def krea2_text_layers() -> tuple[int, ...]:
    return (1, 2)


@argument("scheduler", "Krea2*")
def krea2_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)


@component("ErnieImageTransformer2DModel")
def ernie_transformer() -> ErnieImageTransformer2DModel:
    model = ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=1,
        ffn_hidden_size=32,
        in_channels=4 * CHANNELS,
        out_channels=4 * CHANNELS,
        text_in_dim=WIDTH,
        rope_axes_dim=(4, 6, 6),
    )
    fill_zeros(model)
    return model


@argument("pe", "ErnieImage*")
@argument("pe_tokenizer", "ErnieImage*")
def no_prompt_enhancer() -> None:
    return None


@component("OmniGenTransformer2DModel")
def omnigen_transformer() -> OmniGenTransformer2DModel:
    return OmniGenTransformer2DModel(
        in_channels=CHANNELS,
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        num_layers=1,
        pad_token_id=0,
        vocab_size=VOCABULARY,
        time_step_dim=16,
        rope_scaling={"long_factor": [1.0] * 8, "short_factor": [1.0] * 8, "type": "su"},
    )


@argument("vae", "OmniGen*", "PRXPipeline")
def vae_with_shift() -> AutoencoderKL:
    return autoencoder_kl(latent_channels=CHANNELS, scaling_factor=0.3611, shift_factor=0.1159)


@argument("scheduler", "OmniGen*")
def omnigen_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1)


@argument("scheduler", "ErnieImage*", "PRX*")
def shifted_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)
