"""The LAION aesthetic predictor against numpy on the embeddings of transformers."""

import gc

import numpy as np
import pytest
import tiny_clip
import torch
from safetensors.torch import save_file
from tiny_clip import PROMPTS

from dpok_trl.rewards.aesthetic import Aesthetic
from dpok_trl.rewards.base import RewardError
from dpok_trl.rewards.clip import CLIPScore


TOLERANCE = 1e-4  # scores of about 1 through five linear layers in float32
PICTURES = tiny_clip.pictures()
WIDTHS = {0: (10, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}


def head(width=10):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for index, (inputs, outputs) in WIDTHS.items():
        inputs = width if index == 0 else inputs
        tensors[f"layers.{index}.weight"] = torch.randn(outputs, inputs, generator=generator) * 1.5 / inputs**0.5
        tensors[f"layers.{index}.bias"] = torch.randn(outputs, generator=generator) * 0.3
    return tensors


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tiny_clip.save(folder)
    return folder


@pytest.fixture
def weights(tmp_path):
    torch.save(head(), tmp_path / "aesthetic-model.pth")
    return tmp_path


def expected_scores(clip):
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(clip)
    processor = tiny_clip.image_processor(28)
    with torch.no_grad():
        pixels = torch.cat([processor(image, return_tensors="pt").pixel_values for image in PICTURES])
        text = {"input_ids": torch.tensor([[1, 73]])}
        scores = model(pixel_values=pixels, **text).image_embeds.double().numpy()  # of length 1
    for index in WIDTHS:
        scores = scores @ head()[f"layers.{index}.weight"].double().numpy().T + head()[f"layers.{index}.bias"].numpy()
    return torch.from_numpy(scores[:, 0])


def test_scores(clip, weights):
    scores = Aesthetic(weights, clip=clip)(PICTURES, PROMPTS)
    assert scores.std() > 0.1
    assert (scores - expected_scores(clip)).abs().max() < TOLERANCE
    assert (scores.dtype, scores.device.type, scores.shape) == (torch.float32, "cpu", (5,))


def test_safetensors(clip, tmp_path):
    save_file(head(), tmp_path / "model.safetensors")
    scores = Aesthetic(tmp_path / "model.safetensors", clip=clip)(PICTURES, PROMPTS)
    assert (scores - expected_scores(clip)).abs().max() < TOLERANCE


def test_prompts_are_not_looked_at(clip, weights):
    reward = Aesthetic(weights, clip=clip)
    assert torch.equal(reward(PICTURES, PROMPTS), reward(PICTURES, ["x"] * 5))


def test_batch_size_and_order_change_nothing(clip, weights):
    scores = Aesthetic(weights, clip=clip)(PICTURES, PROMPTS)
    for batch_size in (1, 2):
        again = Aesthetic(weights, clip=clip, batch_size=batch_size)(PICTURES, PROMPTS)
        assert (again - scores).abs().max() < TOLERANCE
    order = [3, 0, 4, 2, 1]
    moved = Aesthetic(weights, clip=clip)([PICTURES[index] for index in order], PROMPTS)
    assert (moved - scores[order]).abs().max() < TOLERANCE


def test_clip_is_shared_and_let_go(clip, weights):
    aesthetic, clip_score = Aesthetic(weights, clip=clip), CLIPScore(clip)
    aesthetic(PICTURES, PROMPTS)
    clip_score(PICTURES, PROMPTS)
    assert aesthetic._model.clip is clip_score._model
    kept = clip_score._model
    del aesthetic, clip_score
    gc.collect()
    other = CLIPScore(clip)
    other(PICTURES, PROMPTS)
    assert other._model is kept


def test_half_precision_leaves_the_head_in_float32(clip, weights):
    reward = Aesthetic(weights, clip=clip, dtype=torch.bfloat16)
    scores = reward(PICTURES, PROMPTS)
    assert {parameter.dtype for parameter in reward._model.head.parameters()} == {torch.float32}
    assert reward._model.clip.model.dtype == torch.bfloat16
    assert 0 < (scores - expected_scores(clip)).abs().max() < 0.2 * np.ptp(expected_scores(clip).numpy())


def test_head_for_another_clip(clip, tmp_path):
    torch.save(head(width=768), tmp_path / "aesthetic-model.pth")
    with pytest.raises(RewardError, match=r"1 shapes \(layers\.0\.weight \(1024, 768\) instead of \(1024, 10\)\)"):
        Aesthetic(tmp_path, clip=clip)(PICTURES, PROMPTS)


def test_what_is_asked_for(clip, weights, monkeypatch):
    asked = []

    def download(repository, filename, *, revision):
        asked.append((repository, filename, revision))
        return weights / filename

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    Aesthetic(clip=clip, revision="v1")(PICTURES, PROMPTS)
    assert asked == [("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth", "v1")]
    assert Aesthetic().clip_weights == "openai/clip-vit-large-patch14"
