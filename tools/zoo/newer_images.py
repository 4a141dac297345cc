"""The newest text-to-image and editing families: GLM-Image, Nucleus-Image, DreamLite, Ideogram 4, Qwen-Image 2.1, Bria FIBO 2, Z-Image Omni."""

from __future__ import annotations

from diffusers import (
    AutoencoderKLQwenImage21,
    AutoencoderTiny,
    BriaFibo2Transformer2DModel,
    DreamLiteUNetModel,
    FlowMatchEulerDiscreteScheduler,
    Ideogram4Transformer2DModel,
    NucleusMoEImageTransformer2DModel,
    QwenImage21Transformer2DModel,
    ZImageTransformer2DModel,
)
from transformers import (
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Siglip2ImageProcessorPil,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)

from zoo.inputs import SPECIAL
from zoo.language_models import qwen3_vl, qwen3_vl_model
from zoo.registry import argument, component
from zoo.stable_diffusion import WIDTH
from zoo.zimage import zimage_transformer


CHANNELS = 4
# The layers of the text encoder that Ideogram and Bria read stand in their pipelines: the last is the 36th.
SPECIAL.update(
    {
        "NucleusMoEImage*": {"return_index": -1, "negative_prompt": "blurry"},
        "QwenImage21*": {
            "true_cfg_scale": 3.0,
            "negative_prompt": "blurry",
            "guidance_scale": None,
            "height": 64,
            "width": 64,
            "use_kv_cache": False,  # a cache filled in one step and read in the next
        },
        "BriaFibo2*": {"max_sequence_length": None},
        "Ideogram4*": {"guidance_schedule": (3.0, 3.0, 3.0, 2.0), "guidance_scale": None, "max_sequence_length": 64},
    }
)


def _settings(**kwargs) -> dict:
    return {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, **kwargs}


@component("NucleusMoEImageTransformer2DModel")
def nucleus_transformer() -> NucleusMoEImageTransformer2DModel:
    return NucleusMoEImageTransformer2DModel(
        **_settings(num_layers=2),
        in_channels=4 * CHANNELS,
        out_channels=CHANNELS,
        num_key_value_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        mlp_ratio=2.0,
        num_experts=2,
        moe_intermediate_dim=16,
        capacity_factors=[2.0, 2.0],
        dense_moe_strategy="leave_first_three_and_last_block_dense",
    )


@component("QwenImage21Transformer2DModel")
def qwenimage21_transformer() -> QwenImage21Transformer2DModel:
    return QwenImage21Transformer2DModel(
        **_settings(),
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        context_in_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )


@component("AutoencoderKLQwenImage21")
def qwenimage21_vae() -> AutoencoderKLQwenImage21:
    return AutoencoderKLQwenImage21(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1] * 5,
        num_res_blocks=1,
        temperal_downsample=[False] * 4,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 1.5, 2.0, 0.5],
        scale_factor_temporal=1,
        scale_factor_spatial=16,
    )


@component("Ideogram4Transformer2DModel")
def ideogram_transformer() -> Ideogram4Transformer2DModel:
    return Ideogram4Transformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        intermediate_size=32,
        adaln_dim=8,
        llm_features_dim=13 * WIDTH,
        mrope_section=(4, 2, 2),
    )


@argument("text_encoder", "Ideogram4*")
def ideogram_text_encoder() -> Qwen3VLModel:
    return qwen3_vl_model(layers=36)


@argument("text_encoder", "BriaFibo2*")
def bria_fibo2_text_encoder() -> Qwen3VLForConditionalGeneration:
    return qwen3_vl(layers=36)


@argument("prompt_enhancer_head", "Ideogram4*")
def no_prompt_enhancer() -> None:
    return None


@component("DreamLiteUNetModel")
def dreamlite_unet() -> DreamLiteUNetModel:
    return DreamLiteUNetModel(
        sample_size=8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(16, 16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        ff_mult=2,
    )


@component("AutoencoderTiny")
def autoencoder_tiny() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=CHANNELS,
    )


@component("BriaFibo2Transformer2DModel")
def bria_fibo2_transformer() -> BriaFibo2Transformer2DModel:
    return BriaFibo2Transformer2DModel(
        in_channels=CHANNELS,
        dim=32,
        n_layers=5,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=3 * WIDTH,
        injection_layer_ids=(0, 1, 2, 3, 4),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=4,
        gist_min_text_len=4,
        gist_max_text_len=64,
        axes_dims=(4, 6, 6),
        axes_lens=(1024, 32, 32),
    )


@component("Siglip2VisionModel")
def siglip2() -> Siglip2VisionModel:
    return Siglip2VisionModel(
        Siglip2VisionConfig(
            hidden_size=WIDTH,
            intermediate_size=37,
            num_hidden_layers=1,
            num_attention_heads=2,
            patch_size=4,
            num_patches=16,
        )
    )


@component("Siglip2ImageProcessorPil", "Siglip2ImageProcessor")
def siglip2_processor() -> Siglip2ImageProcessorPil:
    return Siglip2ImageProcessorPil(patch_size=4, max_num_patches=16)


@argument("transformer", "ZImageOmni*")
def zimage_omni_transformer() -> ZImageTransformer2DModel:
    return zimage_transformer(siglip_feat_dim=WIDTH)


@argument("scheduler", "NucleusMoE*", "QwenImage21*", "DreamLite*", "BriaFibo2*")
def shifted_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


@argument("scheduler", "Ideogram4*")
def static_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler()
