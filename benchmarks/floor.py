"""Rollout and update against the bare denoiser calls that they contain: how much the package adds to the network's own time.

    python benchmarks/floor.py [--threads 2] [--repeats 5] [--clock cpu] [--quick]

Both sides run in one process, in turn, with the same batch shapes and the same number of forward and backward passes; the medians of
their ratios are printed, as a table in Markdown. Decoding of images and rewards is left out on both sides, everything else of ours is in: the pipeline's own
loop, text, noise, log-probabilities, loss, KL, gradient clipping, optimizer.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from dpok_trl import DPOKConfig, DPOKTrainer
from dpok_trl.demo import load_demo_pipeline
from dpok_trl.policy.lora import adapters_disabled
from dpok_trl.training.batches import SampledBatch


def larger_pipeline() -> StableDiffusionPipeline:
    """The embedded pipeline with a random UNet of (64, 128) channels on 16x16 latents."""
    pipe = load_demo_pipeline()
    config = {**pipe.unet.config, "block_out_channels": (64, 128), "sample_size": 16, "norm_num_groups": 16}
    unet = UNet2DConditionModel.from_config(config).eval()
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return StableDiffusionPipeline(
        **{**pipe.components, "unet": unet, "scheduler": scheduler}, requires_safety_checker=False
    )


def make_trainer(pipe: StableDiffusionPipeline, batch: int, guidance: float, steps: int, folder: str) -> DPOKTrainer:
    config = DPOKConfig(
        output_dir=folder,
        sample_num_steps=steps,
        sample_guidance_scale=guidance,
        sample_batch_size=batch,
        sample_num_batches_per_epoch=1,
        train_batch_size=batch,
        train_timesteps_per_update=2,
        kl_weight=0.02,
    )
    return DPOKTrainer(config, lambda images, prompts, metadata: images.mean((1, 2, 3)), ["a green triangle"], pipe)


HEADER = """\
| pipeline | batch | steps | guidance | part | ours, ms | bare network, ms | ratio | smallest to largest |
|---|--:|--:|--:|---|--:|--:|--:|--:|"""

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Clock:
    """Seconds of `now` without what is paused."""

    def __init__(self, now: Callable[[], float]):
        self.now = now
        self.paused = 0.0

    def pause_in(self, owner: object, name: str) -> None:
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            started = self.now()
            result = function(*args, **kwargs)
            self.paused += self.now() - started
            return result

        setattr(owner, name, timed)

    def __call__(self, function: Callable[[], object]) -> float:
        self.paused = 0.0
        started = self.now()
        function()
        return self.now() - started - self.paused


def compare(
    title: str,
    pipe: StableDiffusionPipeline,
    batch: int,
    guidance: float,
    steps: int,
    repeats: int,
    now: Callable[[], float],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(pipe, batch, guidance, steps, folder)
        unet, policy = pipe.unet, trainer.policy
        rows = batch * (2 if guidance > 1 else 1)
        size = unet.config.sample_size
        latents = torch.randn(rows, unet.config.in_channels, size, size)
        text = torch.randn(rows, 16, unet.config.cross_attention_dim)
        timestep = torch.tensor(500)

        def bare(count: int = 1) -> None:
            for _ in range(count):
                unet(latents, timestep, encoder_hidden_states=text, return_dict=False)

        @torch.no_grad()
        def bare_rollout() -> None:
            bare(steps)

        def bare_update() -> None:  # the trained steps: forward and backward; and the reference's forward
            with torch.no_grad(), adapters_disabled([unet]):
                bare(steps)
            for _ in range(steps):
                unet(latents, timestep, encoder_hidden_states=text, return_dict=False)[0].sum().backward()

        clock = Clock(now)
        clock.pause_in(pipe.vae, "decode")
        clock.pause_in(pipe.image_processor, "postprocess")
        prompts = ["a green triangle"] * batch
        trajectory = policy.rollout(prompts, list(range(batch)))
        trainer.experience.ratio_checked = True

        def update() -> None:
            batches = [_sampled(trajectory)]
            trainer.experience.add(0, batches, torch.randn(batch))
            for transitions in trainer._updates(0, 0):
                trainer._update(transitions)

        results = {"rollout": [], "update": []}
        for _ in range(repeats + 1):
            floor = clock(bare_rollout)
            results["rollout"].append((clock(lambda: policy.rollout(prompts, list(range(batch)))), floor))
            floor = clock(bare_update)
            results["update"].append((clock(update), floor))
        for name, pairs in results.items():
            pairs = pairs[1:]  # the first round warms up
            ours, floor = (1000 * statistics.median(column) for column in zip(*pairs, strict=True))
            ratios = sorted(a / b for a, b in pairs)
            print(
                f"| {title} | {batch} | {steps} | {guidance:g} | {name} | {ours:.1f} | {floor:.1f} | {statistics.median(ratios):.3f} | "
                f"{ratios[0]:.3f} to {ratios[-1]:.3f} |",
                flush=True,
            )


def _sampled(trajectory):
    return SampledBatch(trajectory, (None,) * len(trajectory))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of which the median is taken")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: time of this process alone, for a machine that others use too",
    )
    parser.add_argument("--quick", action="store_true", help="one round of two steps: does it run?")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    settings = {"steps": 10, "repeats": arguments.repeats, "now": CLOCKS[arguments.clock]}
    batches = 8, 64
    if arguments.quick:
        settings.update(steps=2, repeats=1)
        batches = 2, 2
    print(HEADER, flush=True)
    compare("SD with UNet (64, 128)", larger_pipeline(), batch=batches[0], guidance=5.0, **settings)
    compare("demo pipeline", load_demo_pipeline(), batch=batches[1], guidance=1.0, **settings)


if __name__ == "__main__":
    main()
