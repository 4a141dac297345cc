"""Runs as data: each in a process of its own with one thread, its result a line of a file. What is in the file is not run again."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm


FILE = "runs.jsonl"
LOGS = "logs"
HEAVY = ("torch", "diffusers", "transformers", "peft", "dpok_trl.training.trainer", "scipy.stats")
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "dpok-trl")

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One run.

    Args:
        kind (`str`): Name of the function that does it, in `kinds.KINDS`.
        settings (`Mapping`): What the function is given; JSON. Two runs of equal kind and settings are one run, in whichever experiment.
    """

    kind: str
    settings: Mapping[str, Any]

    @cached_property
    def key(self) -> str:
        return json.dumps({"kind": self.kind, "settings": self.settings}, sort_keys=True)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run) and self.key == other.key


class Results:
    """Results of runs, in `folder/runs.jsonl`: one line each, in the order in which they ended."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / FILE
        self._found: dict[str, Result] = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            entry = json.loads(line)
            self._found[Run(entry["kind"], entry["settings"]).key] = entry["result"]

    def __contains__(self, run: Run) -> bool:
        return run.key in self._found

    def __getitem__(self, run: Run) -> Result:
        if run not in self:
            raise LookupError(f"{self.path} has no result of this run, which the table needs; do it first: {run.key}")
        return self._found[run.key]

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        return [run for run in dict.fromkeys(runs) if run not in self]

    def add(self, run: Run, result: Result, about: Mapping[str, Any]) -> None:
        entry = {"kind": run.kind, "settings": run.settings, "result": result, "about": about}
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:  # a line at a time: what was done before a kill stays
            file.write(json.dumps(entry, allow_nan=True) + "\n")
        self._found[run.key] = result


def run_missing(
    runs: Iterable[Run], results: Results, functions: Mapping[str, Callable[..., Result]], jobs: int
) -> None:
    """Does what is not done yet, `jobs` at a time.

    Raises:
        `RuntimeError`: When all others are done, if a run failed; says where its output lies. It is run again the next time.
    """
    todo = results.missing(runs)
    if not todo:
        return
    logs = results.folder / LOGS
    logs.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes to come, when they import torch
    context = get_context("forkserver")  # the libraries are imported once, and each run starts from a clean process
    context.set_forkserver_preload(list(HEAVY))
    failed = []
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        pending = {
            pool.submit(_logged, functions[run.kind], dict(run.settings), logs / f"{number:03}.log"): (run, number)
            for number, run in enumerate(todo)
        }
        with tqdm(total=len(todo), unit="run", smoothing=0) as progress:
            for future in as_completed(pending):
                run, number = pending[future]
                progress.update()
                if future.exception() is not None:
                    failed.append(f"{run.key}: {future.exception()!r} (output: {logs / f'{number:03}.log'})")
                    continue
                result, seconds = future.result()
                results.add(run, result, {**circumstances(), "cpu_seconds_in_all": round(seconds, 1)})
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(todo)} runs failed:\n" + "\n".join(failed))


def _logged(function: Callable[..., Result], settings: dict[str, Any], log: Path) -> tuple[Result, float]:
    with log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        result = function(**settings)
    return result, sum(os.times()[:4])  # of this process, which does nothing else, and of those that it has started


def circumstances() -> dict[str, Any]:
    """On what the run was made."""
    return {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "cpu": cpu_model(),
    }


def commit() -> str:
    """Of the checkout, with a plus sign if tracked files of the package were changed since."""
    folder = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
    if head.returncode:
        return "no git"
    package = folder.parent.parent / "src"
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", package], cwd=folder).returncode
    return head.stdout.strip() + ("+" if changed else "")


def cpu_model() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
