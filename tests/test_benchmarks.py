"""The benchmarks run: each in its quick form. Those that train do so in this process, which has torch and diffusers loaded already."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def rows(name, *arguments):
    """The cells of the table that a benchmark prints."""
    command = [sys.executable, BENCHMARKS / f"{name}.py", "--quick", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    header, line, *rest = result.stdout.splitlines()
    assert set(line) <= set("|-:") and header.count("|") == line.count("|")
    assert all(row.count("|") == header.count("|") for row in rest)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rest]


def test_reentry():
    [(name, steps, network, difference, loop, quartiles, share)] = rows("reentry")
    assert (name, steps) == ("sd (tiny)", "50")
    assert float(network) > 0 and float(difference) > 0 and float(loop) > 0
    assert re.fullmatch(r"[\d.]+ to [\d.]+", quartiles) and share.endswith(" %")


def test_memory():
    [(steps, checkpointing, peak, spread, stored)] = rows("memory")
    assert (steps, checkpointing) == ("2", "no")
    assert float(peak) > 100  # Python and torch alone take more
    assert spread == f"{peak} to {peak}"
    assert stored == "0.00"  # three 4x8x8 tensors


def test_rewards():
    found = rows("rewards", "--threads", "1", "2")
    assert [name for name, *_ in found] == ["after sampling", "during it, 1 thread", "during it, 2 threads"]
    # three batches of 0.02 s, and 0.04 s for each reward: all, then sampling of one and all rewards, then all sampling and the last reward
    assert [row[4] for row in found] == ["0.180", "0.140", "0.100"]
    assert [row[2] for row in found] == ["0.120", "0.120", "0.060"]
    for _, seconds, larger, ratio, least, share in found:
        assert float(seconds) >= float(least)  # no clock runs backwards
        assert abs(float(share) - float(seconds) / float(least)) < 0.02
        assert abs(float(ratio) - float(seconds) / float(larger)) < 0.02


@pytest.fixture
def benchmark(monkeypatch):
    """A benchmark's module, by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def quick_rows(benchmark, monkeypatch, capsys):
    """The cells of the table that a benchmark prints."""

    def start(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, "--quick", *arguments])
        benchmark(name).main()
        header, line, *rest = [text for text in capsys.readouterr().out.splitlines() if text.startswith("|")]
        assert set(line) <= set("|-:") and all(row.count("|") == header.count("|") for row in rest)
        return [[cell.strip() for cell in row.strip("|").split("|")] for row in rest]

    return start


def test_epoch(quick_rows):
    found = quick_rows("epoch")
    names = [row[1] for row in found[: len(found) // 2]]
    titles = ["demo, batch 4", "SD (64, 128), batch 4"]
    assert [(row[0], row[1]) for row in found] == [(title, name) for title in titles for name in names]
    for pipeline in (found[: len(names)], found[len(names) :]):
        of = {row[1]: row[2:] for row in pipeline}
        *parts, rollout, update, whole = names
        rounding = 0.05 * len(parts) + 0.05
        assert sum(float(of[part][0]) for part in parts) == pytest.approx(float(of[whole][0]), abs=rounding)
        assert sum(float(of[part][1].removesuffix(" %")) for part in parts) == pytest.approx(100, abs=rounding)
        # two steps, and one replay of the reference with both
        calls = {part: int(of[part][2]) for part in parts if part.startswith(("denoiser", "replay"))}
        assert list(calls.values()) == [2, 2, 2, 3, 2]
        assert all(float(of[part][0]) > 0 for part in parts if part != "text encoder")  # all are watched
        network = [part for part in parts if part.startswith("denoiser")]
        assert [part for part in names if of[part][3]] == [*network, rollout, update, whole]
        for name in (*network, rollout, update, whole):
            ours, bare, ratio = (float(of[name][column]) for column in (0, 3, 4))
            assert ratio == pytest.approx(ours / bare, rel=0.01)
            assert of[name][5] == f"{of[name][4]} to {of[name][4]}"  # of one epoch
        assert float(of[whole][3]) == pytest.approx(float(of[rollout][3]) + float(of[update][3]), abs=0.15)


def test_the_ratio_is_the_median_of_ratios(benchmark):
    # ratios 1, 4 and 2; that of the medians would be 4 / 3
    assert benchmark("epoch").against([3.0, 4.0, 8.0], [3.0, 1.0, 4.0]) == ["3000.0", "2.000", "1.000 to 4.000"]


@pytest.mark.parametrize(
    ("reference", "update", "whole"),
    [
        # 10 + 50 + 3 + 30 + 4 + 5 against 8 + 40 + 20, and 1425 against 25 + 68
        (
            ["10.0", "0.7 %", "1", "8.0", "1.250"],
            ["102.0", "7.2 %", "", "68.0", "1.500"],
            ["1425.0", "100.0 %", "", "93.0", "15.323"],
        ),
        # without the 10 and the 8
        (None, ["92.0", "6.5 %", "", "60.0", "1.533"], ["1415.0", "100.0 %", "", "85.0", "16.647"]),
    ],
    ids=["with KL", "without KL"],
)
def test_rollout_and_update_against_the_bare_network(benchmark, reference, update, whole):
    epoch = benchmark("epoch")
    seconds = dict(
        zip(epoch.PARTS, (0.001, 0.02, 0.002, 0.3, 0.4, 0.01, 0.05, 0.003, 0.03, 0.004, 0.005, 0.6), strict=True)
    )
    bare = {epoch.ROLLOUT: 0.025, epoch.REFERENCE: 0.008, epoch.FORWARD: 0.04, epoch.BACKWARD: 0.02}
    if reference is None:
        del seconds[epoch.REFERENCE]
        bare[epoch.REFERENCE] = 0.0
    lines = epoch.table("x", [seconds], [bare], dict.fromkeys(seconds, 1))
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[:2] for row in found[:-3]] == [["x", part] for part in epoch.PARTS]
    of = {row[1]: row[2:] for row in found}
    assert of[epoch.DECODING][0] == "300.0" and of[epoch.DECODING][2:] == ["1", "", "", ""]
    assert of["**rollout, without decoding**"] == ["23.0", "1.6 %", "", "25.0", "0.920", "0.920 to 0.920"]
    assert of["**update**"] == [*update, f"{update[-1]} to {update[-1]}"]
    assert of["**epoch**"] == [*whole, f"{whole[-1]} to {whole[-1]}"]
    none = ["0.0", "0.0 %", "0", "", "", ""]
    assert of[epoch.REFERENCE] == ([*reference, f"{reference[-1]} to {reference[-1]}"] if reference else none)


def test_time_counts_for_the_innermost_part(benchmark):
    clock = iter([0.0, 1.0, 3.0, 4.0, 10.0, 20.0, 21.0]).__next__
    parts = benchmark("epoch").Parts(clock)
    with parts.part("outer"), parts.part("inner"):  # from 0 and from 1, to 4 and to 10
        assert clock() == 3.0
    with pytest.raises(KeyError), parts.part("outer"):  # 20 to 21
        raise KeyError
    assert parts.take() == ({"outer": 7.0 + 1.0, "inner": 3.0}, {"outer": 2, "inner": 1})
    assert parts.take() == ({}, {})


def test_growth(quick_rows, tmp_path):
    picture = tmp_path / "growth.svg"
    found = quick_rows("growth", "--plot", str(picture))
    assert [(row[0], row[1]) for row in found] == [("images", "16, 32"), ("steps", "2, 3"), ("prompts", "1, 2")]
    for _, points, seconds, fixed, slope, distance in found:
        (x, _), (y, _) = ([float(one) for one in cell.split(", ")] for cell in (points, seconds))
        assert float(fixed) + x * float(slope) == pytest.approx(y, abs=2e-3)  # two points are on their line
        assert distance == "0.0 %"
    assert picture.read_text().count("<svg") == 1


def test_the_line_of_least_squares(benchmark):
    line = benchmark("growth").line
    assert line([1, 2, 4], [5.0, 7.0, 11.0]) == pytest.approx((3.0, 2.0, 0.0), abs=1e-12)
    # means 2 and 4, slope (-1 * -2 + 1 * 3) / 2; on the line are 1.5, 4 and 6.5
    assert line([1, 2, 3], [2.0, 3.0, 7.0]) == pytest.approx((-1.0, 2.5, 1 / 3))


def test_gpu(quick_rows):
    [row] = quick_rows("gpu")
    assert row[:3] == ["quick", "eager", "2"] and row[-1] == "not on a CPU"
    assert all(float(cell.removesuffix(" %")) > 0 for cell in row[3:9])


def test_operations_are_counted(benchmark):
    gpu = benchmark("gpu")
    layer = torch.nn.Linear(3, 5)
    x = torch.randn(7, 3, requires_grad=True)
    assert gpu.flops(lambda: layer(x)) == 2 * 7 * 3 * 5
    assert gpu.flops(lambda: layer(x).sum().backward()) == 3 * 2 * 7 * 3 * 5  # the gradients of x and of the weight
    convolution = torch.nn.Conv2d(3, 5, 3, padding=1)
    assert gpu.flops(lambda: convolution(torch.randn(2, 3, 4, 4))) == 2 * (2 * 4 * 4) * 5 * (3 * 3 * 3)
    assert gpu.share_of_rate(200, seconds=2, rate=400) == 0.25


@pytest.mark.parametrize(("shape", "parameters"), [("sd15", 859_520_964), ("sdxl", 2_567_463_684)])
def test_the_shapes_are_those_of_the_known_networks(shape, parameters, benchmark):
    with torch.device("meta"):
        unet = benchmark("gpu").SHAPES[shape].make_unet()
    assert sum(parameter.numel() for parameter in unet.parameters()) == parameters


def test_common_flags(benchmark):
    make = benchmark("flags").make_parser
    defaults = make("what", repeats=7, of="epochs", quick="one").parse_args([])
    assert vars(defaults) == {"threads": 1, "repeats": 7, "clock": "cpu", "quick": False}
    assert "clock" not in make("what", repeats=7, of="epochs", quick="one", clock=False).parse_args([])


def test_make_bench_runs_all_but_the_one_for_gpus():
    makefile = (BENCHMARKS.parent / "Makefile").read_text()
    chosen = re.search(r"^BENCH \?= (.+)$", makefile, re.M)[1].split()
    programs = {path.stem for path in BENCHMARKS.glob("*.py") if "def main(" in path.read_text()}
    assert len(chosen) == len(set(chosen)) and set(chosen) == programs - {"gpu"}


def test_denoiser(quick_rows):
    [(network, batch, *milliseconds)] = quick_rows("denoiser")
    assert (network, batch) == ("eager", "2")
    forward, reference, backward = map(float, milliseconds)
    assert reference > 0 and 0 < forward < backward  # a backward pass is a forward one and more
