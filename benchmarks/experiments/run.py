"""The experiments behind docs/experiments.md: does the runs that are missing, and makes tables and a figure of all.

    python benchmarks/experiments/run.py figure
    python benchmarks/experiments/run.py figure --quick --folder somewhere   # a tiny form of everything

Runs are kept in FOLDER/runs.jsonl, and one that is there is not run again: what was interrupted goes on. Tables are printed, and the figure is written to
FOLDER/NAME.svg; with --page, both go to docs/experiments.md as well.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from plots import save
from runner import Results, run_missing


EXPERIMENTS = ("figure", "baselines", "kl", "objectives", "prompts", "race")
ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "experiments.md"
IMAGES = ROOT / "docs" / "images" / "experiments"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS, nargs="+")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--no-runs", action="store_true", help="tables and figure of runs that are done")
    parser.add_argument("--page", action="store_true", help="write them into docs/ too")
    parser.add_argument("--quick", action="store_true", help="tiny runs of one seed, to see that all of it works")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "results", help="of the results")
    arguments = parser.parse_args()
    if "race" in arguments.experiment and not arguments.no_runs and "DPOK_TRL_ENV" not in os.environ:
        parser.error(
            "the race needs TRL v0.23: make its environment by race/make_trl_env.sh, and name it by DPOK_TRL_ENV"
        )
    if arguments.quick and arguments.page:
        parser.error("--quick trains next to nothing: leave out --page")
    results = Results(arguments.folder)
    experiments = {name: importlib.import_module(name) for name in arguments.experiment}
    if not arguments.no_runs:
        from kinds import KINDS  # which need everything

        runs = [run for experiment in experiments.values() for run in experiment.runs(arguments.quick)]
        run_missing(runs, results, KINDS, arguments.jobs)
        if "race" in experiments:  # whose runs depend on those of its search
            run_missing(experiments["race"].runs_after(results, arguments.quick), results, KINDS, arguments.jobs)
    for name, experiment in experiments.items():
        tables = experiment.tables(results, arguments.quick)
        for title, table in tables.items():
            print(f"{name}: {title}\n\n{table}\n")
        plot = partial(experiment.plot, results, arguments.quick)
        save(plot, arguments.folder / f"{name}.svg")
        if arguments.page:
            save(plot, IMAGES / f"{name}.svg")
            PAGE.write_text(with_tables(PAGE.read_text(), name, tables))


def with_tables(page: str, experiment: str, tables: Mapping[str, str]) -> str:
    """The page with these tables between its marks, `<!-- experiment: title -->` and `<!-- end -->`.

    Raises:
        `ValueError`: If the page has no place for one of them.
    """
    for title, table in tables.items():
        mark = f"<!-- {experiment}: {title} -->"
        pattern = re.compile(re.escape(mark) + r"\n.*?<!-- end -->", re.DOTALL)
        if not pattern.search(page):
            raise ValueError(f"the page has no place for the table: put {mark} and <!-- end --> where it belongs")
        page = pattern.sub(lambda _, mark=mark, table=table: f"{mark}\n\n{table}\n\n<!-- end -->", page)
    return page


if __name__ == "__main__":
    main()
