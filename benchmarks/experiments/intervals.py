"""Means over seeds, and differences between arms, with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
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

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def plain(self, digits: int = 2) -> str:
        """The mean alone."""
        return "–" if math.isnan(self.mean) else f"{self.mean:.{digits}f}"

    def text(self, digits: int = 2, signed: bool = False) -> str:
        if math.isnan(self.mean):
            return "–"
        sign = "+" if signed else ""
        mean = f"{self.mean:{sign}.{digits}f}"
        if math.isnan(self.low):
            return mean
        if self.low == self.high:  # as happens where few runs are judged by few images; it is no certainty
            return f"{mean} (all alike)"
        return f"{mean} [{self.low:{sign}.{digits}f}, {self.high:{sign}.{digits}f}]"


def interval(values: Values) -> Interval:
    """Of the mean over tasks of the mean over seeds. The tasks are those that they are, the seeds stand for all seeds.

    Runs are independent, so the variance of the mean over K tasks is the sum of s_k² / n_k over K², with Satterthwaite's degrees of freedom
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


def difference(first: Values, second: Values) -> Interval:
    """Of `first` minus `second`, run by run: of the same task and seed, of which both have one."""
    return interval({key: first[key] - second[key] for key in first if key in second})


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
    """A difference, and in words where it may as well be none."""
    if math.isnan(found.low):
        return found.text(digits, signed=True)
    return found.text(digits, signed=True) + ("" if found.excludes_zero else ", not established")
