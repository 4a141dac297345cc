"""ControlNets of SD, SDXL, SD3 and FLUX, and what else gives a UNet a picture to follow: T2I adapters, GLIGEN."""

from __future__ import annotations

import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    ControlNetXSAdapter,
    FluxControlNetModel,
    SD3ControlNetModel,
    T2IAdapter,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.clip_image_project_model import CLIPImageProjection
from torch import nn
from transformers import CLIPProcessor

from zoo.flux import PACKED_CHANNELS, flux_transformer
from zoo.inputs import SPECIAL, picture
from zoo.registry import argument, component
from zoo.sd3 import sd3_transformer
from zoo.sdxl import unet_xl
from zoo.stable_diffusion import WIDTH, clip_image_processor, clip_tokenizer, unet


CONDITION_CHANNELS = (8, 16)  # one halving, as the VAE has


def awake(model: nn.Module) -> nn.Module:
    """Gives weights that start at zero a value: a control network at initialisation adds nothing, and whether it acts could not be seen."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.count_nonzero() == 0:
                nn.init.normal_(parameter, std=0.1)
    return model


@component("ControlNetModel")
def controlnet_sd() -> ControlNetModel:
    return awake(ControlNetModel.from_unet(unet(), conditioning_embedding_out_channels=CONDITION_CHANNELS))


@argument("controlnet", "StableDiffusionXLControlNet*")
def controlnet_sdxl() -> ControlNetModel:
    return awake(ControlNetModel.from_unet(unet_xl(), conditioning_embedding_out_channels=CONDITION_CHANNELS))


@argument("controlnet", "StableDiffusionXLControlNetUnion*")
def controlnet_union() -> ControlNetUnionModel:
    settings = dict(unet_xl().config)
    taken = ("down_block_types", "block_out_channels", "layers_per_block", "cross_attention_dim", "attention_head_dim")
    taken += ("use_linear_projection", "addition_embed_type", "addition_time_embed_dim", "norm_num_groups")
    taken += ("projection_class_embeddings_input_dim", "transformer_layers_per_block")
    return awake(
        ControlNetUnionModel(
            conditioning_embedding_out_channels=CONDITION_CHANNELS,
            num_control_type=6,
            num_trans_channel=16,
            num_trans_head=2,
            num_trans_layer=1,
            num_proj_channel=16,
            **{name: settings[name] for name in taken},
        )
    )


@argument("unet", "StableDiffusionControlNetXS*")
def xs_unet_sd() -> UNet2DConditionModel:
    return unet(layers_per_block=2)  # the XS network has two in each block


@argument("unet", "StableDiffusionXLControlNetXS*")
def xs_unet_sdxl() -> UNet2DConditionModel:
    return unet_xl(layers_per_block=2)


def _controlnet_xs(network: UNet2DConditionModel) -> ControlNetXSAdapter:
    return awake(
        ControlNetXSAdapter.from_unet(
            network, size_ratio=0.5, learn_time_embedding=True, conditioning_embedding_out_channels=CONDITION_CHANNELS
        )
    )


@argument("controlnet", "StableDiffusionControlNetXS*")
def controlnet_xs_sd() -> ControlNetXSAdapter:
    return _controlnet_xs(xs_unet_sd())


@argument("controlnet", "StableDiffusionXLControlNetXS*")
def controlnet_xs_sdxl() -> ControlNetXSAdapter:
    return _controlnet_xs(xs_unet_sdxl())


@component("SD3ControlNetModel")
def controlnet_sd3() -> SD3ControlNetModel:
    return awake(
        SD3ControlNetModel.from_transformer(sd3_transformer(), num_layers=1, num_extra_conditioning_channels=0)
    )


@argument("controlnet", "StableDiffusion3ControlNetInpainting*")
def controlnet_sd3_inpaint() -> SD3ControlNetModel:
    network = sd3_transformer()
    return awake(SD3ControlNetModel.from_transformer(network, num_layers=1, num_extra_conditioning_channels=1))


@component("FluxControlNetModel")
def controlnet_flux() -> FluxControlNetModel:
    return awake(
        FluxControlNetModel.from_transformer(
            flux_transformer(),
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
        )
    )


@argument("transformer", "FluxControl*")
def flux_control_transformer():
    """FLUX control models see the packed control picture beside the packed latents."""
    return flux_transformer(in_channels=2 * PACKED_CHANNELS, out_channels=PACKED_CHANNELS)


@argument("transformer", "FluxControlNet*")
def flux_controlnet_transformer():
    return flux_transformer()


def adapter_blocks() -> dict[str, tuple[str, ...]]:
    """Feature maps of an adapter are added after attention and, without attention, after the halving: only the last block may have none."""
    return {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }


@component("T2IAdapter")
def t2i_adapter() -> T2IAdapter:
    return T2IAdapter(in_channels=3, channels=[16, 32], num_res_blocks=1, downscale_factor=2)


@argument("unet", "StableDiffusionAdapter*")
def adapter_unet_sd() -> UNet2DConditionModel:
    return unet(**adapter_blocks())


@argument("unet", "StableDiffusionXLAdapter*")
def adapter_unet_sdxl() -> UNet2DConditionModel:
    return unet_xl(**adapter_blocks())


@argument("unet", "StableDiffusionGLIGEN*")
def gligen_unet() -> UNet2DConditionModel:
    return awake(unet(attention_type="gated"))


@argument("unet", "StableDiffusionGLIGENTextImage*")
def gligen_text_image_unet() -> UNet2DConditionModel:
    return awake(unet(attention_type="gated-text-image"))


@component("CLIPProcessor")
def clip_processor() -> CLIPProcessor:
    return CLIPProcessor(image_processor=clip_image_processor(), tokenizer=clip_tokenizer())


@component("CLIPImageProjection")
def clip_image_projection() -> CLIPImageProjection:
    return CLIPImageProjection(hidden_size=WIDTH)


CONTROL = picture(2)
GLIGEN = {"gligen_phrases": ["a cat"], "gligen_boxes": [[0.1, 0.2, 0.7, 0.8]], "gligen_scheduled_sampling_beta": 0.5}

SPECIAL.update(
    {
        "StableDiffusion*ControlNet*": {"image": CONTROL},
        "StableDiffusionXLControlNetUnion*": {"image": None, "control_image": [CONTROL], "control_mode": [1]},
        "StableDiffusion*ControlNet*Img2Img*": {"image": picture(), "control_image": CONTROL, "strength": 0.75},
        "StableDiffusion*ControlNet*Inpaint*": {
            "image": picture(),
            "mask_image": picture(1, mode="L"),
            "control_image": CONTROL,
            "strength": 0.75,
        },
        "StableDiffusionXLControlNetUnionImg2Img*": {"image": picture(), "control_image": [CONTROL], "strength": 0.75},
        "StableDiffusionXLControlNetUnionInpaint*": {
            "image": picture(),
            "mask_image": picture(1, mode="L"),
            "control_image": [CONTROL],
            "strength": 0.75,
        },
        "StableDiffusion3ControlNet*": {"image": None, "control_image": CONTROL},
        "StableDiffusion3ControlNetInpainting*": {
            "image": None,
            "mask_image": None,
            "strength": None,
            "control_image": CONTROL,
            "control_mask": picture(1, mode="L"),
        },
        "FluxControl*": {"control_image": CONTROL},
        "StableDiffusion*Adapter*": {"image": [CONTROL, CONTROL]},
        "StableDiffusionGLIGEN*": GLIGEN,
        "StableDiffusionGLIGENTextImage*": {"gligen_images": [picture(3)]},
    }
)
