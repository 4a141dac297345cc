"""Image encoders, and the pipelines of the SD kind whose UNet takes more than latents: upscaling, depth, editing, panorama."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    DDIMInverseScheduler,
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DPTConfig,
    DPTForDepthEstimation,
    DPTImageProcessorPil,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from zoo.inputs import SIZE, SPECIAL, picture
from zoo.registry import argument, component
from zoo.sdxl import euler_scheduler, unet_xl
from zoo.stable_diffusion import WIDTH, autoencoder_kl, ddim_scheduler, unet


VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


@component("CLIPVisionModelWithProjection")
def clip_vision_model_with_projection() -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(CLIPVisionConfig(projection_dim=WIDTH, **VISION))


@component("SiglipVisionModel", "SiglipModel")
def siglip_vision_model() -> SiglipVisionModel:
    return SiglipVisionModel(SiglipVisionConfig(**VISION))


@component("SiglipImageProcessor", "SiglipImageProcessorPil")
def siglip_image_processor() -> SiglipImageProcessorPil:
    return SiglipImageProcessorPil(size={"height": 32, "width": 32})


# An IP adapter's image encoder may be left out, and nothing here uses one.
@argument("image_encoder", "StableDiffusion*", "AnimateDiff*")
def no_image_encoder() -> None:
    return None


@argument("image_encoder", "StableDiffusionGLIGEN*", "StableDiffusionLDM3D*")
def gligen_image_encoder() -> CLIPVisionModelWithProjection:
    return clip_vision_model_with_projection()


@argument("unet", "StableDiffusionInstructPix2Pix*")
def pix2pix_unet() -> UNet2DConditionModel:
    return unet(in_channels=8)  # latents of the picture beside the noisy ones


@argument("unet", "StableDiffusionXLInstructPix2Pix*")
def pix2pix_unet_xl() -> UNet2DConditionModel:
    return unet_xl(in_channels=8)


@argument("unet", "StableDiffusionDepth2Img*")
def depth_unet() -> UNet2DConditionModel:
    return unet(in_channels=5)


@component("DPTForDepthEstimation")
def depth_estimator() -> DPTForDepthEstimation:
    return DPTForDepthEstimation(
        DPTConfig(
            hidden_size=WIDTH,
            intermediate_size=37,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 8, 16, 16],
            fusion_hidden_size=8,
            is_hybrid=False,
        )
    )


@component("DPTImageProcessor", "DPTImageProcessorPil")
def depth_image_processor() -> DPTImageProcessorPil:
    return DPTImageProcessorPil(size={"height": 32, "width": 32})


@argument("unet", "StableDiffusionUpscale*")
def upscale_unet() -> UNet2DConditionModel:
    return unet(in_channels=7, num_class_embeds=50)  # the small picture beside the latents, and how noisy it is


@argument("low_res_scheduler", "StableDiffusionUpscale*")
def low_res_scheduler() -> DDPMScheduler:
    return DDPMScheduler()


@argument("max_noise_level", "StableDiffusionUpscale*")
def max_noise_level() -> int:
    return 40


@argument("unet", "StableDiffusionLatentUpscale*")
def latent_upscale_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        act_fn="gelu",
        attention_head_dim=8,
        norm_num_groups=None,
        block_out_channels=(32, 32, 64, 64),
        time_cond_proj_dim=160,
        conv_in_kernel=1,
        conv_out_kernel=1,
        cross_attention_dim=WIDTH,
        down_block_types=("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3),
        up_block_types=(*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"),
        in_channels=8,
        out_channels=5,
        mid_block_type=None,
        only_cross_attention=False,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        timestep_post_act="gelu",
        layers_per_block=1,
    )


@argument("scheduler", "StableDiffusionLatentUpscale*")
def latent_upscale_scheduler() -> EulerDiscreteScheduler:
    return euler_scheduler(prediction_type="sample")


@argument("vae", "StableDiffusionLDM3D*")
def rgbd_vae() -> AutoencoderKL:
    return autoencoder_kl(in_channels=6, out_channels=6)


@component("DDIMInverseScheduler")
def inverse_scheduler() -> DDIMInverseScheduler:
    return DDIMInverseScheduler.from_config(ddim_scheduler().config)


@argument("vae", "StableDiffusionPanorama*")
def panorama_vae() -> AutoencoderKL:
    """With the scale of the real one, which the pipeline takes for granted."""
    return autoencoder_kl(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


@argument("unet", "StableDiffusionPanorama*")
def panorama_unet() -> UNet2DConditionModel:
    return unet(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )


@argument("scheduler", "StableDiffusionParadigms*")
def parallel_scheduler() -> DDIMParallelScheduler:
    return DDIMParallelScheduler.from_config(ddim_scheduler().config)


@argument("scheduler", "StableDiffusionModelEditing*")
def model_editing_scheduler() -> DDIMScheduler:
    return ddim_scheduler()


@argument("caption_generator", "StableDiffusionPix2PixZero*")
@argument("caption_processor", "StableDiffusionPix2PixZero*")
def no_captions() -> None:
    return None


SPECIAL.update(
    {
        "StableDiffusion*InstructPix2Pix*": {"image": picture(), "image_guidance_scale": 1.5},
        "StableDiffusionInstructPix2Pix*": {"height": None, "width": None},
        "StableDiffusionDepth2Img*": {
            "image": picture(),
            "depth_map": torch.linspace(0, 1, SIZE * SIZE).reshape(1, SIZE, SIZE),
            "strength": 0.75,
        },
        "StableDiffusionUpscale*": {"image": [picture(size=8), picture(1, size=8)], "noise_level": 20},
        "StableDiffusionLatentUpscale*": {"image": [picture(), picture(1)]},
        "StableDiffusionDiffEdit*": {
            "mask_image": torch.ones(1, 1, 8, 8),
            "image_latents": torch.linspace(-1, 1, 2 * 3 * 4 * 64).reshape(
                2, 3, 4, 8, 8
            ),  # of two pictures at three timesteps
        },
        "StableDiffusionPix2PixZero*": {
            "source_embeds": torch.zeros(1, 16, WIDTH),
            "target_embeds": torch.full((1, 16, WIDTH), 0.1),
        },
        "StableDiffusionAttendAndExcite*": {"token_indices": [[2], [2]], "attn_res": (4, 4)},
        # Guidance with a memory, from the first step on: what it sums up must not be lost.
        "SemanticStableDiffusion*": {
            "editing_prompt": ["a hat"],
            "edit_warmup_steps": 0,
            "edit_mom_beta": 0.5,
            "edit_momentum_scale": 0.5,
        },
        "StableDiffusionPipelineSafe": {"sld_warmup_steps": 0},
        "StableDiffusionPanorama*": {"height": 512, "width": 512 + 64},  # windows are 64 latents wide: there are two
        "CycleDiffusion*": {"source_prompt": ["a dog", "a blue circle"], "image": [picture(), picture(1)]},
    }
)
