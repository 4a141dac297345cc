"""Relatives of FLUX with language models as text encoders: Bria, Bria FIBO, Ovis-Image, LongCat-Image."""

from __future__ import annotations

from diffusers import (
    AutoencoderKL,
    BriaFiboTransformer2DModel,
    BriaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    LongCatImageTransformer2DModel,
    OvisImageTransformer2DModel,
)
from diffusers.models.autoencoders.vae import DecoderOutput
from torch.nn.functional import avg_pool2d
from transformers import SmolLM3Config, SmolLM3ForCausalLM

from zoo.inputs import SPECIAL, picture
from zoo.language_models import language_settings
from zoo.registry import argument, component
from zoo.stable_diffusion import WIDTH, autoencoder_kl


CHANNELS = 4
SPECIAL.update(
    {
        "BriaPipeline": {"max_sequence_length": 16},
        # an empty prompt becomes a token that only the real vocabulary has
        "BriaFibo*": {"negative_prompt": "blurry", "max_sequence_length": 64, "height": 32, "width": 32},
        "BriaFiboEdit*": {"image": picture(size=32)},
        "LongCatImage*": {"enable_prompt_rewrite": False, "negative_prompt": "blurry"},
        "LongCatImageEdit*": {"image": picture(), "enable_prompt_rewrite": None, "height": None, "width": None},
    }
)


def _settings() -> dict:
    return {
        "patch_size": 1,
        "in_channels": 4 * CHANNELS,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "axes_dims_rope": [4, 6, 6],
    }


@component("BriaTransformer2DModel")
def bria_transformer() -> BriaTransformer2DModel:
    return BriaTransformer2DModel(**_settings())


@component("BriaFiboTransformer2DModel")
def bria_fibo_transformer() -> BriaFiboTransformer2DModel:
    settings = {**_settings(), "in_channels": CHANNELS, "joint_attention_dim": 2 * WIDTH}
    return BriaFiboTransformer2DModel(**settings, text_encoder_dim=WIDTH)


@component("SmolLM3ForCausalLM")
def smol_lm() -> SmolLM3ForCausalLM:
    return SmolLM3ForCausalLM(SmolLM3Config(**language_settings(no_rope_layer_interval=2)))


@component("OvisImageTransformer2DModel")
def ovis_transformer() -> OvisImageTransformer2DModel:
    return OvisImageTransformer2DModel(**_settings(), out_channels=4 * CHANNELS)


@component("LongCatImageTransformer2DModel")
def longcat_transformer() -> LongCatImageTransformer2DModel:
    return LongCatImageTransformer2DModel(**{**_settings(), "in_channels": 64}, pooled_projection_dim=WIDTH)


@argument("vae", "LongCatImage*")
def longcat_vae() -> AutoencoderKL:
    """The number of channels stands in the pipeline."""
    return autoencoder_kl(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159)


class PooledKL(AutoencoderKL):
    """Reads and writes a picture that is coarser by `pooled`: some pipelines scale whatever they get to about a million pixels.

    Where `blocks` is given, it says so in the configuration, from which a pipeline knows the factor.
    """

    def __init__(self, pooled: int, blocks: int | None = None, **kwargs):
        super().__init__(**kwargs)
        self.pooled = pooled
        if blocks is not None:
            self.register_to_config(block_out_channels=(8,) * blocks)

    def encode(self, x, return_dict=True):
        return super().encode(avg_pool2d(x, self.pooled), return_dict)

    def decode(self, z, return_dict=True, generator=None):
        coarse = super().decode(z, return_dict=False)[0]
        fine = coarse.repeat_interleave(self.pooled, dim=-2).repeat_interleave(self.pooled, dim=-1)
        return DecoderOutput(sample=fine) if return_dict else (fine,)


def one_level_vae(**kwargs) -> PooledKL:
    """Nothing but the pooling makes its latents smaller than the picture."""
    return PooledKL(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=4,
        layers_per_block=1,
        **kwargs,
    )


@argument("vae", "LongCatImageEdit*")
def longcat_editing_vae() -> PooledKL:
    return one_level_vae(pooled=64, blocks=7, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159)


@argument("vae", "BriaPipeline", "OvisImage*")
def vae_with_shift() -> AutoencoderKL:
    return autoencoder_kl(latent_channels=CHANNELS, scaling_factor=0.3611, shift_factor=0.1159)


@argument("scheduler", "Bria*", "OvisImage*", "LongCatImage*")
def dynamic_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, shift=3.0)
