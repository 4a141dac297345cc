"""3. The KL term: the exact KL of a step or the squared difference of the noise, the paper's gradient or the exact one; and how tight the bound is."""

from __future__ import annotations

from collections.abc import Sequence

from arms import Arm, Measure, compared, final, mean_while_training, rl, shown
from bound import ceiling
from intervals import Values, interval, table
from matplotlib.figure import Figure
from plots import figure, point
from runner import Result, Results, Run


SEEDS = 3
TASKS = ("color", "count")
TERMS = {
    "gaussian, paper": ({"kl_type": "gaussian", "kl_gradient": "paper"}, (0.02, 0.1)),
    "gaussian, exact": ({"kl_type": "gaussian", "kl_gradient": "exact"}, (0.02, 0.1)),
    "noise, paper": ({"kl_type": "noise", "kl_gradient": "paper"}, (0.005, 0.02, 0.1)),
}
BOUND_KL_WEIGHTS = (0.0, 0.02, 0.1)


def tasks(quick: bool) -> Sequence[str]:
    return TASKS[:1] if quick else TASKS


def seeds(quick: bool) -> range:
    return range(1 if quick else SEEDS)


def term(name: str, weight: float, quick: bool) -> Arm:
    own = {**TERMS[name][0], "kl_weight": weight}
    return Arm(f"{name}, weight {weight:g}", lambda task, seed: rl(task, seed, quick, **own))


def terms(quick: bool) -> list[Arm]:
    return [term(name, weight, quick) for name, (_, weights) in TERMS.items() for weight in weights]


def bounds(quick: bool) -> list[Arm]:
    """Trained like the others, with what the KL between the distributions of images is at least."""

    def bound(task: str, seed: int, weight: float) -> Run:
        settings = {**rl(task, seed, quick, kl_weight=weight).settings, "pairs": 64 if quick else 2048}
        return Run("bound", settings)

    return [
        Arm(f"kl_weight {weight:g}", lambda task, seed, weight=weight: bound(task, seed, weight))
        for weight in BOUND_KL_WEIGHTS
    ]


def runs(quick: bool = False) -> list[Run]:
    found = []
    for seed in seeds(quick):
        found += [arm.run(task, seed) for arm in terms(quick) for task in tasks(quick)]
        found += [arm.run("color", seed) for arm in bounds(quick)]
    return found


# --------------------------------------------------------------------------------------------------------------------------------------


def tables(results: Results, quick: bool = False) -> dict[str, str]:
    return {"terms": _terms(results, quick), "effects": _effects(results, quick), "bound": _bound(results, quick)}


def _values(results: Results, quick: bool, arm: Arm, measure: Measure) -> Values:
    return arm.values(results, tasks(quick), seeds(quick), measure)


def _terms(results: Results, quick: bool) -> str:
    measures = (
        ("exact", final("exact")),
        ("exact", mean_while_training),
        ("fidelity", final("fidelity")),
        ("kl", final("kl")),
    )
    rows = [
        [arm.name, *(shown(name, _values(results, quick, arm, measure)) for name, measure in measures)]
        for arm in terms(quick)
    ]
    return table(["KL term", "exact", "exact while training", "fidelity", "KL of a path, nats"], rows)


def _effects(results: Results, quick: bool) -> str:
    pairs = [
        *((("gaussian, exact", weight), ("gaussian, paper", weight)) for weight in TERMS["gaussian, exact"][1]),
        (("gaussian, paper", 0.02), ("noise, paper", 0.1)),  # of about the same KL
    ]
    rows = []
    for pair in pairs:
        both = [term(*one, quick) for one in pair]
        found = [
            compared(name, *(_values(results, quick, arm, final(name)) for arm in both)) for name in ("exact", "kl")
        ]
        rows.append([" against ".join(arm.name for arm in both), *found])
    return table(["", "exact, difference", "KL of a path, ratio"], rows)


def _bound(results: Results, quick: bool) -> str:
    rows = []
    for arm in bounds(quick):
        exact, below, path = (
            arm.values(results, ["color"], seeds(quick), measure)
            for measure in (final("exact"), kl_from_below, final("kl"))
        )
        rows.append([arm.name, shown("exact", exact), interval(below).text(1), shown("kl", path)])
    most = ceiling(bounds(quick)[0].run("color", 0).settings["pairs"])
    return table(["color", "exact", f"KL of x_0, nats, at least (at most {most:.1f})", "KL of a path, nats"], rows)


def kl_from_below(result: Result, task: str) -> float:
    return result["kl_from_below"]


def plot(results: Results, quick: bool = False) -> Figure:
    whole, axes = figure(3, width=3.1)
    for axis in axes:
        axis.set_xscale("log")
    for axis, task in zip(axes, tasks(quick), strict=False):
        for index, (name, (_, weights)) in enumerate(TERMS.items()):
            for weight in weights:
                arm = term(name, weight, quick)
                found = [arm.values(results, [task], seeds(quick), final(one)) for one in ("kl", "exact")]
                point(axis, *found, index, name if weight == weights[0] else None)
        axis.set(title=task, xlabel="KL of a path, nats", ylabel="exact")
        axis.legend(fontsize=7)
    for index, arm in enumerate(bounds(quick)):
        found = [arm.values(results, ["color"], seeds(quick), measure) for measure in (final("kl"), kl_from_below)]
        point(axes[2], *found, index, arm.name)
    axes[2].set(
        title="color: the bound", xlabel="KL of a path, nats", ylabel="KL of x_0, nats, at least", ylim=(0, None)
    )
    axes[2].legend(fontsize=7)
    return whole
