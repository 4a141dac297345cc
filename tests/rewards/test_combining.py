"""Several rewards into one number, against sums and normalisations done by hand; and what does not count."""

import math
import threading

import pytest
import torch

from dpok_trl import RewardError
from dpok_trl.rewards.binding import RewardInputs
from dpok_trl.rewards.combining import RewardSet, join_scores


NAN, INF = float("nan"), float("inf")
ROUNDING = 1e-6  # float32, values of about 1
NORMALISED = 2e-6  # the 1e-8 beside the standard deviation is less than that
PROMPTS = ("a", "b", "a", "b")


def of(*values):
    """A reward that says `values`."""
    return lambda images, prompts, metadata: list(values)


def inputs(prompts=PROMPTS):
    return RewardInputs(torch.zeros(len(prompts), 3, 2, 2), tuple(prompts), ({},) * len(prompts))


def totals(rewards, prompts=PROMPTS, **kwargs):
    made = RewardSet(rewards, **kwargs)
    scores = made.score(inputs(prompts))
    return made.total(scores.values, scores.applies, prompts)


def brightness(images, prompts):
    return [0.0] * len(images)


class Judge:
    moved = ()

    def __call__(self, images, prompts):
        return [1.0] * len(images)

    def to(self, device):
        self.moved = (*self.moved, str(device))
        return self


class Server(Judge):
    overlaps = True


# ---------------------------------------------------------------- what is given


def test_one_several_and_by_name():
    assert RewardSet(brightness).names == ["brightness"]
    assert RewardSet([brightness, Judge()]).names == ["brightness", "Judge"]
    assert RewardSet((brightness,)).names == ["brightness"]
    assert RewardSet({"light": brightness, "judge": Judge()}).names == ["light", "judge"]
    shipped = RewardSet(["jpeg-compressibility", brightness])
    assert shipped.names == ["jpeg-compressibility", "brightness"] and len(shipped) == 2


def test_names_are_made_distinct():
    """Or two rewards would write over each other's metrics."""

    def f_2(images, prompts):
        return [0.0] * len(images)

    def f(images, prompts):
        return [0.0] * len(images)

    assert RewardSet([of(1), of(2), of(3)]).names == ["<lambda>", "<lambda>_2", "<lambda>_3"]
    assert RewardSet([f, f, f_2]).names == ["f", "f_2", "f_2_2"]
    assert RewardSet([f_2, f, f]).names == ["f_2", "f", "f_3"]


@pytest.mark.parametrize("nothing", [[], {}, ()])
def test_nothing_given(nothing):
    with pytest.raises(ValueError, match="no reward was given; at least one is needed"):
        RewardSet(nothing)


def test_what_cannot_be_a_reward():
    with pytest.raises(TypeError, match="a reward must be a function of .* got 7 of type int"):
        RewardSet([brightness, 7])
    with pytest.raises(ValueError, match="there is no reward named 'imagereward'. Did you mean 'image-reward'"):
        RewardSet([brightness, "imagereward"])


def test_a_reward_by_name_is_put_on_the_device_and_others_stay(monkeypatch):
    judges = []
    monkeypatch.setattr("dpok_trl.rewards.image_reward.ImageReward", lambda: judges.append(Judge()) or judges[-1])
    mine = Judge()
    RewardSet([mine, "image-reward"], device="meta")
    assert mine.moved == () and judges[0].moved == ("meta",)


def test_what_overlaps_is_not_moved_under_a_thread():
    judge, server = Judge(), Server()
    rewards = RewardSet([judge, brightness, server])
    rewards.to("cpu")
    assert judge.moved == ("cpu",) and server.moved == ()
    assert rewards.have_networks
    assert not RewardSet([brightness, server]).have_networks


# ---------------------------------------------------------------- weights


def test_the_weighted_sum():
    rewards = {"first": of(1, 2, 3, 4), "second": of(10, 0, -10, 20)}
    assert totals(rewards)[0].tolist() == [11, 2, -7, 24]
    assert totals(rewards, weights=[2, 0.5])[0].tolist() == [7, 4, 1, 18]
    assert totals(rewards, weights={"second": 0.5, "first": 2})[0].tolist() == [7, 4, 1, 18]
    total, counts = totals(rewards, weights=[0, -1])
    assert total.tolist() == [-10, 0, 10, -20] and total.dtype == torch.float32 and counts.tolist() == [True] * 4


def test_weights_that_do_not_fit():
    two = {"light": brightness, "judge": Judge()}
    with pytest.raises(ValueError, match=r"reward_weights has 3 numbers for 2 rewards \(light, judge\)"):
        RewardSet(two, weights=[1, 2, 3])
    with pytest.raises(ValueError, match="reward_weights has 1 numbers for 2 rewards"):
        RewardSet(two, weights=[1])
    with pytest.raises(ValueError, match="has the names light, juge, and the rewards are light, judge"):
        RewardSet(two, weights={"light": 1, "juge": 1})


@pytest.mark.parametrize("bad", [NAN, INF])
def test_weights_that_are_no_numbers(bad):
    for weights in ([1.0, bad], {"light": 1.0, "judge": bad}):
        with pytest.raises(ValueError, match=rf"reward_weights must be finite numbers; got \[1.0, {bad}\]"):
            RewardSet({"light": brightness, "judge": Judge()}, weights=weights)


def test_a_sum_that_overflows_does_not_count():
    total, counts = totals([of(1e38, 1, 1, 1)], weights=[100])
    assert counts.tolist() == [False, True, True, True] and total[0].isnan()


# ---------------------------------------------------------------- normalize_then_sum


def test_normalised_over_the_images_of_a_prompt():
    """Prompt a: 1 and 3, mean 2, std 1. Prompt b: 0 and 10, mean 5, std 5. The second reward turns b round, at another scale."""
    rewards = [of(1, 0, 3, 10), of(0.02, 700, 0.04, 300)]
    total, counts = totals(rewards, aggregation="normalize_then_sum")
    torch.testing.assert_close(total, torch.tensor([-2.0, 0.0, 2.0, 0.0]), rtol=0, atol=NORMALISED)
    total, _ = totals(rewards, aggregation="normalize_then_sum", weights=[1, 3])
    torch.testing.assert_close(total, torch.tensor([-4.0, 2.0, 4.0, -2.0]), rtol=0, atol=2 * NORMALISED)
    assert counts.all()


def test_three_images_of_a_prompt():
    std = math.sqrt(14 / 3)  # of 1, 2, 6 around 3: (4 + 1 + 9) / 3
    total, _ = totals([of(1, 2, 6)], prompts=("a",) * 3, aggregation="normalize_then_sum")
    torch.testing.assert_close(total, torch.tensor([-2, -1, 3]) / std, rtol=0, atol=NORMALISED)


def test_scale_and_offset_of_a_reward_do_not_matter():
    random = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 12, generator=random)
    prompts = ["a", "b", "c"] * 4

    def total(scale, offset):
        rewards = [of(*first.tolist()), of(*(second * scale + offset).tolist())]
        return totals(rewards, prompts=prompts, aggregation="normalize_then_sum", weights=[1, 0.5])[0]

    for scale, offset in ((100, 0), (1e-2, 0), (1, 20), (7, -3)):
        torch.testing.assert_close(total(scale, offset), total(1, 0), rtol=0, atol=20 * ROUNDING)
    opposite = total(-1, 0) + total(1, 0)
    alone = totals([of(*first.tolist())], prompts=prompts, aggregation="normalize_then_sum")[0]
    torch.testing.assert_close(opposite, 2 * alone, rtol=0, atol=20 * ROUNDING)


def test_equal_rewards_normalise_to_0():
    total, counts = totals([of(5, 5, 5, 5)], aggregation="normalize_then_sum")
    assert total.tolist() == [0, 0, 0, 0] and counts.all()
    total, _ = totals([of(5, 6)], prompts=("a", "b"), aggregation="normalize_then_sum")  # each alone
    assert total.tolist() == [0, 0]


# ---------------------------------------------------------------- what does not apply, and what failed


def test_none_is_left_out_of_the_sum():
    rewards = [of(1, 2, 3, 4), of(10, None, None, 40)]
    total, counts = totals(rewards)
    assert total.tolist() == [11, 2, 3, 44] and counts.all()


def test_none_is_left_out_of_the_normalisation():
    """Of prompt a three images have the second reward: 10, 20, 30, of mean 20 and variance 200 / 3."""
    prompts = ("a",) * 4
    total, counts = totals([of(0, 0, 0, 0), of(10, None, 20, 30)], prompts=prompts, aggregation="normalize_then_sum")
    one = 10 / math.sqrt(200 / 3)
    torch.testing.assert_close(total, torch.tensor([-one, 0.0, 0.0, one]), rtol=0, atol=NORMALISED)
    assert counts.all()


def test_an_image_that_no_reward_applies_to_does_not_count():
    total, counts = totals([of(1, None, 3, None), of(None, None, 3, 4)])
    assert counts.tolist() == [True, False, True, True]
    assert total[1].isnan() and total[counts].tolist() == [1, 6, 4]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_an_image_that_one_reward_fails_for_does_not_count(bad):
    """And is not taken for a 0, which beside rewards of 20 would be a penalty."""
    total, counts = totals([of(1, 2, 3, 4), of(21, 20, bad, 22)])
    assert counts.tolist() == [True, True, False, True]
    assert total[2].isnan() and total[counts].tolist() == [22, 22, 26]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_an_image_that_does_not_count_is_in_no_statistic(bad):
    """Not in those of the other reward either: the rest is what it would be without the image."""
    prompts = ("a", "a", "a", "b", "b", "a")
    first, second = [1.0, 2.0, 90.0, 4.0, 5.0, 6.0], [0.1, 0.3, bad, 0.4, 0.2, 0.9]
    total, counts = totals([of(*first), of(*second)], prompts=prompts, aggregation="normalize_then_sum")
    keep = [0, 1, 3, 4, 5]
    without, _ = totals(
        [of(*(first[i] for i in keep)), of(*(second[i] for i in keep))],
        prompts=[prompts[i] for i in keep],
        aggregation="normalize_then_sum",
    )
    assert counts.tolist() == [True, True, False, True, True, True]
    assert torch.equal(total[counts], without)


def test_nothing_finite_in_a_batch_is_masked():
    """With one image in a batch, any failure would be a whole batch: the trainer looks at the round."""
    rewards = RewardSet([brightness, of(NAN, INF, None, NAN)])
    scores = rewards.score(inputs())
    total, counts = rewards.total(scores.values, scores.applies, inputs().prompts)
    assert counts.tolist() == [False, False, True, False] and total.isfinite().tolist() == counts.tolist()


@pytest.mark.parametrize("name", ["mean", "std", "nonfinite", "seconds"])
def test_a_reward_must_not_write_over_the_trainers_own_metrics(name):
    def reward(images, prompts, log_metric):
        log_metric(name, 1.0)
        return [0.0] * len(prompts)

    with pytest.raises(
        RewardError, match=f"would write over the trainer's own rewards/reward/{name}; choose another name"
    ):
        RewardSet(reward).score(inputs())


def test_nothing_that_applies_in_a_batch_is_no_failure():
    scores = RewardSet([brightness, of(None, None, None, None)]).score(inputs())
    assert scores.applies.tolist() == [[True, False]] * 4


def test_one_that_is_not_finite_stops_the_run_on_demand():
    rewards = RewardSet([brightness, of(1, NAN, None, INF)], on_error="raise")
    with pytest.raises(RewardError, match=r"2 of the 4 rewards that <lambda> returned are not finite.*\(1 NaN, 1 inf"):
        rewards.score(inputs())
    assert RewardSet(of(1, None, 2, 3), on_error="raise").score(inputs()).applies.sum() == 3


# ---------------------------------------------------------------- what is asked, and kept


def test_info_seconds_and_what_is_logged():
    def sharpness(images, log_metric):
        log_metric("edges", torch.tensor(3))
        log_metric("edges", 5)
        return [1.0] * 4, "sharp"

    def light(images, log_metric):
        log_metric("edges", 7)
        return [2.0] * 4, {"light": True}

    scores = RewardSet([sharpness, light]).score(inputs())
    assert scores.values.tolist() == [[1, 2]] * 4
    assert scores.info == {"sharpness": "sharp", "light": {"light": True}}
    assert scores.metrics == {"rewards/sharpness/edges": [3, 5], "rewards/light/edges": [7]}
    assert len(scores.seconds) == 2 and min(scores.seconds) >= 0
    assert RewardSet(sharpness).score(inputs()).info == "sharp"  # of one reward: as DDPO has it


def test_pictures_are_made_once_for_all_rewards():
    seen = []

    def look(images, prompts):
        seen.append(images)
        return [0.0] * 4

    RewardSet([look, look, look]).score(inputs())
    assert len({id(picture) for images in seen for picture in images}) == 4


@pytest.mark.parametrize("early", [[0], [1], [2], [0, 2], [1, 2], [], [0, 1, 2]])
def test_parts_asked_at_different_times_are_put_together(early):
    def named(value):
        def reward(images, log_metric):
            log_metric("value", value)
            return [value, None, value, value], str(value)

        return reward

    rewards = RewardSet({"a": named(1), "b": named(2), "c": named(3)})
    late = [index for index in range(3) if index not in early]
    parts = [(which, rewards.score(inputs(), which)) for which in (late, early) if which]
    joined, whole = join_scores(parts), rewards.score(inputs())
    torch.testing.assert_close(joined.values, whole.values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(joined.applies, whole.applies)
    assert joined.info == whole.info and joined.metrics == whole.metrics
    assert len(joined.seconds) == 3


def test_the_seconds_are_those_of_their_reward():
    def waits(images, prompts):
        threading.Event().wait(0.05)
        return [0.0] * 4

    rewards = RewardSet([brightness, waits, brightness])
    parts = [([0, 2], rewards.score(inputs(), [0, 2])), ([1], rewards.score(inputs(), [1]))]
    seconds = join_scores(parts).seconds
    assert seconds[1] == max(seconds) >= 0.05


@pytest.mark.parametrize("value", [0.1, 21.3, 3.3333])
def test_equal_rewards_of_a_prompt_are_0(value):
    """In float32 the mean of equal numbers may be another number, and dividing by a spread as small would give ±1."""
    rewards = RewardSet(brightness, aggregation="normalize_then_sum")
    for n in range(2, 25):
        values, applies = torch.full((n, 1), value), torch.ones(n, 1, dtype=torch.bool)
        assert rewards.total(values, applies, ["a"] * n)[0].tolist() == [0.0] * n
