"""Advantages by hand, against DDPO's tracker, and in every order."""

import itertools
import json
import math
from collections import deque

import pytest
import torch

from dpok_trl.core.advantages import (
    PerPromptStatTracker,
    batch_advantages,
    best_and_worst,
    clip_advantages,
    group_advantages,
    kl_to_go,
    leave_one_out,
    leave_one_out_advantages,
    raw_advantages,
    value_advantages,
)


# The result is float32.
FLOAT32_TOLERANCE = 1e-6
PROMPTS = ["dog", "cat", "dog", "cat", "dog", "wolf", "wolf", "cat"]
REWARDS = torch.tensor([1.0, -2.0, 3.5, 0.25, 0.1, 7.0, 5.0, 1e-3])


def every(scale):
    """Every kind of advantage as a function of rewards and prompts."""

    def tracked(rewards, prompts):
        return PerPromptStatTracker(buffer_size=4, min_count=2).update(prompts, rewards, scale=scale)

    def by_value(rewards, prompts):  # two steps, and a value for each prompt
        expected = torch.tensor([{"dog": 0.25, "cat": -1.0}.get(prompt, 2.0) for prompt in prompts])
        return value_advantages(rewards, torch.stack([expected, 2 * expected], dim=1), scale=scale)

    return {
        "none": lambda rewards, prompts: raw_advantages(rewards, scale=scale),
        "batch": lambda rewards, prompts: batch_advantages(rewards, scale=scale),
        "group": lambda rewards, prompts: group_advantages(rewards, prompts, scale=scale),
        "leave_one_out": lambda rewards, prompts: leave_one_out_advantages(rewards, prompts, scale=scale),
        "tracker": tracked,
        "value": by_value,
    }


def functions():
    return {
        f"{name}-{'scaled' if scale else 'unscaled'}": f for scale in (True, False) for name, f in every(scale).items()
    }


EVERY_FUNCTION = pytest.mark.parametrize("function", functions().values(), ids=functions())


def test_every_baseline_by_hand_with_and_without_scale():
    rewards, prompts = torch.tensor([1.0, 3.0, 8.0, 4.0]), ["a", "a", "b", "b"]
    # Of all: mean 4, population std sqrt((9 + 1 + 16 + 0) / 4). Of "a": mean 2, std 1. Of "b": mean 6, std 2.
    std = math.sqrt(6.5) + 1e-8
    by_hand = {
        "none": ([1.0, 3.0, 8.0, 4.0], [std] * 4),
        "batch": ([-3.0, -1.0, 4.0, 0.0], [std] * 4),
        "group": ([-1.0, 1.0, 2.0, -2.0], [1.0001, 1.0001, 2.0001, 2.0001]),
        "leave_one_out": ([-2.0, 2.0, 4.0, -4.0], [1.0001, 1.0001, 2.0001, 2.0001]),
        "tracker": ([-1.0, 1.0, 2.0, -2.0], [1 + 1e-6, 1 + 1e-6, 2 + 1e-6, 2 + 1e-6]),
    }
    for scale in (True, False):
        kinds = every(scale)
        assert kinds.keys() == {*by_hand, "value"}
        for name, (differences, stds) in by_hand.items():
            expected = [d / s if scale else d for d, s in zip(differences, stds, strict=True)]
            assert kinds[name](rewards, prompts).tolist() == pytest.approx(expected, rel=FLOAT32_TOLERANCE), name
        values = torch.tensor([[0.5, 1.0], [0.5, 5.0], [9.0, 8.0], [0.0, -4.0]])
        expected = torch.tensor([[0.5, 0.0], [2.5, -2.0], [-1.0, 0.0], [4.0, 8.0]]) / (std if scale else 1.0)
        actual = value_advantages(rewards, values, scale=scale)
        torch.testing.assert_close(actual, expected, rtol=FLOAT32_TOLERANCE, atol=0.0)


def test_what_is_scaled_by_default():
    for name, scaled in every(True).items():
        unscaled = every(False)[name]
        assert not torch.equal(scaled(REWARDS, PROMPTS), unscaled(REWARDS, PROMPTS))
    values = torch.zeros(8, 1)
    assert torch.equal(raw_advantages(REWARDS), raw_advantages(REWARDS, scale=True))
    assert torch.equal(value_advantages(REWARDS, values), value_advantages(REWARDS, values, scale=True))
    assert torch.equal(batch_advantages(REWARDS), batch_advantages(REWARDS, scale=True))
    assert torch.equal(
        leave_one_out_advantages(REWARDS, PROMPTS), leave_one_out_advantages(REWARDS, PROMPTS, scale=False)
    )


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


@pytest.mark.parametrize("name", [name for name in functions() if name not in ("none-unscaled", "value-unscaled")])
def test_equal_rewards_have_no_advantage(name):
    # Nor where nothing was subtracted: they have no scale.
    assert (functions()[name](torch.full((8,), 0.1), PROMPTS) == 0).all()


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
    if not torch.equal(actual, rewards.float()):  # no baseline, no scale
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


def test_values_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"shape \(3, 2\) for 2 rewards"):
        value_advantages(torch.ones(2), torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"values must have shape \(B, S\)"):
        value_advantages(torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match=r"1 of 4 values are not finite \(first: row 1, step 0 is nan\)"):
        value_advantages(torch.ones(2), torch.tensor([[1.0, 1.0], [math.nan, 1.0]]))


# ----------------------------------------------------------------------------------- unbiased, by complete enumeration


def logits_of(actions, *shape):
    """Logits of so many actions in each of `shape` states: the parameters."""
    theta = torch.randn(*shape, actions, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return theta.requires_grad_()


@pytest.mark.parametrize(("scale", "count"), [(False, 2), (False, 3), (True, 3)])
def test_leave_one_out_is_unbiased(scale, count):
    # A policy over three actions that draws `count` times: every outcome, with its probability.
    theta = logits_of(3)
    rewards = torch.tensor([0.5, -1.0, 4.0])

    def expected_gradient(advantages_of):
        log_p = theta.log_softmax(0)
        surrogate = 0.0
        for draws in map(list, itertools.product(range(3), repeat=count)):
            advantages = advantages_of(rewards[draws], [0] * count).double()
            surrogate = surrogate + log_p[draws].sum().exp().detach() * (advantages * log_p[draws]).mean()
        return torch.autograd.grad(surrogate, theta)[0]

    (exact,) = torch.autograd.grad((theta.softmax(0) * rewards).sum(), theta)

    def leave_one(rewards, groups):
        return leave_one_out_advantages(rewards, groups, scale=scale)

    error = (expected_gradient(leave_one) - exact).norm() / exact.norm()
    if scale:
        # No factor mends it either: the direction is another one.
        assert error > 0.1
        assert torch.cosine_similarity(expected_gradient(leave_one), exact, dim=0) < 1 - 1e-3
        return
    assert error <= FLOAT32_TOLERANCE
    # The mean over the group has the own reward in it: shorter by (n - 1) / n, and of the same direction.
    shorter = expected_gradient(lambda rewards, groups: group_advantages(rewards, groups, scale=False))
    torch.testing.assert_close(shorter, exact * (count - 1) / count, rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)


class Chain:
    """Three steps of two actions each, from every state a policy and a reference: every path, with its probability.

    The state of a step is the last action (0 before the first), as in a denoising chain the latents are.
    """

    def __init__(self):
        self.theta = logits_of(2, 3, 2)
        reference = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self.paths = torch.tensor(list(itertools.product(range(2), repeat=3)))
        steps = torch.arange(3).expand(8, 3)
        states = torch.cat([torch.zeros(8, 1, dtype=torch.long), self.paths[:, :-1]], dim=1)
        log_p, log_ref = self.theta.log_softmax(-1), reference.log_softmax(-1)
        self.log_prob = log_p[steps, states, self.paths]
        self.kl = (log_p.exp() * (log_p - log_ref)).sum(-1)[steps, states]
        self.log_ratio = self.log_prob - log_ref[steps, states, self.paths]
        self.probability = self.log_prob.sum(1).exp()

    def gradient(self, scalar):
        return torch.autograd.grad(scalar, self.theta, retain_graph=True)[0]


def test_what_an_action_is_charged_with_by_hand():
    kl = torch.tensor([[1.0, 2.0, 4.0], [0.5, 0.0, 8.0]])
    assert kl_to_go(kl).tolist() == [[6.0, 4.0, 0.0], [8.0, 8.0, 0.0]]
    log_ratio = torch.tensor([[-1.0, 1.0, 0.5], [0.0, -2.0, 3.0]])
    charges = kl_to_go(kl, log_ratio)
    assert charges.tolist() == [[5.0, 5.0, 0.5], [8.0, 6.0, 3.0]]
    assert leave_one_out(charges).tolist() == [[-3.0, -1.0, -2.5], [3.0, 1.0, 2.5]]
    assert leave_one_out(torch.tensor([[1.0], [2.0], [6.0]])).tolist() == [[-3.0], [-1.5], [4.5]]
    assert torch.equal(leave_one_out(charges[:1]), charges[:1])
    assert torch.equal(kl_to_go(kl[:, :1]), torch.zeros(2, 1))
    for one in (kl_to_go(kl.double().requires_grad_()), leave_one_out(charges.double())):
        assert one.dtype == torch.float32 and not one.requires_grad


def test_the_charges_complete_the_gradient_of_the_kl():
    # E over all paths. The exact gradient is that of the expectation itself, with the probability of every path in it.
    chain = Chain()
    probability, log_prob = chain.probability.detach(), chain.log_prob
    exact = chain.gradient((chain.probability * chain.kl.sum(1)).sum())

    def score(charges):
        return chain.gradient((probability[:, None] * log_prob * charges.double()).sum())

    own = chain.gradient((probability[:, None] * chain.kl).sum())  # kl_gradient="paper"
    assert (own - exact).norm() > 0.1 * exact.norm()
    with_later = own + score(kl_to_go(chain.kl))  # "exact"
    assert (with_later - exact).norm() <= FLOAT32_TOLERANCE * exact.norm()
    in_the_reward = score(kl_to_go(chain.kl, chain.log_ratio))  # "reward"
    assert (in_the_reward - exact).norm() <= FLOAT32_TOLERANCE * exact.norm()


@pytest.mark.parametrize("with_log_ratio", [False, True])
def test_leaving_one_out_of_the_charges_is_unbiased(with_log_ratio):
    chain = Chain()
    charges = kl_to_go(chain.kl, chain.log_ratio if with_log_ratio else None)
    scores = torch.stack([chain.gradient(one.sum()).flatten() for one in chain.log_prob.flatten()]).reshape(8, 3, -1)

    def moments(baseline):
        mean = squares = 0.0
        for i, j in itertools.product(range(8), repeat=2):  # two rows, drawn independently
            rows = [i, j]
            gradient = torch.einsum("bs,bsp->p", baseline(charges[rows]).double(), scores[rows]) / 2
            weight = (chain.probability[i] * chain.probability[j]).detach()
            mean, squares = mean + weight * gradient, squares + weight * gradient.square()
        return mean, (squares - mean.square()).sum()

    mean, variance = moments(leave_one_out)
    expected, plain_variance = moments(lambda rows: rows)
    assert (mean - expected).norm() <= FLOAT32_TOLERANCE * expected.norm()
    if not with_log_ratio:  # the later KL is much the same for all rows; the log-ratio of an own action is not
        assert variance < 0.7 * plain_variance


def test_charges_do_not_depend_on_the_order_of_the_rows():
    # Even float64 sums of the second column depend on the order, unless they are exact.
    cancelling = torch.tensor([1e17, 1.0, -1e17, 3.0, 1e17, -1e17, 5.0, -3.0] * 6)
    charges = torch.stack([torch.randn(48, generator=torch.Generator().manual_seed(0)), cancelling], dim=1)
    expected = leave_one_out(charges)
    assert expected.double().mean(0).abs().le(FLOAT32_TOLERANCE * charges.abs().amax(0)).all()
    for seed in range(5):
        order = torch.randperm(48, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(leave_one_out(charges[order]), expected[order])


def test_charges_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"same shape \(B, S\), but have \(2, 3\) and \(2, 1\)"):
        kl_to_go(torch.ones(2, 3), torch.ones(2, 1))
    for function in (kl_to_go, leave_one_out):
        for wrong in (torch.ones(3), torch.ones(0, 3), torch.ones(2, 0)):
            with pytest.raises(ValueError, match=r"must have shape \(B, S\)"):
                function(wrong)
        with pytest.raises(ValueError, match="1 of 4 .* are not finite"):
            function(torch.tensor([[1.0, math.inf], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="1 of 2 log_ratio are not finite"):
        kl_to_go(torch.ones(1, 2), torch.tensor([[0.0, math.nan]]))


# --------------------------------------------------------------------------------------------------------- curation


NAN = math.nan


@pytest.mark.parametrize(
    ("rewards", "best", "worst", "kept"),
    [
        ([3.0, 1.0, 4.0, 2.0], 1, 1, [2, 1]),
        ([3.0, 1.0, 4.0, 2.0], 2, 0, [2, 0]),
        ([3.0, 1.0, 4.0, 2.0], 0, 3, [1, 3, 0]),
        ([3.0, 1.0, 4.0, 2.0], 2, 2, [0, 1, 2, 3]),
        # Of equal ones the first are the best and the last the worst, and none is both.
        ([1.0, 1.0, 1.0, 1.0], 1, 1, [0, 3]),
        ([5.0, 5.0, 0.0, 0.0], 1, 1, [0, 3]),
        # What is not finite lies between, and is kept only where there are too few others.
        ([NAN, 1.0, 4.0, 2.0], 1, 1, [2, 1]),
        ([NAN, 1.0, 4.0, 2.0], 2, 1, [2, 3, 1]),
        ([NAN, 1.0, NAN, 2.0], 1, 2, [3, 1, 2]),
        ([NAN, 1.0, NAN, 2.0], 2, 1, [3, 1, 2]),
        ([NAN, NAN, NAN, 2.0], 1, 1, [3, 2]),
        ([NAN, NAN, NAN, 2.0], 0, 1, [3]),
        ([math.inf, 1.0, -math.inf, 2.0], 1, 1, [3, 1]),
        ([NAN, NAN, NAN, NAN], 1, 1, [0, 3]),
    ],
)
def test_best_and_worst_by_hand(rewards, best, worst, kept):
    actual = best_and_worst(torch.tensor(rewards), ["a"] * 4, best, worst)
    assert actual.dtype == torch.bool
    assert actual.nonzero().flatten().tolist() == sorted(kept)


def test_best_and_worst_of_every_group():
    generator = torch.Generator().manual_seed(0)
    rewards, groups = torch.randn(60, generator=generator), torch.randint(4, (60,), generator=generator)
    kept = best_and_worst(rewards, groups, 2, 3)
    for group in range(4):
        mine = rewards[groups == group].sort().values
        assert rewards[kept & (groups == group)].sort().values.tolist() == [*mine[:3].tolist(), *mine[-2:].tolist()]
    assert torch.equal(best_and_worst(rewards, groups.tolist(), 2, 3), kept)
    assert torch.equal(best_and_worst((rewards * 1000).long(), groups, 2, 3), kept)
    order = torch.randperm(60, generator=generator)
    assert torch.equal(best_and_worst(rewards[order], groups[order], 2, 3), kept[order])


def test_what_cannot_be_kept_is_refused():
    rewards = torch.arange(5.0)
    with pytest.raises(ValueError, match="group 'b' has 2 members, but the best 2 and the worst 1 are 3"):
        best_and_worst(rewards, ["a", "a", "a", "b", "b"], 2, 1)
    for best, worst in [(0, 0), (-1, 2), (2, -1)]:
        with pytest.raises(ValueError, match=f"but best is {best} and worst is {worst}"):
            best_and_worst(rewards, ["a"] * 5, best, worst)
    with pytest.raises(ValueError, match="got 2 for 5 rewards"):
        best_and_worst(rewards, ["a", "a"], 1, 0)
    with pytest.raises(ValueError, match=r"rewards must have shape \(B,\)"):
        best_and_worst(rewards[:, None], ["a"] * 5, 1, 0)
    # A group of one is no error here.
    assert best_and_worst(rewards[:1], ["a"], 1, 0).tolist() == [True]


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
