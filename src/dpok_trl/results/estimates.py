"""Means over prompts with standard errors, and what they are means of: scores, distances between pictures, the best of n."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean, stdev

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


def over_prompts(groups: Sequence[Rows], statistic: Callable[[Rows], float], smallest: int = 1) -> Estimate:
    """The mean over prompts of a statistic of each prompt's images, every prompt counted alike.

    Images of one prompt are not independent of each other: they are all easy, or all hard. So with P > 1 prompts the error is that of P numbers T_p,
    `s / sqrt(P)` with `s` their standard deviation (from P - 1): the prompts are taken as drawn from those that one cares about, and the noise of the images
    is in it. Few prompts may be close together by chance (two with 3 hits in 8 each would have the error 0), so it is never below what the noise of the images
    leaves by itself, `sqrt(sum_p e_p^2) / P`. `e_p` is the jackknife's error of one prompt with N images,
    `e_p^2 = (N - 1) / N * sum_i (T_i - mean(T_i))^2` with T_i the statistic without image i (Efron and Stein, Annals of Statistics 9, 1981); of a mean it is
    `s / sqrt(N)` of the images. With a single prompt that is the error.

    Args:
        groups (`Sequence[Sequence[int]]`): The images of each prompt.
        statistic (`Callable[[Sequence[int]], float]`): Of some images of one prompt.
        smallest (`int`): Images that it needs. Prompts that have fewer are left out.
    """
    groups = [rows for rows in groups if len(rows) >= smallest]
    if not groups:
        return Estimate(math.nan, math.nan, 0, 0)
    values = [statistic(rows) for rows in groups]
    number = len(groups)
    errors = [_jackknife(rows, statistic) if len(rows) > smallest else math.nan for rows in groups]
    error = math.hypot(*errors) / number
    if number > 1:
        spread = stdev(values) / math.sqrt(number)
        error = spread if math.isnan(error) else max(spread, error)
    return Estimate(fmean(values), error, sum(map(len, groups)), number)


def _jackknife(rows: Rows, statistic: Callable[[Rows], float]) -> float:
    without = [statistic([*rows[:index], *rows[index + 1 :]]) for index in range(len(rows))]
    return stdev(without) * (len(rows) - 1) / math.sqrt(len(rows))


def mean_of(values: torch.Tensor) -> Callable[[Rows], float]:
    """The mean of `values`, `(n,)`, over some images."""
    numbers = values.double().tolist()
    return lambda rows: fmean(numbers[row] for row in rows)


def mean_distance(features: torch.Tensor) -> Callable[[Rows], float]:
    """The mean Euclidean distance between two of some images, over all pairs.

    Args:
        features (`torch.Tensor` of shape `(n, D)`)
    """
    vectors = features.double()

    def statistic(rows: Rows) -> float:
        # not by way of scalar products: they would put equal pictures a little apart
        distances = torch.cdist(vectors[rows], vectors[rows], compute_mode="donot_use_mm_for_euclid_dist")
        return distances.sum().item() / (len(rows) * (len(rows) - 1))

    return statistic


def best_of(values: torch.Tensor, n: int) -> Callable[[Rows], float]:
    """An unbiased estimate of E[max of n images], from N >= n images: the mean of the maximum over all subsets of n of them.

    The i-th smallest of N is the maximum of `C(i - 1, n - 1)` of the `C(N, n)` subsets.

    Args:
        values (`torch.Tensor` of shape `(n,)`)
        n (`int`)
    """
    numbers = values.double().tolist()

    def statistic(rows: Rows) -> float:
        weights = _maximum_weights(len(rows), n)
        ordered = sorted(numbers[row] for row in rows)
        return math.fsum(weight * value for weight, value in zip(weights, ordered, strict=True))

    return statistic


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
