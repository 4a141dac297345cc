"""ImageReward (Xu et al. 2023, arXiv 2304.05977) on the BLIP classes of transformers.

The original package does not run on transformers 5. This is the same network, from the original checkpoint. Two things differ from
transformers' defaults and must (`VISION["layer_norm_eps"]`, `TEXT["num_attention_heads"]`), and two from what BLIP's own matching head
does: the text starts with [CLS], not with [ENC], and attention looks both ways although the configuration says "decoder" (which is only
what makes transformers build cross-attention).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dpok_trl.rewards.info import RewardInfo
from dpok_trl.rewards.pictures import openai_clip_pixels
from dpok_trl.rewards.weights import ModelReward, build, load_state_dict, load_tokenizer, shared


FILE = "ImageReward.pt"
VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,  # timm's; the default here is 1e-5
}
TEXT = {
    "vocab_size": 30524,  # BERT's, [DEC] and [ENC]
    "hidden_size": 768,
    "encoder_hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,  # the default here is 8
    "max_position_embeddings": 512,
    "is_decoder": True,
}
MAX_TOKENS = 35
# Of the raw scores over the training set of the paper.
MEAN, STD = 0.16717362830052426, 1.0333394966054072

# Where the checkpoint and transformers differ; what is not named here has the same name in both.
_VISION_NAMES = (
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("blocks.", "encoder.layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
)
# The contrastive head of BLIP, which the score does not use, and a buffer that is made anew.
_LEFT_OUT = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


class RatingHead(nn.Module):
    """Five linear layers and no activation between them: what was trained, here and in the LAION aesthetic predictor."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """`(B, width)` -> `(B,)`."""
        return self.layers(features)[:, 0]


class ImageRewardModel(nn.Module):
    """BLIP's picture encoder, its text encoder with cross-attention to the picture, and the head on the first token."""

    def __init__(self, vision: Mapping[str, Any], text: Mapping[str, Any]):
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        self.vision_model = BlipVisionModel(BlipVisionConfig(**vision))
        self.text_encoder = BlipTextModel(BlipTextConfig(**text), add_pooling_layer=False)
        self.mlp = RatingHead(text["hidden_size"])

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): normalised.
            input_ids, attention_mask (`torch.Tensor` of shape `(B, L)`).

        Returns:
            `torch.Tensor` of shape `(B,)`: standardised scores, float32.
        """
        patches = self.vision_model(pixel_values.to(self.text_encoder.dtype)).last_hidden_state
        tokens = self.text_encoder(
            input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=patches
        ).last_hidden_state
        return (self.mlp(tokens[:, 0].float()) - MEAN) / STD


def convert_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original checkpoint under the keys of [`ImageRewardModel`]. Keys it does not know stay, for the error that names them."""
    converted = {}
    for original, tensor in state_dict.items():
        key = original.removeprefix("module.")
        if key.startswith(_LEFT_OUT):
            continue
        if key.startswith("blip.visual_encoder."):
            key = key.removeprefix("blip.visual_encoder.")
            if key.startswith("norm."):
                key = "post_layernorm." + key.removeprefix("norm.")
            for theirs, ours in _VISION_NAMES:
                key = key.replace(theirs, ours)
            key = "vision_model." + key
        else:
            key = key.removeprefix("blip.")
        converted[key] = tensor
    return converted


def make_model(state_dict: Mapping[str, Tensor], source: str, dtype: torch.dtype = torch.float32) -> ImageRewardModel:
    """The network around a checkpoint with the original keys. The head stays in float32 whatever the dtype."""
    model = build(lambda: ImageRewardModel(VISION, TEXT), convert_keys(state_dict), source, dtype)
    model.mlp.float()
    return model


def make_tokenizer(tokenizer: str) -> Any:
    """BERT's tokenizer with the two tokens that BLIP added: they are never put in front, but a prompt may spell them."""
    from transformers import BertTokenizer

    made = load_tokenizer(BertTokenizer, tokenizer)
    made.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    if len(made) != TEXT["vocab_size"]:
        raise ValueError(
            f"image-reward needs the vocabulary of bert-base-uncased, {TEXT['vocab_size'] - 2} tokens; {tokenizer} has {len(made) - 2}."
        )
    return made


class ImageReward(ModelReward):
    """
    How much people prefer the picture for its prompt: text alignment and looks in one number.

    Of a prompt the first 35 tokens count ([CLS] and [SEP] among them), as in the original.

    Args:
        weights (`str` or `Path`): a Hub id, a folder with `ImageReward.pt`, or the file.
        tokenizer (`str`): a Hub id or a folder; the vocabulary of `bert-base-uncased`.

    The others are those of [`ModelReward`].
    """

    info = RewardInfo(
        name="image-reward",
        summary="human preference for a picture given its prompt (BLIP, trained on 137k comparisons)",
        input="image, prompt",
        range="about N(0, 1)",
        weights="zai-org/ImageReward, ImageReward.pt (1.8 GB); bert-base-uncased, tokenizer only",
        licence="Apache-2.0",
        needs="nothing more",
        overlooks="Reads the first 35 tokens of a prompt and a square crop of the centre, and prefers rich, saturated pictures.",
    )

    def __init__(
        self,
        weights: str | Path = "zai-org/ImageReward",
        *,
        tokenizer: str | Path = "bert-base-uncased",
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ):
        super().__init__(weights, revision=revision, device=device, dtype=dtype, batch_size=batch_size)
        self.tokenizer_name = str(tokenizer)
        self.tokenizer: Any = None

    def _load(self) -> nn.Module:
        self.tokenizer = make_tokenizer(self.tokenizer_name)
        return shared(
            ("image-reward", self.weights, self.revision, self.device, self.dtype),
            lambda: make_model(load_state_dict(self.weights, FILE, self.revision), self.weights, self.dtype),
        )

    def _score(self, model: ImageRewardModel, images: list[Image.Image], prompts: list[str]) -> Tensor:
        token_ids = self._tokenize(prompts)

        def scores(indices: Sequence[int]) -> Tensor:
            pixels = openai_clip_pixels([images[index] for index in indices], VISION["image_size"])
            # Padded to the longest here: the mask makes it the same as padding to 35.
            padded = self.tokenizer.pad(
                {"input_ids": [token_ids[prompts[index]] for index in indices]}, return_tensors="pt"
            )
            return model(
                pixels.to(self.device), padded["input_ids"].to(self.device), padded["attention_mask"].to(self.device)
            )

        return self._batched(scores, range(len(images)))

    def _tokenize(self, prompts: Sequence[str]) -> dict[str, list[int]]:
        """The token ids of each distinct prompt, [CLS] first."""
        distinct = list(dict.fromkeys(prompts))
        token_ids = self.tokenizer(distinct, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        full = [prompt for prompt, ids in zip(distinct, token_ids, strict=True) if len(ids) == MAX_TOKENS]
        self._tell_of_a_cut(self.tokenizer, full, MAX_TOKENS)
        return dict(zip(distinct, token_ids, strict=True))
