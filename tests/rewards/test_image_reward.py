"""ImageReward: the golden file of the original code, the mistakes it catches, the full-size layout, pixels and token ids."""

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dpok_trl.rewards import image_reward
from dpok_trl.rewards.base import RewardError
from dpok_trl.rewards.image_reward import (
    MEAN,
    STD,
    TEXT,
    VISION,
    ImageReward,
    ImageRewardModel,
    convert_keys,
    make_model,
    make_tokenizer,
)
from dpok_trl.rewards.pictures import openai_clip_pixels


GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "imagereward_golden_tiny.json").read_text())
GOLDEN_TOLERANCE = 1e-5
BATCH_TOLERANCE = 1e-5


# --- the golden file: rewards that the original code gave for a tiny model ---------------------------------------------


def golden_tensor(key, shape):
    """The golden file's integer formula, `GOLDEN["formula"]`."""
    count, seed = int(np.prod(shape)), sum(map(ord, key)) % 97
    index = np.arange(count, dtype=np.int64)
    noise = ((index * 7919 * (index % 13 + 1) + seed * 104729) % 10007) / 5003.5 - 1
    if "norm" in key.lower() and key.endswith("weight"):
        values = 1 + 0.1 * noise
    elif key.startswith("mlp."):
        values = noise * 1.6 / np.sqrt(shape[1] if len(shape) == 2 else 8)
    else:
        values = 0.4 * noise
    return torch.tensor(values, dtype=torch.float32).reshape(shape)


def golden_state_dict():
    tensors = {key: golden_tensor(key, shape) for key, shape in GOLDEN["keys"].items()}
    positions = "blip.text_encoder.embeddings.position_ids"
    tensors[positions] = torch.arange(GOLDEN["keys"][positions][-1])[None]
    return tensors


def golden_inputs():
    index = torch.arange(4 * 3 * 32 * 32, dtype=torch.int64)
    pixels = (((index * index) % 1009) / 504.5 - 1).float().reshape(4, 3, 32, 32)
    pixels[1] *= -1
    pixels[2] *= 0.3
    input_ids = torch.tensor(GOLDEN["input_ids"])
    mask = (input_ids != 0).long()
    return pixels, input_ids, mask


@pytest.fixture
def tiny(monkeypatch):
    """The sizes of the golden file in the place of the real ones; everything else stays as it is."""
    monkeypatch.setattr(image_reward, "VISION", VISION | GOLDEN["vision"])
    text = TEXT | GOLDEN["text"] | {"encoder_hidden_size": GOLDEN["vision"]["hidden_size"]}
    monkeypatch.setattr(image_reward, "TEXT", text)
    return monkeypatch


def error(model, pixels, input_ids, mask, expected=GOLDEN["rewards"]):
    with torch.no_grad():
        return (model(pixels, input_ids, mask) - torch.tensor(expected)).abs().max().item()


def test_golden(tiny):
    model = make_model(golden_state_dict(), "golden")
    pixels, input_ids, mask = golden_inputs()
    assert error(model, pixels, input_ids, mask) < GOLDEN_TOLERANCE
    first = input_ids[:1].expand(4, -1), mask[:1].expand(4, -1)
    assert error(model, pixels, *first, expected=GOLDEN["rewards_prompt0"]) < GOLDEN_TOLERANCE


def test_golden_without_padding(tiny):
    model = make_model(golden_state_dict(), "golden")
    pixels, input_ids, mask = golden_inputs()
    for row in range(4):
        length = int(mask[row].sum())
        one = pixels[row : row + 1], input_ids[row : row + 1, :length], mask[row : row + 1, :length]
        assert error(model, *one, expected=[GOLDEN["rewards"][row]]) < GOLDEN_TOLERANCE


def with_text(tiny, **changes):
    tiny.setattr(image_reward, "TEXT", image_reward.TEXT | changes)


def with_vision(tiny, **changes):
    tiny.setattr(image_reward, "VISION", image_reward.VISION | changes)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda tiny: with_vision(tiny, layer_norm_eps=1e-5),
        lambda tiny: with_text(tiny, num_attention_heads=8),
        lambda tiny: with_vision(tiny, num_attention_heads=8),
        lambda tiny: with_vision(tiny, hidden_act="quick_gelu"),
        lambda tiny: tiny.setattr(image_reward, "MEAN", 0.0),
        lambda tiny: tiny.setattr(image_reward, "STD", 1.0),
    ],
    ids=["vision eps", "text heads", "vision heads", "quick gelu", "mean", "std"],
)
def test_golden_catches_a_setting(tiny, mistake):
    mistake(tiny)
    assert error(make_model(golden_state_dict(), "golden"), *golden_inputs()) > GOLDEN_TOLERANCE


def test_golden_catches_a_causal_mask(tiny):
    model = make_model(golden_state_dict(), "golden")
    model.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"is_decoder": True}), with_kwargs=True
    )
    assert error(model, *golden_inputs()) > GOLDEN_TOLERANCE


def test_golden_catches_enc_in_front(tiny):
    pixels, input_ids, mask = golden_inputs()
    input_ids[:, 0] = GOLDEN["text"]["vocab_size"] - 1
    assert error(make_model(golden_state_dict(), "golden"), pixels, input_ids, mask) > GOLDEN_TOLERANCE


def test_golden_catches_a_missing_mask(tiny):
    pixels, input_ids, _ = golden_inputs()
    assert (
        error(make_model(golden_state_dict(), "golden"), pixels, input_ids, torch.ones_like(input_ids))
        > GOLDEN_TOLERANCE
    )


def test_golden_catches_an_activation_in_the_head(tiny):
    model = make_model(golden_state_dict(), "golden")
    model.mlp.layers[1] = nn.ReLU()
    assert error(model, *golden_inputs()) > GOLDEN_TOLERANCE


@pytest.mark.parametrize("keys", [("norm1", "norm2"), ("attn.qkv", "attn.qkv")], ids=["norms swapped", "qkv order"])
def test_golden_catches_a_wrong_name(tiny, keys):
    tensors = golden_state_dict()
    prefix = "blip.visual_encoder.blocks.0."
    for end in ("weight", "bias"):
        one, other = (f"{prefix}{key}.{end}" for key in keys)
        if one == other:
            tensors[one] = torch.cat(tensors[one].chunk(3)[::-1])
        else:
            tensors[one], tensors[other] = tensors[other], tensors[one]
    assert error(make_model(tensors, "golden"), *golden_inputs()) > GOLDEN_TOLERANCE


def test_half_precision_leaves_the_head_in_float32(tiny):
    model = make_model(golden_state_dict(), "golden", torch.bfloat16)
    assert {parameter.dtype for parameter in model.mlp.parameters()} == {torch.float32}
    assert model.vision_model.dtype == model.text_encoder.dtype == torch.bfloat16
    with torch.no_grad():
        scores = model(*golden_inputs())
    assert scores.dtype == torch.float32
    assert error(model, *golden_inputs()) < 0.2  # bfloat16 has 8 bits; the scores differ by 1.5


def test_wrapped_by_data_parallel(tiny):
    model = make_model({f"module.{key}": tensor for key, tensor in golden_state_dict().items()}, "golden")
    assert error(model, *golden_inputs()) < GOLDEN_TOLERANCE


# --- full size --------------------------------------------------------------------------------------------------------


def original_shapes():
    """The 625 tensors of the published checkpoint, from the architecture; written out apart from the port."""
    shapes = {}

    def linear(name, outputs, inputs):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def norm(name, width):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (width,), (width,)

    vision = "blip.visual_encoder"
    shapes[f"{vision}.cls_token"], shapes[f"{vision}.pos_embed"] = (1, 1, 1024), (1, 197, 1024)
    shapes[f"{vision}.patch_embed.proj.weight"] = (1024, 3, 16, 16)
    shapes[f"{vision}.patch_embed.proj.bias"] = (1024,)
    for index in range(24):
        block = f"{vision}.blocks.{index}"
        norm(f"{block}.norm1", 1024)
        linear(f"{block}.attn.qkv", 3072, 1024)
        linear(f"{block}.attn.proj", 1024, 1024)
        norm(f"{block}.norm2", 1024)
        linear(f"{block}.mlp.fc1", 4096, 1024)
        linear(f"{block}.mlp.fc2", 1024, 4096)
    norm(f"{vision}.norm", 1024)

    text = "blip.text_encoder"
    shapes[f"{text}.embeddings.position_ids"] = (1, 512)
    shapes[f"{text}.embeddings.word_embeddings.weight"] = (30524, 768)
    shapes[f"{text}.embeddings.position_embeddings.weight"] = (512, 768)
    norm(f"{text}.embeddings.LayerNorm", 768)
    for index in range(12):
        layer = f"{text}.encoder.layer.{index}"
        for attention, width in (("attention", 768), ("crossattention", 1024)):
            linear(f"{layer}.{attention}.self.query", 768, 768)
            linear(f"{layer}.{attention}.self.key", 768, width)
            linear(f"{layer}.{attention}.self.value", 768, width)
            linear(f"{layer}.{attention}.output.dense", 768, 768)
            norm(f"{layer}.{attention}.output.LayerNorm", 768)
        linear(f"{layer}.intermediate.dense", 3072, 768)
        linear(f"{layer}.output.dense", 768, 3072)
        norm(f"{layer}.output.LayerNorm", 768)
    linear("blip.vision_proj", 256, 1024)
    linear("blip.text_proj", 256, 768)
    widths = (768, 1024, 128, 64, 16, 1)
    for index, inputs, outputs in zip((0, 2, 4, 6, 7), widths[:-1], widths[1:], strict=True):
        linear(f"mlp.layers.{index}", outputs, inputs)
    return shapes


def full_size_state_dict():
    """Zeros that take no memory."""
    return {key: torch.zeros(1).expand(shape) for key, shape in original_shapes().items()}


def test_full_size():
    tensors = full_size_state_dict()
    assert len(tensors) == 625
    assert sum(tensor.numel() for tensor in tensors.values()) == 446_666_465
    model = make_model(tensors, "full size")
    assert len(model.state_dict()) == 620
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert counts == {"vision_model": 303_301_632, "text_encoder": 141_977_088, "mlp": 927_969}
    assert torch.equal(model.text_encoder.embeddings.position_ids, torch.arange(512)[None])
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert (model.vision_model.config.layer_norm_eps, model.text_encoder.config.layer_norm_eps) == (1e-6, 1e-12)
    assert model.text_encoder.config.num_attention_heads == 12


def test_original_names_of_the_golden_file():
    """Those of layer 0 are the published checkpoint's; the golden file was written by the original code."""
    first_layers = {
        key
        for key in original_shapes()
        if not any(f".{index}." in key for index in range(2, 24)) or "mlp.layers" in key
    }
    assert first_layers == set(GOLDEN["keys"])


def test_missing_and_unexpected_keys_are_named():
    tensors = full_size_state_dict()
    del tensors["mlp.layers.7.bias"]
    tensors["blip.visual_encoder.head.weight"] = torch.zeros(1)
    with pytest.raises(RewardError) as error:
        make_model(tensors, "zai-org/ImageReward")
    assert str(error.value) == (
        "the weights of zai-org/ImageReward do not fit this model: 1 missing (mlp.layers.7.bias), "
        "1 unexpected (vision_model.head.weight)."
    )


def test_left_out():
    assert convert_keys(dict.fromkeys(("blip.vision_proj.weight", "blip.text_proj.bias"))) == {}


# --- pixels -----------------------------------------------------------------------------------------------------------


def recipe(image):
    """The published preprocessing, once more: Resize(224, bicubic), CenterCrop(224), RGB, ToTensor, Normalize."""
    width, height = image.size
    short, long = sorted((width, height))
    new_long = int(224 * long / short)
    image = image.resize((224, new_long) if width <= height else (new_long, 224), Image.BICUBIC)
    top, left = round((image.height - 224) / 2.0), round((image.width - 224) / 2.0)
    array = np.asarray(image.crop((left, top, left + 224, top + 224)).convert("RGB"))
    scaled = array.astype(np.float32) / np.float32(255)
    mean = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
    std = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
    return torch.from_numpy(((scaled - mean) / std).transpose(2, 0, 1).copy())


def picture(width, height, mode="RGB", seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(noise, "RGBA").convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1", "CMYK"])
def test_pixels_of_modes(mode):
    image = picture(301, 257, mode)
    assert image.mode == mode
    assert torch.equal(openai_clip_pixels([image], 224)[0], recipe(image))


@pytest.mark.parametrize(
    "size", [(224, 224), (512, 512), (225, 224), (227, 224), (229, 224), (224, 229), (37, 500), (500, 37), (1, 1)]
)
def test_pixels_of_sizes(size):
    image = picture(*size)
    pixels = openai_clip_pixels([image, image], 224)
    assert pixels.shape == (2, 3, 224, 224)
    assert torch.equal(pixels[1], recipe(image))


def test_palette_is_resized_before_conversion():
    image = picture(300, 300, "P")
    assert not torch.equal(openai_clip_pixels([image], 224), openai_clip_pixels([image.convert("RGB")], 224))


# --- tokens and the whole reward --------------------------------------------------------------------------------------

WORDS = ["a", "green", "colored", "rabbit", "two", "dogs", ".", ",", "of", "painting"]


@pytest.fixture
def folder(tmp_path, tiny):
    """Weights and tokenizer as a user keeps them, with 118 + 2 tokens."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = [*special, *WORDS]
    vocabulary += [f"[unused{index}]" for index in range(GOLDEN["text"]["vocab_size"] - 2 - len(vocabulary))]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    torch.save(golden_state_dict(), tmp_path / "ImageReward.pt")
    return tmp_path


PROMPTS = ["A green colored rabbit.", "two dogs", "A green colored rabbit.", "", "a painting of a rabbit, two dogs"]
PICTURES = [picture(40 + 7 * seed, 33, seed=seed) for seed in range(5)]


def ids(*words):
    return [2, *(5 + WORDS.index(word) for word in words), 3]


def test_token_ids(folder):
    reward = ImageReward(folder, tokenizer=folder)
    reward.tokenizer = make_tokenizer(str(folder))
    assert reward._tokenize(PROMPTS) == {
        "A green colored rabbit.": ids("a", "green", "colored", "rabbit", "."),
        "two dogs": ids("two", "dogs"),
        "": ids(),
        "a painting of a rabbit, two dogs": ids("a", "painting", "of", "a", "rabbit", ",", "two", "dogs"),
    }


def test_tokens_of_blip(folder):
    tokenizer = make_tokenizer(str(folder))
    size = GOLDEN["text"]["vocab_size"]
    assert tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [size - 2, size - 1]
    assert tokenizer("[ENC] rabbit")["input_ids"] == [2, size - 1, *ids("rabbit")[1:]]


def test_another_vocabulary_is_refused(folder, tiny):
    with_text(tiny, vocab_size=30524)
    with pytest.raises(ValueError, match="vocabulary of bert-base-uncased, 30522 tokens; .* has 118"):
        make_tokenizer(str(folder))


def test_prompt_beyond_the_limit(folder, caplog):
    reward = ImageReward(folder, tokenizer=folder)
    full, longer = " ".join(["dogs"] * 33), " ".join(["dogs"] * 34)
    with caplog.at_level(logging.WARNING, logger="dpok_trl"):
        reward(PICTURES[:2], [full, "two dogs"])
        assert caplog.messages == []
        scores = reward(PICTURES[:1] * 2, [full, longer])
        reward(PICTURES[:1], [longer + " dogs"])
    assert len(caplog.messages) == 1
    assert "the first 35 tokens of a prompt; this one has 36" in caplog.messages[0]
    assert abs(scores[0] - scores[1]) < BATCH_TOLERANCE


def test_whole_reward_against_the_network(folder):
    reward = ImageReward(folder, tokenizer=folder)
    scores = reward(PICTURES, PROMPTS)
    assert (scores.shape, scores.dtype, scores.device.type) == ((5,), torch.float32, "cpu")
    model = make_model(golden_state_dict(), "golden")
    tokenizer = make_tokenizer(str(folder))
    for image, prompt, score in zip(PICTURES, PROMPTS, scores, strict=True):
        tokens = tokenizer(prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        pixels = openai_clip_pixels([image], 32)
        with torch.no_grad():
            features = model.text_encoder(
                tokens.input_ids, tokens.attention_mask, encoder_hidden_states=model.vision_model(pixels)[0]
            )[0][:, 0]
            expected = (model.mlp.layers(features) - MEAN) / STD
        assert abs(expected.item() - score) < BATCH_TOLERANCE


def test_batch_size_and_order_change_nothing(folder):
    scores = ImageReward(folder, tokenizer=folder)(PICTURES, PROMPTS)
    assert scores.std() > 0.01
    for batch_size in (1, 2, 5):
        again = ImageReward(folder, tokenizer=folder, batch_size=batch_size)(PICTURES, PROMPTS)
        assert (again - scores).abs().max() < BATCH_TOLERANCE
    order = [3, 0, 4, 2, 1]
    moved = ImageReward(folder, tokenizer=folder)([PICTURES[i] for i in order], [PROMPTS[i] for i in order])
    assert (moved - scores[order]).abs().max() < BATCH_TOLERANCE


def test_loaded_once_and_only_when_called(folder, monkeypatch):
    loads = []
    load = image_reward.load_state_dict
    monkeypatch.setattr(image_reward, "load_state_dict", lambda *given: loads.append(given) or load(*given))
    one, two = (ImageReward(folder, tokenizer=folder) for _ in range(2))
    half = ImageReward(folder, tokenizer=folder, dtype=torch.bfloat16)
    assert loads == []
    one(PICTURES[:1], ["two dogs"])
    two(PICTURES[:1], ["two dogs"])
    assert loads == [(str(folder), "ImageReward.pt", None)]
    half(PICTURES[:1], ["two dogs"])
    assert len(loads) == 2
    assert {type(reward._model) for reward in (one, two, half)} == {ImageRewardModel}


# --- the published checkpoint -----------------------------------------------------------------------------------------

PUBLISHED_PROMPT = "a painting of an ocean with clouds and birds, day time, low depth field effect"
PUBLISHED = [0.5811622738838196, 0.2745276093482971, -1.4131819009780884, -2.029569625854492]
PUBLISHED_TOLERANCE = 2e-3  # computed on a GPU by their authors


@pytest.mark.skipif(
    os.environ.get("DPOK_TRL_REAL_WEIGHTS") != "1",
    reason="downloads 1.8 GB: set DPOK_TRL_REAL_WEIGHTS=1, and DPOK_TRL_IMAGE_REWARD_PICTURES to a folder with 1.webp ... 4.webp "
    "from assets/images of github.com/zai-org/ImageReward",
)
def test_published_scores():
    pictures = Path(os.environ["DPOK_TRL_IMAGE_REWARD_PICTURES"])
    images = [Image.open(pictures / f"{number}.webp") for number in (1, 2, 3, 4)]
    scores = ImageReward()(images, [PUBLISHED_PROMPT] * 4)
    assert (scores - torch.tensor(PUBLISHED)).abs().max() < PUBLISHED_TOLERANCE
