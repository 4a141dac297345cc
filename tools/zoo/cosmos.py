"""Cosmos 1.0, 2 and 2.5. Without the resized padding mask, which needs torchvision."""

from __future__ import annotations

from diffusers import (
    AutoencoderKLCosmos,
    CosmosTransformer3DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from zoo.inputs import SPECIAL, picture
from zoo.registry import argument, component
from zoo.stable_diffusion import TOKENS, WIDTH


CHANNELS = 4
FRAMES = 9
SPECIAL.update(
    {
        "Cosmos*": {"max_sequence_length": TOKENS},
        "Cosmos*World*": {"num_frames": FRAMES},
        "CosmosTextToWorld*": {"height": 32, "width": 32},
        "CosmosVideoToWorld*": {"height": 32, "width": 32},
        "Cosmos*VideoToWorld*": {"image": [picture(seed, size=32) for seed in range(2)]},
        "Cosmos2_5*": {"num_frames": 5, "max_sequence_length": 256},  # behind a system message,
    }
)


class Guard:
    """In the place of NVIDIA's guardrail models, without which the pipelines refuse to run: lets everything pass."""

    def to(self, *args, **kwargs) -> Guard:
        return self

    def check_text_safety(self, prompt) -> bool:
        return True

    def check_video_safety(self, frames):
        return frames


argument("safety_checker", "Cosmos*")(Guard)


@component("AutoencoderKLCosmos")
def cosmos_vae() -> AutoencoderKLCosmos:
    return AutoencoderKLCosmos(
        latent_channels=CHANNELS,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        patch_size=4,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        latents_mean=None,
        latents_std=None,
    )


def cosmos_transformer(**kwargs) -> CosmosTransformer3DModel:
    return CosmosTransformer3DModel(
        **{
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 1,
            "mlp_ratio": 2.0,
            "text_embed_dim": WIDTH,
            "adaln_lora_dim": 4,
            "max_size": (4, 16, 16),
            "concat_padding_mask": False,
            **kwargs,
        }
    )


@component("CosmosTransformer3DModel")
def cosmos_text_transformer() -> CosmosTransformer3DModel:
    return cosmos_transformer()


@argument("transformer", "Cosmos2TextToImage*")
def cosmos2_transformer() -> CosmosTransformer3DModel:
    return cosmos_transformer(extra_pos_embed_type=None)


@argument("transformer", "CosmosVideoToWorld*")
def cosmos_video_transformer() -> CosmosTransformer3DModel:
    """A mask of the given frames is a channel beside the latents."""
    return cosmos_transformer(in_channels=CHANNELS + 1)


@argument("transformer", "Cosmos2VideoToWorld*")
def cosmos2_video_transformer() -> CosmosTransformer3DModel:
    return cosmos_transformer(in_channels=CHANNELS + 1, extra_pos_embed_type=None)


@argument("transformer", "Cosmos2_5*")
def cosmos25_transformer() -> CosmosTransformer3DModel:
    return cosmos_transformer(
        in_channels=CHANNELS + 1,
        extra_pos_embed_type=None,
        use_crossattn_projection=True,
        crossattn_proj_in_channels=2 * WIDTH,
        encoder_hidden_states_channels=WIDTH,
    )


@argument("scheduler", "CosmosTextToWorld*", "CosmosVideoToWorld*")
def cosmos_scheduler() -> EDMEulerScheduler:
    return EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras")


@argument("scheduler", "Cosmos2TextToImage*", "Cosmos2VideoToWorld*")
def cosmos2_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)


@argument("scheduler", "Cosmos2_5*")
def cosmos25_scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, use_karras_sigmas=True, final_sigmas_type="sigma_min"
    )
