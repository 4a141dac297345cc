"""The benchmarks run: each in its quick form, by its own command."""

import re
import subprocess
import sys
from pathlib import Path


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
    [(name, steps, network, difference, loop, quartiles, share)] = rows("reentry", "--clock", "cpu")
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
