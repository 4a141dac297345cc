"""What a run of the race is told, measured by and leaves, the same for both sides: CPU time, and the pictures that it took to be right.

Needs the standard library alone, and runs in both environments.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any


LEVEL = 0.9  # share of exact pictures at the finish
WINDOW = 128  # last pictures over which it is taken; the standard error of a share of 0.9 is 0.027


@dataclass(kw_only=True)
class CommonSettings:
    seed: int = 0
    epochs: int = 20
    stop_at: float | None = None  # share of exact pictures among the last 128
    threads: int = 1
    prompt: str = "a green triangle"
    eval_images: int = 256


def main(run: Callable[[Any], dict[str, Any]], settings: type[CommonSettings]) -> None:
    """Of a side's script: settings as JSON in, the result as JSON out."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: {Path(sys.argv[0]).name} '<settings as JSON>'")
    print(json.dumps(run(settings(**json.loads(sys.argv[1])))))


def cpu_seconds() -> float:
    """CPU time of this process, all threads, and of the processes that it started and that have ended: compilers, for `torch.compile`."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in MiB (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def last_mean(verdicts: Sequence[bool], window: int) -> float | None:
    """Share of the last `window` verdicts that are true; `None` while there are fewer."""
    return sum(verdicts[-window:]) / window if len(verdicts) >= window else None


def first_reaching(curve: Sequence[dict[str, Any]], level: float) -> dict[str, Any] | None:
    """The first point of the curve whose `exact_window` is at least `level`, or `None`."""
    return next((p for p in curve if p["exact_window"] is not None and p["exact_window"] >= level), None)


def finish(curve: Sequence[dict[str, Any]], level: float = LEVEL) -> dict[str, Any]:
    """CPU-seconds and images until `level`; both `None` where it was not reached."""
    point = first_reaching(curve, level)
    return {
        "seconds_to_090": None if point is None else point["cpu_s"],
        "images_to_090": None if point is None else point["images"],
    }


def seconds_per_image(curve: Sequence[dict[str, Any]], skip: int) -> dict[str, float]:
    """CPU-seconds per image of sampling (with the reward) and update: medians over the epochs after the first `skip`.

    `start_up`: what the first `skip` epochs took beyond as many median ones, in CPU-seconds (checks, `torch.compile`).

    Raises:
        `ValueError`: If the curve has no more than `skip` epochs.
    """
    if len(curve) <= skip:
        raise ValueError(f"{skip} epochs are to be skipped, and the curve has {len(curve)}: give it more.")
    images = curve[0]["images"]  # of each epoch
    sample = statistics.median(point["sample_cpu_s"] for point in curve[skip:])
    update = statistics.median(point["update_cpu_s"] for point in curve[skip:])
    total = statistics.median(point["sample_cpu_s"] + point["update_cpu_s"] for point in curve[skip:])
    first = sum(point["sample_cpu_s"] + point["update_cpu_s"] for point in curve[:skip])
    return {
        "sample": sample / images,
        "update": update / images,
        "total": total / images,
        "start_up": first - skip * total,
    }


class Race:
    """Times the epochs of a trainer, and keeps what the reward says of their pictures.

    Args:
        reward (`Callable`): `(images, prompts, metadata) -> (rewards, {"exact": list of bool})`. The trainer is given [`Race.judge`] in its place.
        clock (`Callable`): CPU-seconds.
    """

    def __init__(self, reward: Callable[..., tuple[Any, dict[str, Any]]], clock: Callable[[], float] = cpu_seconds):
        self.reward, self.clock = reward, clock
        self.curve: list[dict[str, Any]] = []
        self._verdicts: list[bool] = []
        self._epoch: tuple[list[float], list[bool]] = ([], [])  # rewards and verdicts of the running epoch
        self._spent = 0.0  # by the finished epochs
        self._begun = self._sampled_at = 0.0

    def judge(self, images: Any, prompts: Sequence[str], metadata: Any) -> tuple[Any, dict[str, Any]]:
        rewards, info = self.reward(images, prompts, metadata)
        self._epoch[0].extend(rewards.tolist())
        self._epoch[1].extend(info["exact"])
        return rewards, info

    def run(self, step: Callable[[int, int], int], epochs: int, stop_at: float | None) -> None:
        """Calls `step(epoch, optimizer_steps) -> optimizer_steps`, as both trainers' `train` does, until `epochs` are done or the last pictures are right in a
        share of `stop_at`. The epoch that gets there is finished, for its pictures are known before its update."""
        steps = 0
        for epoch in range(epochs):
            self._begun = self.clock()
            steps = step(epoch, steps)
            self._finished(epoch, steps)
            share = self.curve[-1]["exact_window"]
            if stop_at is not None and share is not None and share >= stop_at:
                return

    def sampled(self) -> None:
        """To be called once an epoch, when its pictures have been drawn and scored."""
        self._sampled_at = self.clock()

    def _finished(self, epoch: int, optimizer_steps: int) -> None:
        """A point: images and CPU-seconds are those at which its pictures were known, before the update on them."""
        rewards, verdicts = self._epoch
        self._epoch = ([], [])
        self._verdicts += verdicts
        sample, update = self._sampled_at - self._begun, self.clock() - self._sampled_at
        self.curve.append(
            {
                "epoch": epoch,
                "images": len(self._verdicts),
                "cpu_s": self._spent + sample,
                "reward_mean": sum(rewards) / len(rewards),
                "exact_mean": sum(verdicts) / len(verdicts),
                "exact_window": last_mean(self._verdicts, WINDOW),
                "sample_cpu_s": sample,
                "update_cpu_s": update,
                "optimizer_steps": optimizer_steps,
            }
        )
        self._spent += sample + update

    def result(
        self,
        package: str,
        settings: CommonSettings,
        trainable: Sequence[Any],
        memory: float,
        final: dict[str, float] | None,
    ) -> dict[str, Any]:
        """Of a whole run.

        Args:
            package (`str`): That of the trainer, as pip knows it.
            trainable (`Sequence[torch.nn.Parameter]`)
            memory (`float`): Its peak when the training was done, in MiB.
            final (`dict`, *optional*): Of `evaluate`.
        """
        packages = (package, "torch", "diffusers", "transformers", "peft", "accelerate")
        return {
            "settings": asdict(settings),
            "versions": {name: version(name) for name in packages},
            "curve": self.curve,
            **finish(self.curve),
            "final": final,
            "trainable_parameters": sum(parameter.numel() for parameter in trainable),
            "peak_rss_mb": memory,
        }
