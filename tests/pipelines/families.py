"""Every family of pipelines that the tests of this folder go through, and the settings under which a family goes another way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from diffusers import DiffusionPipeline, HiDreamImageTransformer2DModel
from zoo import build, call_arguments
from zoo.hidream import hidream_transformer
from zoo.stable_diffusion import ddim_scheduler, unet
from zoo.wan import wan_transformer


@dataclass(frozen=True)
class Family:
    """A tiny pipeline and a tiny call of it.

    Args:
        pipeline (`str`): Name of a class of diffusers.
        components (`dict`): Functions that make components, or other arguments of the constructor, which the zoo would make otherwise.
        arguments (`dict`): Of the call, over those of the zoo.
        attributes (`dict`): Set on the pipeline, where no argument of the call does it.
        module (`str`): Where the class is.
    """

    pipeline: str
    components: dict[str, Callable[[], Any]] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    module: str = "diffusers"

    def pipe(self) -> DiffusionPipeline:
        """A new pipeline, always with the same weights."""
        given = {}
        for name, make in self.components.items():
            torch.manual_seed(1)
            given[name] = make()
        pipe = build(getattr(import_module(self.module), self.pipeline), **given)
        for name, value in self.attributes.items():
            setattr(pipe, name, value)
        return pipe

    def call(self, pipe: DiffusionPipeline) -> dict[str, Any]:
        """The arguments of a call, without the prompt."""
        return {**call_arguments(pipe), **self.arguments}


def _small_hidream_transformer() -> torch.nn.Module:
    """The zoo's has patches for 128 x 128 latents."""
    config = hidream_transformer().config
    return HiDreamImageTransformer2DModel.from_config({**config, "patch_size": 2, "max_resolution": (8, 8)})


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
    # Eight lines, as in its default: a batch of eight prompts must not be taken for them.
    "sana": Family(
        "SanaPipeline",
        arguments={"complex_human_instruction": ["say", "in", "words", "all", "that", "one", "can", "see:"]},
    ),
    "pixart_sigma": Family("PixArtSigmaPipeline"),
    "qwenimage": Family("QwenImagePipeline"),
    "z_image": Family("ZImagePipeline"),
    "lumina2": Family("Lumina2Pipeline"),
    # It scales every size that it is asked for to the area of its default.
    "hidream": Family(
        "HiDreamImagePipeline",
        {"transformer": _small_hidream_transformer},
        attributes={"default_sample_size": 8},
    ),
    "auraflow": Family("AuraFlowPipeline"),
    "cogview4": Family("CogView4Pipeline"),
    "chroma": Family("ChromaPipeline"),
    # Exported only where SentencePiece is installed, for a tokenizer that the zoo has no need of.
    "kolors": Family("KolorsPipeline", module="diffusers.pipelines.kolors.pipeline_kolors"),
    # Video
    "wan": Family("WanPipeline"),
    "wan_two_experts": Family("WanPipeline", {"transformer_2": wan_transformer, "boundary_ratio": lambda: 0.875}),
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
