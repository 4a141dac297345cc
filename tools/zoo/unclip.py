"""Pipelines that make an image embedding of the text first: stable unCLIP, unCLIP, Stable Cascade, Wuerstchen; and what else wants one."""

from __future__ import annotations

import torch
from diffusers import (
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    LCMScheduler,
    StableCascadeUNet,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import WuerstchenDiffNeXt
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

from zoo.inputs import SPECIAL, picture
from zoo.registry import argument, component
from zoo.stable_diffusion import WIDTH, unet


@argument("unet", "StableUnCLIP*")
def stable_unclip_unet() -> UNet2DConditionModel:
    return unet(class_embed_type="projection", projection_class_embeddings_input_dim=2 * WIDTH)


@component("StableUnCLIPImageNormalizer")
def image_normalizer() -> StableUnCLIPImageNormalizer:
    return StableUnCLIPImageNormalizer(embedding_dim=WIDTH)


@argument("prior_scheduler", "StableUnCLIP*")
@argument("image_noising_scheduler", "StableUnCLIP*")
def embedding_scheduler() -> DDPMScheduler:
    return DDPMScheduler(
        variance_type="fixed_small_log",
        prediction_type="sample",
        clip_sample_range=5.0,
        beta_schedule="squaredcos_cap_v2",
    )


@component("LCMScheduler")
def lcm_scheduler() -> LCMScheduler:
    return LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)


@argument("unet", "LatentConsistency*")
def lcm_unet() -> UNet2DConditionModel:
    return unet(time_cond_proj_dim=16)  # guidance is a condition


def _super_resolution() -> UNet2DModel:
    return UNet2DModel(
        sample_size=16,
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(16, 32),
        norm_num_groups=8,
        in_channels=6,
        out_channels=3,
    )


@argument("super_res_first", "UnCLIP*")
@argument("super_res_last", "UnCLIP*")
def super_resolution() -> UNet2DModel:
    return _super_resolution()


@component("UnCLIPTextProjModel")
def unclip_text_projection() -> UnCLIPTextProjModel:
    return UnCLIPTextProjModel(
        clip_embeddings_dim=WIDTH, time_embed_dim=64, cross_attention_dim=WIDTH, clip_extra_context_tokens=4
    )


@argument("decoder", "UnCLIP*")
def unclip_decoder() -> UNet2DConditionModel:
    return unet(in_channels=3, out_channels=6, class_embed_type="identity")


@component("StableCascadeUNet")
def cascade_unet(**kwargs) -> StableCascadeUNet:
    return StableCascadeUNet(
        **{
            "in_channels": 4,
            "out_channels": 4,
            "conditioning_dim": 32,
            "block_out_channels": (16, 32),
            "num_attention_heads": (-1, 2),
            "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1),
            "down_blocks_repeat_mappers": (1, 1),
            "up_blocks_repeat_mappers": (1, 1),
            "block_types_per_layer": (
                ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
                ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
            ),
            "switch_level": None,
            "clip_text_pooled_in_channels": WIDTH,
            "dropout": (0.1, 0.1),
            "effnet_in_channels": 16,
            "patch_size": 2,
            **kwargs,
        }
    )


@argument("prior", "StableCascade*")
@argument("prior_prior", "StableCascade*")
def cascade_prior() -> StableCascadeUNet:
    return cascade_unet(
        in_channels=16,
        out_channels=16,
        effnet_in_channels=None,
        clip_image_in_channels=WIDTH,
        clip_text_in_channels=WIDTH,
        patch_size=1,
        switch_level=(False,),
    )


@component("PaellaVQModel")
def paella_vq_model() -> PaellaVQModel:
    return PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=4, embed_dim=8)


@component("WuerstchenPrior")
def wuerstchen_prior() -> WuerstchenPrior:
    return WuerstchenPrior(c_in=2, c=8, depth=2, c_cond=WIDTH, c_r=8, nhead=2)


@component("WuerstchenDiffNeXt")
def wuerstchen_decoder() -> WuerstchenDiffNeXt:
    return WuerstchenDiffNeXt(
        c_cond=WIDTH, c_hidden=[16], nhead=[2], blocks=[1], level_config=["CT"], clip_embd=WIDTH, inject_effnet=[False]
    )


@component("DDPMWuerstchenScheduler")
def wuerstchen_scheduler() -> DDPMWuerstchenScheduler:
    return DDPMWuerstchenScheduler()


SPECIAL.update(
    {
        "StableUnCLIPPipeline": {"prior_num_inference_steps": 2},
        "StableUnCLIPImg2Img*": {"image": picture()},
        "LatentConsistency*": {"original_inference_steps": 50},
        "LatentConsistencyModelImg2Img*": {"image": picture(), "strength": 0.75},
        "StableCascadeDecoder*": {"image_embeddings": torch.linspace(-1, 1, 2 * 16 * 16).reshape(2, 16, 4, 4)},
        "WuerstchenDecoder*": {"image_embeddings": torch.linspace(-1, 1, 2 * 4 * 16).reshape(2, 4, 4, 4)},
        "StableCascadePrior*": {"height": 128, "width": 128},
        "WuerstchenPrior*": {"height": 128, "width": 128},
    }
)
