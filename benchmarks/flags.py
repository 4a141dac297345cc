"""The flags that all benchmarks share, with one set of defaults: one thread, and the time of the process alone."""

from __future__ import annotations

import argparse
import time


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def make_parser(
    description: str | None, repeats: int, of: str, quick: str, clock: bool = True
) -> argparse.ArgumentParser:
    """A parser of `--threads`, `--repeats`, `--quick` and, where time is measured, `--clock`.

    Args:
        repeats (`int`): The default.
        of (`str`): What is repeated.
        quick (`str`): What is left with `--quick`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch, in each process")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"{of} of which the median is taken")
    if clock:
        parser.add_argument("--clock", choices=CLOCKS, default="cpu", help="cpu: time of this process alone")
    parser.add_argument("--quick", action="store_true", help=f"{quick}: does it run?")
    return parser
