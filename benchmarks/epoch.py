"""Where the time of an epoch goes, part by part, and how much the package adds to the bare network calls in its rollout, its update, and all of it.

    python benchmarks/epoch.py [--threads 1] [--repeats 7] [--clock cpu] [--compile] [--no-kl] [--quick]

Two pipelines: the embedded one with the preset `demo` (64 images, 10 steps, guidance 1), and a Stable Diffusion with a random UNet of (64, 128) channels
(8 images, 10 steps, guidance 5). Whole epochs are measured, `DPOKTrainer.step`, and after each one the same network calls by themselves: as many forward and
backward passes, on the arguments that the epoch gave. Time counts for the innermost part only, so the parts add up to the epoch; the last three rows of a pipeline are
sums of parts. A table in Markdown is printed: medians over the epochs, after two that warm up, of the ratios of ours to the bare network too, with the smallest and the
largest of them.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from flags import CLOCKS, make_parser

from dpok_trl import DPOKConfig, DPOKTrainer
from dpok_trl.demo import load_demo_pipeline
from dpok_trl.demo.command import demo_lora_config


HEADER = """\
| pipeline | part | ms an epoch | share | calls | bare network, ms | ratio | smallest to largest |
|---|---|--:|--:|--:|--:|--:|--:|"""

TEXT, DECODING, REWARD, OPTIMIZER = "text encoder", "decoding of images", "reward", "optimizer"
ROLLOUT, REFERENCE, FORWARD, BACKWARD = (
    "denoiser in rollouts",
    "denoiser for the reference",
    "denoiser in replays, forward",
    "denoiser in replays, backward",
)
NETWORK = (ROLLOUT, REFERENCE, FORWARD, BACKWARD)
# What is not the network's is ours or the pipeline's.
ROLLOUT_LOOP, REPLAY_LOOP, UPDATE, REST = (
    "rollout: pipeline's loop, noise, log-probabilities",
    "replay: pipeline's loop, log-probabilities",
    "update: transitions, loss, KL",
    "rest: prompts, advantages, logs",
)
# In the order of an epoch.
PARTS = (
    TEXT,
    ROLLOUT,
    ROLLOUT_LOOP,
    DECODING,
    REWARD,
    REFERENCE,
    FORWARD,
    REPLAY_LOOP,
    BACKWARD,
    OPTIMIZER,
    UPDATE,
    REST,
)
SUMS = {
    "**rollout, without decoding**": (TEXT, ROLLOUT, ROLLOUT_LOOP),
    "**update**": (REFERENCE, FORWARD, REPLAY_LOOP, BACKWARD, OPTIMIZER, UPDATE),
    "**epoch**": PARTS,
}


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
    parts.watch(pipe.text_encoder, "forward", TEXT)
    parts.watch(pipe.vae, "decode", DECODING)
    parts.watch(pipe.image_processor, "postprocess", DECODING)
    parts.watch(trainer.policy, "rollout", ROLLOUT_LOOP)
    parts.watch(trainer.policy, "forward", REPLAY_LOOP)
    parts.watch(trainer.accelerator, "backward", BACKWARD)
    parts.watch(trainer.scoring, "begin", REWARD)
    parts.watch(trainer.scoring, "finish", REWARD)
    parts.watch(trainer.accelerator, "clip_grad_norm_", OPTIMIZER)
    for method in ("step", "zero_grad"):
        parts.watch(trainer.optimizer, method, OPTIMIZER)
    parts.watch(trainer.scoring, "gather", REST)
    for method in ("sample", "advantages", "_log"):
        parts.watch(trainer, method, REST)
    parts.watch(trainer, "step", UPDATE)  # what an epoch does and is not counted above: nothing of an update is missed
    return Denoiser(trainer, parts)


def demo_trainer(folder: str, **settings: Any) -> DPOKTrainer:
    """The preset `demo` on the embedded pipeline, without what it writes."""
    config = DPOKConfig.preset("demo", **{"output_dir": folder, "save_freq": 0, "sample_grid_freq": 0, **settings})
    prompts = ["a green triangle"]
    return DPOKTrainer(config, "demo-soft", prompts, load_demo_pipeline(), peft_config=demo_lora_config())


def larger_pipeline() -> StableDiffusionPipeline:
    """The embedded pipeline with a random UNet of (64, 128) channels on 16x16 latents."""
    pipe = load_demo_pipeline()
    config = {**pipe.unet.config, "block_out_channels": (64, 128), "sample_size": 16, "norm_num_groups": 16}
    unet = UNet2DConditionModel.from_config(config).eval()
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return StableDiffusionPipeline(
        **{**pipe.components, "unet": unet, "scheduler": scheduler}, requires_safety_checker=False
    )


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


def measure(
    trainer: DPOKTrainer, repeats: int, now: Callable[[], float]
) -> tuple[list[dict[str, float]], list[dict[str, float]], dict[str, int]]:
    """Seconds of the parts of each epoch, seconds of the bare network calls after it, and how often an epoch does each part."""
    parts = Parts(now)
    denoiser = watch(trainer, parts)
    epochs, bare = [], []
    step = 0
    for epoch in range(2 + repeats):  # the first checks the ratio, and compiles
        denoiser.count.clear()
        parts.take()
        step = trainer.step(epoch, step)
        seconds, calls = parts.take()
        epochs.append(seconds)
        bare.append(denoiser.bare_epoch(now))
    return epochs[2:], bare[2:], calls


def against(ours: Sequence[float], bare: Sequence[float]) -> list[str]:
    """The cells of a comparison: the bare network's median, the median of the ratios, and the smallest and the largest of them."""
    ratios = [one / other for one, other in zip(ours, bare, strict=True)]
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    return [f"{1000 * statistics.median(bare):.1f}", f"{statistics.median(ratios):.3f}", spread]


def table(
    title: str,
    epochs: Sequence[Mapping[str, float]],
    bare: Sequence[Mapping[str, float]],
    calls: Mapping[str, int],
) -> Iterator[str]:
    """The rows of a pipeline, of what [`measure`] gave."""
    for name, parts in ({part: (part,) for part in PARTS} | SUMS).items():
        ours = [sum(one.get(part, 0.0) for part in parts) for one in epochs]
        share = statistics.median(one / sum(epoch.values()) for one, epoch in zip(ours, epochs, strict=True))
        count = "" if name in SUMS else str(calls.get(name, 0))
        cells = [title, name, f"{1000 * statistics.median(ours):.1f}", f"{100 * share:.1f} %", count]
        network = [part for part in parts if part in NETWORK and calls.get(part)]
        cells += against(ours, [sum(one[part] for part in network) for one in bare]) if network else [""] * 3
        yield "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = make_parser(__doc__, repeats=7, of="epochs", quick="one epoch of two steps")
    parser.add_argument("--compile", action="store_true", help="with torch_compile (minutes to compile)")
    parser.add_argument("--no-kl", action="store_true", help="without the reference: kl_weight = 0")
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
    for name, make in TRAINERS.items():
        with tempfile.TemporaryDirectory() as folder:
            trainer = make(folder, **settings)
            title = f"{name}, batch {trainer.config.sample_batch_size}"
            for line in table(title, *measure(trainer, arguments.repeats, CLOCKS[arguments.clock])):
                print(line, flush=True)


if __name__ == "__main__":
    main()
