"""Language models that serve as text encoders, at `WIDTH`, and their tokenizers.

A byte is a token, so that every template of every family can be written; the price is long prompts, which the call arguments cut.
"""

from __future__ import annotations

import string

from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GemmaConfig,
    GemmaModel,
    GemmaTokenizer,
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Mistral3Model,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
)

from zoo.registry import component
from zoo.stable_diffusion import WIDTH


VOCABULARY = 512  # of every language model: the tokenizers have fewer tokens
QWEN_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
GEMMA_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
# The text of all turns, with their roles; a turn's content is text, or a list of parts that may be text or a picture.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_vocabulary() -> dict[str, int]:
    return {token: index for index, token in enumerate([*QWEN_SPECIAL, *sorted(ByteLevel.alphabet())])}


@component(
    "Qwen2Tokenizer",
    "Qwen2TokenizerFast",
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "AutoTokenizer",
    "TokenizersBackend",
    "PreTrainedTokenizerBase",
)
def qwen_tokenizer() -> Qwen2Tokenizer:
    tokenizer = Qwen2Tokenizer(
        vocab=qwen_vocabulary(), merges=[], additional_special_tokens=QWEN_SPECIAL[1:], padding_side="right"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.image_token, tokenizer.video_token = "<|image_pad|>", "<|video_pad|>"
    return tokenizer


class PictureProcessor(Qwen2VLProcessor):
    """Without its video processor, which cannot be made where torchvision is missing and which no picture needs."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        for kind in ("image", "video"):
            token = f"<|{kind}_pad|>"
            setattr(self, f"{kind}_token", token)
            setattr(self, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(token))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


@component("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor")
def qwen_vl_processor() -> PictureProcessor:
    pictures = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
    )
    return PictureProcessor(pictures, qwen_tokenizer(), chat_template=CHAT_TEMPLATE)


@component("GemmaTokenizer", "GemmaTokenizerFast")
def gemma_tokenizer() -> GemmaTokenizer:
    tokens = [*GEMMA_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *string.printable.replace(" ", "")]
    tokenizer = GemmaTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[], add_bos_token=True
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def language_settings(**kwargs) -> dict:
    """What the configurations of all language models call alike."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": WIDTH // 2,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        **kwargs,
    }


@component("Gemma2PreTrainedModel")
def gemma2() -> Gemma2Model:
    return Gemma2Model(Gemma2Config(**language_settings()))


@component("GemmaPreTrainedModel")
def gemma() -> GemmaModel:
    return GemmaModel(GemmaConfig(**language_settings()))


@component("GlmModel")
def glm() -> GlmModel:
    return GlmModel(GlmConfig(**language_settings()))


@component("LlamaModel")
def llama() -> LlamaModel:
    return LlamaModel(LlamaConfig(**language_settings()))


@component("LlamaForCausalLM")
def llama_for_causal_lm() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**language_settings()))


@component("Qwen3Model")
def qwen3() -> Qwen3Model:
    return Qwen3Model(Qwen3Config(**language_settings()))


@component("Qwen3ForCausalLM")
def qwen3_for_causal_lm() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**language_settings()))


def _vision_tokens() -> dict[str, int]:
    token = qwen_vocabulary()
    return {
        "image_token_id": token["<|image_pad|>"],
        "video_token_id": token["<|video_pad|>"],
        "vision_start_token_id": token["<|vision_start|>"],
        "vision_end_token_id": token["<|vision_end|>"],
    }


def _vision_settings(**kwargs) -> dict:
    return {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        **kwargs,
    }


def _multimodal_settings(**kwargs) -> dict:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
    return language_settings(rope_parameters=rope, **kwargs)


def _qwen_vl_config() -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text_config=_multimodal_settings(),
        vision_config=_vision_settings(window_size=16, fullatt_block_indexes=[0]),
        **_vision_tokens(),
    )


@component("Qwen2_5_VLForConditionalGeneration")
def qwen_vl() -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration(_qwen_vl_config())


@component("Qwen2_5_VLTextModel")
def qwen_vl_text_model() -> Qwen2_5_VLTextModel:
    return Qwen2_5_VLTextModel(_qwen_vl_config().text_config)


def _qwen3_vl_config(layers: int) -> Qwen3VLConfig:
    return Qwen3VLConfig(
        text_config=_multimodal_settings(num_hidden_layers=layers),
        vision_config=_vision_settings(num_position_embeddings=64, deepstack_visual_indexes=[0]),
        **_vision_tokens(),
    )


@component("Qwen3VLForConditionalGeneration")
def qwen3_vl(layers: int = 2) -> Qwen3VLForConditionalGeneration:
    return Qwen3VLForConditionalGeneration(_qwen3_vl_config(layers))


@component("Qwen3VLModel")
def qwen3_vl_model(layers: int = 2) -> Qwen3VLModel:
    return Qwen3VLModel(_qwen3_vl_config(layers))


def _mistral3_config() -> Mistral3Config:
    return Mistral3Config(
        text_config={"model_type": "mistral", **language_settings()},
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 8,
            "image_size": 16,
            "patch_size": 4,
        },
        image_token_index=qwen_vocabulary()["<|image_pad|>"],
    )


@component("Mistral3ForConditionalGeneration")
def mistral3() -> Mistral3ForConditionalGeneration:
    return Mistral3ForConditionalGeneration(_mistral3_config())


@component("Mistral3Model")
def mistral3_model() -> Mistral3Model:
    return Mistral3Model(_mistral3_config())
