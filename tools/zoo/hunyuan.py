"""Hunyuan-DiT, HunyuanImage 2.1 and HunyuanVideo (1.0 and 1.5)."""

from __future__ import annotations

import string

from diffusers import (
    AutoencoderKLHunyuanImage,
    AutoencoderKLHunyuanImageRefiner,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanDiT2DControlNetModel,
    HunyuanDiT2DModel,
    HunyuanImageTransformer2DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoTransformer3DModel,
)
from diffusers.guiders import AdaptiveProjectedMixGuidance, ClassifierFreeGuidance
from transformers import BertConfig, BertModel, BertTokenizer, ByT5Tokenizer, CLIPTextModel, T5Config, T5EncoderModel

from zoo.inputs import SPECIAL, picture
from zoo.registry import argument, component
from zoo.stable_diffusion import TOKENS, WIDTH, clip_text_config


CHANNELS = 4
FRAMES = 5  # the first alone, then four in a latent frame
SHORT_TEMPLATE = {"template": "video: {}.", "crop_start": 7}  # cropped are the bytes before the prompt
SPECIAL.update(
    {
        "HunyuanDiT*": {"use_resolution_binning": False},
        "HunyuanDiTControlNet*": {"control_image": picture()},
        "HunyuanImageRefiner*": {"image": [picture(seed, size=32) for seed in range(2)], "height": 32, "width": 32},
        "HunyuanVideo*": {"num_frames": FRAMES},
        "HunyuanVideoPipeline": {
            "prompt_template": SHORT_TEMPLATE,
            "max_sequence_length": TOKENS,
            "true_cfg_scale": 3.0,
            "negative_prompt": "blurry",
        },
        "HunyuanSkyreels*": {
            "image": [picture(0), picture(1)],  # one for each prompt
            "num_frames": FRAMES,
            "prompt_template": SHORT_TEMPLATE,
            "max_sequence_length": TOKENS,
        },
        "HunyuanVideoFramepack*": {
            "image": [picture(0), picture(1)],
            "latent_window_size": 2,
            "prompt_template": SHORT_TEMPLATE,
            "max_sequence_length": TOKENS,
        },
        "HunyuanVideo15ImageToVideo*": {"image": picture()},
    }
)


# ------------------------------------------------------------------------------------------------------------------ Hunyuan-DiT


@component("BertTokenizer")
def bert_tokenizer() -> BertTokenizer:
    letters = string.ascii_lowercase + string.digits + string.punctuation
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    return BertTokenizer(vocab={token: index for index, token in enumerate(tokens)}, model_max_length=TOKENS)


@component("BertModel")
def bert() -> BertModel:
    return BertModel(
        BertConfig(
            vocab_size=256,
            hidden_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=37,
            max_position_embeddings=77,
        )
    )


def _dit_settings() -> dict:
    return {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": CHANNELS,
        "patch_size": 2,
        "sample_size": 8,
        "hidden_size": 16,
        "mlp_ratio": 2.0,
        "cross_attention_dim": WIDTH,
        "cross_attention_dim_t5": WIDTH,
        "pooled_projection_dim": 8,
        "text_len": 77,
        "text_len_t5": 256,
        "activation_fn": "gelu-approximate",
        "use_style_cond_and_image_meta_size": True,
    }


@component("HunyuanDiT2DModel")
def hunyuan_dit() -> HunyuanDiT2DModel:
    return HunyuanDiT2DModel(**_dit_settings(), num_layers=2)


@component("HunyuanDiT2DControlNetModel")
def hunyuan_dit_controlnet() -> HunyuanDiT2DControlNetModel:
    return HunyuanDiT2DControlNetModel(**_dit_settings(), transformer_num_layers=2)


@argument("scheduler", "HunyuanDiT*")
def hunyuan_dit_scheduler() -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.03,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        steps_offset=1,
        clip_sample=False,
    )


# --------------------------------------------------------------------------------------------------- HunyuanImage, HunyuanVideo


@component("ByT5Tokenizer")
def byt5_tokenizer() -> ByT5Tokenizer:
    return ByT5Tokenizer()


@argument("text_encoder_2", "HunyuanImage*", "HunyuanVideo15*")
def byt5_encoder() -> T5EncoderModel:
    """As many tokens as there are bytes and sentinels; reads what a prompt wants written in the picture."""
    return T5EncoderModel(T5Config(vocab_size=400, d_model=WIDTH, d_kv=8, d_ff=37, num_layers=1, num_heads=2))


def _settings(**kwargs) -> dict:
    return {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "text_embed_dim": WIDTH,
        **kwargs,
    }


@component("HunyuanImageTransformer2DModel")
def hunyuan_image_transformer() -> HunyuanImageTransformer2DModel:
    return HunyuanImageTransformer2DModel(
        **_settings(num_single_layers=1, rope_axes_dim=(8, 8), text_embed_2_dim=WIDTH)
    )


@argument("transformer", "HunyuanImageRefiner*")
def hunyuan_image_refiner() -> HunyuanImageTransformer2DModel:
    """Three-dimensional, two frames in one, with the coarse picture's latents beside the noisy ones."""
    settings = _settings(
        in_channels=4 * CHANNELS, out_channels=2 * CHANNELS, num_single_layers=1, rope_axes_dim=(4, 6, 6)
    )
    return HunyuanImageTransformer2DModel(**settings, patch_size=(1, 1, 1), guidance_embeds=True)


@component("AutoencoderKLHunyuanImage")
def hunyuan_image_vae() -> AutoencoderKLHunyuanImage:
    return AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=CHANNELS,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=16,
        scaling_factor=0.75289,
    )


@component("AutoencoderKLHunyuanImageRefiner")
def hunyuan_image_refiner_vae() -> AutoencoderKLHunyuanImageRefiner:
    return AutoencoderKLHunyuanImageRefiner(
        latent_channels=CHANNELS,
        block_out_channels=(16, 16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )


@argument("guider", "HunyuanImage*")
def hunyuan_image_guider() -> AdaptiveProjectedMixGuidance:
    return AdaptiveProjectedMixGuidance(guidance_scale=3.0)


@argument("ocr_guider", "HunyuanImage*")
def hunyuan_image_ocr_guider() -> AdaptiveProjectedMixGuidance:
    return AdaptiveProjectedMixGuidance(guidance_scale=3.0)


@argument("text_encoder_2", "HunyuanVideo*", "HunyuanSkyreels*", "Kandinsky5*")
def clip_of_77_tokens() -> CLIPTextModel:
    """The length of the prompt stands in the pipeline."""
    config = clip_text_config()
    config.max_position_embeddings = 77
    return CLIPTextModel(config)


@component("AutoencoderKLHunyuanVideo")
def hunyuan_video_vae(levels: int = 3) -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        latent_channels=CHANNELS,
        down_block_types=("HunyuanVideoDownBlock3D",) * levels,
        up_block_types=("HunyuanVideoUpBlock3D",) * levels,
        block_out_channels=(8,) * levels,
        layers_per_block=1,
        norm_num_groups=4,
        spatial_compression_ratio=2 ** (levels - 1),
        temporal_compression_ratio=4,
    )


def _video_settings(**kwargs) -> dict:
    return _settings(num_single_layers=1, pooled_projection_dim=WIDTH, rope_axes_dim=(4, 6, 6), **kwargs)


@component("HunyuanVideoTransformer3DModel")
def hunyuan_video_transformer(**kwargs) -> HunyuanVideoTransformer3DModel:
    return HunyuanVideoTransformer3DModel(**_video_settings(**kwargs))


@argument("transformer", "HunyuanSkyreels*")
def hunyuan_skyreels_transformer() -> HunyuanVideoTransformer3DModel:
    return HunyuanVideoTransformer3DModel(**_video_settings(in_channels=2 * CHANNELS, guidance_embeds=False))


@component("HunyuanVideoFramepackTransformer3DModel")
def hunyuan_framepack_transformer() -> HunyuanVideoFramepackTransformer3DModel:
    return HunyuanVideoFramepackTransformer3DModel(
        **_video_settings(has_image_proj=True, image_proj_dim=WIDTH, has_clean_x_embedder=True)
    )


@component("AutoencoderKLHunyuanVideo15")
def hunyuan_video15_vae() -> AutoencoderKLHunyuanVideo15:
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=CHANNELS,
        block_out_channels=(16, 16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    vae.enable_slicing()  # its attention mask fits a batch of one only
    return vae


@component("HunyuanVideo15Transformer3DModel")
def hunyuan_video15_transformer() -> HunyuanVideo15Transformer3DModel:
    return HunyuanVideo15Transformer3DModel(
        **_settings(in_channels=2 * CHANNELS + 1, rope_axes_dim=(4, 6, 6)),
        text_embed_2_dim=WIDTH,
        image_embed_dim=WIDTH,
        target_size=16,
        task_type="t2v",
    )


@argument("transformer", "HunyuanVideo15ImageToVideo*")
def hunyuan_video15_image_transformer() -> HunyuanVideo15Transformer3DModel:
    return HunyuanVideo15Transformer3DModel(
        **_settings(in_channels=2 * CHANNELS + 1, rope_axes_dim=(4, 6, 6)),
        text_embed_2_dim=WIDTH,
        image_embed_dim=WIDTH,
        target_size=16,
        task_type="i2v",
    )


@argument("guider", "HunyuanVideo15*")
def hunyuan_video15_guider() -> ClassifierFreeGuidance:
    return ClassifierFreeGuidance(guidance_scale=3.0)


@argument("scheduler", "HunyuanImage*", "HunyuanVideo*", "HunyuanSkyreels*")
def hunyuan_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=5.0)
