"""Wrappers by hand-computed numbers, and what they keep of the reward they wrap."""

import math

import pytest
import torch
from PIL import Image

from dpok_trl.rewards.base import RewardError, score_batch
from dpok_trl.rewards.binding import BoundReward, RewardInputs, TrainerState
from dpok_trl.rewards.combining import RewardSet
from dpok_trl.rewards.demo import DemoGreenness
from dpok_trl.rewards.image_reward import ImageReward
from dpok_trl.rewards.wrappers import Cached, Clipped, Negated, Standardized


NAN, INF = math.nan, math.inf
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def column(images, target):
    """A reward that returns what the prompts came with."""
    return list(target)


def batch(targets, prompts=None, levels=None):
    levels = torch.tensor(levels or [0.0] * len(targets))
    prompts = tuple(prompts or ("a cat",) * len(targets))
    return RewardInputs(
        levels.view(-1, 1, 1, 1).expand(-1, 3, 4, 4), prompts, tuple({"target": target} for target in targets)
    )


def scores(wrapper, targets, **kwargs):
    """As a list, `None` where it does not apply."""
    scored = score_batch(BoundReward(wrapper), batch(targets, **kwargs))
    pairs = zip(scored.values.tolist(), scored.applies.tolist(), strict=True)
    return [value if applies else None for value, applies in pairs]


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_clipped():
    assert scores(Clipped(column, -1, 2), [-5.0, -1.0, 0.5, 7.0]) == [-1.0, -1.0, 0.5, 2.0]
    assert scores(Clipped(column, high=2), [-5.0, 7.0]) == [-5.0, 2.0]
    assert scores(Clipped(column, low=-1), [-5.0, 7.0]) == [-1.0, 7.0]


def test_negated():
    assert scores(Negated(column), [-5.0, 0.25]) == [5.0, -0.25]


def test_standardized_by_given_numbers():
    assert scores(Standardized(column, mean=21.0, std=0.5), [21.0, 22.0, 20.5]) == [0.0, 2.0, -1.0]


def test_standardized_by_running_statistics():
    wrapper = Standardized(column, momentum=0.25)
    assert wrapper.state_dict() == {"mean": None, "variance": None}
    # mean 2, variance 1
    torch.testing.assert_close(torch.tensor(scores(wrapper, [1.0, 3.0])), torch.tensor([-1.0, 1.0]), **CLOSE)
    assert wrapper.state_dict() == {"mean": 2.0, "variance": 1.0}
    # this call: mean 6, variance 4. Mixture: mean 3, variance 0.75 * 1 + 0.25 * 4 + 0.25 * 0.75 * 16 = 4.75
    expected = torch.tensor([(4 - 3) / 4.75**0.5, (8 - 3) / 4.75**0.5])
    torch.testing.assert_close(torch.tensor(scores(wrapper, [4.0, 8.0])), expected, **CLOSE)
    assert wrapper.state_dict() == {"mean": 3.0, "variance": 4.75}


def test_running_statistics_go_on_from_their_state():
    one, other = Standardized(column), Standardized(column)
    scores(one, [1.0, 3.0])
    other.load_state_dict(one.state_dict())
    assert scores(other, [5.0, 6.0]) == scores(one, [5.0, 6.0])
    assert other.state_dict() == one.state_dict()


def test_momentum_one_standardizes_each_call_by_itself():
    wrapper = Standardized(column, momentum=1.0)
    for targets in ([1.0, 3.0], [100.0, 300.0]):
        torch.testing.assert_close(torch.tensor(scores(wrapper, targets)), torch.tensor([-1.0, 1.0]), **CLOSE)


def test_equal_rewards_are_zero_and_not_nan():
    assert scores(Standardized(column), [5.0, 5.0]) == [0.0, 0.0]


# --- what fails and what does not apply -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda reward: Clipped(reward, 0, 1), 1.0),
        (Negated, -3.0),
        (lambda reward: Standardized(reward, 1.0, 2.0), 1.0),
        (Standardized, 0.0),  # alone, it is its own mean
        (Cached, 3.0),
    ],
    ids=["clipped", "negated", "standardized", "running", "cached"],
)
def test_none_nan_and_infinity_stay(make, expected):
    none, nan, infinite, finite = scores(make(column), [None, NAN, INF, 3.0])
    assert none is None and math.isnan(nan) and infinite == INF  # clipping would make a failure the best image
    assert finite == expected


def test_running_statistics_do_not_see_what_failed():
    wrapper = Standardized(column)
    scores(wrapper, [None, NAN])
    assert wrapper.state_dict() == {"mean": None, "variance": None}
    scores(wrapper, [1.0, None, 3.0, -INF, NAN])
    assert wrapper.state_dict() == {"mean": 2.0, "variance": 1.0}


def test_a_reward_that_raises_is_named():
    def broken(images, prompts):
        raise OSError("no server")

    with pytest.raises(RewardError, match="the reward function broken raised OSError: no server"):
        scores(Negated(broken), [1.0])


# --- the cache --------------------------------------------------------------------------------------------------------


class Counting:
    """The mean of the picture, or what the prompt came with; and how many it was asked about."""

    def __init__(self, image_type):
        self.image_type = image_type
        self.calls = []

    def __call__(self, images, prompts, metadata):
        self.calls.append(len(images))
        levels = [
            float(image.mean()) if torch.is_tensor(image) else image.getpixel((0, 0))[0] / 255 for image in images
        ]
        return [level if row["target"] is None else row["target"] for level, row in zip(levels, metadata, strict=True)]


@pytest.mark.parametrize("image_type", ["pil", "pt"])
def test_cached_asks_once(image_type):
    reward = Counting(image_type)
    cached = Cached(reward)
    first = scores(cached, [None] * 3, levels=[0.0, 1.0, 0.0])
    assert first == [0.0, 1.0, 0.0] and reward.calls == [2]  # two of the three are the same
    assert scores(cached, [None] * 3, levels=[1.0, 0.2, 0.0]) == pytest.approx([1.0, 0.2, 0.0])
    assert reward.calls == [2, 1]
    assert scores(cached, [None] * 3, levels=[0.0, 1.0, 0.0]) == first
    assert reward.calls == [2, 1]
    assert (cached.hits, cached.misses) == (6, 3)


def test_another_prompt_or_metadata_is_another_entry():
    reward = Counting("pt")
    cached = Cached(reward)
    assert scores(cached, [None, None], prompts=("a cat", "a dog")) == [0.0, 0.0]
    assert scores(cached, [0.5, None], prompts=("a cat", "a cat")) == [0.5, 0.0]
    assert reward.calls == [2, 1]


def test_failures_are_asked_again_and_none_is_not():
    answers = iter([[NAN, None], [0.5]])
    cached = Cached(lambda images, prompts: next(answers))
    assert math.isnan(scores(cached, [0.0, 0.0], levels=[0.0, 1.0])[0])
    assert scores(cached, [0.0, 0.0], levels=[0.0, 1.0]) == [0.5, None]
    assert scores(cached, [0.0, 0.0], levels=[0.0, 1.0]) == [0.5, None]


def test_the_oldest_goes_first():
    reward = Counting("pt")
    cached = Cached(reward, size=2)
    for level in (0.0, 1.0, 0.0, 0.5, 0.0, 1.0):  # 0.5 drives out 1.0, for 0.0 was asked since
        scores(cached, [None], levels=[level])
    assert len(reward.calls) == 4


def test_pictures_that_only_their_mode_or_palette_tells_apart():
    grey = Image.new("L", (2, 2), 1)
    palette, other = Image.new("P", (2, 2), 1), Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    other.putpalette([0, 0, 0, 0, 255, 0])

    def red(images, prompts):
        return [image.convert("RGB").getpixel((0, 0))[0] for image in images]

    values, _ = Cached(red)([grey, palette, other, grey], ["a cat"] * 4)
    assert values == [1.0, 255.0, 0.0, 1.0]


def test_cached_refuses_groups():
    with pytest.raises(ValueError, match="diversity is a reward of all images of a prompt together"):
        Cached("diversity")


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_names_and_info():
    assert RewardSet([Negated(column), Negated(Clipped(column, 0, 1))]).names == [
        "negated(column)",
        "negated(clipped(column))",
    ]
    wrapper = Clipped("demo-soft", high=0.9)
    assert wrapper.info.name == BoundReward(wrapper).name == "clipped(demo-soft)"
    assert wrapper.info.range == "[-inf, 0.9]"
    assert wrapper.info.licence == "Apache-2.0 (this package)"
    assert not hasattr(Negated(column), "info")


@pytest.mark.parametrize("image_type", ["pil", "pt"])
def test_how_the_reward_is_called(image_type):
    seen = {}

    class Reward:
        overlaps = True

        def __call__(self, images, prompts, target, trainer_state, log_metric, note="nothing"):
            seen.update(images=images, prompts=prompts, target=target, state=trainer_state, note=note)
            log_metric("sum", sum(target))
            return target

    Reward.image_type = image_type
    wrapper = Negated(Negated(Reward()))
    bound = BoundReward(wrapper)
    assert (bound.image_type, bound.overlaps, bound.wants_groups) == (image_type, True, False)
    inputs = batch([1.0, 2.0])
    state = TrainerState(3, 4)
    inputs = RewardInputs(inputs.images, inputs.prompts, inputs.metadata, state)
    result = RewardSet(wrapper).score(inputs)
    assert result.values[:, 0].tolist() == [1.0, 2.0]
    assert result.metrics == {"rewards/negated(negated(Reward))/sum": [3.0]}
    assert (seen["prompts"], seen["target"], seen["state"], seen["note"]) == (
        ("a cat",) * 2,
        [1.0, 2.0],
        state,
        "nothing",
    )
    if image_type == "pt":
        assert seen["images"] is inputs.images
    else:
        assert [image.tobytes() for image in seen["images"]] == [image.tobytes() for image in inputs.pictures]


def test_the_info_that_a_reward_returns_is_kept():
    inputs = RewardInputs(torch.rand(2, 3, 8, 8), ("four circles",) * 2, ({},) * 2)
    _, info = DemoGreenness()(inputs.images, inputs.prompts)
    assert score_batch(BoundReward(Negated("demo-greenness")), inputs).info == info
    _, info = Negated("demo-soft")(inputs.images, inputs.prompts)
    assert set(info) == {"exact"}


def test_groups_are_kept():
    inputs = RewardInputs(
        torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1, 1).expand(-1, 3, 8, 8), ("a", "b", "a"), ({},) * 3
    )
    scored = score_batch(BoundReward(Negated("diversity")), inputs)
    assert scored.applies.tolist() == [True, False, True] and scored.values[[0, 2]].tolist() == [0.0, 0.0]
    pictures, prompts = inputs.pictures, ["a", "a", "b"]
    *pair, alone = Negated("diversity")(pictures, prompts)[0]  # called by hand, too
    assert pair == pytest.approx([-1.0, -1.0], abs=1e-6) and alone is None
    assert Negated(DemoGreenness())(inputs.images, inputs.prompts)[0] == [0.0] * 3


def test_only_what_has_a_network_can_be_moved():
    class Moved(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float32))

        def forward(self, images, prompts):
            return self.weight * torch.ones(len(prompts))

    module = Moved()
    wrapper = Negated(Clipped(module, 0, 1))
    assert wrapper.to("meta") is wrapper and module.weight.device.type == "meta"
    assert RewardSet(wrapper).have_networks and not RewardSet(Negated(column)).have_networks
    assert not hasattr(wrapper, "device") and not hasattr(Negated(column), "device")  # as what they wrap


def test_the_device_is_that_of_the_reward():
    wrapper = Cached(Clipped("pickscore", high=22))
    assert wrapper.device is None
    assert wrapper.to("meta").device == wrapper.bound.function.bound.function.device == torch.device("meta")
    assert Negated(ImageReward(device="cpu")).device == torch.device("cpu")


def test_groups_have_no_running_statistics():
    with pytest.raises(
        ValueError, match="diversity is a reward of all images of a prompt together, .* give mean and std"
    ):
        Standardized("diversity")
    assert Standardized("diversity", 0.2, 0.1).wants_groups


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Clipped(column), "needs `low`, `high` or both"),
        (lambda: Clipped(column, 2, 1), "`low` below `high`; got 2 and 1"),
        (lambda: Standardized(column, mean=1.0), "both mean and std, or none; got mean=1.0 and std=None"),
        (lambda: Standardized(column, 0.0, 0.0), "a std above 0; got 0.0"),
        (lambda: Standardized(column, momentum=0.0), "above 0 and at most 1; got 0.0"),
        (lambda: Cached(column, 0), "a size of at least 1; got 0"),
        (lambda: Negated("demo-sotf"), "Did you mean 'demo-soft'"),
    ],
)
def test_wrong_arguments(make, words):
    with pytest.raises(ValueError, match=words):
        make()
