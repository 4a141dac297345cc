"""HiDream-I1: a mixture of experts on CLIP, CLIP, T5 and the hidden states of a Llama."""

from __future__ import annotations

from diffusers import AutoencoderKL, HiDreamImageTransformer2DModel, UniPCMultistepScheduler
from transformers import Qwen2Tokenizer

from zoo.inputs import SPECIAL
from zoo.language_models import qwen_tokenizer
from zoo.registry import argument, component
from zoo.stable_diffusion import TOKENS, WIDTH, autoencoder_kl


SPECIAL.update({"HiDream*": {"max_sequence_length": TOKENS}})


@component("HiDreamImageTransformer2DModel")
def hidream_transformer() -> HiDreamImageTransformer2DModel:
    """Large patches: the pipeline always draws 128 x 128 latents."""
    return HiDreamImageTransformer2DModel(
        patch_size=16,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[WIDTH, WIDTH],
        text_emb_dim=2 * WIDTH,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(128, 128),
        llama_layers=[0, 1],
    )


@argument("vae", "HiDream*")
def hidream_vae() -> AutoencoderKL:
    return autoencoder_kl(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )


@argument("tokenizer_4", "HiDream*")
def hidream_tokenizer_4() -> Qwen2Tokenizer:
    tokenizer = qwen_tokenizer()
    tokenizer.model_max_length = TOKENS
    return tokenizer


@argument("scheduler", "HiDream*")
def hidream_scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
