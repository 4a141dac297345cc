"""A pipeline of one's own: no text, no VAE, one network that paints pictures of 8 x 8 pixels, and ways to be no policy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from tiny import ddim


SIDE = 8


def network() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=SIDE,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
    ).eval()


class Painter(DiffusionPipeline):
    """What a test wants otherwise it sets as an attribute.

    `walk` makes the timesteps of the loop from those of the scheduler; `around` is a context for the network's call, `behind` changes its output, and
    `beside` are more arguments of `scheduler.step`.
    """

    walk: Callable[[torch.Tensor], Any] = staticmethod(lambda timesteps: timesteps)
    around: Callable[[], Any] = nullcontext
    behind: Callable[[torch.Tensor], torch.Tensor] = staticmethod(lambda output: output)
    beside: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, prompt, generator=None, num_inference_steps=4, output_type="pt", return_dict=True):
        self.scheduler.set_timesteps(num_inference_steps)
        pictures = randn_tensor((len(prompt), 3, SIDE, SIDE), generator=generator)
        for timestep in self.walk(self.scheduler.timesteps):
            with self.around():
                output = self.behind(self.unet(pictures, timestep).sample)
            pictures = self.scheduler.step(output, timestep, pictures, **self.beside).prev_sample
        return (self.painted(pictures),)

    @staticmethod
    def painted(pictures: torch.Tensor) -> torch.Tensor:
        return (pictures / 2 + 0.5).clamp(0, 1)


def painter(**settings: Any) -> Painter:
    pipe = Painter(network(), ddim())
    vars(pipe).update(settings)
    return pipe


class Gallery(DiffusionPipeline):
    """Nothing is where other pipelines have it: its network is `net`, its prompts are `text`, and its pictures hang somewhere in a dict."""

    def __init__(self, net, scheduler):
        super().__init__()
        self.register_modules(net=net, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, text, generator=None, num_inference_steps=4, output_type="pt"):
        self.scheduler.set_timesteps(num_inference_steps)
        pictures = randn_tensor((len(text), 3, SIDE, SIDE), generator=generator)
        for timestep in self.scheduler.timesteps:
            pictures = self.scheduler.step(self.net(pictures, timestep).sample, timestep, pictures).prev_sample
        return {"titles": text, "rooms": {"main": Painter.painted(pictures)}}
