"""Advantages by hand, against DDPO's tracker, and in every order."""

import json
import math
from collections import deque

import pytest
import torch

from dpok_trl.core.advantages import (
    PerPromptStatTracker,
    batch_advantages,
    clip_advantages,
    group_advantages,
    leave_one_out_advantages,
)


# The result is float32.
FLOAT32_TOLERANCE = 1e-6
PROMPTS = ["dog", "cat", "dog", "cat", "dog", "wolf", "wolf", "cat"]
REWARDS = torch.tensor([1.0, -2.0, 3.5, 0.25, 0.1, 7.0, 5.0, 1e-3])


def functions():
    def tracked(rewards, prompts):
        return PerPromptStatTracker(buffer_size=4, min_count=2).update(prompts, rewards)

    return {
        "batch": lambda rewards, prompts: batch_advantages(rewards),
        "group": group_advantages,
        "group_unscaled": lambda rewards, prompts: group_advantages(rewards, prompts, scale=False),
        "leave_one_out": leave_one_out_advantages,
        "tracker": tracked,
    }


EVERY_FUNCTION = pytest.mark.parametrize("function", functions().values(), ids=functions())


def test_batch_advantages_by_hand():
    # mean 2, population std 1
    expected = torch.tensor([1.0, -1.0, 1.0, -1.0])
    actual = batch_advantages(torch.tensor([3.0, 1.0, 3.0, 1.0]))
    torch.testing.assert_close(actual, expected, rtol=FLOAT32_TOLERANCE, atol=0.0)


def test_group_advantages_by_hand():
    rewards, groups = torch.tensor([1.0, 10.0, 3.0, 10.0]), ["a", "b", "a", "b"]
    actual = group_advantages(rewards, groups)
    expected = torch.tensor([-1 / 1.0001, 0.0, 1 / 1.0001, 0.0])
    torch.testing.assert_close(actual, expected, rtol=FLOAT32_TOLERANCE, atol=0.0)
    assert group_advantages(rewards, groups, scale=False).tolist() == [-1.0, 0.0, 1.0, 0.0]
    assert torch.equal(group_advantages(rewards, torch.tensor([4, 7, 4, 7])), actual)


def test_leave_one_out_advantages_by_hand():
    rewards, groups = torch.tensor([1.0, 2.0, 6.0, 10.0, 4.0]), [0, 0, 0, 1, 1]
    # 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2, 10 - 4, 4 - 10
    expected = torch.tensor([-3.0, -1.5, 4.5, 6.0, -6.0])
    actual = leave_one_out_advantages(rewards, groups)
    torch.testing.assert_close(actual, expected, rtol=FLOAT32_TOLERANCE, atol=0.0)


@pytest.mark.parametrize("scale", [True, False])
def test_the_mean_of_every_group_is_zero(scale):
    advantages = group_advantages(REWARDS, PROMPTS, scale=scale)
    for prompt in set(PROMPTS):
        rows = torch.tensor([prompt == other for other in PROMPTS])
        assert abs(advantages[rows].mean().item()) <= FLOAT32_TOLERANCE
        if scale:
            assert advantages[rows].std(correction=0).item() == pytest.approx(1.0, abs=1e-3)


@EVERY_FUNCTION
def test_equal_rewards_have_no_advantage(function):
    assert torch.equal(function(torch.full((8,), 0.1), PROMPTS), torch.zeros(8))


@EVERY_FUNCTION
@pytest.mark.parametrize("cancelling", [False, True])
def test_any_order_and_any_split_over_ranks_gives_the_same_bits(function, cancelling):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(48, generator=generator)
    if cancelling:
        # Here even float64 sums depend on the order, unless they are exact.
        rewards = torch.tensor([1e17, 1.0, -1e17, 3.0, 1e17, -1e17, 5.0, -3.0] * 6)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(48)]
    expected = function(rewards, prompts)
    orders = [torch.randperm(48, generator=generator) for _ in range(5)]
    # What a gather makes of rows that were dealt out to 2 and to 4 ranks in turn.
    orders += [torch.arange(48).reshape(-1, ranks).T.flatten() for ranks in (2, 4)]
    for order in orders:
        assert torch.equal(function(rewards[order], [prompts[i] for i in order]), expected[order])


@EVERY_FUNCTION
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bfloat16, torch.float16, torch.float64, torch.bool])
def test_rewards_of_any_dtype_are_computed_in_full_precision(function, dtype):
    rewards = torch.tensor([1, 0, 1, 0, 0, 1, 1, 1]).to(dtype)
    actual = function(rewards, PROMPTS)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, function(rewards.float(), PROMPTS))
    assert (actual != actual.round()).any()  # nothing was truncated


@EVERY_FUNCTION
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rewards_that_are_not_finite_are_refused(function, value):
    rewards = REWARDS.clone()
    rewards[5] = value
    with pytest.raises(ValueError, match=r"1 of 8 rewards are not finite \(first: row 5"):
        function(rewards, PROMPTS)


@EVERY_FUNCTION
def test_wrong_shapes_are_refused(function):
    for rewards in (REWARDS[:, None], REWARDS[0], REWARDS[:0]):
        with pytest.raises(ValueError, match=r"rewards must have shape \(B,\)"):
            function(rewards, PROMPTS)


@pytest.mark.parametrize("function", [group_advantages, leave_one_out_advantages])
def test_groups_of_one_and_wrong_counts_are_refused(function):
    with pytest.raises(ValueError, match=r"1 of 2 groups have one member \(first: 'b'\)"):
        function(torch.tensor([1.0, 2.0, 3.0]), ["a", "a", "b"])
    with pytest.raises(ValueError, match="got 2 for 3 rewards"):
        function(torch.tensor([1.0, 2.0, 3.0]), ["a", "a"])


def test_clip_advantages():
    clipped = clip_advantages(torch.tensor([-7.0, -5.0, 0.5, 5.5]), 5.0)
    assert clipped.tolist() == [-5.0, -5.0, 0.5, 5.0]
    with pytest.raises(ValueError, match="must be > 0"):
        clip_advantages(clipped, 0.0)


# ------------------------------------------------------------------------------------------------ the tracker


class DDPOTracker:
    """DDPO's tracker (arXiv:2305.13301; kvablack/ddpo-pytorch, stat_tracking.py), retold in plain Python."""

    def __init__(self, buffer_size, min_count):
        self.buffer_size, self.min_count, self.stats = buffer_size, min_count, {}

    @staticmethod
    def mean_and_std(values):
        mean = sum(values) / len(values)
        return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / len(values)) + 1e-6

    def update(self, prompts, rewards):
        advantages = [None] * len(rewards)
        for prompt in set(prompts):
            rows = [row for row, other in enumerate(prompts) if other == prompt]
            self.stats.setdefault(prompt, deque(maxlen=self.buffer_size)).extend(rewards[row] for row in rows)
            enough = len(self.stats[prompt]) >= self.min_count
            mean, std = self.mean_and_std(self.stats[prompt] if enough else rewards)
            for row in rows:
                advantages[row] = (rewards[row] - mean) / std
        return advantages


def epochs(count=3):
    generator = torch.Generator().manual_seed(3)
    # 4 dogs, 2 cats and 2 wolves each time: a buffer of 8 begins to forget whole epochs of dogs in the third.
    prompts = ["dog"] * 4 + ["cat"] * 2 + ["wolf"] * 2
    return [(prompts, torch.randn(8, generator=generator)) for _ in range(count)]


def test_tracker_equals_ddpo_over_three_epochs():
    ours, theirs = PerPromptStatTracker(8, 4), DDPOTracker(8, 4)
    for epoch, (prompts, rewards) in enumerate(epochs()):
        actual = ours.update(prompts, rewards)
        expected = torch.tensor(theirs.update(prompts, rewards.tolist()))
        torch.testing.assert_close(actual, expected, rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)
        # The first epoch has too few cats for statistics of their own, the second has enough.
        assert (ours.get_stats()["cat"]["count"] < 4) == (epoch == 0)
    stats = ours.get_stats()
    assert {prompt: values["count"] for prompt, values in stats.items()} == {"dog": 8, "cat": 6, "wolf": 6}
    for prompt, values in stats.items():
        mean, std = theirs.mean_and_std(theirs.stats[prompt])
        assert values["mean"] == pytest.approx(mean) and values["std"] + 1e-6 == pytest.approx(std)


def test_tracker_by_hand():
    tracker = PerPromptStatTracker(buffer_size=3, min_count=2)
    # Alone, "a" is normalised by the batch (mean 5, std sqrt(14 / 3)), and "b" by itself (mean 4, std 2).
    first = tracker.update(["a", "b", "b"], torch.tensor([7.0, 2.0, 6.0]))
    expected = torch.tensor([2 / (math.sqrt(14 / 3) + 1e-6), -2 / (2 + 1e-6), 2 / (2 + 1e-6)])
    torch.testing.assert_close(first, expected, rtol=FLOAT32_TOLERANCE, atol=0.0)
    second = tracker.update(["c", "a"], torch.tensor([8.0, 0.0]))
    # "a" has 7 and 0 now; "c" is new, and the batch has mean 4 and std 4.
    expected = torch.tensor([4 / (4 + 1e-6), -3.5 / (3.5 + 1e-6)])
    torch.testing.assert_close(second, expected, rtol=FLOAT32_TOLERANCE, atol=0.0)
    assert tracker.get_stats()["a"] == {"mean": 3.5, "std": 3.5, "count": 2}


def test_a_full_buffer_does_not_prefer_high_rewards():
    # 400 rewards of one prompt into a buffer of 100: the ones that stay are a fair sample.
    tracker = PerPromptStatTracker(buffer_size=100, min_count=1)
    tracker.update(["dog"] * 400, torch.arange(400))
    stats = tracker.get_stats()["dog"]
    assert stats["count"] == 100
    # Mean 199.5 and std 115.5; the standard error of the mean of 100 is 10.
    assert abs(stats["mean"] - 199.5) < 3 * 10
    assert abs(stats["std"] - 115.5) < 3 * 6


def test_tracker_resumes_exactly_through_json():
    uninterrupted, interrupted = PerPromptStatTracker(8, 4), PerPromptStatTracker(8, 4)
    *before, (prompts, rewards) = epochs(4)
    for epoch in before:
        uninterrupted.update(*epoch)
        interrupted.update(*epoch)
    resumed = PerPromptStatTracker(8, 4)
    resumed.load_state_dict(json.loads(json.dumps(interrupted.state_dict())))
    assert resumed.get_stats() == uninterrupted.get_stats()
    assert torch.equal(resumed.update(prompts, rewards), uninterrupted.update(prompts, rewards))
    assert resumed.state_dict() == uninterrupted.state_dict()


def test_state_is_a_copy_and_a_smaller_buffer_keeps_the_newest():
    tracker = PerPromptStatTracker(4, 1)
    for value in (1.0, 2.0, 3.0):
        tracker.update(["dog"], torch.tensor([value]))
    state = tracker.state_dict()
    tracker.update(["dog"], torch.tensor([4.0]))
    smaller = PerPromptStatTracker(2, 1)
    smaller.load_state_dict(state)
    assert smaller.state_dict() == {"rewards": {"dog": [2.0, 3.0]}}


def test_a_refused_batch_leaves_the_tracker_as_it_was():
    tracker = PerPromptStatTracker(4, 1)
    tracker.update(["dog"], torch.tensor([1.0]))
    before = tracker.state_dict()
    with pytest.raises(ValueError, match="not finite"):
        tracker.update(["dog", "cat"], torch.tensor([2.0, float("nan")]))
    with pytest.raises(ValueError, match="got 1 for 2 rewards"):
        tracker.update(["dog"], torch.tensor([2.0, 3.0]))
    assert tracker.state_dict() == before


@pytest.mark.parametrize(("buffer_size", "min_count"), [(16, 17), (16, 0), (0, 0)])
def test_a_tracker_that_could_never_track_is_refused(buffer_size, min_count):
    with pytest.raises(ValueError, match="0 < min_count <= buffer_size"):
        PerPromptStatTracker(buffer_size, min_count)
