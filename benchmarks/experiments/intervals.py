"""Means over seeds, and differences between arms, with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, variance

from scipy.stats import t


LEVEL = 0.95

Values = Mapping[tuple[str, int], float]  # (task, seed) -> number


@dataclass(frozen=True)
class Interval:
    """A mean and the interval that covers it in 95 of 100 repetitions; `low` and `high` are NaN where one run says nothing of others."""

    mean: float
    low: float
    high: float
    runs: int
    ratio: bool = False  # of two arms; else a mean, or a difference

    @property
    def shows_an_effect(self) -> bool:
        nothing = 1 if self.ratio else 0
        return self.low > nothing or self.high < nothing

    def within(self, low: float, high: float) -> Interval:
        """Without what cannot be, as a share above 1."""
        return replace(self, low=max(self.low, low), high=min(self.high, high))

    def plain(self, digits: int = 2) -> str:
        """The mean alone."""
        return "–" if math.isnan(self.mean) else f"{self.mean:.{digits}f}"

    def text(self, digits: int = 2, signed: bool = False) -> str:
        if math.isnan(self.mean):
            return "–"
        sign = "+" if signed and not self.ratio else ""
        mean, low, high = (
            f"{round(value, digits) + 0.0:{sign}.{digits}f}" for value in (self.mean, self.low, self.high)
        )
        mean = f"× {mean}" if self.ratio else mean
        if math.isnan(self.low):
            return mean
        if self.low == self.high:  # as happens where few runs are judged by few images; it is no certainty
            return f"{mean} (all alike)"
        return f"{mean} [{low}, {high}]"


def interval(values: Values) -> Interval:
    """Of the mean over tasks of the mean over seeds. The tasks are those that they are, the seeds stand for all seeds.

    Runs of different tasks are independent (else see [`over_tasks`]), so the variance of the mean over K tasks is the sum of s_k² / n_k over K², with Satterthwaite's degrees of freedom
    (https://doi.org/10.2307/3002019); of one task this is Student's interval.
    """
    groups = _by_task(values)
    if not groups:
        return Interval(math.nan, math.nan, math.nan, 0)
    runs = sum(len(group) for group in groups)
    mean = fmean(fmean(group) for group in groups)
    if min(len(group) for group in groups) < 2:
        return Interval(mean, math.nan, math.nan, runs)
    variances = [variance(group) / len(group) for group in groups]
    total = sum(variances)
    if total == 0:
        return Interval(mean, mean, mean, runs)
    freedom = total**2 / sum(v**2 / (len(group) - 1) for v, group in zip(variances, groups, strict=True))
    half = float(t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(total) / len(groups)
    return Interval(mean, mean - half, mean + half, runs)


def geometric(values: Values) -> Interval:
    """As [`interval`], of what spreads by factors, as a KL does."""
    return _of_logarithms({key: math.log(value) for key, value in values.items()})


def difference(first: Values, second: Values) -> Interval:
    """Of `first` minus `second`, run by run: of the same task and seed."""
    return interval({key: first[key] - second[key] for key in _same(first, second)})


def ratio(first: Values, second: Values) -> Interval:
    """Of `first` to `second`, run by run: the geometric mean."""
    logarithms = {key: math.log(first[key] / second[key]) for key in _same(first, second)}
    return replace(_of_logarithms(logarithms), ratio=True)


def over_tasks(values: Values) -> Values:
    """Seed by seed, the mean over the tasks: of arms in which one run does all tasks, whose numbers then hang together."""
    seeds = {seed for _, seed in values}
    return {("", seed): fmean(value for (_, other), value in values.items() if other == seed) for seed in seeds}


def _of_logarithms(values: Values) -> Interval:
    found = interval(values)
    return replace(found, mean=math.exp(found.mean), low=math.exp(found.low), high=math.exp(found.high))


def _same(first: Values, second: Values) -> Iterable[tuple[str, int]]:
    if first.keys() != second.keys():
        raise ValueError(f"runs of other tasks or seeds: {sorted(first)} and {sorted(second)}.")
    return first.keys()


def _by_task(values: Values) -> list[list[float]]:
    groups: dict[Hashable, list[float]] = {}
    for (task, _), value in values.items():
        groups.setdefault(task, []).append(value)
    return list(groups.values())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; the first column to the left, the others to the right."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def verdict(found: Interval, digits: int = 2) -> str:
    """A difference or ratio, and in words where it may as well be none."""
    if math.isnan(found.low):
        return found.text(digits, signed=True)
    return found.text(digits, signed=True) + ("" if found.shows_an_effect else ", not established")
