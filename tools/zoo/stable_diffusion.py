"""Stable Diffusion 1.x and 2.x, and what other families share with it: CLIP, the VAE."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPImageProcessor, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from zoo.registry import argument, component


WIDTH = 32  # of every text encoder
TOKENS = 16  # longest prompt


@cache
def _clip_files() -> tuple[str, str]:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,"
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return json.dumps({token: index for index, token in enumerate(tokens)}), "#version: 0.2\n"


@component("CLIPTokenizer")
def clip_tokenizer() -> CLIPTokenizer:
    vocabulary, merges = _clip_files()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(vocabulary)
        (Path(folder) / "merges.txt").write_text(merges)
        return CLIPTokenizer(
            f"{folder}/vocab.json", f"{folder}/merges.txt", model_max_length=TOKENS, pad_token="<|endoftext|>"
        )


def clip_text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=78,
        hidden_size=WIDTH,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=WIDTH,
        bos_token_id=76,
        eos_token_id=77,
    )


@component("CLIPTextModel")
def clip_text_model() -> CLIPTextModel:
    return CLIPTextModel(clip_text_config())


@component("CLIPTextModelWithProjection")
def clip_text_model_with_projection() -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(clip_text_config())


@component("AutoencoderKL")
def autoencoder_kl(**kwargs) -> AutoencoderKL:
    return AutoencoderKL(
        **{
            "block_out_channels": (8, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "latent_channels": 4,
            "norm_num_groups": 4,
            "layers_per_block": 1,
            "sample_size": 16,
            **kwargs,
        }
    )


def unet(**kwargs) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **{
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": WIDTH,
            "attention_head_dim": 8,
            "norm_num_groups": 8,
            **kwargs,
        }
    )


@component("UNet2DConditionModel")
def unet_sd() -> UNet2DConditionModel:
    return unet()


@component("KarrasDiffusionSchedulers", "DDIMScheduler", "PNDMScheduler")
def ddim_scheduler(**kwargs) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        **{"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **kwargs},
    )


@argument("requires_safety_checker", "*")
def no_safety_checker() -> bool:
    return False


@argument("safety_checker", "*")
def no_checker() -> None:
    return None


@component("CLIPImageProcessorPil", "CLIPImageProcessor")
def clip_image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(crop_size=32, size={"shortest_edge": 32})
