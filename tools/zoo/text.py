"""The text encoders that several families share, T5 and its multilingual kin, at `WIDTH`."""

from __future__ import annotations

from transformers import T5Config, T5EncoderModel, T5Tokenizer, UMT5Config, UMT5EncoderModel

from zoo.registry import component
from zoo.stable_diffusion import TOKENS, WIDTH


LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"()[]{}<>|/_-+=*&%$#@~\\`"
T5_SPECIAL = ["<pad>", "</s>", "<unk>"]
T5_VOCABULARY = len(T5_SPECIAL) + 1 + len(LETTERS)


@component("T5Tokenizer", "T5TokenizerFast")
def t5_tokenizer() -> T5Tokenizer:
    """A letter, or the start of a word, is a token."""
    pieces = [*((token, 0.0) for token in T5_SPECIAL), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TOKENS)


def _t5_settings(**kwargs) -> dict[str, int]:
    return {
        "vocab_size": T5_VOCABULARY,
        "d_model": WIDTH,
        "d_kv": 8,
        "d_ff": 37,
        "num_layers": 1,
        "num_heads": 2,
        "relative_attention_num_buckets": 8,
        **kwargs,
    }


@component("T5EncoderModel")
def t5_encoder(**kwargs) -> T5EncoderModel:
    return T5EncoderModel(T5Config(**_t5_settings(**kwargs)))


@component("UMT5EncoderModel")
def umt5_encoder(**kwargs) -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(**_t5_settings(**kwargs)))
