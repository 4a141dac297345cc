"""AuraFlow: a joint transformer with register tokens, text from a UMT5 alone."""

from __future__ import annotations

from diffusers import AuraFlowTransformer2DModel

from zoo.inputs import SPECIAL
from zoo.registry import component
from zoo.stable_diffusion import TOKENS, WIDTH


@component("AuraFlowTransformer2DModel")
def auraflow_transformer() -> AuraFlowTransformer2DModel:
    return AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=WIDTH,
        pos_embed_max_size=64,
    )


SPECIAL.update({"AuraFlow*": {"max_sequence_length": TOKENS}})
