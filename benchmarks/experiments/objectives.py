"""4. The objective, where samples are used again: by further passes over a round, or from a buffer of rounds."""

from __future__ import annotations

from arms import UNSET, Arm, cpu_seconds, final, mean_while_training, of_curve, rl
from intervals import difference, interval, table, verdict
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
        once = arm(objective, (1, 1), quick)
        for reuse in REUSE:
            one = arm(objective, reuse, quick)
            exact, training, kl, seconds = (
                one.values(results, [TASK], seeds(quick), measure)
                for measure in (final("exact"), mean_while_training("exact"), final("kl"), cpu_seconds)
            )
            before = once.values(results, [TASK], seeds(quick), mean_while_training("exact"))
            change = "" if reuse == (1, 1) else verdict(difference(training, before))
            rows.append(
                [
                    one.name,
                    interval(exact).text(),
                    interval(training).text(),
                    change,
                    interval(kl).text(1),
                    interval(seconds).plain(0),
                ]
            )
    return table(["", "exact", "exact while training", "− once", "KL, nats", "CPU s"], rows)


def _objectives(results: Results, quick: bool) -> str:
    """ppo and kl_mask against dpok, at equal reuse."""
    rows = []
    for reuse, words in REUSE.items():
        first = arm("dpok", reuse, quick)
        cells = []
        for objective in ("ppo", "kl_mask"):
            for measure, digits in ((mean_while_training("exact"), 2), (final("kl"), 1)):
                values = [
                    one.values(results, [TASK], seeds(quick), measure) for one in (arm(objective, reuse, quick), first)
                ]
                cells.append(verdict(difference(*values), digits))
        rows.append([words, *cells])
    head = ["− dpok", "ppo: exact while training", "KL, nats", "kl_mask: exact while training", "KL, nats"]
    return table(head, rows)


def plot(results: Results, quick: bool = False) -> Figure:
    whole, axes = figure(3)
    for axis, objective in zip(axes, OBJECTIVES, strict=True):
        axis.set_title(objective)
        for index, reuse in enumerate(REUSE):
            one = arm(objective, reuse, quick)
            found = [of_curve(results[run], "images", "exact") for run in one.done(results, TASK, seeds(quick))]
            curve(axis, found, index, REUSE[reuse])
        axis.set(xlabel="images", ylabel="exact, of the round's samples", ylim=(0, 1))
        axis.legend(fontsize=7)
    return whole
