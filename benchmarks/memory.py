"""Peak memory of training against the number of denoising steps, with and without gradient checkpointing.

    python benchmarks/memory.py [--steps 10 25 50] [--batch 1] [--size 32] [--channels 128 256] [--threads 1] [--repeats 3] [--device cpu] [--quick]

Each line is a process of its own: a rollout, then replay and backward pass of every stochastic step, one step at a time, on a Stable Diffusion
with a random UNet. On a CPU the peak is that of the process (`ru_maxrss`), with Python and the libraries in it; on a GPU it is what torch
allocated. The latents are what a longer trajectory adds. A table in Markdown is printed, with medians and the range.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from flags import make_parser


HEADER = """\
| steps | gradient checkpointing | peak, MiB | range | stored latents, MiB |
|--:|---|--:|--:|--:|"""
MIB = 2**20


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """The peak of this process and the size of the stored latents, in MiB."""
    sys.path[:0] = [str(Path(__file__).parent.parent / "tools")]  # the small parts around the UNet
    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from zoo import build
    from zoo.stable_diffusion import unet

    from dpok_trl.policy.policy import Policy
    from dpok_trl.policy.tuning import tune

    torch.set_num_threads(arguments.threads)
    diffusers_logging.set_verbosity_error()
    network = unet(
        block_out_channels=tuple(arguments.channels),
        layers_per_block=2,
        sample_size=arguments.size,
        norm_num_groups=32,
    )
    pipe = build(StableDiffusionPipeline, unet=network).to(arguments.device)
    if arguments.checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    pixels = arguments.size * pipe.vae_scale_factor
    call = {
        "num_inference_steps": arguments.steps[0],
        "guidance_scale": 5.0,
        "height": pixels,
        "width": pixels,
    }
    policy = Policy(pipe, tune(pipe, {"unet": pipe.unet}), call_kwargs=call)
    trajectory = policy.rollout(["a cat"] * arguments.batch, list(range(arguments.batch)))
    for step in trajectory.steps:
        (replayed,) = policy(trajectory, steps=[step])
        replayed.log_prob.sum().backward()
    if arguments.device == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    else:
        peak = torch.cuda.max_memory_allocated(arguments.device)
    stored = {
        latents.data_ptr(): latents.nbytes for latents in [*trajectory.latents, *trajectory.next_latents]
    }  # the two share tensors
    return {"peak": peak / MIB, "stored": sum(stored.values()) / MIB}


def in_a_process(arguments: argparse.Namespace, steps: int, checkpointing: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", "--steps", str(steps)]
    for name in ("batch", "size", "threads", "device"):
        command += [f"--{name}", str(getattr(arguments, name))]
    command += ["--channels", *map(str, arguments.channels)] + ["--checkpointing"] * checkpointing
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = make_parser(
        __doc__, repeats=3, of="processes", quick="one short trajectory of a tiny network", clock=False
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 25, 50], help="lengths of the trajectory")
    parser.add_argument("--batch", type=int, default=1, help="images")
    parser.add_argument("--size", type=int, default=32, help="of the latents")
    parser.add_argument("--channels", type=int, nargs=2, default=[128, 256], help="of the UNet's two blocks")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # one line, in this process
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments)))
        return
    if arguments.quick:
        arguments.steps, arguments.repeats = [2], 1
        arguments.size, arguments.channels = 8, [32, 32]
    print(HEADER, flush=True)
    for checkpointing in (False, True)[: 1 if arguments.quick else 2]:
        for steps in arguments.steps:
            results = [in_a_process(arguments, steps, checkpointing) for _ in range(arguments.repeats)]
            peaks = [result["peak"] for result in results]
            print(
                f"| {steps} | {'yes' if checkpointing else 'no'} | {statistics.median(peaks):.0f} | {min(peaks):.0f} to {max(peaks):.0f} | "
                f"{results[0]['stored']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
