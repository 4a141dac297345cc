"""LTX-2: video and sound denoised side by side, on the hidden states of a Gemma 3."""

from __future__ import annotations

from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from zoo.inputs import SPECIAL, picture
from zoo.language_models import language_settings
from zoo.registry import argument, component
from zoo.stable_diffusion import WIDTH


CHANNELS = 4
SOUND_CHANNELS = 2
MEL_BINS = 16
SPECIAL.update(
    {
        "LTX2*": {
            "num_frames": 5,
            "frame_rate": 25.0,
            "height": 32,
            "width": 32,
            "max_sequence_length": 16,
            "spatio_temporal_guidance_blocks": [0],
        },
        "LTX2DFR*": {"spatio_temporal_guidance_blocks": None},
        "LTX2ImageToVideo*": {"image": [picture(seed, size=32) for seed in range(2)], "image_crf": 0},
    }
)


@component("Gemma3ForConditionalGeneration")
def gemma3() -> Gemma3ForConditionalGeneration:
    config = Gemma3Config(
        text_config={"model_type": "gemma3_text", **language_settings()},
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
    )
    return Gemma3ForConditionalGeneration(config)


@component("LTX2TextConnectors")
def connectors() -> LTX2TextConnectors:
    stream = {
        "num_attention_heads": 2,
        "attention_head_dim": WIDTH // 2,
        "num_layers": 1,
        "num_learnable_registers": None,
    }
    return LTX2TextConnectors(
        caption_channels=WIDTH,
        text_proj_in_factor=3,
        **{f"video_connector_{name}": value for name, value in stream.items()},
        **{f"audio_connector_{name}": value for name, value in stream.items()},
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
    )


@component("AutoencoderKLLTX2Video")
def video_vae() -> AutoencoderKLLTX2Video:
    return AutoencoderKLLTX2Video(
        latent_channels=CHANNELS,
        block_out_channels=(8,),
        down_block_types=("LTX2VideoDownBlock3D",),
        decoder_block_out_channels=(8,),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatiotemporal",),
        upsample_type=("spatiotemporal",),
        upsample_residual=(False,),
        upsample_factor=(1,),
    )


@component("AutoencoderKLLTX2Audio")
def audio_vae() -> AutoencoderKLLTX2Audio:
    return AutoencoderKLLTX2Audio(
        base_channels=8,
        ch_mult=(1,),
        num_res_blocks=1,
        resolution=32,
        latent_channels=SOUND_CHANNELS,
        mel_bins=MEL_BINS,
    )


@component("LTX2Vocoder")
def vocoder() -> LTX2Vocoder:
    return LTX2Vocoder(
        in_channels=2 * MEL_BINS,
        hidden_channels=32,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    )


@component("LTX2VideoTransformer3DModel")
def ltx2_transformer() -> LTX2VideoTransformer3DModel:
    return LTX2VideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=SOUND_CHANNELS * MEL_BINS // 4,
        audio_out_channels=SOUND_CHANNELS * MEL_BINS // 4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=1,
        caption_channels=WIDTH,
        rope_double_precision=False,
    )


@argument("audio_scheduler", "LTX2*")
@argument("prompt_enhancer", "LTX2*")
@argument("processor", "LTX2*")
@argument("duration_head", "LTX2*")
def nothing() -> None:
    return None


@argument("scheduler", "LTX2*")
def ltx2_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )
