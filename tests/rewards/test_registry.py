"""Rewards by name, by place in a module, and by address."""

import importlib

import pytest
import torch

from dpok_trl.rewards.base import RewardError, score_batch
from dpok_trl.rewards.binding import BoundReward, RewardInputs
from dpok_trl.rewards.info import RewardInfo
from dpok_trl.rewards.registry import SHIPPED, load_reward, shipped_rewards
from dpok_trl.rewards.remote import RemoteReward


@pytest.fixture
def module(tmp_path, monkeypatch):
    """`module(name, source)`: writes a module that can be imported."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, source):
        (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()

    return write


def test_a_function_is_taken_as_it_is():
    def reward(images, prompts):
        return []

    assert load_reward(reward) is reward


@pytest.mark.parametrize("name", SHIPPED)
def test_every_name_makes_its_reward_without_loading_weights(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: pytest.fail("a download"))
    reward = load_reward(name)
    assert callable(reward) and reward.info.name == name


def test_arguments_go_to_the_constructor():
    assert load_reward("jpeg-incompressibility", quality=50).quality == 50
    assert str(load_reward("image-reward", device="meta").device) == "meta"


def test_what_the_shipped_rewards_say_of_themselves():
    infos = shipped_rewards()
    assert [info.name for info in infos] == list(SHIPPED)
    for info in infos:
        assert isinstance(info, RewardInfo)
        assert all(isinstance(text, str) and text for text in vars(info).values()), info.name


@pytest.mark.parametrize("address", ["http://localhost:8000/score", "https://example.com"])
def test_an_address_is_a_server(address):
    assert isinstance(load_reward(address), RemoteReward)


def test_a_place_in_a_module(module):
    module("my_rewards_here", "def redness(images, prompts):\n    return [1.0] * len(images)\n")
    assert load_reward("my_rewards_here:redness").__name__ == "redness"
    with pytest.raises(ValueError, match="'my_rewards_here:redness' is a function and takes no device"):
        load_reward("my_rewards_here:redness", device="cpu")


def test_a_class_in_a_module_is_made(module):
    module(
        "my_judges_here",
        "class Judge:\n"
        "    def __init__(self, strict=False):\n        self.strict = strict\n"
        "    def __call__(self, images, prompts):\n        return [1.0] * len(images)\n",
    )
    assert load_reward("my_judges_here:Judge").strict is False
    assert load_reward("my_judges_here:Judge", strict=True).strict is True


# ---------------------------------------------------------------- what is not there


@pytest.mark.parametrize(
    ("name", "meant"),
    [("imagereward", "image-reward"), ("ImageReward", "image-reward"), ("pick-score", "pickscore"), ("hps", "hpsv2"),
     ("jpeg_compressibility", "jpeg-compressibility"), ("clipscore", "clip-score"), ("CLIPScore", "clip-score"), ("HPSV2.1", "hpsv2.1")],
)  # fmt: skip
def test_an_unknown_name(name, meant):
    with pytest.raises(ValueError) as error:
        load_reward(name)
    assert str(error.value).startswith(f"there is no reward named '{name}'. Did you mean '{meant}'? There are: ")
    assert all(shipped in str(error.value) for shipped in SHIPPED) and "'module:function'" in str(error.value)


@pytest.mark.parametrize(
    ("address", "meant"),
    [("localhost:8000", "http://localhost:8000"), ("127.0.0.1:8000/score", "http://127.0.0.1:8000/score"),
     ("http:/localhost:8000", "http://localhost:8000"), ("https:example.org", "https://example.org"),
     ("HTTP:/localhost:8000", "http://localhost:8000")],
)  # fmt: skip
def test_half_an_address(address, meant):
    with pytest.raises(ValueError) as error:
        load_reward(address)
    assert str(error.value) == (
        f"'{address}' is no address: that of a server begins with http:// or https://, as in '{meant}'."
    )


@pytest.mark.parametrize(("name", "meant"), [("my_rewards.pil", "my_rewards:pil"), ("a.b.c", "a.b:c")])
def test_a_dot_for_a_colon(name, meant):
    with pytest.raises(ValueError, match=f"named '{name}'. For a function of yours write '{meant}', with a colon."):
        load_reward(name)
    with pytest.raises(ValueError, match="named 'hpsv2.2'. Did you mean 'hpsv2.1'?"):
        load_reward("hpsv2.2")


@pytest.mark.parametrize("name", ["hpsv3", "HPSv3", "geneval", "GenEval"])
def test_what_is_served_elsewhere(name):
    with pytest.raises(
        ValueError, match=rf"no reward named '{name}'\. It runs .*: docs/remote-rewards\.md has its server\."
    ):
        load_reward(name)


def test_the_scheme_of_an_address_in_capitals():
    assert load_reward("HTTP://localhost:8000/Score").client.url == "http://localhost:8000/Score"


@pytest.mark.parametrize("place", [".m:f", ":f", "m:", "a..b:f", "m:f.g"])
def test_what_can_be_no_place(place):
    with pytest.raises(ValueError, match=f"'{place}' is no module and function: write 'module:function'"):
        load_reward(place)


def test_what_is_there_and_cannot_be_called(module):
    module("my_rewards_constant", "C = 3\nclass Bare: pass\n")
    with pytest.raises(ValueError, match="'my_rewards_constant:C' is 3 of type int: a reward is something to call"):
        load_reward("my_rewards_constant:C")
    with pytest.raises(ValueError, match="of type Bare: a reward is something to call"):
        load_reward("my_rewards_constant:Bare")


def test_a_module_that_is_no_python(module):
    module("my_rewards_broken", "def f(:\n")
    with pytest.raises(
        ValueError, match=r"the module 'my_rewards_broken' is no Python: .*my_rewards_broken\.py, line 1"
    ):
        load_reward("my_rewards_broken:f")


def test_an_unknown_name_like_no_other():
    with pytest.raises(ValueError, match="there is no reward named 'xyz'. There are: "):
        load_reward("xyz")


@pytest.mark.parametrize("place", ["no_such_module_here:reward", "no_such_package_here.rewards:reward"])
def test_an_unknown_module(place):
    name = place.partition(":")[0]
    with pytest.raises(ValueError, match=rf"there is no module '{name}' \(of '{place}'\); is it on PYTHONPATH\?"):
        load_reward(place)


def test_an_unknown_function_of_a_module(module):
    module("my_rewards_there", "def redness(images, prompts):\n    return []\n")
    with pytest.raises(ValueError, match="the module 'my_rewards_there' has no 'rednes'. Did you mean 'redness'?"):
        load_reward("my_rewards_there:rednes")
    with pytest.raises(ValueError, match="the module 'my_rewards_there' has no 'x'.$"):
        load_reward("my_rewards_there:x")


@pytest.mark.parametrize("needed", ["no_such_library_here", "my", "my_rewards"])
def test_what_a_module_itself_lacks_is_not_taken_for_the_module(needed, module):
    module("my_rewards_with_imports", f"import {needed}\n")
    with pytest.raises(ModuleNotFoundError, match=f"No module named '{needed}'"):
        load_reward("my_rewards_with_imports:reward")


@pytest.mark.parametrize("name", SHIPPED)
def test_videos_are_refused_in_one_sentence(name):
    videos = torch.rand(2, 3, 3, 16, 16)
    bound = BoundReward(load_reward(name))
    with pytest.raises(
        RewardError, match=r"scores pictures and was given videos .* with one frame of each, such as `.*`\."
    ):
        score_batch(bound, RewardInputs(videos, ("a red square",) * 2, ({"text": "x"},) * 2))


def test_videos_are_refused_by_the_client():
    with pytest.raises(ValueError, match=r"was given videos .*`images\[:, 0\]`"):
        load_reward("http://localhost:8000")(torch.rand(2, 3, 3, 16, 16), ["a", "b"])
