"""Human Preference Score v2 and v2.1 (Wu et al. 2023, arXiv 2306.09341): open_clip's ViT-H-14 in transformers' `CLIPModel`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dpok_trl.rewards.clip import LAION_CLIP, Clip, ClipReward
from dpok_trl.rewards.info import RewardInfo
from dpok_trl.rewards.pictures import hps_pixels
from dpok_trl.rewards.weights import build, load_state_dict, load_tokenizer, shared


TEXT = {
    "vocab_size": 49408,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "hidden_act": "gelu",  # the default here is OpenAI's quick_gelu
    "eos_token_id": 49407,
}
VISION = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
}
PROJECTION = 1024

# open_clip's name -> transformers'. Within a block the names are the same for pictures and text.
_SINGLE = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_BLOCKS = {
    "transformer.resblocks.": "text_model.encoder.layers.",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
}
_IN_A_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def convert_open_clip(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """
    open_clip's CLIP under the keys of transformers' `CLIPModel`: names, the two projections transposed, and query, key and value apart.

    Keys it does not know stay, for the error that names them.
    """
    converted = {}
    for original, tensor in state_dict.items():
        key = original.removeprefix("module.")
        if key in _SINGLE:
            converted[_SINGLE[key]] = tensor
        elif key in _TRANSPOSED:
            converted[_TRANSPOSED[key]] = tensor.T
        else:
            converted.update(_convert_block(key, tensor))
    return converted


def _convert_block(key: str, tensor: Tensor) -> dict[str, Tensor]:
    for theirs, ours in _BLOCKS.items():
        if key.startswith(theirs):
            index, _, inside = key.removeprefix(theirs).partition(".")
            layer = f"{ours}{index}."
            name, _, kind = inside.rpartition(".")
            if inside.startswith("attn.in_proj_"):
                kind = inside.removeprefix("attn.in_proj_")
                thirds = zip("qkv", tensor.chunk(3), strict=True)
                return {f"{layer}self_attn.{which}_proj.{kind}": third for which, third in thirds}
            if name in _IN_A_BLOCK:
                return {f"{layer}{_IN_A_BLOCK[name]}.{kind}": tensor}
    return {key: tensor}


def make_model(state_dict: Mapping[str, Tensor], source: str) -> Any:
    """The `CLIPModel` around a checkpoint with open_clip's keys, in float32."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(text_config=dict(TEXT), vision_config=dict(VISION), projection_dim=PROJECTION)
    return build(lambda: CLIPModel(config), convert_open_clip(state_dict), source, torch.float32)


class HPSv2(ClipReward):
    """
    Human preference for a picture given its prompt: the cosine, without CLIP's scale.

    Its scores lie within a few hundredths: scale them before adding them to another reward.
    """

    info = RewardInfo(
        name="hpsv2",
        summary="human preference for a picture given its prompt (CLIP-H, trained on HPDv2)",
        input="image, prompt",
        range="about 0.27, standard deviation about 0.02",
        weights=f"xswu/HPSv2, HPS_v2_compressed.pt (986M parameters); {LAION_CLIP}, tokenizer only",
        licence="Apache-2.0",
        needs="nothing more",
        overlooks="Prefers glossy, contrasty pictures in the styles it was trained on.",
    )
    default_weights = "xswu/HPSv2"
    default_tokenizer = LAION_CLIP
    file = "HPS_v2_compressed.pt"

    def _load(self) -> nn.Module:
        from transformers import CLIPTokenizer

        def load() -> Clip:
            model = make_model(load_state_dict(self.weights, self.file, self.revision), f"{self.weights}, {self.file}")
            return Clip(model, load_tokenizer(CLIPTokenizer, self.tokenizer_name), self.dtype, hps_pixels)

        return shared(
            ("hps", self.file, self.weights, self.tokenizer_name, self.revision, self.device, self.dtype), load
        )


class HPSv21(HPSv2):
    """[`HPSv2`] with the weights of version 2.1, trained on more and better data."""

    info = RewardInfo(
        name="hpsv2.1",
        summary="human preference for a picture given its prompt (CLIP-H, trained on more data than hpsv2)",
        input="image, prompt",
        range="about 0.27, standard deviation about 0.02",
        weights=f"xswu/HPSv2, HPS_v2.1_compressed.pt (986M parameters); {LAION_CLIP}, tokenizer only",
        licence="Apache-2.0",
        needs="nothing more",
        overlooks="Prefers glossy, contrasty pictures in the styles it was trained on.",
    )
    file = "HPS_v2.1_compressed.pt"
