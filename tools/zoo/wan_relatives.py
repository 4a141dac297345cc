"""Families on Wan's VAE: SkyReels V2, ChronoEdit, Lucy Edit, AnyFlow, Helios, SANA-Video."""

from __future__ import annotations

from diffusers import (
    AnyFlowFARTransformer3DModel,
    AnyFlowTransformer3DModel,
    ChronoEditTransformer3DModel,
    DPMSolverMultistepScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeliosScheduler,
    HeliosTransformer3DModel,
    SanaVideoTransformer3DModel,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)

from zoo.inputs import SPECIAL, picture
from zoo.registry import argument, component
from zoo.stable_diffusion import TOKENS, WIDTH
from zoo.text import t5_tokenizer
from zoo.wan import CHANNELS, FRAMES, autoencoder_kl_wan, wan_settings


VIDEO = [picture(frame) for frame in range(FRAMES)]
SPECIAL.update(
    {
        "SkyReelsV2*": {"num_frames": FRAMES, "max_sequence_length": TOKENS},
        "SkyReelsV2*ImageToVideo*": {"image": picture()},
        # three latent frames: with two, one of them a picture, the schedules of its frames would be one
        "SkyReelsV2DiffusionForcing*": {"num_frames": 9, "base_num_frames": 9},
        "SkyReelsV2*VideoToVideo*": {"video": VIDEO, "num_frames": 13, "overlap_history": 1},
        "ChronoEdit*": {"image": picture(), "num_frames": FRAMES, "max_sequence_length": TOKENS},
        "LucyEdit*": {"video": [VIDEO, VIDEO], "num_frames": FRAMES, "max_sequence_length": TOKENS},
        "AnyFlow*": {"num_frames": FRAMES, "max_sequence_length": TOKENS},
        "Helios*": {"num_frames": FRAMES, "max_sequence_length": TOKENS, "num_latent_frames_per_chunk": 2},
        "SanaVideo*": {"frames": FRAMES, "use_resolution_binning": False, "complex_human_instruction": []},
        "SanaImageToVideo*": {
            "image": picture(),
            "frames": FRAMES,
            "use_resolution_binning": False,
            "complex_human_instruction": [],
        },
    }
)


argument("tokenizer", "SkyReelsV2*", "ChronoEdit*", "LucyEdit*", "AnyFlow*", "Helios*")(t5_tokenizer)


@component("SkyReelsV2Transformer3DModel")
def skyreels_transformer() -> SkyReelsV2Transformer3DModel:
    return SkyReelsV2Transformer3DModel(**wan_settings())


@argument("transformer", "SkyReelsV2ImageToVideo*")
def skyreels_image_transformer() -> SkyReelsV2Transformer3DModel:
    return SkyReelsV2Transformer3DModel(
        **wan_settings(in_channels=2 * CHANNELS + 4, image_dim=WIDTH, added_kv_proj_dim=24)
    )


@component("ChronoEditTransformer3DModel")
def chrono_transformer() -> ChronoEditTransformer3DModel:
    return ChronoEditTransformer3DModel(
        **wan_settings(in_channels=2 * CHANNELS + 4, image_dim=WIDTH, added_kv_proj_dim=24), rope_temporal_skip_len=2
    )


@argument("transformer", "LucyEdit*")
def lucy_transformer() -> WanTransformer3DModel:
    """The video to edit is channels beside the noisy ones."""
    return WanTransformer3DModel(**wan_settings(in_channels=2 * CHANNELS))


@argument("transformer_2", "LucyEdit*")
def no_second_expert() -> None:
    return None


@component("AnyFlowTransformer3DModel")
def anyflow_transformer() -> AnyFlowTransformer3DModel:
    return AnyFlowTransformer3DModel(**wan_settings())


@component("AnyFlowFARTransformer3DModel")
def anyflow_far_transformer() -> AnyFlowFARTransformer3DModel:
    return AnyFlowFARTransformer3DModel(**wan_settings(), chunk_partition=(1, 1), full_chunk_limit=2)


@argument("scheduler", "AnyFlow*")
def anyflow_scheduler() -> FlowMapEulerDiscreteScheduler:
    return FlowMapEulerDiscreteScheduler()


@component("HeliosTransformer3DModel")
def helios_transformer() -> HeliosTransformer3DModel:
    settings = wan_settings()
    del settings["rope_max_seq_len"]
    return HeliosTransformer3DModel(**settings, rope_dim=(4, 4, 4))


@argument("scheduler", "Helios*")
def helios_scheduler() -> HeliosScheduler:
    return HeliosScheduler()


@component("SanaVideoTransformer3DModel")
def sana_video_transformer() -> SanaVideoTransformer3DModel:
    return SanaVideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=WIDTH,
        sample_size=4,
        rope_max_seq_len=32,
    )


argument("vae", "SanaVideo*", "SanaImageToVideo*")(autoencoder_kl_wan)


@argument("scheduler", "SkyReelsV2*")
def skyreels_scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)


@argument("scheduler", "SanaVideo*")
def sana_video_scheduler() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)


@argument("scheduler", "ChronoEdit*", "LucyEdit*", "SanaImageToVideo*")
def shifted_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=5.0)
