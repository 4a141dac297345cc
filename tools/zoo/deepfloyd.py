"""DeepFloyd IF: diffusion of pixels, with a T5 for the text and UNets that predict their variance beside the noise."""

from __future__ import annotations

from diffusers import DDPMScheduler, UNet2DConditionModel

from zoo.inputs import SIZE, SPECIAL, picture
from zoo.registry import argument
from zoo.stable_diffusion import WIDTH


def if_unet(**kwargs) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **{
            "sample_size": SIZE,
            "in_channels": 3,
            "out_channels": 6,  # the noise and its variance
            "layers_per_block": 1,
            "block_out_channels": (16, 32),
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "cross_attention_dim": WIDTH,
            "encoder_hid_dim": WIDTH,
            "attention_head_dim": 8,
            "addition_embed_type": "text",
            "addition_embed_type_num_heads": 2,
            "cross_attention_norm": "group_norm",
            "resnet_time_scale_shift": "scale_shift",
            "norm_num_groups": 8,
            "act_fn": "gelu",
            **kwargs,
        }
    )


@argument("unet", "IF*")
def if_unet_first_stage() -> UNet2DConditionModel:
    return if_unet()


@argument("unet", "IF*SuperResolution*")
def if_unet_super_resolution() -> UNet2DConditionModel:
    """It sees the small picture, enlarged, beside the noisy one, and is told how noisy that is."""
    return if_unet(
        in_channels=6, class_embed_type="timestep", mid_block_scale_factor=1.414, time_embedding_act_fn="gelu"
    )


@argument("scheduler", "IF*")
@argument("image_noising_scheduler", "IF*")
def if_scheduler() -> DDPMScheduler:
    """The checkpoints' own has `variance_type="learned_range"` and thresholding, with which a step is no policy."""
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True, clip_sample_range=1.0)


@argument("watermarker", "IF*")
def no_if_watermark() -> None:
    return None


# The text is cleaned with two libraries (bs4, ftfy) that need not be installed.
SPECIAL.update(
    {
        "IF*": {"clean_caption": False},
        "IFImg2Img*": {"image": picture(), "strength": 0.75, "height": None, "width": None},
        "IFInpaint*": {
            "image": picture(),
            "mask_image": picture(1, mode="L"),
            "strength": 0.75,
            "height": None,
            "width": None,
        },
        "IFSuperResolution*": {"image": picture(size=8), "height": SIZE, "width": SIZE},
        "IFImg2ImgSuperResolution*": {"image": picture(size=8), "original_image": picture(), "strength": 0.75},
        "IFInpaintingSuperResolution*": {
            "image": picture(size=8),
            "original_image": picture(),
            "mask_image": picture(1, mode="L"),
            "strength": 0.75,
        },
    }
)
