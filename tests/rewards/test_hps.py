"""HPSv2 and HPSv2.1: against a CLIP in open_clip's layout, written here on torch's own attention."""

import numpy as np
import pytest
import tiny_clip
import torch
from PIL import Image
from tiny_clip import PROMPTS
from torch import nn
from torch.nn import functional

from dpok_trl.rewards import hps
from dpok_trl.rewards.base import RewardError
from dpok_trl.rewards.hps import HPSv2, HPSv21, convert_open_clip, make_model
from dpok_trl.rewards.pictures import hps_pixels


TOLERANCE = 1e-5
PIXEL_TOLERANCE = 1e-4  # torch has its weights in float32, Pillow in float64; without antialiasing it is above 0.1
PICTURES = tiny_clip.pictures()
SIZES = {
    "embed": 10,
    "context": 20,
    "vocab": 74,
    "vision": (16, 32, 2, 2),
    "text": (12, 24, 2, 2),
    "image": 28,
    "patch": 14,
}
FULL_SIZES = {
    "embed": 1024,
    "context": 77,
    "vocab": 49408,
    "vision": (1280, 5120, 32, 16),
    "text": (1024, 4096, 24, 16),
    "image": 224,
    "patch": 14,
}


# --- open_clip's layout -----------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width, hidden, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, hidden), "c_proj": nn.Linear(hidden, width)})

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp["c_proj"](functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Transformer(nn.Module):
    def __init__(self, width, hidden, layers, heads):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, hidden, heads) for _ in range(layers))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        width = sizes["vision"][0]
        self.conv1 = nn.Conv2d(3, width, sizes["patch"], sizes["patch"], bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((sizes["image"] // sizes["patch"]) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(*sizes["vision"])
        self.proj = nn.Parameter(torch.zeros(width, sizes["embed"]))

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        width = sizes["text"][0]
        self.visual = Visual(sizes)
        self.transformer = Transformer(*sizes["text"])
        self.token_embedding = nn.Embedding(sizes["vocab"], width)
        self.positional_embedding = nn.Parameter(torch.zeros(sizes["context"], width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, sizes["embed"]))
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def text(self, ids):
        """Padded with zeros to the full context; the last token, which has the highest id, is what is read."""
        mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)
        x = self.transformer(self.token_embedding(ids) + self.positional_embedding, mask)
        return self.ln_final(x)[torch.arange(len(ids)), ids.argmax(-1)] @ self.text_projection


def open_clip(seed=0):
    model = OpenClip(SIZES).eval()
    tiny_clip.randomize(model.state_dict(), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if ".ln_" in name or name.startswith("ln_"):
            tensor.add_(0.5 * torch.randn(tensor.shape, generator=generator))  # no two layers alike
    return model


def expected_scores(model, images, prompts):
    """One pair at a time, pixels and token ids by other means than the reward's."""
    tokenizer, scores = tiny_clip.tokenizer(), []
    for image, prompt in zip(images, prompts, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        ids = torch.tensor([ids + [0] * (SIZES["context"] - len(ids))])
        with torch.no_grad():
            picture = functional.normalize(model.visual(recipe(image, SIZES["image"])[None]), dim=-1)
            text = functional.normalize(model.text(ids), dim=-1)
        scores.append((picture @ text.T).item())
    return torch.tensor(scores)


@pytest.fixture
def tiny(monkeypatch):
    def settings(width, hidden, layers, heads):
        return {
            "hidden_size": width,
            "intermediate_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
        }

    text = {"vocab_size": SIZES["vocab"], "max_position_embeddings": SIZES["context"], "eos_token_id": 73}
    monkeypatch.setattr(hps, "TEXT", hps.TEXT | settings(*SIZES["text"]) | text)
    vision = {"image_size": SIZES["image"], "patch_size": SIZES["patch"]}
    monkeypatch.setattr(hps, "VISION", hps.VISION | settings(*SIZES["vision"]) | vision)
    monkeypatch.setattr(hps, "PROJECTION", SIZES["embed"])
    assert (len(tiny_clip.tokenizer()), tiny_clip.tokenizer().eos_token_id) == (74, 73)


@pytest.fixture
def folder(tmp_path, tiny):
    """Both versions' files, with different weights, and a tokenizer."""
    torch.save({"state_dict": open_clip(0).state_dict(), "epoch": 1}, tmp_path / "HPS_v2_compressed.pt")
    torch.save({"state_dict": open_clip(1).state_dict()}, tmp_path / "HPS_v2.1_compressed.pt")
    tiny_clip.tokenizer().save_pretrained(tmp_path)
    return tmp_path


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reward_class", "seed"), [(HPSv2, 0), (HPSv21, 1)])
def test_scores(folder, reward_class, seed):
    scores = reward_class(folder, tokenizer=folder)(PICTURES, PROMPTS)
    expected = expected_scores(open_clip(seed), PICTURES, PROMPTS)
    assert expected.std() > 0.05
    assert (scores - expected).abs().max() < TOLERANCE
    assert (scores.dtype, scores.device.type) == (torch.float32, "cpu")


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batch_size_changes_nothing(folder, batch_size):
    scores = HPSv2(folder, tokenizer=folder)(PICTURES, PROMPTS)
    assert (HPSv2(folder, tokenizer=folder, batch_size=batch_size)(PICTURES, PROMPTS) - scores).abs().max() < TOLERANCE


def test_order_of_the_batch(folder):
    reward, order = HPSv2(folder, tokenizer=folder), [3, 0, 4, 2, 1]
    moved = reward([PICTURES[index] for index in order], [PROMPTS[index] for index in order])
    assert (moved - reward(PICTURES, PROMPTS)[order]).abs().max() < TOLERANCE


def test_quick_gelu_would_be_seen(folder, monkeypatch):
    monkeypatch.setattr(hps, "VISION", hps.VISION | {"hidden_act": "quick_gelu"})
    scores = HPSv2(folder, tokenizer=folder)(PICTURES, PROMPTS)
    assert (scores - expected_scores(open_clip(0), PICTURES, PROMPTS)).abs().max() > 50 * TOLERANCE


# --- keys -------------------------------------------------------------------------------------------------------------


def test_every_tensor_arrives_once(tiny):
    """Both ways: each of open_clip's values is found in the converted tensors, and nothing else is."""
    tensors, first = {}, 0
    for key, tensor in OpenClip(SIZES).state_dict().items():
        tensors[key] = torch.arange(first, first + tensor.numel()).reshape(tensor.shape)
        first += tensor.numel()
    converted = convert_open_clip(tensors)
    assert converted.keys() == make_model(open_clip().state_dict(), "").state_dict().keys()
    values = torch.cat([tensor.flatten() for tensor in converted.values()])
    assert torch.equal(values.sort().values, torch.arange(first))


def test_attention_and_projections():
    tensors = {
        "visual.transformer.resblocks.11.attn.in_proj_weight": torch.arange(12).view(6, 2),
        "transformer.resblocks.3.attn.in_proj_bias": torch.arange(6),
        "visual.proj": torch.arange(6).view(2, 3),
        "module.text_projection": torch.arange(6).view(3, 2),
    }
    vision, text = "vision_model.encoder.layers.11.self_attn", "text_model.encoder.layers.3.self_attn"
    assert {key: tensor.tolist() for key, tensor in convert_open_clip(tensors).items()} == {
        f"{vision}.q_proj.weight": [[0, 1], [2, 3]],
        f"{vision}.k_proj.weight": [[4, 5], [6, 7]],
        f"{vision}.v_proj.weight": [[8, 9], [10, 11]],
        f"{text}.q_proj.bias": [0, 1],
        f"{text}.k_proj.bias": [2, 3],
        f"{text}.v_proj.bias": [4, 5],
        "visual_projection.weight": [[0, 3], [1, 4], [2, 5]],
        "text_projection.weight": [[0, 2, 4], [1, 3, 5]],
    }


def test_full_size():
    with torch.device("meta"):
        original = OpenClip(FULL_SIZES).state_dict()
    assert len(original) == 686
    assert sum(tensor.numel() for tensor in original.values()) == 986_109_441
    zeros = {key: torch.zeros(()).expand(tensor.shape) for key, tensor in original.items()}
    model = make_model(zeros, "full size")
    assert len(model.state_dict()) == 910
    assert sum(parameter.numel() for parameter in model.parameters()) == 986_109_441
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert torch.equal(model.text_model.embeddings.position_ids, torch.arange(77)[None])
    assert torch.equal(model.vision_model.embeddings.position_ids, torch.arange(257)[None])


def test_missing_and_unexpected_keys_are_named(folder):
    tensors = open_clip().state_dict()
    del tensors["visual.proj"]
    tensors["transformer.resblocks.0.ls_1.gamma"] = torch.zeros(1)
    torch.save(tensors, folder / "HPS_v2_compressed.pt")
    with pytest.raises(RewardError) as error:
        HPSv2(folder, tokenizer=folder)(PICTURES, PROMPTS)
    assert str(error.value) == (
        f"the weights of {folder}, HPS_v2_compressed.pt do not fit this model: 1 missing (visual_projection.weight), "
        "1 unexpected (transformer.resblocks.0.ls_1.gamma)."
    )


def test_hub_is_asked_for_the_file_of_the_version(folder, monkeypatch):
    asked = []

    def download(repository, filename, *, revision):
        asked.append((repository, filename, revision))
        return folder / filename

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    HPSv2(tokenizer=folder, revision="v1")(PICTURES, PROMPTS)
    HPSv21(tokenizer=folder)(PICTURES, PROMPTS)
    assert asked == [
        ("xswu/HPSv2", "HPS_v2_compressed.pt", "v1"),
        ("xswu/HPSv2", "HPS_v2.1_compressed.pt", None),
    ]
    assert HPSv2().tokenizer_name == "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


# --- pixels -----------------------------------------------------------------------------------------------------------


def recipe(image, size):
    """Longer side to `size`, zeros around, CLIP's mean and std; resized by Pillow, channel by channel, as floats."""
    array = np.asarray(image.convert("RGB"), np.float32) / 255
    height, width = array.shape[:2]
    scale = size / max(height, width)
    new = round(height * scale), round(width * scale)
    square = np.zeros((3, size, size), np.float32)
    top, left = (size - new[0]) // 2, (size - new[1]) // 2
    for channel in range(3):
        plane = Image.fromarray(array[:, :, channel].copy()).resize((new[1], new[0]), Image.BICUBIC)
        square[channel, top : top + new[0], left : left + new[1]] = np.asarray(plane)
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    return (torch.from_numpy(square) - mean[:, None, None]) / std[:, None, None]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
@pytest.mark.parametrize("size", [(512, 512), (224, 224), (224, 101), (300, 223), (101, 333), (50, 40)])
def test_pixels(size, mode):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    image = Image.fromarray(noise, "RGBA").convert(mode)
    pixels = hps_pixels([image], 224)
    assert pixels.shape == (1, 3, 224, 224)
    assert (pixels[0] - recipe(image, 224)).abs().max() < PIXEL_TOLERANCE


def test_very_long_picture_keeps_a_row():
    pixels = hps_pixels([Image.new("RGB", (2000, 2), "white")], 224)
    assert (pixels[0, 0] > 0).sum() == 224
