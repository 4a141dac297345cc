"""Motif-Video, on a T5-Gemma 2."""

from __future__ import annotations

from diffusers import FlowMatchEulerDiscreteScheduler, MotifVideoTransformer3DModel
from diffusers.guiders import ClassifierFreeGuidance
from transformers import SiglipImageProcessorPil, T5Gemma2Encoder, T5Gemma2EncoderConfig

from zoo.inputs import SPECIAL, picture
from zoo.language_models import language_settings
from zoo.registry import argument, component
from zoo.stable_diffusion import TOKENS, WIDTH


CHANNELS = 4
FRAMES = 5
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
SPECIAL.update(
    {
        "MotifVideo*": {"num_frames": FRAMES, "max_sequence_length": TOKENS, "negative_prompt": "blurry"},
        "MotifVideoImage2Video*": {"image": picture()},
    }
)


@component("T5Gemma2Encoder")
def t5_gemma2_encoder() -> T5Gemma2Encoder:
    config = T5Gemma2EncoderConfig(
        text_config={"model_type": "t5gemma2_text", **language_settings(dropout_rate=0.0)},
        vision_config={"model_type": "siglip_vision_model", **VISION},
        mm_tokens_per_image=4,
        image_token_index=511,
        boi_token_index=509,
        eoi_token_index=510,
    )
    return T5Gemma2Encoder(config, eoi_token_index=510)


@component("MotifVideoTransformer3DModel")
def motif_transformer(**kwargs) -> MotifVideoTransformer3DModel:
    return MotifVideoTransformer3DModel(
        in_channels=2 * CHANNELS + 1,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=WIDTH,
        rope_axes_dim=(4, 6, 6),
        **kwargs,
    )


@argument("transformer", "MotifVideoImage2Video*")
def motif_picture_transformer() -> MotifVideoTransformer3DModel:
    return motif_transformer(image_embed_dim=VISION["hidden_size"])


@argument("guider", "MotifVideo*")
def motif_guider() -> ClassifierFreeGuidance:
    return ClassifierFreeGuidance(guidance_scale=3.0)


@argument("feature_extractor", "MotifVideo*")
def motif_feature_extractor() -> SiglipImageProcessorPil:
    return SiglipImageProcessorPil(size={"height": 16, "width": 16})


@argument("scheduler", "MotifVideo*")
def motif_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=5.0)
