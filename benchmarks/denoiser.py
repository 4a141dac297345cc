"""The bare denoiser of the embedded pipeline, with the adapter of the demo: what batch size and `torch.compile` can give.

    python benchmarks/denoiser.py [--batch 16 32 64 128] [--compile] [--threads 1] [--repeats 7] [--clock cpu] [--quick]

Per row of the batch: a forward pass without gradients, one with the adapter off (the reference of the KL), and a forward and backward pass. With `--compile` the same network
compiled, timed in turn with the eager one: three graphs for each batch size, which take minutes. A table in Markdown is printed, medians.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator

import torch
from flags import CLOCKS, make_parser
from torch import nn

from dpok_trl.demo import load_demo_pipeline
from dpok_trl.demo.command import demo_lora_config
from dpok_trl.policy.lora import adapters_disabled, prepare_adapter


HEADER = """\
| network | batch | forward, ms a row | reference, ms a row | forward and backward, ms a row |
|---|--:|--:|--:|--:|"""


def passes(network: nn.Module, batch: int) -> list[Callable[[], None]]:
    """Forward, reference, and forward and backward."""
    size = network.config.sample_size
    latents = torch.randn(batch, network.config.in_channels, size, size)
    text = torch.randn(batch, 16, network.config.cross_attention_dim)
    timestep = torch.tensor(500)

    def run() -> torch.Tensor:
        return network(latents, timestep, encoder_hidden_states=text, return_dict=False)[0]

    @torch.no_grad()
    def forward() -> None:
        run()

    @torch.no_grad()
    def reference() -> None:
        with adapters_disabled([network]):
            run()

    def backward() -> None:
        run().square().sum().backward()
        network.zero_grad()

    return [forward, reference, backward]


def rows(networks: dict[str, nn.Module], batch: int, repeats: int, now: Callable[[], float]) -> Iterator[str]:
    """The rows of a batch size: all networks in turn."""
    todo = {name: passes(network, batch) for name, network in networks.items()}
    seconds: dict[str, list[list[float]]] = {name: [[], [], []] for name in networks}
    for _ in range(2 + repeats):  # the first two warm up
        for name, functions in todo.items():
            for function, taken in zip(functions, seconds[name], strict=True):
                started = now()
                function()
                taken.append(now() - started)
    for name, columns in seconds.items():
        cells = [f"{1000 * statistics.median(column[2:]) / batch:.3f}" for column in columns]
        yield "| " + " | ".join([name, str(batch), *cells]) + " |"


def main() -> None:
    parser = make_parser(__doc__, repeats=7, of="passes", quick="one small batch, eager")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--compile", action="store_true", help="the compiled network too")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.batch, arguments.compile, arguments.repeats = [2], False, 1
    torch.set_num_threads(arguments.threads)
    network = load_demo_pipeline().unet
    prepare_adapter(network, demo_lora_config())
    networks = {"eager": network}
    if arguments.compile:
        networks["compiled"] = copy.deepcopy(network)
        networks["compiled"].compile(dynamic=False)
    print(HEADER, flush=True)
    for batch in arguments.batch:
        for line in rows(networks, batch, arguments.repeats, CLOCKS[arguments.clock]):
            print(line, flush=True)


if __name__ == "__main__":
    main()
