"""EasyAnimate and JoyImage: video and editing models on a language model that sees, with an autoencoder of its own or Wan's."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLMagvit,
    EasyAnimateTransformer3DModel,
    JoyImageEditPlusTransformer3DModel,
)
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from zoo.inputs import SIZE, SPECIAL
from zoo.language_models import qwen_tokenizer
from zoo.registry import argument, component
from zoo.stable_diffusion import WIDTH


FRAMES = 5
LATENT_CHANNELS = 4


@component("AutoencoderKLMagvit")
def magvit() -> AutoencoderKLMagvit:
    return AutoencoderKLMagvit(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=[8, 8, 8, 8],
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    )


@argument("text_encoder", "EasyAnimate*")
def easyanimate_text_encoder() -> Qwen2VLForConditionalGeneration:
    tokenizer = qwen_tokenizer()
    text = {
        "vocab_size": len(tokenizer) + 8,
        "hidden_size": WIDTH,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        "max_position_embeddings": 512,
    }
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))


@argument("tokenizer", "EasyAnimate*")
def easyanimate_tokenizer() -> Qwen2Tokenizer:
    return qwen_tokenizer()


def _transformer(in_channels: int) -> EasyAnimateTransformer3DModel:
    return EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=in_channels,
        out_channels=LATENT_CHANNELS,
        patch_size=2,
        num_layers=2,
        mmdit_layers=1,
        time_embed_dim=8,
        text_embed_dim=WIDTH,
        add_norm_text_encoder=True,
        sample_width=2 * SIZE,
        sample_height=2 * SIZE,
    )


@component("EasyAnimateTransformer3DModel")
def easyanimate_transformer() -> EasyAnimateTransformer3DModel:
    return _transformer(LATENT_CHANNELS)


@argument("transformer", "EasyAnimateControl*")
def easyanimate_control_transformer() -> EasyAnimateTransformer3DModel:
    return _transformer(3 * LATENT_CHANNELS)  # with a control video and a reference picture


@argument("transformer", "EasyAnimateInpaint*")
def easyanimate_inpaint_transformer() -> EasyAnimateTransformer3DModel:
    return _transformer(2 * LATENT_CHANNELS + 1)  # with the masked video and the mask


@component("JoyImageEditPlusTransformer3DModel")
def joyimage_plus_transformer() -> JoyImageEditPlusTransformer3DModel:
    return JoyImageEditPlusTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        hidden_size=32,
        num_attention_heads=2,
        text_dim=WIDTH,
        mlp_width_ratio=2.0,
        num_layers=1,
        rope_dim_list=[4, 6, 6],
    )


def _video() -> torch.Tensor:
    return torch.linspace(0, 1, 3 * FRAMES * 4 * SIZE * SIZE).reshape(1, 3, FRAMES, 2 * SIZE, 2 * SIZE)


SPECIAL.update(
    {
        "EasyAnimate*": {"num_frames": FRAMES, "height": 2 * SIZE, "width": 2 * SIZE, "negative_prompt": "bad"},
        "EasyAnimateControl*": {"control_video": _video()},
        "EasyAnimateInpaint*": {"video": _video(), "mask_video": 255 * torch.ones(1, 1, FRAMES, 2 * SIZE, 2 * SIZE)},
        # Not JoyImageEdit, which makes pictures of a million pixels whatever is asked for.
        "JoyImageEditPlus*": {"negative_prompt": "bad"},
    }
)
