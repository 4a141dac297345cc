"""CLIPScore and PickScore against transformers' own `CLIPModel.forward`; pixels against its own image processor."""

import shutil

import numpy as np
import pytest
import tiny_clip
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_clip import PROMPTS

from dpok_trl.rewards.base import RewardError
from dpok_trl.rewards.clip import Clip, CLIPScore, PickScore
from dpok_trl.rewards.pictures import clip_pixels


TOLERANCE = 1e-5  # of a cosine, in float32
PICTURES = tiny_clip.pictures()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tiny_clip.save(folder)
    return folder


@pytest.fixture(scope="module")
def oracle(folder):
    """`logits_per_image` of transformers for each pair, one at a time, divided by the scale: the cosines."""
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    processor = tiny_clip.image_processor(model.config.vision_config.image_size)
    cosines = []
    for image, prompt in zip(PICTURES, PROMPTS, strict=True):
        with torch.no_grad():
            tokens = tokenizer([prompt], return_tensors="pt", truncation=True, max_length=20)
            pixels = processor(image, return_tensors="pt").pixel_values
            logits = model(input_ids=tokens.input_ids, pixel_values=pixels).logits_per_image
        cosines.append(logits.item() / np.exp(4.6))
    return torch.tensor(cosines)


def test_clip_score(folder, oracle):
    scores = CLIPScore(folder)(PICTURES, PROMPTS)
    assert oracle.min() < -0.05 and oracle.max() > 0.05  # both sides of the clip
    assert (scores - (100 * oracle).clamp(min=0)).abs().max() < 100 * TOLERANCE
    assert (scores.dtype, scores.device.type, scores.shape) == (torch.float32, "cpu", (5,))


def test_pickscore(folder, oracle):
    scores = PickScore(folder, tokenizer=folder)(PICTURES, PROMPTS)
    assert (scores - float(np.exp(4.6)) * oracle).abs().max() < 100 * TOLERANCE


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batch_size_changes_nothing(folder, batch_size):
    scores = PickScore(folder, tokenizer=folder)(PICTURES, PROMPTS)
    again = PickScore(folder, tokenizer=folder, batch_size=batch_size)(PICTURES, PROMPTS)
    assert (again - scores).abs().max() < 100 * TOLERANCE


def test_order_of_the_batch(folder):
    reward, order = PickScore(folder, tokenizer=folder), [3, 0, 4, 2, 1]
    scores = reward(PICTURES, PROMPTS)
    moved = reward([PICTURES[index] for index in order], [PROMPTS[index] for index in order])
    assert (moved - scores[order]).abs().max() < 100 * TOLERANCE
    assert scores.std() > 1


def test_each_distinct_prompt_is_encoded_once(folder, monkeypatch):
    seen, embed = [], Clip.embed_prompts
    monkeypatch.setattr(
        Clip, "embed_prompts", lambda self, prompts: seen.append(list(prompts)) or embed(self, prompts)
    )
    CLIPScore(folder, batch_size=3)(PICTURES, PROMPTS)
    assert seen == [["a green rabbit", "two dogs", ""], ["two red dogs, a rabbit"]]


def test_long_prompt_is_cut(folder):
    long = " ".join(["two dogs"] * 40)
    scores = PickScore(folder, tokenizer=folder)(PICTURES[:1] * 2, [long, long + " a rabbit"])
    assert scores[0] == scores[1]


def test_a_prompt_that_is_cut_is_told_once(folder, caplog):
    reward = CLIPScore(folder)
    full, longer = " ".join(["dogs"] * 18), " ".join(["dogs"] * 19)
    with caplog.at_level("WARNING", logger="dpok_trl"):
        reward(PICTURES[:2], [full, "two dogs"])
        assert caplog.messages == []
        reward(PICTURES[:2], [full, longer])
        reward(PICTURES[:1], [longer + " dogs"])
    assert len(caplog.messages) == 1
    assert "clip-score reads the first 20 tokens of a prompt; this one has 21" in caplog.messages[0]


def test_half_a_file_is_named(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(RewardError, match=f"CLIP model {broken}"):
        CLIPScore(broken)(PICTURES[:1], ["two dogs"])


def test_half_precision_keeps_the_scale(folder, oracle):
    reward = PickScore(folder, tokenizer=folder, dtype=torch.bfloat16)
    scores = reward(PICTURES, PROMPTS)
    assert reward._model.model.dtype == torch.bfloat16
    assert reward._model.scale == pytest.approx(np.exp(4.6), rel=1e-6)
    assert (scores / float(np.exp(4.6)) - oracle).abs().max() < 0.05


# --- loading ----------------------------------------------------------------------------------------------------------


def test_one_model_for_the_same_weights(folder):
    one, two = CLIPScore(folder), PickScore(folder, tokenizer=folder)
    half, elsewhere = CLIPScore(folder, dtype=torch.bfloat16), CLIPScore(folder, revision="v1")
    for reward in (one, two, half, elsewhere):
        assert reward._model is None
        reward(PICTURES[:1], PROMPTS[:1])
    assert one._model is two._model
    assert len({id(reward._model) for reward in (one, half, elsewhere)}) == 3


def test_what_is_asked_for(monkeypatch):
    import transformers

    asked = []

    def model(weights, **named):
        asked.append((weights, named["revision"]))
        return tiny_clip.model(), {"missing_keys": set(), "unexpected_keys": {"text_model.embeddings.position_ids"}}

    def tokenizer(name, **named):
        asked.append((name, named["revision"]))
        return tiny_clip.tokenizer()

    monkeypatch.setattr(transformers.CLIPModel, "from_pretrained", model)
    monkeypatch.setattr(transformers.CLIPTokenizer, "from_pretrained", tokenizer)
    CLIPScore(revision="v1")(PICTURES[:1], PROMPTS[:1])
    PickScore(revision="v2")(PICTURES[:1], PROMPTS[:1])
    assert asked == [
        ("openai/clip-vit-large-patch14", "v1"),
        ("openai/clip-vit-large-patch14", "v1"),
        ("yuvalkirstain/PickScore_v1", "v2"),
        ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", None),
    ]


def test_missing_and_unexpected_keys_are_named(tmp_path):
    tiny_clip.save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["visual_projection.weight"]
    tensors["extra.weight"] = torch.zeros(1)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RewardError, match=r"1 missing \(visual_projection\.weight\), 1 unexpected \(extra\.weight\)"):
        CLIPScore(tmp_path)(PICTURES[:1], PROMPTS[:1])


def test_nothing_there(tmp_path):
    with pytest.raises(RewardError, match="could not get the CLIP model"):
        CLIPScore(tmp_path)(PICTURES[:1], PROMPTS[:1])


def test_tokenizer_of_another_model():
    words = tiny_clip.tokenizer()
    words.add_tokens(["extra"])
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ tokens and the CLIP model \d+: give the `tokenizer`"):
        Clip(tiny_clip.model(), words)


def test_module_is_imported_without_transformers():
    import subprocess
    import sys

    code = "import sys, dpok_trl.rewards.clip, dpok_trl.rewards.image_reward; print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


# --- pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
@pytest.mark.parametrize("size", [(512, 512), (224, 224), (225, 224), (229, 224), (301, 257), (37, 300)])
def test_pixels_are_those_of_transformers(size, mode):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    expected = tiny_clip.image_processor(224)(image, return_tensors="pt").pixel_values
    assert (clip_pixels([image], 224) - expected).abs().max() < 1e-6
