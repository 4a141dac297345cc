"""4. The objective, where samples are used again: by further passes over a round, or from a buffer of rounds."""

from __future__ import annotations

from arms import UNSET, Arm, compared, cpu_seconds, final, mean_while_training, rl, shown, title
from intervals import interval, table
from matplotlib.figure import Figure
from plots import curve, figure
from runner import Results, Run


SEEDS = 3
TASK = "count"
OBJECTIVES = {
    "dpok": {"train_objective": "dpok"},
    "ppo": {"train_objective": "ppo"},
    # in nats; a shift of the mean by 0.2 standard deviations
    "kl_mask": {"train_objective": "kl_mask", "train_kl_threshold": 0.02, "train_clip_range": UNSET},
}
# (rounds in the buffer, passes over each round) -> words
REUSE = {(1, 1): "once", (2, 1): "buffer of 2", (3, 1): "buffer of 3", (1, 2): "2 passes", (1, 4): "4 passes"}
ROUNDS = 12  # half of what the other experiments have: it is about learning more from fewer images


def seeds(quick: bool) -> range:
    return range(1 if quick else SEEDS)


def arm(objective: str, reuse: tuple[int, int], quick: bool) -> Arm:
    rounds, passes = reuse
    own = {"num_epochs": ROUNDS, "train_buffer_rounds": rounds, "train_num_inner_epochs": passes}
    return Arm(
        f"{objective}, {REUSE[reuse]}",
        lambda task, seed: rl(task, seed, quick, **OBJECTIVES[objective], **own),
    )


def runs(quick: bool = False) -> list[Run]:
    return [arm(name, reuse, quick).run(TASK, seed) for seed in seeds(quick) for reuse in REUSE for name in OBJECTIVES]


# --------------------------------------------------------------------------------------------------------------------------------------


def tables(results: Results, quick: bool = False) -> dict[str, str]:
    return {"reuse": _reuse(results, quick), "objectives": _objectives(results, quick)}


def _reuse(results: Results, quick: bool) -> str:
    """Each objective, against using every sample once."""
    rows = []
    for objective in OBJECTIVES:
        for reuse in REUSE:
            one, once = (arm(objective, those, quick) for those in (reuse, (1, 1)))
            exact, training, before, kl, seconds = (
                of.values(results, [TASK], seeds(quick), measure)
                for of, measure in (
                    (one, final("exact")),
                    (one, mean_while_training),
                    (once, mean_while_training),
                    (one, final("kl")),
                    (one, cpu_seconds),
                )
            )
            change = "" if reuse == (1, 1) else compared("exact", training, before)
            cells = [shown("exact", exact), shown("exact", training), change, shown("kl", kl)]
            rows.append([one.name, *cells, interval(seconds).plain(0)])
    return table(["", "exact", "exact while training", "− once", title("kl"), "CPU s"], rows)


def _objectives(results: Results, quick: bool) -> str:
    """ppo and kl_mask against dpok, at equal reuse."""
    rows = []
    for reuse, words in REUSE.items():
        cells = []
        for objective in ("ppo", "kl_mask"):
            for name, measure in (("exact", mean_while_training), ("kl", final("kl"))):
                both = (arm(those, reuse, quick) for those in (objective, "dpok"))
                cells.append(compared(name, *(one.values(results, [TASK], seeds(quick), measure) for one in both)))
        rows.append([words, *cells])
    head = ["against dpok", "ppo: exact while training", "KL, ratio", "kl_mask: exact while training", "KL, ratio"]
    return table(head, rows)


def plot(results: Results, quick: bool = False) -> Figure:
    whole, axes = figure(3)
    for axis, objective in zip(axes, OBJECTIVES, strict=True):
        axis.set_title(objective)
        for index, reuse in enumerate(REUSE):
            one = arm(objective, reuse, quick)
            found = one.curves(results, TASK, seeds(quick), "images", "exact")
            curve(axis, found, index, REUSE[reuse])
        axis.set(xlabel="images", ylabel="exact, of the round's samples", ylim=(0, 1))
        axis.legend(fontsize=7)
    return whole
