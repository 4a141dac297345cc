"""The experiments: what they count with, and each of them in its quick form, by its own command."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy.stats import t, ttest_ind


EXPERIMENTS = Path(__file__).parent.parent / "benchmarks" / "experiments"
PUBLISHED = ("baselines", "kl", "objectives", "prompts")  # whose runs are all in the repository
NAMES = ("figure", "baselines", "kl", "objectives", "prompts")


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))


# --- intervals ---------------------------------------------------------------------------------------------------------------------------


def test_of_one_task_the_interval_is_students():
    from intervals import interval

    found = interval({("color", 0): 0.5, ("color", 1): 0.7, ("color", 2): 0.9})
    half = t.ppf(0.975, 2) * 0.2 / math.sqrt(3)  # the standard deviation of .5, .7, .9 is .2
    assert found.runs == 3
    assert (found.mean, found.low, found.high) == pytest.approx((0.7, 0.7 - half, 0.7 + half), abs=1e-12)
    assert found.shows_an_effect


def test_what_differs_between_tasks_is_no_error():
    from intervals import interval

    found = interval({("color", 0): 0.9, ("color", 1): 0.9, ("count", 0): 0.1, ("count", 1): 0.1})
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)
    assert found.text() == "0.50 (all alike)"


def test_tasks_of_equal_variance_pool_their_degrees_of_freedom():
    from intervals import interval

    values = {(task, seed): base + 0.1 * seed for task, base in (("a", 0.0), ("b", 5.0)) for seed in range(3)}
    found = interval(values)
    half = t.ppf(0.975, 4) * math.sqrt(2 * 0.01 / 3) / 2  # 2 (n - 1) of them, for two tasks of the same spread
    assert found.high - found.mean == pytest.approx(half, rel=1e-9)


def test_one_run_says_nothing_of_others():
    from intervals import interval, verdict

    found = interval({("color", 0): 0.25})
    assert found.mean == 0.25 and math.isnan(found.low) and not found.shows_an_effect
    assert found.text() == "0.25" and verdict(found) == "+0.25"
    assert interval({}).text() == "–"


def test_a_difference_is_taken_run_by_run():
    from intervals import difference, verdict

    first = {("color", seed): value for seed, value in enumerate((0.25, 0.5, 1.0))}
    second = {("color", seed): value for seed, value in enumerate((0.0, 0.25, 0.75))}
    found = difference(first, second)  # 0.25 each time, however far seeds are from each other
    assert found.runs == 3
    assert (found.low, found.high) == (0.25, 0.25)
    assert verdict(found) == "+0.25 (all alike)"
    assert verdict(difference(first, {("color", 0): 0.3, ("color", 1): 0.3, ("color", 2): 0.3})).endswith(
        ", not established"
    )
    with pytest.raises(ValueError, match="other tasks or seeds"):
        difference(first, {("color", 0): 0.3})


def test_what_spreads_by_factors_is_compared_by_factors():
    from intervals import geometric, ratio, verdict

    first = {("color", seed): value for seed, value in enumerate((1.0, 10.0, 100.0))}
    found = geometric(first)
    half = t.ppf(0.975, 2) * math.log(10) / math.sqrt(3)  # the standard deviation of log 1, log 10, log 100 is log 10
    expected = (10, 10 * math.exp(-half), 10 * math.exp(half))
    assert (found.mean, found.low, found.high) == pytest.approx(expected, rel=1e-12)
    halved = {key: value / (2 + seed) for seed, (key, value) in enumerate(first.items())}  # by 2, 3 and 4
    found = ratio(first, halved)
    assert found.mean == pytest.approx(24 ** (1 / 3), rel=1e-12) and found.shows_an_effect
    assert verdict(found).startswith("× 2.88 [") and "not established" not in verdict(found)
    assert verdict(ratio(first, {key: 10.0 for key in first})).endswith(", not established")


def test_tasks_of_one_run_count_once():
    from intervals import interval, over_tasks

    values = {(task, seed): base + seed for task, base in (("a", 0.0), ("b", 5.0)) for seed in range(3)}
    assert over_tasks(values) == {("", 0): 2.5, ("", 1): 3.5, ("", 2): 4.5}
    assert interval(over_tasks(values)).high - 3.5 == pytest.approx(t.ppf(0.975, 2) / math.sqrt(3), rel=1e-12)


def test_a_share_is_not_above_one():
    from intervals import interval

    found = interval({("color", 0): 0.9, ("color", 1): 1.0}).within(0, 1)
    assert found.high == 1 and found.low == pytest.approx(0.95 - t.ppf(0.975, 1) * 0.05, rel=1e-9)


# --- what the KL is at least ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0])
def test_the_bound_is_below_the_kl_of_two_gaussians_and_shows_something(shift):
    from bound import kl_from_below

    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(1024, 4, generator=generator) for _ in range(2))
    found = kl_from_below(first + shift, second, seed=0, epochs=10)
    true = 4 * shift**2 / 2
    # data processing: no set tells more; the best half-space at a shift of 1 in four dimensions tells 1.2 of the 2 nats
    assert 0 <= found <= true
    assert found >= {0.0: 0.0, 0.5: 0.1, 1.0: 0.7}[shift]


def test_bernoulli_kl_at_the_confidence_limits():
    from bound import _told_apart, ceiling

    first, second = torch.ones(100), torch.zeros(100)
    likely, unlikely = 0.025 ** (1 / 100), 1 - 0.025 ** (1 / 100)  # Clopper-Pearson of 100 and of 0 in 100
    expected = likely * math.log(likely / unlikely) + (1 - likely) * math.log((1 - likely) / (1 - unlikely))
    assert _told_apart(first, second, 0.5) == pytest.approx(expected, rel=1e-9)
    assert _told_apart(first, first, 0.5) == 0.0
    assert ceiling(266) == pytest.approx(expected, rel=1e-9)  # of which the test takes 100


# --- runs -------------------------------------------------------------------------------------------------------------------------------------


def square(number):
    if number < 0:
        raise ValueError(f"{number} is negative")
    return {"square": number**2}


def test_what_is_done_is_kept_and_not_done_again(tmp_path):
    from runner import Results, Run

    results, run = Results(tmp_path), Run("square", {"number": 3, "of": [1, 2]})
    assert results.missing([run, Run("square", {"of": [1, 2], "number": 3})]) == [run]  # one run, whatever the order
    results.add(run, {"square": 9, "nothing": math.nan}, {"commit": "abc"})
    again = Results(tmp_path)
    assert again.missing([run]) == [] and again[run]["square"] == 9 and math.isnan(again[run]["nothing"])
    others = [Run("cube", run.settings), Run("square", {"number": 4})]
    assert again.missing([run, *others]) == others
    [line] = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert json.loads(line)["about"] == {"commit": "abc"}


def test_a_failed_run_is_named_and_the_others_are_kept(tmp_path):
    script = f"""
import sys
sys.path[:0] = [{str(EXPERIMENTS)!r}, {str(Path(__file__).parent)!r}]
import runner
runner.HEAVY = ()
from pathlib import Path
from test_experiments import square
if __name__ == "__main__":
    runs = [runner.Run("square", {{"number": number}}) for number in (2, -1, 3)]
    runner.run_missing(runs, runner.Results(Path({str(tmp_path)!r})), {{"square": square}}, jobs=1)
"""
    file = tmp_path / "script.py"
    file.write_text(script)
    done = subprocess.run([sys.executable, file], capture_output=True, text=True)
    assert done.returncode == 1
    assert "1 of 3 runs failed" in done.stderr and "-1 is negative" in done.stderr
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [line["result"]["square"] for line in lines] == [4, 9]


def test_tables_go_where_the_page_marks_them():
    from run import with_tables

    page = "before\n<!-- kl: terms -->\nold\n<!-- end -->\nafter\n<!-- kl: bound -->\n<!-- end -->\n"
    found = with_tables(page, "kl", {"terms": "| new \\1 |"})
    assert found == page.replace("\nold\n", "\n\n| new \\1 |\n\n")
    with pytest.raises(ValueError, match="kl: nowhere"):
        with_tables(page, "kl", {"nowhere": ""})


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_page_has_the_tables_of_the_results(name):
    from run import PAGE, with_tables
    from runner import Results

    page = PAGE.read_text()
    tables = __import__(name).tables(Results(EXPERIMENTS / "results"))
    assert with_tables(page, name, tables) == page


@pytest.mark.parametrize("name", NAMES)
def test_every_arm_is_another_run(name):
    module = __import__(name)
    runs = module.runs()
    assert len(set(runs)) == len(runs)
    seeds = {run.settings["seed"] for run in runs if "seed" in run.settings}
    assert seeds == set(range(5 if name == "figure" else 3))


# --- the race -----------------------------------------------------------------------------------------------------------------------------------


def arrived(seconds):
    """A result of the race that arrived after so many CPU-seconds; `None`: never, and took 99."""
    return {"seconds_to_090": seconds, "images_to_090": None, "curve": [{"cpu_s": 99.0}]}


def test_the_ratio_of_two_sides_is_welchs_on_logarithms():
    from race import welch_ratio

    ours, theirs = (10.0, 20.0, 40.0), (20.0, 40.0, 80.0, 160.0, 5.0)
    found = welch_ratio([arrived(one) for one in ours], [arrived(one) for one in theirs])
    expected = ttest_ind([math.log(one) for one in ours], [math.log(one) for one in theirs], equal_var=False)
    low, high = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((math.exp(low), math.exp(high)), rel=1e-9)


def test_the_best_setting_is_that_of_the_least_time_and_never_is_all_of_it(tmp_path):
    import race
    from runner import Results

    results = Results(tmp_path)
    found = race.searched("TRL", quick=False)
    assert len(found) == len(race.searched("ours, KL", quick=False)) == len(race.searched("ours, no KL", quick=False))
    for place, those in enumerate(found.values()):
        for seed, run in enumerate(those):
            # the fifth: 60 on average. The second: 10, 10, 10 and never, which is 32.25. The others: 70
            seconds = {1: (10.0, 10.0, 10.0, None), 4: 4 * (60.0,)}.get(place, 4 * (70.0,))[seed]
            results.add(run, arrived(seconds), {})
    assert race.best(results, "TRL", quick=False) == list(found)[1]


@pytest.mark.parametrize(
    "name",
    [
        *NAMES,
        pytest.param(
            "race",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif("DPOK_TRL_ENV" not in os.environ, reason="needs TRL v0.23, see race/README.md"),
            ],
        ),
    ],
)
def test_quick(name, tmp_path):
    command = [sys.executable, EXPERIMENTS / "run.py", name, "--quick", "--jobs", "1", "--folder", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tables = re.findall(rf"^{name}: (.+)$", done.stdout, re.MULTILINE)
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(tables) >= 2 and len(rows) > 2 * len(tables)
    assert (tmp_path / f"{name}.svg").read_text().startswith("<?xml")
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    if name != "race":  # whose runs depend on its search
        assert len(lines) == len(set(__import__(name).runs(quick=True)))
    again = subprocess.run([*command, "--no-runs"], capture_output=True, text=True)
    assert again.stdout == done.stdout  # tables are of what is kept
