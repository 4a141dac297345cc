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
