"""Chroma: FLUX without its CLIP and without embedded guidance; the modulations come from a network of their own."""

from __future__ import annotations

from diffusers import ChromaTransformer2DModel

from zoo.flux import PACKED_CHANNELS
from zoo.inputs import SPECIAL, picture
from zoo.registry import component
from zoo.stable_diffusion import TOKENS, WIDTH


@component("ChromaTransformer2DModel")
def chroma_transformer() -> ChromaTransformer2DModel:
    return ChromaTransformer2DModel(
        in_channels=PACKED_CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        axes_dims_rope=(4, 2, 2),
        joint_attention_dim=WIDTH,
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )


SPECIAL.update(
    {
        "Chroma*": {"max_sequence_length": TOKENS},
        "Chroma*Img2Img*": {"image": picture(), "strength": 0.75},
        "Chroma*Inpaint*": {"image": picture(), "mask_image": picture(1, mode="L"), "strength": 0.75},
    }
)
