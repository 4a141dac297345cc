"""`dpok-trl report`: the page of a run, made again from its folder."""

from __future__ import annotations

import argparse
from pathlib import Path


HELP = "make report.html of a run again from its folder, also of one that is still going or was killed; no model is loaded"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="output_dir of the run")
    parser.add_argument("--output", type=Path, help="the page; report.html in the run's folder if it is not given")
    parser.add_argument("--open", action="store_true", help="show the page in the browser")


def run(args: argparse.Namespace) -> int:
    if args.output is not None and not args.output.parent.is_dir():
        raise FileNotFoundError(f"--output {args.output}: there is no folder {args.output.parent}. Make it first.")
    if args.output is not None and args.output.is_dir():
        raise IsADirectoryError(f"--output {args.output} is a folder. Name the page: {args.output / 'report.html'}.")
    from dpok_trl.results.report import render_report

    page = render_report(args.run_folder, args.output)
    print(f"Report: {page}")
    if args.open:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())
    return 0
