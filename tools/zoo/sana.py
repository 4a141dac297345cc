"""Sana: deep-compression VAE, Gemma 2, linear attention; Sana-Sprint."""

from __future__ import annotations

from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaControlNetModel,
    SanaTransformer2DModel,
    SCMScheduler,
)

from zoo.inputs import SPECIAL, picture
from zoo.registry import argument, component
from zoo.stable_diffusion import WIDTH


SIZE = 32  # pixels: sizes must be multiples of it
SPECIAL.update(
    {
        "Sana*": {
            "height": SIZE,
            "width": SIZE,
            "use_resolution_binning": False,
            "complex_human_instruction": [],
            "max_sequence_length": 16,
        },
        "SanaControlNet*": {"control_image": picture(size=SIZE)},
        "SanaSprint*": {"num_inference_steps": 2},
        "SanaSprintImg2Img*": {"image": picture(size=SIZE), "strength": 1.0},
    }
)


@component("AutoencoderDC")
def autoencoder_dc() -> AutoencoderDC:
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 16),
        decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        scaling_factor=0.41407,
    )


def _settings() -> dict:
    return {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": WIDTH,
        "sample_size": 8,
    }


@component("SanaTransformer2DModel")
def sana_transformer() -> SanaTransformer2DModel:
    return SanaTransformer2DModel(**_settings())


@argument("transformer", "SanaSprint*")
def sana_sprint_transformer() -> SanaTransformer2DModel:
    """Distilled: guidance goes in as an embedding."""
    return SanaTransformer2DModel(**_settings(), guidance_embeds=True, qk_norm="rms_norm_across_heads")


@component("SanaControlNetModel")
def sana_controlnet() -> SanaControlNetModel:
    return SanaControlNetModel(**{**_settings(), "num_layers": 1})


@argument("scheduler", "SanaPipeline", "SanaControlNetPipeline")
def sana_scheduler() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


@argument("scheduler", "SanaPAG*")
def sana_pag_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


@argument("scheduler", "SanaSprint*")
def sana_sprint_scheduler() -> SCMScheduler:
    return SCMScheduler(prediction_type="trigflow", sigma_data=0.5)
