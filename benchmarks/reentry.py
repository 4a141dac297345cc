"""What it costs to enter a pipeline again: the replay of one step against the bare network calls of that step.

    python benchmarks/reentry.py [--families sd flux ...] [--sd15] [--steps 50] [--repeats 15] [--threads 1] [--clock cpu] [--quick]

A replay walks the pipeline's whole loop and runs the network in the selected step only. Here it is the last stochastic one, so that all steps
are walked. Timed in turn, at batch 1 and without gradients, are

* the replay;
* the network: the same calls of it, with the arguments that the replay gave it;
* the loop: the replay once more, with the network's recorded answers in place of the network.

What the replay takes longer than the network is the overhead: the pipeline's own loop, drawing x_T, guidance, the scheduler, the log-probability.
The time of the loop alone is the same thing, without the noise of the network's time.

Families are those of tests/pipelines/families.py, with tiny random networks; `--sd15` adds a UNet of the size of Stable Diffusion 1.5 on 64x64
latents. A table in Markdown is printed: medians, and of the loop's time the quartiles as well.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from flags import CLOCKS, make_parser


REPOSITORY = Path(__file__).parent.parent
sys.path[:0] = [str(REPOSITORY / "tests"), str(REPOSITORY / "tools")]  # the tiny pipelines

from pipelines.families import FAMILIES  # noqa: E402
from zoo import build  # noqa: E402
from zoo.stable_diffusion import WIDTH, autoencoder_kl  # noqa: E402

from dpok_trl.policy.hooks import PipelineHooks  # noqa: E402
from dpok_trl.policy.policy import Policy  # noqa: E402
from dpok_trl.policy.tuning import tune  # noqa: E402


HEADER = """\
| pipeline | steps walked | network, ms | replay less network, ms | loop alone, ms | quartiles | loop / network |
|---|--:|--:|--:|--:|--:|--:|"""


def sd15_sized_pipeline() -> StableDiffusionPipeline:
    """The UNet of Stable Diffusion 1.5 (860 million parameters) with random weights, between small parts."""
    unet = UNet2DConditionModel(
        sample_size=64, cross_attention_dim=WIDTH, block_out_channels=(320, 640, 1280, 1280), attention_head_dim=8
    )
    # the factor of 8 between pixels and latents takes four blocks
    vae = autoencoder_kl(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    return build(StableDiffusionPipeline, unet=unet, vae=vae)


def zeros(sample: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
    """In place of a UNet's forward: 50 steps of a large one would take minutes, and what the latents hold does not change the time."""
    return (torch.zeros_like(sample),)


class Recorded:
    """The calls of networks within a block, and their answers: both can be had again.

    Args:
        networks (`list[torch.nn.Module]`)
    """

    def __init__(self, networks: list[torch.nn.Module]):
        self.networks = networks
        self.calls: list[Callable[[], Any]] = []
        self.answers: list[Any] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        def listen(module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            self.calls.append(lambda: module(*args, **kwargs))
            self.answers.append(output)

        handles = [network.register_forward_hook(listen, with_kwargs=True) for network in self.networks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self) -> None:
        for call in self.calls:
            call()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Within it the networks give their recorded answers, in turn, and do nothing."""
        answers = cycle(self.answers)
        for network in self.networks:
            network.forward = lambda *args, **kwargs: next(answers)
        try:
            yield
        finally:
            for network in self.networks:
                del network.forward


def milliseconds(function: Callable[[], Any], clock: Callable[[], float]) -> float:
    started = clock()
    function()
    return 1000 * (clock() - started)


@torch.no_grad()
def row(
    name: str,
    pipe: DiffusionPipeline,
    call: dict[str, Any],
    repeats: int,
    clock: Callable[[], float],
    zero_rollout: bool = False,
) -> str:
    """The row of a pipeline, at batch 1."""
    tuned = tune(pipe, PipelineHooks().denoisers(pipe))
    policy = Policy(pipe, tuned, call_kwargs=call)
    networks = list(tuned.denoisers.values())
    if zero_rollout:
        networks[0].forward = zeros
    trajectory = policy.rollout(["a cat"], [0])
    if zero_rollout:
        del networks[0].forward
    last = [trajectory.steps[-1]]
    recorded = Recorded(networks)
    with recorded.listening():
        policy(trajectory, steps=last)  # warms up too
    columns: dict[str, list[float]] = {"network": [], "replay": [], "loop": []}
    for _ in range(repeats):
        columns["network"].append(milliseconds(recorded.run, clock))
        columns["replay"].append(milliseconds(lambda: policy(trajectory, steps=last), clock))
        with recorded.answering():
            columns["loop"].append(milliseconds(lambda: policy(trajectory, steps=last), clock))
    network = statistics.median(columns["network"])
    difference = statistics.median(
        replay - bare for bare, replay in zip(columns["network"], columns["replay"], strict=True)
    )
    low, loop, high = statistics.quantiles(columns["loop"], n=4)
    return (
        f"| {name} | {len(trajectory.latents) - 1} | {network:.2f} | {difference:.2f} | {loop:.2f} | {low:.2f} to {high:.2f} | "
        f"{100 * loop / network:.3g} % |"
    )


def main() -> None:
    parser = make_parser(__doc__, repeats=15, of="measurements, 2 or more,", quick="one family, three measurements")
    parser.add_argument("--families", nargs="*", choices=list(FAMILIES), default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument(
        "--sd15", action="store_true", help="a UNet of the size of Stable Diffusion 1.5 as well (5 GB)"
    )
    parser.add_argument("--steps", type=int, default=50, help="of the loop")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.families, arguments.repeats = ["sd"], 3
    torch.set_num_threads(arguments.threads)
    diffusers_logging.set_verbosity_error()
    clock = CLOCKS[arguments.clock]
    print(HEADER, flush=True)
    for name in arguments.families:
        family = FAMILIES[name]
        pipe = family.pipe()
        call = {**family.call(pipe), "num_inference_steps": arguments.steps}
        print(row(f"{name} (tiny)", pipe, call, arguments.repeats, clock), flush=True)
    if arguments.sd15:
        pipe = sd15_sized_pipeline()
        call = {"num_inference_steps": arguments.steps, "guidance_scale": 1.0, "height": 512, "width": 512}
        few = max(2, arguments.repeats // 3)  # a call takes seconds
        print(row("SD 1.5 size, unguided", pipe, call, few, clock, zero_rollout=True), flush=True)


if __name__ == "__main__":
    main()
