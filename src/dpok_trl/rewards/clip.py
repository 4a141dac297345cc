"""Rewards that are the cosine of a picture and its prompt in CLIP's space: CLIPScore and PickScore."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from dpok_trl.rewards.base import RewardError
from dpok_trl.rewards.info import RewardInfo
from dpok_trl.rewards.pictures import clip_pixels
from dpok_trl.rewards.weights import ModelReward, check_keys, load_tokenizer, shared


OPENAI_CLIP = "openai/clip-vit-large-patch14"
LAION_CLIP = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class Clip(nn.Module):
    """
    A CLIP model with its tokenizer and its recipe for pixels: pictures and prompts in, unit vectors out.

    Args:
        model (`transformers.CLIPModel`): in float32.
        tokenizer (`transformers.CLIPTokenizer`).
        dtype (`torch.dtype`): what the model is cast to.
        pixels (`Callable`): `(pictures, size)` to normalised pixels.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        dtype: torch.dtype = torch.float32,
        pixels: Callable[[Sequence[Image.Image], int], Tensor] = clip_pixels,
    ):
        super().__init__()
        text = model.config.text_config
        if len(tokenizer) != text.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens and the CLIP model {text.vocab_size}: give the `tokenizer` of these weights."
            )
        self.scale = model.logit_scale.float().exp().item()  # before the cast: bfloat16 makes 98.9 of 100
        self.model = model.to(dtype).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.pixels = pixels
        self.max_tokens = text.max_position_embeddings
        self.image_size = model.config.vision_config.image_size

    # `get_image_features` and `get_text_features` return another type in transformers 5 than in 4; this is what both compute.

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """`(B, D)`, float32, of length 1."""
        pixels = self.pixels(images, self.image_size).to(self.model.device, self.model.dtype)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return functional.normalize(self.model.visual_projection(pooled).float(), dim=-1)

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """`(B, D)`, float32, of length 1. A long prompt is cut after 77 tokens, as everywhere with CLIP."""
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.model.device)
        pooled = self.model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        return functional.normalize(self.model.text_projection(pooled).float(), dim=-1)


def load_clip(
    weights: str,
    tokenizer: str,
    *,
    revision: str | None = None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Clip:
    """A CLIP model in the format of transformers, from a Hub id or a folder; the same one for all rewards that ask for it."""
    from safetensors import SafetensorError
    from transformers import CLIPModel, CLIPTokenizer

    def load() -> Clip:
        try:
            model, report = CLIPModel.from_pretrained(
                weights, revision=revision, dtype=torch.float32, output_loading_info=True
            )
        except OSError as error:
            raise RewardError(f"could not get the CLIP model {weights}: {error}") from error
        except (SafetensorError, RuntimeError) as error:  # half a file, or tensors of other shapes
            raise RewardError(f"the weights of the CLIP model {weights} cannot be read: {error}") from error
        # Old checkpoints hold `position_ids`, which are no weights.
        unexpected = {key for key in report["unexpected_keys"] if not key.endswith("position_ids")}
        check_keys(weights, missing=report["missing_keys"], unexpected=unexpected)
        words = load_tokenizer(CLIPTokenizer, tokenizer, revision if tokenizer == weights else None)
        return Clip(model, words, dtype)

    return shared(("clip", weights, tokenizer, revision, device, dtype), load)


class ClipReward(ModelReward):
    """
    A score made of the cosine of picture and prompt.

    Args:
        weights (`str` or `Path`, *optional*): a Hub id or a folder; by default the published ones.
        tokenizer (`str` or `Path`, *optional*): a Hub id or a folder; by default what belongs to the published weights.

    The others are those of [`ModelReward`]. `revision` pins the weights, and a tokenizer that lies beside them.
    """

    default_weights: str
    default_tokenizer: str | None = None  # None: beside the weights

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        tokenizer: str | Path | None = None,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ):
        weights = self.default_weights if weights is None else weights
        super().__init__(weights, revision=revision, device=device, dtype=dtype, batch_size=batch_size)
        self.tokenizer_name = str(tokenizer or self.default_tokenizer or self.weights)

    def _load(self) -> nn.Module:
        return load_clip(
            self.weights, self.tokenizer_name, revision=self.revision, device=self.device, dtype=self.dtype
        )

    def _score(self, model: Clip, images: list[Image.Image], prompts: list[str]) -> Tensor:
        distinct = list(dict.fromkeys(prompts))
        row = {prompt: index for index, prompt in enumerate(distinct)}
        self._tell_of_a_cut(model.tokenizer, distinct, model.max_tokens)
        texts = self._batched(model.embed_prompts, distinct)[[row[prompt] for prompt in prompts]]
        return self._of_cosine((self._batched(model.embed_images, images) * texts).sum(dim=-1), model)

    def _of_cosine(self, cosine: Tensor, model: Clip) -> Tensor:
        return cosine


class CLIPScore(ClipReward):
    """
    How well the picture shows the prompt: max(100 cos, 0), as torchmetrics' `CLIPScore` has it.

    (The paper, Hessel et al. 2021, has 2.5 max(cos, 0), with the prefix "A photo depicts" and ViT-B/32.)
    """

    info = RewardInfo(
        name="clip-score",
        summary="CLIP similarity of picture and prompt, max(100 cos, 0)",
        input="image, prompt",
        range="0 to 100, in practice about 15 to 35",
        weights=f"{OPENAI_CLIP} (1.7 GB)",
        licence="MIT (of OpenAI's CLIP)",
        needs="nothing more",
        overlooks="A bag of words: it hardly tells which colour belongs to which thing, is weak on counting and places, and is hacked by writing the prompt into the picture.",
    )
    default_weights = OPENAI_CLIP

    def _of_cosine(self, cosine: Tensor, model: Clip) -> Tensor:
        return (100 * cosine).clamp(min=0)


class PickScore(ClipReward):
    """
    Which of two pictures a person would pick for the prompt: exp(logit scale) cos, as published (Kirstain et al. 2023).

    The difference of two pictures' scores is the log-odds that the first is picked. Some trainers divide it by 26.
    """

    info = RewardInfo(
        name="pickscore",
        summary="human preference for a picture given its prompt (CLIP-H, trained on Pick-a-Pic)",
        input="image, prompt",
        range="about 21, standard deviation about 1",
        weights=f"yuvalkirstain/PickScore_v1 (3.9 GB); {LAION_CLIP}, tokenizer only",
        licence="not stated on the model card",
        needs="nothing more",
        overlooks="The taste of the users of one web site, on a square crop of the centre.",
    )
    default_weights = "yuvalkirstain/PickScore_v1"
    default_tokenizer = LAION_CLIP

    def _of_cosine(self, cosine: Tensor, model: Clip) -> Tensor:
        return model.scale * cosine
