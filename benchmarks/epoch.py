"""Where the time of an epoch goes, part by part, and the bare network calls that it contains.

    python benchmarks/epoch.py [--threads 1] [--repeats 5] [--clock cpu] [--compile] [--quick]

Two pipelines: the embedded one with the preset `demo` (64 images, 10 steps, guidance 1), and a Stable Diffusion with a random UNet of (64, 128) channels
(8 images, 10 steps, guidance 5). Whole epochs are measured, `DPOKTrainer.step`, and after each one the same network calls by themselves: as many forward and
backward passes, on the arguments that the epoch gave. Time counts for the innermost part only, so the parts add up to the epoch. A table in Markdown is printed:
medians over the epochs, after two that warm up.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from floor import CLOCKS, larger_pipeline

from dpok_trl import DPOKConfig, DPOKTrainer
from dpok_trl.demo import load_demo_pipeline
from dpok_trl.demo.command import demo_lora_config


HEADER = """\
| pipeline | part | ms an epoch | share | calls | bare network, ms | ratio |
|---|---|--:|--:|--:|--:|--:|"""

ROLLOUT, REFERENCE, FORWARD, BACKWARD = (
    "denoiser in rollouts",
    "denoiser for the reference",
    "denoiser in replays, forward",
    "denoiser in replays, backward",
)
NETWORK = (ROLLOUT, REFERENCE, FORWARD, BACKWARD)
# In the order of an epoch. What is not the network's is ours or the pipeline's.
PARTS = (
    "text encoder",
    ROLLOUT,
    "rollout: pipeline's loop, noise, log-probabilities",
    "VAE decoder",
    "reward",
    REFERENCE,
    FORWARD,
    "replay: pipeline's loop, log-probabilities",
    BACKWARD,
    "optimizer",
    "rest",
)
_ROLLOUT_LOOP, _REPLAY_LOOP = PARTS[2], PARTS[7]


class Parts:
    """Seconds of the parts of a program, each without the parts inside it."""

    def __init__(self, now: Callable[[], float]):
        self.now = now
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._inner: list[float] = []  # for each part in progress, the time of what is inside it

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = self.now()
        self._inner.append(0.0)
        try:
            yield
        finally:
            passed = self.now() - started
            self.seconds[name] += passed - self._inner.pop()
            self.calls[name] += 1
            if self._inner:
                self._inner[-1] += passed

    def watch(self, owner: Any, method: str, name: str | Callable[[], str]) -> None:
        """Lets the calls of a method count for a part, or for the one that a function names at the time of the call."""
        function = getattr(owner, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.part(name if isinstance(name, str) else name()):
                return function(*args, **kwargs)

        setattr(owner, method, watched)

    def take(self) -> tuple[dict[str, float], dict[str, int]]:
        """What was counted since the last time."""
        taken = dict(self.seconds), dict(self.calls)
        self.seconds.clear()
        self.calls.clear()
        return taken


class Denoiser:
    """The calls of a trainer's denoiser: which part each is, and how to do it again by itself.

    It is counted before the network, as a call of the module, so that a compiled one is the compiled one here too.
    """

    def __init__(self, trainer: DPOKTrainer, parts: Parts):
        self.trainer, self.parts = trainer, parts
        (self.name,) = trainer.tuned.denoisers
        self.arguments: dict[str, tuple[tuple, dict]] = {}
        self.count: dict[str, int] = defaultdict(int)
        self._reference = False
        networks = trainer.policy._networks
        reference = trainer.policy.reference
        trainer.policy._networks = lambda recording=None: _Watched(networks(recording), self)

        @contextmanager
        def watched_reference() -> Iterator[None]:
            with reference():
                self._reference = True
                try:
                    yield
                finally:
                    self._reference = False

        trainer.policy.reference = watched_reference

    def call(self, run: Callable[[str, tuple, dict], Any], name: str, args: tuple, kwargs: dict) -> Any:
        kind = FORWARD if torch.is_grad_enabled() else REFERENCE if self._reference else ROLLOUT
        self.arguments[kind] = args, kwargs
        self.count[kind] += 1
        with self.parts.part(kind):
            return run(name, args, kwargs)

    def bare(self, kind: str) -> Any:
        """One call on the arguments of the last one of its kind."""
        args, kwargs = self.arguments[kind]
        return self.trainer.tuned.denoisers[self.name](*args, **kwargs)[0]

    def bare_epoch(self, now: Callable[[], float]) -> dict[str, float]:
        """Seconds of all network calls of an epoch, by themselves."""
        seconds = dict.fromkeys(NETWORK, 0.0)
        with torch.no_grad():
            for _ in range(self.count[ROLLOUT]):
                started = now()
                self.bare(ROLLOUT)
                seconds[ROLLOUT] += now() - started
            with self.trainer.tuned.reference_answers():
                for _ in range(self.count[REFERENCE]):
                    started = now()
                    self.bare(REFERENCE)
                    seconds[REFERENCE] += now() - started
        for _ in range(self.count[FORWARD]):
            started = now()
            output = self.bare(FORWARD).sum()
            middle = now()
            output.backward()
            seconds[FORWARD] += middle - started
            seconds[BACKWARD] += now() - middle
        self.trainer.optimizer.zero_grad()
        return seconds


class _Watched:
    """The networks of a policy, whose denoisers' calls are counted."""

    def __init__(self, networks: Any, denoiser: Denoiser):
        self._networks, self._denoiser = networks, denoiser

    def run(self, name: str, args: tuple, kwargs: dict) -> Any:
        return self._denoiser.call(self._networks.run, name, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._networks, name)


def watch(trainer: DPOKTrainer, parts: Parts) -> Denoiser:
    """Lets an epoch of `trainer` be counted in `parts`."""
    pipe = trainer.pipeline
    parts.watch(pipe.text_encoder, "forward", "text encoder")
    parts.watch(pipe.vae, "decode", "VAE decoder")
    parts.watch(trainer.policy, "rollout", _ROLLOUT_LOOP)
    parts.watch(trainer.policy, "forward", _REPLAY_LOOP)
    parts.watch(trainer.accelerator, "backward", BACKWARD)
    parts.watch(trainer.scoring, "begin", "reward")
    parts.watch(trainer.scoring, "finish", "reward")
    parts.watch(trainer.accelerator, "clip_grad_norm_", "optimizer")
    for method in ("step", "zero_grad"):
        parts.watch(trainer.optimizer, method, "optimizer")
    parts.watch(trainer, "step", "rest")
    return Denoiser(trainer, parts)


def demo_trainer(folder: str, **settings: Any) -> DPOKTrainer:
    """The preset `demo` on the embedded pipeline, without what it writes."""
    config = DPOKConfig.preset("demo", **{"output_dir": folder, "save_freq": 0, "sample_grid_freq": 0, **settings})
    prompts = ["a green triangle"]
    return DPOKTrainer(config, "demo-soft", prompts, load_demo_pipeline(), peft_config=demo_lora_config())


def larger_trainer(folder: str, **settings: Any) -> DPOKTrainer:
    """Guided, on the pipeline with the larger UNet."""
    config = DPOKConfig(
        **{
            "output_dir": folder,
            "save_freq": 0,
            "sample_grid_freq": 0,
            "sample_num_steps": 10,
            "sample_guidance_scale": 5.0,
            "sample_batch_size": 8,
            "sample_num_batches_per_epoch": 1,
            "train_batch_size": 8,
            "train_timesteps_per_update": 2,
            "kl_weight": 0.02,
            **settings,
        }
    )
    return DPOKTrainer(config, "demo-soft", ["a green triangle"], larger_pipeline())


TRAINERS = {"demo": demo_trainer, "SD (64, 128)": larger_trainer}


def rows(title: str, trainer: DPOKTrainer, repeats: int, now: Callable[[], float]) -> Iterator[str]:
    """The rows of a pipeline."""
    parts = Parts(now)
    denoiser = watch(trainer, parts)
    epochs: list[dict[str, float]] = []
    bare: list[dict[str, float]] = []
    step = 0
    for epoch in range(2 + repeats):  # the first checks the ratio, and compiles
        denoiser.count.clear()
        parts.take()
        step = trainer.step(epoch, step)
        seconds, calls = parts.take()
        epochs.append(seconds)
        bare.append(denoiser.bare_epoch(now))
    epochs, bare = epochs[2:], bare[2:]

    def row(part: str, ours: list[float], floor: list[float] | None, count: int | str) -> str:
        share = statistics.median(one / sum(epoch.values()) for one, epoch in zip(ours, epochs, strict=True))
        cells = [title, part, f"{1000 * statistics.median(ours):.1f}", f"{100 * share:.1f} %", str(count)]
        if floor is None:
            return "| " + " | ".join([*cells, "", ""]) + " |"
        ratio = statistics.median(one / other for one, other in zip(ours, floor, strict=True))
        return "| " + " | ".join([*cells, f"{1000 * statistics.median(floor):.1f}", f"{ratio:.3f}"]) + " |"

    for part in PARTS:
        floor = [one[part] for one in bare] if part in NETWORK and calls.get(part) else None
        yield row(part, [one.get(part, 0.0) for one in epochs], floor, calls.get(part, 0))
    sampling = [sum(one.get(part, 0.0) for part in (ROLLOUT, _ROLLOUT_LOOP)) for one in epochs]
    yield row("**rollout, without text and decoding**", sampling, [one[ROLLOUT] for one in bare], "")
    updating = (REFERENCE, FORWARD, BACKWARD, _REPLAY_LOOP, "optimizer", "rest")
    ours = [sum(one.get(part, 0.0) for part in updating) for one in epochs]
    yield row("**update, with the rest**", ours, [sum(one[part] for part in updating[:3]) for one in bare], "")
    yield row("**epoch**", [sum(one.values()) for one in epochs], [sum(one.values()) for one in bare], "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--repeats", type=int, default=5, help="epochs of which the median is taken")
    parser.add_argument("--clock", choices=CLOCKS, default="cpu", help="cpu: time of this process alone")
    parser.add_argument("--compile", action="store_true", help="with torch_compile (minutes to compile)")
    parser.add_argument("--no-kl", action="store_true", help="without the reference: kl_weight = 0")
    parser.add_argument("--quick", action="store_true", help="one epoch of two steps: does it run?")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    settings: dict[str, Any] = {"torch_compile": arguments.compile, "accelerator_kwargs": {"cpu": True}}
    if arguments.no_kl:
        settings["kl_weight"] = 0.0
    if arguments.quick:
        settings |= {"sample_num_steps": 2, "sample_batch_size": 4, "train_batch_size": 4}
        arguments.repeats = 1
    print(HEADER, flush=True)
    for title, make in TRAINERS.items():
        with tempfile.TemporaryDirectory() as folder:
            for line in rows(title, make(folder, **settings), arguments.repeats, CLOCKS[arguments.clock]):
                print(line, flush=True)


if __name__ == "__main__":
    main()
