"""Kandinsky 2.1, 2.2 and 3: a VQ autoencoder, a UNet of simple attention blocks, and in 2.x a prior that makes image embeddings of text."""

from __future__ import annotations

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    Kandinsky3UNet,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP
from torch import nn
from transformers import XLMRobertaTokenizer

from zoo.inputs import SPECIAL, picture
from zoo.registry import argument, component
from zoo.stable_diffusion import TOKENS, WIDTH
from zoo.text import LETTERS


ROBERTA_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
ROBERTA_VOCABULARY = len(ROBERTA_SPECIAL) + 1 + len(LETTERS) + 1  # and <mask>
ROBERTA = {
    "vocab_size": ROBERTA_VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


@component("XLMRobertaTokenizer")
def xlm_roberta_tokenizer() -> XLMRobertaTokenizer:
    pieces = [*((token, 0.0) for token in ROBERTA_SPECIAL), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    return XLMRobertaTokenizer(vocab=pieces, model_max_length=TOKENS)


@component("MultilingualCLIP")
def multilingual_clip() -> MultilingualCLIP:
    return MultilingualCLIP(MCLIPConfig(numDims=WIDTH, transformerDimensions=WIDTH, **ROBERTA)).eval()


@component("VQModel")
def movq() -> VQModel:
    return VQModel(
        block_out_channels=[32, 32],
        down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )


_SIMPLE_BLOCKS = {
    "out_channels": 8,  # it predicts its variance too, which the pipelines leave out where the scheduler does not want it
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "sample_size": 8,
    "encoder_hid_dim": WIDTH,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
    "resnet_time_scale_shift": "scale_shift",
}


@argument("unet", "Kandinsky*")
def kandinsky_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        in_channels=4, addition_embed_type="text_image", encoder_hid_dim_type="text_image_proj", **_SIMPLE_BLOCKS
    )


@argument("unet", "KandinskyInpaint*")
def kandinsky_inpaint_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        in_channels=9, addition_embed_type="text_image", encoder_hid_dim_type="text_image_proj", **_SIMPLE_BLOCKS
    )


@argument("unet", "KandinskyV22*")
def kandinsky22_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        in_channels=4, addition_embed_type="image", encoder_hid_dim_type="image_proj", **_SIMPLE_BLOCKS
    )


@argument("unet", "KandinskyV22Inpaint*")
def kandinsky22_inpaint_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        in_channels=9, addition_embed_type="image", encoder_hid_dim_type="image_proj", **_SIMPLE_BLOCKS
    )


@argument("scheduler", "Kandinsky*")
def kandinsky_scheduler() -> DDIMScheduler:
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


@argument("scheduler", "KandinskyV22*", "Kandinsky3*")
def kandinsky_ddpm() -> DDPMScheduler:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, clip_sample=False)


@component("PriorTransformer")
def prior_transformer() -> PriorTransformer:
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=12, embedding_dim=WIDTH, num_embeddings=TOKENS, num_layers=1
    )
    # Zeros at first: an embedding with a standard deviation of 0 would leave nothing of what the prior draws.
    prior.clip_std = nn.Parameter(torch.ones(prior.clip_std.shape))
    return prior


@component("UnCLIPScheduler")
def unclip_scheduler() -> UnCLIPScheduler:
    return UnCLIPScheduler(prediction_type="sample", clip_sample_range=10.0)


@argument("scheduler", "KandinskyPrior*", "KandinskyV22Prior*")
def prior_scheduler() -> UnCLIPScheduler:
    return unclip_scheduler()


@component("Kandinsky3UNet")
def kandinsky3_unet() -> Kandinsky3UNet:
    return Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(32, 64),
        cross_attention_dim=4,
        encoder_hid_dim=WIDTH,
    )


@argument("unet", "Kandinsky3*")
def kandinsky3_denoiser() -> Kandinsky3UNet:
    return kandinsky3_unet()


def _embeddings(sign: int) -> list[torch.Tensor]:
    """One for each of two prompts."""
    return list((sign * torch.linspace(-1, 1, 2 * WIDTH)).reshape(2, 1, WIDTH))


EMBEDDINGS = {"image_embeds": _embeddings(1), "negative_image_embeds": _embeddings(-1)}
ONE_EMBEDDING = {name: embeddings[:1] for name, embeddings in EMBEDDINGS.items()}

SPECIAL.update(
    {
        "KandinskyPipeline": EMBEDDINGS,
        "KandinskyImg2ImgPipeline": {**EMBEDDINGS, "image": picture(), "strength": 0.75},
        "KandinskyInpaintPipeline": {**ONE_EMBEDDING, "image": picture(), "mask_image": picture(1, mode="L")},
        "KandinskyImg2ImgCombined*": {"image": picture(), "strength": 0.75},
        "KandinskyInpaintCombined*": {"image": picture(), "mask_image": picture(1, mode="L")},
        "KandinskyV22Img2ImgCombined*": {"image": picture(), "strength": 0.75},
        "KandinskyV22InpaintCombined*": {"image": picture(), "mask_image": picture(1, mode="L")},
        "KandinskyV22PriorEmb2Emb*": {"image": picture(), "strength": 0.75},
        "Kandinsky3Img2Img*": {"image": picture(), "strength": 0.75},
    }
)
