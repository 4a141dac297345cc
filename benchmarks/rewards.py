"""What overlapping rewards with sampling gains: a round of batches with a reward behind a server, after sampling and during it.

    python benchmarks/rewards.py [--batches 6] [--sampling 0.1] [--reward 0.2] [--threads 1 2 4] [--repeats 5]

Sampling is a pause of the given length that lets other threads run, as waiting for a GPU does; the server is a real one on this machine, which pauses as
well and then answers. What is measured is therefore the trainer's own part: threads, requests, and waiting. Two floors stand beside it: the larger of all
sampling and all rewards (over their threads), and what the pauses allow in fact, since no reward begins before its batch is sampled.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import torch
from accelerate import Accelerator

from dpok_trl import DPOKConfig, RemoteReward
from dpok_trl.rewards.binding import TrainerState
from dpok_trl.training.batches import SampledBatch
from dpok_trl.training.scoring import Scoring


@contextmanager
def server(seconds: float) -> Iterator[str]:
    """The address of a server that answers after `seconds`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            time.sleep(seconds)
            body = json.dumps({"rewards": [1.0] * len(request["images"])}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def round_seconds(url: str, args: argparse.Namespace, threads: int | None, accelerator: Accelerator) -> float:
    """Wall time of sampling and scoring a round, by the trainer's own `Scoring`; `threads=None`: rewards after sampling."""
    reward = RemoteReward(url, batch_size=args.batch_size)
    reward.overlaps = threads is not None
    scoring = Scoring(reward, DPOKConfig(max_workers=threads or 1), accelerator)
    images = torch.rand(args.batch_size, 3, args.size, args.size)
    batches = []
    started = time.perf_counter()
    for _ in range(args.batches):
        time.sleep(args.sampling)
        trajectory = SimpleNamespace(images=images, prompts=["a cat"] * args.batch_size)
        batch = SampledBatch(trajectory, ({},) * args.batch_size)
        scoring.begin(batch, TrainerState(0, 0))
        batches.append(batch)
    scoring.finish(batches)
    return time.perf_counter() - started


def floor(args: argparse.Namespace, threads: int | None) -> float:
    """The least that the pauses allow."""
    if threads is None:
        return args.batches * (args.sampling + args.reward)
    free = [0.0] * threads  # when each thread is done with what it has
    for number in range(1, args.batches + 1):
        first = min(range(threads), key=free.__getitem__)
        free[first] = max(free[first], number * args.sampling) + args.reward
    return max(free)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--sampling", type=float, default=0.1, help="seconds of a batch")
    parser.add_argument("--reward", type=float, default=0.2, help="seconds of a request; there is one for each batch")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4], help="max_workers")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--size", type=int, default=64, help="pixels on a side")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tenth of the time, once")
    args = parser.parse_args()
    if args.quick:
        args.batches, args.sampling, args.reward, args.repeats = 3, 0.02, 0.04, 1

    accelerator = Accelerator(cpu=True)
    print("| rewards | seconds | max(sampling, rewards) | ratio | least possible | ratio |")
    print("|---|---|---|---|---|---|")
    with server(args.reward) as url:
        round_seconds(url, args, None, accelerator)  # warms up
        for threads in (None, *args.threads):
            seconds = statistics.median(round_seconds(url, args, threads, accelerator) for _ in range(args.repeats))
            name = "after sampling" if threads is None else f"during it, {threads} thread{'s' * (threads > 1)}"
            least = floor(args, threads)
            larger = args.batches * max(args.sampling, args.reward / (threads or 1))
            print(
                f"| {name} | {seconds:.3f} | {larger:.3f} | {seconds / larger:.2f} | {least:.3f} | {seconds / least:.3f} |"
            )


if __name__ == "__main__":
    main()
