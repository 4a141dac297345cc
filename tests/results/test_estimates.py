"""Means over prompts, their errors, and the best of n: by hand, by enumeration and by Monte Carlo."""

import itertools
import math
from statistics import fmean

import pytest
import torch

from dpok_trl.results.estimates import BestOf, Estimate, Mean, MeanDistance, Statistic, equivalent_n, over_prompts


FLOAT64 = 1e-12  # relative


def values(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_images_of_one_prompt_by_hand():
    scores = values(1.0, 2.0, 3.0, 6.0)
    result = over_prompts([[0, 1, 2, 3]], Mean(scores))
    assert result.mean == 3.0
    assert result.standard_error == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3 / 4), rel=FLOAT64)  # s / sqrt(N)
    assert (result.images, result.prompts) == (4, 1)
    assert str(result) == "3.000 ± 1.080"
    assert str(over_prompts([[0]], Mean(values(0.5)))) == "0.500"


def test_several_prompts_count_alike_and_their_spread_is_the_error():
    # means 1, 4 and 10 of 2, 1 and 3 images; over all images the mean would be 6
    scores = values(0.5, 1.5, 4.0, 9.0, 10.0, 11.0)
    result = over_prompts([[0, 1], [2], [3, 4, 5]], Mean(scores))
    assert result.mean == 5.0
    assert result.standard_error == pytest.approx(math.sqrt((16 + 1 + 25) / 2 / 3), rel=FLOAT64)
    assert (result.images, result.prompts) == (6, 3)


def test_prompts_that_agree_by_chance_leave_the_error_of_their_images():
    # three hits in eight of both prompts: no spread, and the variance of each mean is 3/8 * 5/8 / 7
    scores = values(*[1, 1, 1, 0, 0, 0, 0, 0] * 2)
    result = over_prompts([range(8), range(8, 16)], Mean(scores))
    assert result.standard_error == pytest.approx(math.sqrt(2 * 3 / 8 * 5 / 8 / 7) / 2, rel=FLOAT64)


def test_clustered_images_are_not_taken_for_independent():
    """Prompts with an effect of their own: the spread of the means over 2000 repetitions is the error that is told, and not that of independent images."""
    generator = torch.Generator().manual_seed(0)
    effects = torch.randn(2000, 10, 1, generator=generator, dtype=torch.float64)
    scores = (effects + 0.5 * torch.randn(2000, 10, 8, generator=generator, dtype=torch.float64)).flatten(1)
    groups = [range(first, first + 8) for first in range(0, 80, 8)]
    results = [over_prompts(groups, Mean(one)) for one in scores[:300]]
    true = math.sqrt((1 + 0.25 / 8) / 10)
    assert scores.mean(1).std().item() == pytest.approx(true, rel=0.05)  # 2000 repetitions know it to 1.6 percent
    assert math.sqrt(fmean(r.standard_error**2 for r in results)) == pytest.approx(true, rel=0.1)
    independent = math.sqrt(scores.var(dim=1).mean().item() / 80)
    assert independent < 0.45 * true


def test_nothing_is_no_number():
    result = over_prompts([[], []], Mean(values()))
    assert math.isnan(result.mean) and math.isnan(result.standard_error)
    assert (result.images, result.prompts, str(result)) == (0, 0, "–")
    only = over_prompts([[0], [], [1]], Mean(values(1.0, 3.0)))  # a prompt of which nothing is left is no prompt
    assert (only.mean, only.standard_error, only.prompts) == (2.0, 1.0, 2)


# --- the distance between pictures ------------------------------------------------------------------------------------


def test_mean_distance_by_hand():
    features = values(0, 0, 3, 4, 0, 0, 7, 7).reshape(4, 2)  # 0 and 2 are the same point
    result = over_prompts([[0, 1, 2]], MeanDistance(features))
    assert result.mean == pytest.approx((5 + 0 + 5) / 3, rel=FLOAT64)
    # without one image each: 5, 0, 5
    assert result.standard_error == pytest.approx(
        math.sqrt(2 / 3 * (2 * (5 - 10 / 3) ** 2 + (10 / 3) ** 2)), rel=FLOAT64
    )
    alone = over_prompts([[0], [1, 2]], MeanDistance(features))
    assert (alone.mean, alone.prompts) == (5.0, 1) and math.isnan(alone.standard_error)


# --- the best of n ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 7))
def test_best_of_is_the_mean_maximum_of_all_subsets(n):
    scores = values(0.3, -1.0, 2.5, 2.5, 0.0, 7.0)
    expected = fmean(max(subset) for subset in itertools.combinations(scores.tolist(), n))
    assert BestOf(scores, n)(range(6)) == pytest.approx(expected, rel=FLOAT64)


def test_best_of_by_hand():
    # the maximum of two of 1, 2, 4 is 2, 4 or 4
    assert BestOf(values(4.0, 1.0, 2.0), 2)([0, 1, 2]) == pytest.approx(10 / 3, rel=FLOAT64)
    assert BestOf(values(4.0, 1.0, 2.0), 1)([0, 1, 2]) == pytest.approx(7 / 3, rel=FLOAT64)
    assert BestOf(values(4.0, 1.0, 2.0), 3)([0, 1, 2]) == 4.0
    with pytest.raises(ValueError, match="best of 4 images cannot be estimated from 3: draw at least 4"):
        BestOf(values(4.0, 1.0, 2.0), 4)([0, 1, 2])


@pytest.mark.parametrize("n", [2, 4, 8])
def test_best_of_is_unbiased_on_uniform_scores(n):
    """E[max of n uniforms] = n / (n + 1). The plain maximum of the first n would need n times as many images for that."""
    scores = torch.rand(3000, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = [BestOf(one, n)(range(8)) for one in scores]
    error = torch.tensor(found).std().item() / math.sqrt(len(found))
    assert abs(fmean(found) - n / (n + 1)) < 3 * error
    assert error < 0.005


def test_best_of_many_does_not_overflow():
    scores = torch.arange(1, 1001, dtype=torch.float64)  # E[max of n of 1..N] = n (N + 1) / (n + 1)
    for n in (2, 500, 1000):
        assert BestOf(scores, n)(range(1000)) == pytest.approx(n * 1001 / (n + 1), rel=1e-10)


def test_the_error_of_the_best_of_one_is_that_of_the_mean():
    scores = torch.randn(12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    one, mean = (over_prompts([range(12)], statistic) for statistic in (BestOf(scores, 1), Mean(scores)))
    assert one.standard_error == pytest.approx(mean.standard_error, rel=1e-9)


# --- the closed forms of the jackknife --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [3, 8])
def test_the_images_without_each_of_them(number):
    generator = torch.Generator().manual_seed(3)
    scores = 100 + torch.randn(number, generator=generator, dtype=torch.float64)
    features = torch.randn(number, 5, generator=generator, dtype=torch.float64)
    for statistic in (Mean(scores), MeanDistance(features), MeanDistance(features) - MeanDistance(2 * features)):
        one_by_one = Statistic.without_each(statistic, list(range(number)))
        assert statistic.without_each(range(number)) == pytest.approx(one_by_one, rel=FLOAT64)


def test_distances_are_measured_once_for_each_prompt(monkeypatch):
    measured, cdist = [], torch.cdist
    monkeypatch.setattr(torch, "cdist", lambda a, b, **kwargs: measured.append(len(a)) or cdist(a, b, **kwargs))
    over_prompts([range(8), range(8, 16)], MeanDistance(torch.rand(16, 3, generator=torch.Generator().manual_seed(4))))
    assert measured == [8, 8]


# --- how many images are worth as much --------------------------------------------------------------------------------


def differences(*means, error=0.1):
    return lambda n: Estimate(means[n - 1], error, 8, 2)


@pytest.mark.parametrize(
    ("means", "numbers", "words"),
    [
        ((0.5, 0.2, -0.1, -0.4), (2 + 2 / 3, 2 + 1 / 3, 3.0), "the best of 2.7 (2.3 to 3.0)"),
        ((0.5, -0.5), (1.5, 1.4, 1.6), "the best of 1.5 (1.4 to 1.6)"),
        ((0.3, 0.05), (None, 1.8, None), "more than the best of 2 (from 1.8)"),
        ((0.5, -0.05), (1 + 0.5 / 0.55, 1 + 0.4 / 0.55, None), "the best of 1.9 (1.7 to more than 2)"),
        ((0.3, 0.15), (None, None, None), "more than the best of 2"),
        ((0.3,), (None, None, None), "more than one image"),
        ((0.05, -0.5), (1 + 1 / 11, None, 1 + 3 / 11), "not distinguishable from one image"),
        ((-0.05, -0.5), (None, None, 1.1 + 1 / 90), "not distinguishable from one image"),
        ((-0.2, -0.5), (None, None, None), "less than one image"),
        ((), (None, None, None), "–"),
    ],
)
def test_how_many_images_a_difference_is_worth(means, numbers, words):
    found = equivalent_n(differences(*means), len(means))
    assert str(found) == words
    written = found.to_dict()
    assert [written[name] for name in ("n", "low", "high")] == [
        None if number is None else pytest.approx(number, rel=1e-9) for number in numbers
    ]
    assert (written["largest_n"], written["words"]) == (len(means), words)


def test_no_difference_is_not_worth_two_images():
    assert str(equivalent_n(differences(0.0, -0.4, error=0.0), 2)) == "not distinguishable from one image"


def test_what_has_no_error_is_not_compared():
    def difference(n):
        return Estimate(0.5, 0.1 if n < 3 else math.nan, 3, 1)

    assert equivalent_n(difference, 3).largest_n == 2
