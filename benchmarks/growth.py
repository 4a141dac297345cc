"""How the cost of an epoch grows with images, steps, prompts and processes: points, and the straight line through them.

    python benchmarks/growth.py [--threads 1] [--repeats 3] [--clock cpu] [--processes 1 2] [--plot docs/images/growth.svg] [--quick]

The embedded pipeline with the preset `demo`, in batches of 16 images, so that more images are more batches of one shape. All trainers live at once and take their
epochs in turn, so a machine that others use too is slow for all of them alike; the first two epochs of each warm up. Every point is a median. The line is that of least
squares; *largest distance* is that of a point from it, as a share of the line's value there. More processes (`--processes`, gloo) have more cores only if the
machine does: each process's own images stay the same, and the time is the slowest one's. A table in Markdown is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from flags import CLOCKS, make_parser

from dpok_trl import DPOKConfig, DPOKTrainer
from dpok_trl.demo import load_demo_pipeline
from dpok_trl.demo.command import demo_lora_config


HEADER = """\
| cost of an epoch against | points | seconds | fixed part, s | for each more, s | largest distance |
|---|---|---|--:|--:|--:|"""

BATCH = 16
IMAGES, STEPS, PROMPTS = 32, 10, 1  # where another one is varied
VARIED: dict[str, Sequence[int]] = {"images": (16, 32, 64, 96), "steps": (5, 10, 15, 20), "prompts": (1, 4, 12)}
# Distinct prompts of the demo's grammar.
COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle")


def make_trainer(folder: str, images: int = IMAGES, steps: int = STEPS, prompts: int = PROMPTS) -> DPOKTrainer:
    config = DPOKConfig.preset(
        "demo",
        output_dir=folder,
        accelerator_kwargs={"cpu": True},
        save_freq=0,
        sample_grid_freq=0,
        sample_num_steps=steps,
        sample_batch_size=BATCH,
        sample_num_batches_per_epoch=images // BATCH,
        train_batch_size=BATCH,
        train_gradient_accumulation_steps=images // BATCH,  # as many optimizer steps, however many images
    )
    texts = [f"a {colour} {shape}" for shape in SHAPES for colour in COLOURS][:prompts]
    return DPOKTrainer(config, "demo-soft", texts, load_demo_pipeline(), peft_config=demo_lora_config())


def epoch_seconds(trainers: Sequence[DPOKTrainer], repeats: int, now: Callable[[], float]) -> list[float]:
    """The median seconds of an epoch of each trainer; they take turns."""
    seconds: list[list[float]] = [[] for _ in trainers]
    steps = [0] * len(trainers)
    for epoch in range(2 + repeats):
        for index, trainer in enumerate(trainers):
            started = now()
            steps[index] = trainer.step(epoch, steps[index])
            seconds[index].append(now() - started)
    return [statistics.median(one[2:]) for one in seconds]


def line(points: Sequence[float], seconds: Sequence[float]) -> tuple[float, float, float]:
    """The line of least squares.

    Returns:
        `tuple[float, float, float]`: Its value at 0, its slope, and the largest distance of a point from it as a share of its value there.
    """
    slope, fixed = np.polyfit(points, seconds, 1)
    on_line = fixed + slope * np.asarray(points)
    return float(fixed), float(slope), float(np.abs(np.asarray(seconds) / on_line - 1).max())


def row(what: str, points: Sequence[int], seconds: Sequence[float]) -> str:
    numbers = ", ".join(map(str, points)), ", ".join(f"{one:.3f}" for one in seconds)
    if what not in VARIED:  # processes: two points are always on a line
        return f"| {what} | {numbers[0]} | {numbers[1]} | | | |"
    fixed, slope, distance = line(points, seconds)
    return f"| {what} | {numbers[0]} | {numbers[1]} | {fixed:.3f} | {slope:.5f} | {100 * distance:.1f} % |"


def seconds_of_processes(count: int, images: int, steps: int, repeats: int, threads: int, clock: str) -> float:
    """The median seconds of an epoch of `count` processes that train together, of `images` images each: of the slowest one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)] if count > 1 else [{}]
    arguments = [
        "--worker",
        str(images),
        str(steps),
        "--repeats",
        str(repeats),
        "--threads",
        str(threads),
        "--clock",
        clock,
    ]
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, *arguments],
            env={**os.environ, **rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ranks
    ]
    results = [(worker, *worker.communicate()) for worker in workers]
    for worker, _, errors in results:
        if worker.returncode:
            raise RuntimeError(f"a process ended with code {worker.returncode}: {errors[-2000:]}")
    return max(json.loads(output.splitlines()[-1]) for _, output, _ in results)


def draw(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], path: Path) -> None:
    """Points and lines, a panel for each."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "growth"  # the same picture is the same file
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(
        1, len(curves), figsize=(3.2 * len(curves), 2.9), layout="constrained", squeeze=False
    )
    for panel, (what, (points, seconds)) in zip(panels[0], curves.items(), strict=True):
        fixed, slope, _ = line(points, seconds)
        ends = np.array([0, max(points)])
        panel.plot(ends, fixed + slope * ends, color="#8aa", linewidth=1.2)
        panel.plot(points, seconds, "o", color="#235", markersize=5)
        panel.set(xlabel=what, xticks=(0, *points), xlim=(0, 1.06 * max(points)), ylim=(0, 1.15 * max(seconds)))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("seconds an epoch")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = make_parser(__doc__, repeats=3, of="epochs", quick="the smallest sizes, one epoch")
    parser.add_argument("--processes", type=int, nargs="*", default=[], help="numbers of processes, such as 1 2")
    parser.add_argument("--plot", type=Path, help="an SVG of points and lines")
    parser.add_argument("--worker", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    now = CLOCKS[arguments.clock]
    with tempfile.TemporaryDirectory() as folder:
        if arguments.worker:
            trainer = make_trainer(folder, *arguments.worker)
            print(json.dumps(epoch_seconds([trainer], arguments.repeats, now)[0]))
            return
        varied, fixed = VARIED, {}
        if arguments.quick:
            varied, fixed = {"images": (16, 32), "steps": (2, 3), "prompts": (1, 2)}, {"images": 16, "steps": 2}
            arguments.repeats = 1
        print(HEADER, flush=True)
        curves: dict[str, tuple[Sequence[int], Sequence[float]]] = {}
        for what, points in varied.items():
            trainers = [make_trainer(f"{folder}/{what}-{point}", **{**fixed, what: point}) for point in points]
            curves[what] = points, epoch_seconds(trainers, arguments.repeats, now)
            print(row(what, *curves[what]), flush=True)
    if arguments.processes:
        size = fixed.get("images", IMAGES), fixed.get("steps", STEPS)
        seconds = [
            seconds_of_processes(count, *size, arguments.repeats, arguments.threads, arguments.clock)
            for count in arguments.processes
        ]
        print(row(f"processes, of {size[0]} images each", arguments.processes, seconds), flush=True)
    if arguments.plot:
        draw(curves, arguments.plot)


if __name__ == "__main__":
    main()
