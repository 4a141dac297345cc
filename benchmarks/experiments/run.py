"""The experiments behind docs/experiments.md: does the runs that are missing, and makes tables and plots of all.

python benchmarks/experiments/run.py figure
python benchmarks/experiments/run.py figure --quick --folder somewhere
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from kinds import KINDS
from runner import Results, run_missing


EXPERIMENTS = ("figure", "baselines", "kl", "objectives", "prompts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS, nargs="+")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--seeds", type=int, help="the first so many seeds only")
    parser.add_argument("--quick", action="store_true", help="tiny runs, to see that all of it works")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "results", help="of the results")
    arguments = parser.parse_args()
    results = Results(arguments.folder)
    runs = []
    for name in arguments.experiment:
        runs += importlib.import_module(name).runs(arguments.quick)
    if arguments.seeds is not None:
        runs = [run for run in runs if run.settings.get("seed", 0) < arguments.seeds]
    run_missing(runs, results, KINDS, arguments.jobs)


if __name__ == "__main__":
    main()
