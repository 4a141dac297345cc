"""Wan: text to video with one expert (2.1), with one for high and one for low noise (2.2), and from pictures or videos."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanAnimateTransformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from transformers import CLIPVisionConfig, CLIPVisionModel, T5Tokenizer

from zoo.inputs import SPECIAL, picture
from zoo.registry import argument, component
from zoo.stable_diffusion import WIDTH
from zoo.text import t5_tokenizer


CHANNELS = 4  # of the latents
FRAMES = 5  # the first alone, then four in a latent frame
VIDEO = [picture(seed) for seed in range(FRAMES)]
SPECIAL.update(
    {
        "Wan*": {"num_frames": FRAMES, "max_sequence_length": 16},
        "WanImageToVideo*": {"image": picture()},
        "WanVideoToVideo*": {"video": VIDEO, "num_frames": None},
        "WanVACE*": {"video": VIDEO, "mask": [picture(seed, mode="L") for seed in range(FRAMES)]},
        "WanAnimate*": {
            "image": picture(),
            "guidance_scale": 3.0,
            "pose_video": VIDEO,
            "face_video": VIDEO,
            "num_frames": None,
            "segment_frame_length": FRAMES,
        },
    }
)


@component("AutoencoderKLWan")
def autoencoder_kl_wan() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 1.5, 2.0, 0.5],
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    )


def wan_settings(**kwargs) -> dict:
    return {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "text_dim": WIDTH,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 1,
        "rope_max_seq_len": 32,
        **kwargs,
    }


@component("WanTransformer3DModel")
def wan_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(**wan_settings())


@argument("transformer", "WanImageToVideo*")
def wan_image_transformer() -> WanTransformer3DModel:
    """Wan 2.1's: the picture comes as latents with a mask (4 + 4 more channels here) and as CLIP embeddings."""
    return WanTransformer3DModel(
        **wan_settings(in_channels=2 * CHANNELS + 4, image_dim=WIDTH, added_kv_proj_dim=24, pos_embed_seq_len=None)
    )


@component("WanVACETransformer3DModel")
def wan_vace_transformer() -> WanVACETransformer3DModel:
    return WanVACETransformer3DModel(**wan_settings(vace_layers=[0], vace_in_channels=2 * CHANNELS + 16))


@component("WanAnimateTransformer3DModel")
def wan_animate_transformer() -> WanAnimateTransformer3DModel:
    return WanAnimateTransformer3DModel(
        **wan_settings(
            in_channels=2 * CHANNELS + 4,
            latent_channels=CHANNELS,
            image_dim=WIDTH,
            num_layers=2,
            motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
            motion_encoder_size=16,
            motion_style_dim=8,
            motion_dim=4,
            motion_encoder_dim=8,
            face_encoder_hidden_dim=16,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=2,
        )
    )


@component("CLIPVisionModel")
def clip_vision_model() -> CLIPVisionModel:
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            projection_dim=WIDTH,
        )
    )


@argument("tokenizer", "Wan*")
def wan_tokenizer() -> T5Tokenizer:
    return t5_tokenizer()


@argument("transformer_2", "Wan*")
@argument("boundary_ratio", "Wan*")
def one_expert() -> None:
    return None


def two_experts() -> dict:
    """What `build(WanPipeline, **two_experts())` needs for a Wan 2.2: both experts are used in a call of four steps."""
    torch.manual_seed(1)
    return {"transformer_2": wan_transformer(), "boundary_ratio": 0.875}


@argument("scheduler", "Wan*")
def wan_scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
