"""The LAION aesthetic predictor v2: how good a picture looks, whatever the prompt."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from dpok_trl.rewards.clip import OPENAI_CLIP, Clip, load_clip
from dpok_trl.rewards.image_reward import RatingHead
from dpok_trl.rewards.info import RewardInfo
from dpok_trl.rewards.weights import ModelReward, build, load_state_dict


FILE = "aesthetic-model.pth"


class AestheticModel(nn.Module):
    """CLIP's picture embedding, of length 1, and the head on it."""

    def __init__(self, clip: Clip, head: RatingHead):
        super().__init__()
        self.clip = clip
        self.head = head


class Aesthetic(ModelReward):
    """
    How good the picture looks on a scale of 1 to 10, as people rated pictures; the prompt is not looked at.

    Args:
        weights (`str` or `Path`): of the head: a Hub id, a folder with `aesthetic-model.pth`, or the file (`.safetensors` as well).
        clip (`str` or `Path`): a Hub id or a folder. The model is shared with `clip-score`.

    `revision` is that of the head alone: to pin the CLIP model, give its folder. The others are those of [`ModelReward`]. The head stays in float32.
    """

    info = RewardInfo(
        name="aesthetic",
        summary="how good the picture looks, as people rated pictures from 1 to 10 (LAION aesthetic v2)",
        input="image",
        range="1 to 10, most pictures about 4 to 7",
        weights=f"trl-lib/ddpo-aesthetic-predictor, {FILE} (4 MB); {OPENAI_CLIP} (1.7 GB)",
        licence="Apache-2.0 (LAION's predictor), MIT (OpenAI's CLIP)",
        needs="nothing more",
        overlooks="Does not look at the prompt, and drifts to painterly pictures, saturated colours and frames.",
    )

    def __init__(
        self,
        weights: str | Path = "trl-lib/ddpo-aesthetic-predictor",
        *,
        clip: str | Path = OPENAI_CLIP,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ):
        super().__init__(weights, revision=revision, device=device, dtype=dtype, batch_size=batch_size)
        self.clip_weights = str(clip)

    def _load(self) -> nn.Module:
        tensors = load_state_dict(self.weights, FILE, self.revision)
        clip = load_clip(self.clip_weights, self.clip_weights, device=self.device, dtype=self.dtype)
        width = clip.model.config.projection_dim
        return AestheticModel(clip, build(lambda: RatingHead(width), tensors, self.weights, torch.float32))

    def _score(self, model: AestheticModel, images: list[Image.Image], prompts: list[str]) -> Tensor:
        return self._batched(lambda some: model.head(model.clip.embed_images(some)), images)
