"""What the scripts of tests/hub train: three shapes of pipelines, by the names of their bases on the Hub."""

import torch
from diffusers import FluxPipeline
from tiny import stable_diffusion, stable_diffusion_xl
from zoo import build, call_arguments


torch.set_num_threads(1)

MAKE = {"sd": stable_diffusion, "sdxl": stable_diffusion_xl, "flux": lambda: build(FluxPipeline)}


def call(pipe) -> dict:
    """Arguments of a tiny call, without the prompt."""
    return call_arguments(pipe)


def image(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    return pipe("a cat", generator=generator, output_type="pt", **call(pipe)).images


def red(images, prompts, metadata):
    return images[:, 0].mean((1, 2)), {}
