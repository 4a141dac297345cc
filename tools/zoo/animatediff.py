"""Video out of UNets: AnimateDiff and its kin (motion modules between the blocks of SD's UNet), text-to-video with a 3-D UNet, I2VGen-XL."""

from __future__ import annotations

from diffusers import (
    I2VGenXLUNet,
    MotionAdapter,
    SparseControlNetModel,
    UNet2DConditionModel,
    UNet3DConditionModel,
)

from zoo.controlnet import awake
from zoo.inputs import SPECIAL, picture
from zoo.registry import argument, component
from zoo.sdxl import euler_scheduler, unet_xl
from zoo.stable_diffusion import WIDTH


FRAMES = 2
VIDEO = [picture(0), picture(1)]


@component("MotionAdapter")
def motion_adapter(**kwargs) -> MotionAdapter:
    return awake(
        MotionAdapter(
            block_out_channels=(16, 32),
            motion_layers_per_block=1,
            motion_mid_block_layers_per_block=1,
            motion_num_attention_heads=2,
            motion_norm_num_groups=8,
            motion_max_seq_length=8,
            **kwargs,
        )
    )


@argument("motion_adapter", "AnimateDiffSDXL*")
def motion_adapter_sdxl() -> MotionAdapter:
    return motion_adapter(use_motion_mid_block=False)


@argument("unet", "AnimateDiffSDXL*", "TextToVideoZeroSDXL*")
def animatediff_unet_sdxl() -> UNet2DConditionModel:
    return unet_xl()


@argument("scheduler", "AnimateDiffSDXL*")
def animatediff_scheduler_sdxl():
    return euler_scheduler()


@argument("motion_adapter", "PIA*")
def pia_motion_adapter() -> MotionAdapter:
    return motion_adapter(conv_in_channels=9)


@component("SparseControlNetModel")
def sparse_controlnet() -> SparseControlNetModel:
    return awake(
        SparseControlNetModel(
            block_out_channels=(16, 32),
            layers_per_block=1,
            in_channels=4,
            down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"),
            cross_attention_dim=WIDTH,
            attention_head_dim=8,
            norm_num_groups=8,
            conditioning_embedding_out_channels=(8, 16),
            motion_num_attention_heads=2,
        )
    )


_BLOCKS_3D = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    "cross_attention_dim": WIDTH,
    "norm_num_groups": 8,
}


@component("UNet3DConditionModel")
def unet_3d() -> UNet3DConditionModel:
    return awake(UNet3DConditionModel(attention_head_dim=4, **_BLOCKS_3D))


@component("I2VGenXLUNet")
def unet_i2vgen_xl() -> I2VGenXLUNet:
    return awake(I2VGenXLUNet(num_attention_heads=2, **_BLOCKS_3D))


SPECIAL.update(
    {
        "AnimateDiff*": {"num_frames": FRAMES},
        "AnimateDiffControlNet*": {"conditioning_frames": VIDEO},
        "AnimateDiffSparseControlNet*": {"conditioning_frames": VIDEO[:1], "controlnet_frame_indices": [0]},
        "AnimateDiffVideoToVideo*": {"video": [VIDEO, VIDEO], "strength": 0.75, "num_frames": None},
        "AnimateDiffVideoToVideoControlNet*": {"conditioning_frames": VIDEO},
        "PIA*": {"image": [picture(), picture(1)], "num_frames": FRAMES},
        "I2VGenXL*": {"image": [picture(), picture(1)], "num_frames": FRAMES, "target_fps": 4},
        "TextToVideoSD*": {"num_frames": FRAMES},
        "VideoToVideoSD*": {"video": [VIDEO, VIDEO], "strength": 0.75},
        "TextToVideoZero*": {"video_length": FRAMES, "t0": 1, "t1": 2},
    }
)
