"""Z-Image: a single stream whose inputs and outputs are lists with one tensor for each sample."""

from __future__ import annotations

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageControlNetModel, ZImageTransformer2DModel

from zoo.inputs import SPECIAL, picture
from zoo.language_models import qwen3, qwen_tokenizer
from zoo.registry import argument, component
from zoo.stable_diffusion import WIDTH, autoencoder_kl


CHANNELS = 4
SPECIAL.update(
    {
        "ZImage*": {"max_sequence_length": 64},
        "ZImageImg2Img*": {"image": picture(), "strength": 0.8},
        "ZImageInpaint*": {"image": picture(), "mask_image": picture(mode="L"), "strength": 0.8},
        "ZImageControlNet*": {"control_image": picture()},
        "ZImageControlNetInpaint*": {"image": picture(), "mask_image": [picture(mode="L"), picture(1, mode="L")]},
    }
)


@component("ZImageTransformer2DModel")
def zimage_transformer(**kwargs) -> ZImageTransformer2DModel:
    return ZImageTransformer2DModel(
        in_channels=CHANNELS,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 32, 32],
        **kwargs,
    )


@component("ZImageControlNetModel")
def zimage_controlnet(**kwargs) -> ZImageControlNetModel:
    return ZImageControlNetModel(
        **{
            "control_layers_places": [0],
            "control_in_dim": CHANNELS,
            "dim": 32,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            **kwargs,
        }
    )


@argument("controlnet", "ZImageControlNetInpaint*")
def zimage_inpainting_controlnet() -> ZImageControlNetModel:
    """Reads the control picture, the mask and the masked picture, as the checkpoints from 2.0 on do."""
    return zimage_controlnet(
        control_in_dim=2 * CHANNELS + 1,
        control_refiner_layers_places=[0],
        add_control_noise_refiner="control_noise_refiner",
    )


@argument("vae", "ZImage*")
def zimage_vae() -> AutoencoderKL:
    return autoencoder_kl(latent_channels=CHANNELS, scaling_factor=0.3611, shift_factor=0.1159)


argument("text_encoder", "ZImage*")(qwen3)
argument("tokenizer", "ZImage*")(qwen_tokenizer)


@argument("scheduler", "ZImage*")
def zimage_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=6.0)
