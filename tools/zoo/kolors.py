"""Kolors: SDXL's UNet on the hidden states of a ChatGLM."""

from __future__ import annotations

import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from transformers import BatchEncoding, Qwen2Tokenizer

from zoo.inputs import SPECIAL, picture
from zoo.language_models import QWEN_SPECIAL, VOCABULARY, qwen_vocabulary
from zoo.registry import argument, component
from zoo.stable_diffusion import WIDTH, unet


TOKENS = 256  # the pipeline's own length, which its call does not pass on
SPECIAL.update({"KolorsImg2Img*": {"image": picture(), "strength": 0.8}})


class PositionTokenizer(Qwen2Tokenizer):
    """Stands in for ChatGLM's tokenizer, which needs a SentencePiece model in a file: pads on the left and returns positions."""

    def __call__(self, *args, **kwargs) -> BatchEncoding:
        encoded = super().__call__(*args, **kwargs)
        encoded["position_ids"] = (encoded["attention_mask"].cumsum(dim=-1) - 1).clamp(min=0)
        return encoded


@argument("tokenizer", "Kolors*")
def kolors_tokenizer() -> PositionTokenizer:
    return PositionTokenizer(
        vocab=qwen_vocabulary(), merges=[], additional_special_tokens=QWEN_SPECIAL[1:], padding_side="left"
    )


@component("ChatGLMModel")
def chatglm() -> ChatGLMModel:
    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        ffn_hidden_size=37,
        kv_channels=WIDTH // 2,
        num_attention_heads=2,
        seq_length=TOKENS,
        original_rope=True,
    )
    model = ChatGLMModel(config)
    for parameter in model.parameters():  # the class leaves them as the memory happens to be
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.1)
    return model


@argument("unet", "Kolors*")
def kolors_unet() -> UNet2DConditionModel:
    return unet(
        encoder_hid_dim=WIDTH,
        encoder_hid_dim_type="text_proj",
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
    )


@argument("image_encoder", "Kolors*")
def no_image_encoder() -> None:
    return None


argument("feature_extractor", "Kolors*")(no_image_encoder)


@argument("scheduler", "Kolors*")
def kolors_scheduler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.014,
        beta_schedule="scaled_linear",
        num_train_timesteps=1100,
        timestep_spacing="leading",
        steps_offset=1,
    )
