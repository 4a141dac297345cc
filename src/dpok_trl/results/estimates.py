"""Means over prompts with standard errors, and what they are means of: scores, distances between pictures, the best of n."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

import torch


Rows = Sequence[int]  # positions of images


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its standard error.

    Args:
        mean (`float`): NaN if there was nothing to take the mean of.
        standard_error (`float`): NaN where it cannot be estimated (a single image).
        images, prompts (`int`): How many it was taken of.
    """

    mean: float
    standard_error: float
    images: int
    prompts: int

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "–"
        if math.isnan(self.standard_error):
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} ± {self.standard_error:.3f}"


# --- statistics of the images of one prompt ---------------------------------------------------------------------------


class Statistic(ABC):
    """A number that some images of one prompt have.

    Attributes:
        smallest (`int`): Images that it needs.
    """

    smallest = 1

    @abstractmethod
    def __call__(self, rows: Rows) -> float: ...

    def without_each(self, rows: Rows) -> list[float]:
        """The statistic without the first of the images, without the second, and so on."""
        return [self([*rows[:index], *rows[index + 1 :]]) for index in range(len(rows))]

    def __sub__(self, other: Statistic) -> Statistic:
        return _Difference(self, other)


class _Difference(Statistic):
    def __init__(self, first: Statistic, second: Statistic):
        self.first, self.second = first, second
        self.smallest = max(first.smallest, second.smallest)

    def __call__(self, rows: Rows) -> float:
        return self.first(rows) - self.second(rows)

    def without_each(self, rows: Rows) -> list[float]:
        pairs = zip(self.first.without_each(rows), self.second.without_each(rows), strict=True)
        return [first - second for first, second in pairs]


class Mean(Statistic):
    """Of `values`, `(n,)`."""

    def __init__(self, values: torch.Tensor):
        self.numbers = values.double().tolist()

    def __call__(self, rows: Rows) -> float:
        return fmean(self.numbers[row] for row in rows)

    def without_each(self, rows: Rows) -> list[float]:
        # by what each is off the mean, not by a sum less each: large values that are all alike leave no error
        mean = self(rows)
        return [mean - (self.numbers[row] - mean) / (len(rows) - 1) for row in rows]


class MeanDistance(Statistic):
    """The mean Euclidean distance between two of some images, over all pairs.

    Args:
        features (`torch.Tensor` of shape `(n, D)`)
    """

    smallest = 2

    def __init__(self, features: torch.Tensor):
        self.features = features.double()
        self._distances: dict[tuple[int, ...], torch.Tensor] = {}  # of each prompt, which are made once

    def __call__(self, rows: Rows) -> float:
        return self._between(rows).sum().item() / (len(rows) * (len(rows) - 1))

    def without_each(self, rows: Rows) -> list[float]:
        distances = self._between(rows)
        # image i is in a row and in a column of them
        left = distances.sum() - 2 * distances.sum(dim=1)
        return (left / ((len(rows) - 1) * (len(rows) - 2))).tolist()

    def _between(self, rows: Rows) -> torch.Tensor:
        key = tuple(rows)
        if key not in self._distances:
            some = self.features[list(rows)]
            # not by way of scalar products: they would put equal pictures a little apart
            self._distances[key] = torch.cdist(some, some, compute_mode="donot_use_mm_for_euclid_dist")
        return self._distances[key]


class BestOf(Statistic):
    """An unbiased estimate of E[max of n images], from N >= n images: the mean of the maximum over all subsets of n of them.

    The i-th smallest of N is the maximum of `C(i - 1, n - 1)` of the `C(N, n)` subsets.

    Args:
        values (`torch.Tensor` of shape `(images,)`)
        n (`int`)
    """

    def __init__(self, values: torch.Tensor, n: int):
        self.numbers, self.n, self.smallest = values.double().tolist(), n, n

    def __call__(self, rows: Rows) -> float:
        weights = _maximum_weights(len(rows), self.n)
        ordered = sorted(self.numbers[row] for row in rows)
        return math.fsum(weight * value for weight, value in zip(weights, ordered, strict=True))


@lru_cache(maxsize=4096)
def _maximum_weights(number: int, n: int) -> tuple[float, ...]:
    """`C(i - 1, n - 1) / C(N, n)` for i from 1 to N = `number`."""
    if not 1 <= n <= number:
        raise ValueError(f"the best of {n} images cannot be estimated from {number}: draw at least {max(n, 1)}.")
    weights = [0.0] * number
    weight = n / number
    for i in range(number, n - 1, -1):  # downwards by their ratio: the binomials themselves are too large for floats
        weights[i - 1] = weight
        weight *= (i - n) / (i - 1) if i > 1 else 0.0
    return tuple(weights)


# --- means over prompts -----------------------------------------------------------------------------------------------


def over_prompts(groups: Sequence[Rows], statistic: Statistic) -> Estimate:
    """The mean over prompts of a statistic of each prompt's images, every prompt counted alike.

    Images of one prompt are not independent of each other: they are all easy, or all hard. So with P > 1 prompts the error is that of P numbers T_p,
    `s / sqrt(P)` with `s` their standard deviation (from P - 1): the prompts are taken as drawn from those that one cares about, and the noise of the images
    is in it. Few prompts may be close together by chance (two with 3 hits in 8 each would have the error 0), so it is never below what the noise of the images
    leaves by itself, `sqrt(sum_p e_p^2) / P`. `e_p` is the jackknife's error of one prompt with N images,
    `e_p^2 = (N - 1) / N * sum_i (T_i - mean(T_i))^2` with T_i the statistic without image i (Efron and Stein, Annals of Statistics 9, 1981); of a mean it is
    `s / sqrt(N)` of the images. With a single prompt that is the error.

    Args:
        groups (`Sequence[Sequence[int]]`): The images of each prompt. Prompts that have fewer than the statistic needs are left out.
        statistic ([`Statistic`])
    """
    groups = [rows for rows in groups if len(rows) >= statistic.smallest]
    if not groups:
        return Estimate(math.nan, math.nan, 0, 0)
    values = [statistic(rows) for rows in groups]
    number = len(groups)
    errors = [_jackknife(rows, statistic) if len(rows) > statistic.smallest else math.nan for rows in groups]
    error = math.hypot(*errors) / number
    if number > 1:
        spread = stdev(values) / math.sqrt(number)
        error = spread if math.isnan(error) else max(spread, error)
    return Estimate(fmean(values), error, sum(map(len, groups)), number)


def _jackknife(rows: Rows, statistic: Statistic) -> float:
    return stdev(statistic.without_each(rows)) * (len(rows) - 1) / math.sqrt(len(rows))


# --- how many images are worth as much --------------------------------------------------------------------------------


@dataclass(frozen=True)
class EquivalentN:
    """Of how many images of the pretrained model the best is as good as one of the tuned model, in the mean.

    Args:
        n (`float`): Where the difference is 0, between the whole numbers by a straight line. NaN if that is outside 1 to `largest_n`.
        low, high (`float`): Where it is one standard error above 0, and below; likewise.
        largest_n (`int`): The largest n of which the difference has an error.
        at_one ([`Estimate`]): The tuned model's image against one image of the pretrained model.
    """

    n: float
    low: float
    high: float
    largest_n: int
    at_one: Estimate

    def __str__(self) -> str:
        if math.isnan(self.at_one.mean) or self.largest_n < 1:
            return "–"
        if abs(self.at_one.mean) <= self.at_one.standard_error:
            return "not distinguishable from one image"
        if self.at_one.mean < 0:
            return "less than one image"
        if math.isnan(self.low):  # better by more than an error, wherever it could be compared
            return f"more than the best of {self.largest_n}" if self.largest_n > 1 else "more than one image"
        if math.isnan(self.n):
            return f"more than the best of {self.largest_n} (from {self.low:.1f})"
        high = f"more than {self.largest_n}" if math.isnan(self.high) else f"{self.high:.1f}"
        return f"the best of {self.n:.1f} ({self.low:.1f} to {high})"

    def to_dict(self) -> dict[str, Any]:
        """For JSON: a number that is NaN is `None`."""
        numbers = {"n": self.n, "low": self.low, "high": self.high}
        finite = {name: None if math.isnan(value) else value for name, value in numbers.items()}
        return {**finite, "largest_n": self.largest_n, "words": str(self)}


def equivalent_n(difference_to: Callable[[int], Estimate], largest: int) -> EquivalentN:
    """
    Args:
        difference_to (`Callable[[int], Estimate]`): Tuned minus the best of n of the pretrained model, by the same prompts: its error has those of both in it.
            What is 0 but for rounding is 0.
        largest (`int`): The largest n that it takes.
    """
    found: list[Estimate] = []
    for n in range(1, largest + 1):
        difference = difference_to(n)
        if math.isnan(difference.standard_error):
            largest = n - 1
            break
        found.append(difference)
        if difference.mean + difference.standard_error < 0:  # nothing more is to be found beyond
            break
    n, low = (_crossing([one.mean - share * one.standard_error for one in found]) for share in (0, 1))
    # Where all images have the highest score there is no error, and no n is better than that: it is not too large.
    high = _crossing([one.mean + one.standard_error for one in found], below_zero=True)
    return EquivalentN(n, low, high, largest, found[0] if found else Estimate(math.nan, math.nan, 0, 0))


def _crossing(values: Sequence[float], below_zero: bool = False) -> float:
    """Where what is given for n = 1, 2 ... falls to 0, or below; NaN if that is outside."""
    if values and values[0] == 0:
        return 1.0
    if not values or values[0] < 0:
        return math.nan
    for n, (above, below) in enumerate(pairwise(values), start=1):
        if below < 0 or (below == 0 and not below_zero):
            return n + above / (above - below)
    return math.nan
