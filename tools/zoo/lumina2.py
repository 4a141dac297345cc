"""Lumina-Image 2.0 (Gemma 2, guidance that keeps the norm and may be cut off) and Lumina-Next (Gemma)."""

from __future__ import annotations

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Lumina2Transformer2DModel, LuminaNextDiT2DModel

from zoo.inputs import SPECIAL
from zoo.registry import argument, component
from zoo.stable_diffusion import WIDTH, autoencoder_kl


SPECIAL.update(
    {
        "Lumina*": {"max_sequence_length": 32},
        "LuminaPipeline": {"clean_caption": False},
        "Lumina2*": {"system_prompt": "a system"},
    }
)


@component("Lumina2Transformer2DModel")
def lumina2_transformer() -> Lumina2Transformer2DModel:
    return Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=8,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(64, 16, 16),
        cap_feat_dim=WIDTH,
    )


@component("LuminaNextDiT2DModel")
def lumina_transformer() -> LuminaNextDiT2DModel:
    return LuminaNextDiT2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=1,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=8,
        cross_attention_dim=WIDTH,
    )


@argument("vae", "Lumina2*")
def lumina2_vae() -> AutoencoderKL:
    return autoencoder_kl(scaling_factor=0.3611, shift_factor=0.1159)


@argument("scheduler", "Lumina2*")
def lumina2_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=6.0)


@argument("scheduler", "LuminaPipeline")
def lumina_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler()
