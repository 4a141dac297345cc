"""Video families on a T5: LTX-Video, CogVideoX, Mochi, Allegro, Latte."""

from __future__ import annotations

from diffusers import (
    AllegroTransformer3DModel,
    AutoencoderKLAllegro,
    AutoencoderKLCogVideoX,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    CogVideoXDDIMScheduler,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LatteTransformer3DModel,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
)

from zoo.inputs import SPECIAL, picture
from zoo.registry import argument, component
from zoo.stable_diffusion import TOKENS, WIDTH, ddim_scheduler


CHANNELS = 4
FRAMES = 9
PICTURES = [picture(seed, size=32) for seed in range(2)]  # one for each prompt
VIDEOS = [[picture(seed + frame) for frame in range(5)] for seed in range(2)]
SPECIAL.update(
    {
        "LTXPipeline": {"num_frames": FRAMES, "height": 32, "width": 32, "max_sequence_length": TOKENS},
        "LTXImageToVideo*": {
            "image": PICTURES,
            "num_frames": FRAMES,
            "height": 32,
            "width": 32,
            "max_sequence_length": TOKENS,
        },
        "LTXCondition*": {
            "image": PICTURES,
            "num_frames": FRAMES,
            "height": 32,
            "width": 32,
            "max_sequence_length": TOKENS,
        },
        "LTXI2VLong*": {"num_frames": FRAMES, "height": 32, "width": 32, "max_sequence_length": TOKENS},
        "CogVideoX*": {"num_frames": 5, "max_sequence_length": TOKENS},
        "CogVideoXImageToVideo*": {"image": PICTURES},
        "CogVideoXVideoToVideo*": {"video": VIDEOS, "num_frames": None, "strength": 0.8},
        "CogVideoXFunControl*": {"control_video": VIDEOS, "num_frames": None},
        "Mochi*": {"num_frames": 3, "max_sequence_length": TOKENS},
        "Allegro*": {
            "height": 32,
            "width": 32,
            "num_frames": 4,
            "clean_caption": False,
            "max_sequence_length": TOKENS,
        },
        "Latte*": {"video_length": 2, "clean_caption": False},
    }
)


@component("AutoencoderKLLTXVideo")
def ltx_vae() -> AutoencoderKLLTXVideo:
    return AutoencoderKLLTXVideo(
        latent_channels=CHANNELS,
        block_out_channels=(8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False, False, False),
        downsample_type=("conv", "conv"),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        patch_size=2,
    )


@component("LTXVideoTransformer3DModel")
def ltx_transformer() -> LTXVideoTransformer3DModel:
    return LTXVideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=WIDTH,
    )


@argument("scheduler", "LTX*")
def ltx_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )


@argument("scheduler", "LTXCondition*", "LTXI2VLong*")
def ltx_static_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler()


@component("AutoencoderKLCogVideoX")
def cogvideox_vae() -> AutoencoderKLCogVideoX:
    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8),
        latent_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=2,
        sample_height=16,
        sample_width=16,
    )


def cogvideox_transformer(channels: int) -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=channels,
        out_channels=CHANNELS,
        time_embed_dim=4,
        text_embed_dim=WIDTH,
        num_layers=1,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        max_text_seq_length=TOKENS,
        use_rotary_positional_embeddings=True,
    )


@component("CogVideoXTransformer3DModel")
def cogvideox_text_transformer() -> CogVideoXTransformer3DModel:
    return cogvideox_transformer(CHANNELS)


@argument("transformer", "CogVideoXImageToVideo*", "CogVideoXFunControl*")
def cogvideox_conditioned_transformer() -> CogVideoXTransformer3DModel:
    return cogvideox_transformer(2 * CHANNELS)


@argument("scheduler", "CogVideoX*")
def cogvideox_scheduler() -> CogVideoXDDIMScheduler:
    return CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", snr_shift_scale=1.0
    )


@component("AutoencoderKLMochi")
def mochi_vae() -> AutoencoderKLMochi:
    return AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )


@component("MochiTransformer3DModel")
def mochi_transformer() -> MochiTransformer3DModel:
    return MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        text_embed_dim=WIDTH,
        time_embed_dim=4,
        max_sequence_length=TOKENS,
    )


@argument("scheduler", "Mochi*")
def mochi_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(invert_sigmas=True)


@component("AutoencoderKLAllegro")
def allegro_vae() -> AutoencoderKLAllegro:
    vae = AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=2,
    )
    # it decodes by tiles only, and these of one sample
    vae.enable_tiling()
    vae.enable_slicing()
    vae.kernel = vae.stride = (4, 32, 32)
    return vae


@component("AllegroTransformer3DModel")
def allegro_transformer() -> AllegroTransformer3DModel:
    return AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=1,
        cross_attention_dim=48,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=WIDTH,
    )


@argument("scheduler", "Allegro*")
def allegro_scheduler() -> EulerAncestralDiscreteScheduler:
    return EulerAncestralDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@component("LatteTransformer3DModel")
def latte_transformer() -> LatteTransformer3DModel:
    return LatteTransformer3DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=WIDTH,
        in_channels=CHANNELS,
        cross_attention_dim=16,
        out_channels=2 * CHANNELS,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        video_length=2,
    )


@argument("scheduler", "Latte*")
def latte_scheduler() -> DDIMScheduler:
    return ddim_scheduler()
