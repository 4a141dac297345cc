"""Files, strict keys, sharing, and what every reward with a network does."""

import gc
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from dpok_trl.rewards import weights
from dpok_trl.rewards.base import RewardError
from dpok_trl.rewards.info import RewardInfo
from dpok_trl.rewards.weights import ModelReward, build, find_file, load_state_dict, load_tokenizer, shared


TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.tensor([0.5, -0.5])}


def assert_same(found, expected=TENSORS):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# --- files ------------------------------------------------------------------------------------------------------------


def test_file_and_folder(tmp_path):
    torch.save(TENSORS, tmp_path / "model.pt")
    assert_same(load_state_dict(tmp_path, "model.pt"))
    assert_same(load_state_dict(str(tmp_path / "model.pt"), "another name"))


def test_safetensors(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert_same(load_state_dict(tmp_path, "model.safetensors"))


def test_checkpoint_with_a_state_dict_inside(tmp_path):
    torch.save({"epoch": 3, "state_dict": TENSORS}, tmp_path / "model.pt")
    assert_same(load_state_dict(tmp_path, "model.pt"))


def test_checkpoint_from_before_zip_archives(tmp_path):
    torch.save(TENSORS, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    assert_same(load_state_dict(tmp_path, "model.pt"))


def test_tensors_are_mapped_from_the_file(tmp_path, monkeypatch):
    torch.save(TENSORS, tmp_path / "model.pt")
    load, seen = torch.load, {}
    monkeypatch.setattr(torch, "load", lambda path, **given: seen.update(given) or load(path, **given))
    load_state_dict(tmp_path, "model.pt")
    assert seen == {"map_location": "cpu", "weights_only": True, "mmap": True}


class Harmful:
    def __reduce__(self):
        return print, ("code in a checkpoint has run",)


def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path, capsys):
    torch.save({"a": Harmful()}, tmp_path / "model.pt")
    with pytest.raises(RewardError, match="is refused: it does not hold tensors alone"):
        load_state_dict(tmp_path, "model.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Harmful(), protocol=2))
    with pytest.raises(RewardError, match="is refused"):
        load_state_dict(tmp_path, "plain.pt")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["half.pt", "old.pt", "half.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.9])
def test_half_a_file_is_named(name, kept, tmp_path):
    path = tmp_path / name
    if name == "half.safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=name == "half.pt")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(RewardError, match=f"{name} is (broken|refused)"):
        load_state_dict(tmp_path, name)


def test_not_a_state_dict(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    torch.save({"a": torch.zeros(3), "step": 7}, tmp_path / "mixed.pt")
    with pytest.raises(RewardError, match=r"tensor\.pt holds one Tensor; a mapping"):
        load_state_dict(tmp_path, "tensor.pt")
    with pytest.raises(RewardError, match=r"mixed\.pt is no state dict: not tensors are step"):
        load_state_dict(tmp_path, "mixed.pt")


def test_folder_without_the_file(tmp_path):
    (tmp_path / "readme.md").touch()
    with pytest.raises(RewardError, match=r"has no file model\.pt; it holds readme\.md\."):
        find_file(tmp_path, "model.pt")


@pytest.mark.parametrize("path", ["./nowhere/here", "/nowhere", "../x", "~/x", "nowhere", "a/b/c"])
def test_path_that_is_not_there_is_not_looked_for_on_the_hub(path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *given, **named: pytest.fail("asked the Hub"))
    with pytest.raises(RewardError, match="there is no file or folder"):
        find_file(path, "model.pt")


def test_hub_is_asked_for_repository_file_and_revision(tmp_path, monkeypatch):
    torch.save(TENSORS, tmp_path / "model.pt")
    asked = []

    def download(repository, filename, *, revision):
        asked.append((repository, filename, revision))
        return str(tmp_path / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert_same(load_state_dict("owner/name", "model.pt", "v1"))
    find_file("owner/name", "model.pt")
    assert asked == [("owner/name", "model.pt", "v1"), ("owner/name", "model.pt", None)]


def test_hub_that_does_not_answer(monkeypatch):
    def download(*given, **named):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(RewardError, match=r"could not get model\.pt of owner/name at v1 from the Hub \(no route\)"):
        find_file("owner/name", "model.pt", "v1")


@pytest.mark.parametrize("name", ["BertTokenizer", "CLIPTokenizer"])
def test_tokenizer_that_is_not_there(name, tmp_path, monkeypatch):
    """transformers makes an empty one of each."""
    import transformers

    tokenizer_class = getattr(transformers, name)
    monkeypatch.setattr(tokenizer_class, "from_pretrained", lambda *given, **named: tokenizer_class())
    with pytest.raises(RewardError, match="found no vocabulary at owner/name"):
        load_tokenizer(tokenizer_class, "owner/name")
    monkeypatch.undo()
    with pytest.raises(RewardError, match="could not get the tokenizer"):
        load_tokenizer(tokenizer_class, str(tmp_path / "nowhere"))


# --- models -----------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.register_buffer("position_ids", torch.arange(4).expand(1, -1), persistent=False)


def test_build_takes_the_tensors_themselves():
    model = build(Small, TENSORS, "owner/name", torch.float32)
    assert model.a.weight.data_ptr() == TENSORS["a.weight"].data_ptr()
    assert torch.equal(model.position_ids, torch.arange(4)[None])
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert build(Small, TENSORS, "owner/name", torch.bfloat16).a.weight.dtype == torch.bfloat16


def test_missing_and_unexpected_keys_are_counted_and_listed():
    given = {"a.weight": TENSORS["a.weight"]} | {f"b.{index}": torch.zeros(1) for index in range(7)}
    with pytest.raises(RewardError) as error:
        build(Small, given, "owner/name", torch.float32)
    assert str(error.value) == (
        "the weights of owner/name do not fit this model: 1 missing (a.bias), "
        "7 unexpected (b.0, b.1, b.2, b.3, b.4 and 2 more)."
    )


def test_another_shape():
    with pytest.raises(RewardError, match=r"1 shapes \(a\.bias \(3,\) instead of \(2,\)\)"):
        build(Small, {**TENSORS, "a.bias": torch.zeros(3)}, "owner/name", torch.float32)


def test_shared_as_long_as_it_is_held():
    made = []

    def load():
        made.append(1)
        return nn.Linear(1, 1)

    first = shared(("key", 1), load)
    assert shared(("key", 1), load) is first
    assert shared(("key", 2), load) is not first
    assert len(made) == 2
    del first
    gc.collect()
    assert ("key", 1) not in weights._loaded


# --- rewards ----------------------------------------------------------------------------------------------------------


class Area(ModelReward):
    """Its network is one number, its score the picture's area."""

    info = RewardInfo("area", "", "image", "", "none", "none", "nothing more")

    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self.batches = []

    def _load(self):
        return shared(("area", self.weights, self.device), lambda: nn.Linear(1, 1))

    def _score(self, model, images, prompts):
        assert not torch.is_grad_enabled()
        self.device_of_the_model = model.weight.device.type

        def areas(some):
            self.batches.append(len(some))
            return torch.tensor([image.width * image.height for image in some], dtype=torch.float64)

        return self._batched(areas, images)


PICTURES = [Image.new("RGB", (width, 2)) for width in (1, 2, 3, 4, 5)]


def test_call():
    reward = Area("w", batch_size=2)
    assert reward._model is None
    scores = reward(tuple(PICTURES), tuple("abcde"))
    assert scores.tolist() == [2, 4, 6, 8, 10]
    assert (scores.dtype, scores.device.type) == (torch.float32, "cpu")
    assert reward.batches == [2, 2, 1]


def test_device():
    reward, other = Area("w"), Area("w")
    reward(PICTURES, ["p"] * 5)
    other(PICTURES, ["p"] * 5)
    assert reward._model is other._model
    assert reward.to("meta") is reward
    assert other._model.weight.device.type == "meta"  # one model, so it has gone for both

    unloaded = Area("v").to("meta")
    assert unloaded._model is None
    unloaded(PICTURES, ["p"] * 5)
    assert unloaded.device_of_the_model == "meta"


def test_the_device_is_open_until_somebody_decides():
    called, moved, given = Area("x"), Area("x"), Area("x", device="meta")
    assert called.device is None and moved.device is None and given.device == torch.device("meta")
    called(PICTURES, ["p"] * 5)
    assert called.device == torch.device("cpu") and called.device_of_the_model == "cpu"
    assert moved.to("meta").device == torch.device("meta")


def test_one_call_at_a_time():
    busy = threading.Lock()

    class Slow(Area):
        def _score(self, model, images, prompts):
            assert busy.acquire(blocking=False), "two calls at once"
            time.sleep(0.005)
            busy.release()
            return super()._score(model, images, prompts)

    rewards = [Slow("y"), Slow("y")] * 4  # of one model
    with ThreadPoolExecutor(8) as pool:
        scores = list(pool.map(lambda reward: reward(PICTURES, ["p"] * 5).tolist(), rewards))
    assert scores == [[2, 4, 6, 8, 10]] * 8


def test_a_shared_model_comes_back_to_the_reward_that_is_called():
    reward, other = Area("u", device="cpu"), Area("u", device="cpu")
    reward(PICTURES, ["p"] * 5)
    other(PICTURES, ["p"] * 5)
    other.device = torch.device("meta")
    other(PICTURES, ["p"] * 5)
    assert (reward.device.type, other.device_of_the_model) == ("cpu", "meta")


@pytest.mark.parametrize("count", [0, 4, 6])
def test_as_many_prompts_as_pictures(count):
    with pytest.raises(
        ValueError, match=f"area needs one prompt for each picture.* got 5 pictures and {count} prompts"
    ):
        Area("w")(PICTURES, ["p"] * count)


def test_nothing_to_score():
    with pytest.raises(ValueError, match="got 0 pictures and 0 prompts"):
        Area("w")([], [])


def test_video_frames_are_no_picture():
    with pytest.raises(
        ValueError, match=r"area scores pictures and was given videos.*such as `\[frames\[0\] for frames in images\]`"
    ):
        Area("w")([PICTURES], ["p"])


def test_batch_size():
    with pytest.raises(ValueError, match="area: `batch_size` must be at least 1; got 0"):
        Area("w", batch_size=0)


def test_a_path_is_taken_as_text(tmp_path):
    assert Area(Path("some") / "folder").weights == "some/folder"
