"""`dpok-trl push`: a model that lies in a folder, to the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path


HELP = "push a saved model, or the newest one of a run, to the Hub"

MESSAGE = "Upload model tuned with DPOK"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, help="what `save_model` left, a checkpoint, or the output folder of a run"
    )
    parser.add_argument("repo", help="repository, such as me/rabbit-lora; it is made if need be")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--message", default=MESSAGE, help="of the commit")


def run(args: argparse.Namespace) -> int:
    from dpok_trl.results.hub import newest_model, push_folder

    folder = newest_model(args.folder.expanduser())
    print(f"Pushing {folder} to {args.repo} ...", flush=True)
    print(push_folder(folder, args.repo, commit_message=args.message, private=args.private or None))
    return 0
