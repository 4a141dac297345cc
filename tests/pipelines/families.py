"""Every family of pipelines that the tests of this folder go through, and the settings under which a family goes another way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from zoo import build, call_arguments
from zoo.registry import maker_for
from zoo.stable_diffusion import ddim_scheduler, unet


@dataclass(frozen=True)
class Family:
    """A tiny pipeline and a tiny call of it.

    Args:
        pipeline (`str`): Name of a class of diffusers.
        components (`dict`): Functions that make components, or other arguments of the constructor, which the zoo would make otherwise.
        arguments (`dict`): Of the call, over those of the zoo.
    """

    pipeline: str
    components: dict[str, Callable[[], Any]] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)

    def pipe(self) -> DiffusionPipeline:
        """A new pipeline, always with the same weights."""
        given = {}
        for name, make in self.components.items():
            torch.manual_seed(1)
            given[name] = make()
        return build(getattr(diffusers, self.pipeline), **given)

    def call(self, pipe: DiffusionPipeline) -> dict[str, Any]:
        """The arguments of a call, without the prompt."""
        return {**call_arguments(pipe), **self.arguments}


def _wan_expert() -> torch.nn.Module:
    return maker_for("WanPipeline", "transformer", ["WanTransformer3DModel"])()


FAMILIES = {
    # Stable Diffusion, and what its releases 2.x and SDXL train differently
    "sd": Family("StableDiffusionPipeline"),
    "sd_v_prediction": Family(
        "StableDiffusionPipeline", {"scheduler": lambda: ddim_scheduler(prediction_type="v_prediction")}
    ),
    "sd_zero_snr": Family(
        "StableDiffusionPipeline",
        {
            "scheduler": lambda: ddim_scheduler(
                prediction_type="v_prediction",
                rescale_betas_zero_snr=True,
                timestep_spacing="trailing",
                set_alpha_to_one=True,
            )
        },
        {"guidance_rescale": 0.7},
    ),
    "sdxl": Family("StableDiffusionXLPipeline"),
    "sdxl_guidance_rescale": Family("StableDiffusionXLPipeline", arguments={"guidance_rescale": 0.7}),
    # Transformers
    "sd3": Family("StableDiffusion3Pipeline"),
    "sd3_without_t5": Family(
        "StableDiffusion3Pipeline", {"text_encoder_3": lambda: None, "tokenizer_3": lambda: None}
    ),
    "sd3_skip_layer_guidance": Family(
        "StableDiffusion3Pipeline",
        arguments={
            "skip_guidance_layers": [1],
            "skip_layer_guidance_start": 0.2,
            "skip_layer_guidance_stop": 0.7,  # steps 1 and 2 of 4
        },
    ),
    "flux": Family("FluxPipeline"),
    "flux_true_cfg": Family("FluxPipeline", arguments={"true_cfg_scale": 3.0, "negative_prompt": "a dog"}),
    "flux2": Family("Flux2Pipeline"),
    "flux2_klein": Family("Flux2KleinPipeline"),
    "sana": Family("SanaPipeline"),
    "pixart_sigma": Family("PixArtSigmaPipeline"),
    "qwenimage": Family("QwenImagePipeline"),
    "z_image": Family("ZImagePipeline"),
    "lumina2": Family("Lumina2Pipeline"),
    "hidream": Family("HiDreamImagePipeline"),
    "auraflow": Family("AuraFlowPipeline"),
    "cogview4": Family("CogView4Pipeline"),
    "chroma": Family("ChromaPipeline"),
    "kolors": Family("KolorsPipeline"),
    # Video
    "wan": Family("WanPipeline"),
    "wan_two_experts": Family("WanPipeline", {"transformer_2": _wan_expert, "boundary_ratio": lambda: 0.875}),
    # From a picture
    "sd_img2img": Family("StableDiffusionImg2ImgPipeline"),
    "sd_inpaint": Family("StableDiffusionInpaintPipeline"),
    "sd_inpaint_9_channels": Family("StableDiffusionInpaintPipeline", {"unet": lambda: unet(in_channels=9)}),
    "sdxl_img2img": Family("StableDiffusionXLImg2ImgPipeline"),
    "sdxl_inpaint": Family("StableDiffusionXLInpaintPipeline"),
    "flux_img2img": Family("FluxImg2ImgPipeline"),
    "flux_inpaint": Family("FluxInpaintPipeline"),
    "flux_fill": Family("FluxFillPipeline"),
}
