"""Speed and memory on a GPU: pipelines of the shapes of Stable Diffusion 1.5 and SDXL with random weights in bf16, eager and compiled.

    python benchmarks/gpu.py [--shapes sd15 sdxl] [--batch 4] [--steps 10] [--repeats 3] [--no-compile]
    python benchmarks/gpu.py --count        # operations only, on any machine, without weights
    python benchmarks/gpu.py --quick        # a tiny network on the CPU: does it run?

Random weights take the time of trained ones, and need no download. Guided sampling (5.0), a LoRA on the attention projections, the KL to the reference. Measured are

* a rollout, decoding included: images a second;
* an update on what it drew (reference, forward, backward, optimizer): transitions a second, a transition being one image at one step;
* of both the share of the chip's matrix rate: the operations of the network's calls (`torch.utils.flop_counter`: products of matrices, convolutions, attention) over
  the time, against the rate of this chip in a large product of matrices of the same dtype, measured here;
* the peak of the memory that torch has allocated.

A table in Markdown is printed, medians of `--repeats`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from epoch import FORWARD, REFERENCE, ROLLOUT, Denoiser, Parts
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dpok_trl import DPOKConfig, DPOKTrainer
from dpok_trl.training.batches import SampledBatch


sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))  # the tokenizer

from zoo.stable_diffusion import clip_tokenizer


HEADER = """\
| pipeline | network | batch | images/s | TFLOP a rollout | share of matrix rate | transitions/s | TFLOP an update | share of matrix rate | peak memory, GiB |
|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"""

COUNT_HEADER = """\
| shape | parameters, million | latents | TFLOP a forward pass, one row | with text of |
|---|--:|---|--:|--:|"""

TOKENS = 77


@dataclass(frozen=True)
class Shape:
    """What makes a pipeline as large as a known one.

    Args:
        unet (`dict`): Arguments of its UNet that differ from those of Stable Diffusion 1.5, diffusers' defaults.
        widths (`tuple[int, ...]`): Of the text encoders; two make it an SDXL.
        vae (`tuple[int, ...]`): Channels of the decoder's blocks.
        size (`int`): Of the latents.
    """

    unet: dict[str, Any]
    widths: tuple[int, ...]
    vae: tuple[int, ...] = (128, 256, 512, 512)
    size: int = 64

    @property
    def text_width(self) -> int:
        return sum(self.widths)

    def make_unet(self) -> UNet2DConditionModel:
        return UNet2DConditionModel(
            **{"sample_size": self.size, "cross_attention_dim": self.text_width, "attention_head_dim": 8, **self.unet}
        )


SHAPES = {
    "sd15": Shape({}, (768,)),
    "sdxl": Shape(
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 1280 + 6 * 256,  # pooled text, and six numbers on size and crop
        },
        (768, 1280),
        size=128,
    ),
}
QUICK = Shape(
    {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
    },
    (32,),
    vae=(8, 16),
    size=8,
)


def make_pipeline(shape: Shape, device: torch.device, dtype: torch.dtype) -> DiffusionPipeline:
    """With random weights, made on the device."""
    classes = (CLIPTextModel, CLIPTextModelWithProjection)
    with torch.device(device):
        encoders = [
            kind(
                CLIPTextConfig(
                    vocab_size=78,
                    hidden_size=width,
                    intermediate_size=4 * width,
                    num_hidden_layers=2,  # each prompt is encoded once: no part of the time
                    num_attention_heads=max(1, width // 64),
                    max_position_embeddings=TOKENS,
                    projection_dim=width,
                    bos_token_id=76,
                    eos_token_id=77,
                )
            )
            for kind, width in zip(classes, shape.widths, strict=False)
        ]
        vae = AutoencoderKL(
            block_out_channels=shape.vae,
            down_block_types=("DownEncoderBlock2D",) * len(shape.vae),
            up_block_types=("UpDecoderBlock2D",) * len(shape.vae),
            latent_channels=4,
            norm_num_groups=min(32, shape.vae[0]),
            layers_per_block=2,
        )
        parts = {"unet": shape.make_unet(), "vae": vae, "text_encoder": encoders[0]}
    parts = {name: part.to(dtype).eval().requires_grad_(False) for name, part in parts.items()}
    tokenizer = clip_tokenizer()
    tokenizer.model_max_length = TOKENS
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False
    )
    common = {**parts, "tokenizer": tokenizer, "scheduler": scheduler}
    if len(encoders) == 2:
        second = encoders[1].to(dtype).eval().requires_grad_(False)
        return StableDiffusionXLPipeline(**common, text_encoder_2=second, tokenizer_2=tokenizer, add_watermarker=False)
    return StableDiffusionPipeline(
        **common, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def flops(function: Callable[[], Any]) -> int:
    """Operations of a call in products of matrices, convolutions and attention: a multiplication and an addition are two."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def share_of_rate(operations: float, seconds: float, rate: float) -> float:
    """The part of `rate` (operations a second) that was reached."""
    return operations / seconds / rate


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Operations a second in the product of two square matrices: the best of ten."""
    some, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    some @ other  # the first one chooses a kernel
    return 2 * size**3 / min(seconds_of(lambda: some @ other, device) for _ in range(10))


def seconds_of(function: Callable[[], Any], device: torch.device) -> float:
    """Wall time, with what the device still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def make_trainer(pipe: DiffusionPipeline, batch: int, steps: int, folder: str, compiled: bool) -> DPOKTrainer:
    config = DPOKConfig(
        output_dir=folder,
        sample_num_steps=steps,
        sample_guidance_scale=5.0,
        sample_batch_size=batch,
        sample_num_batches_per_epoch=1,
        train_batch_size=batch,
        kl_weight=0.02,
        torch_compile=compiled,
    )
    return DPOKTrainer(config, lambda images, prompts, metadata: images.mean((1, 2, 3)), ["a cat"], pipe)


def seconds_of_a_rollout(trainer: DPOKTrainer, batch: int, device: torch.device) -> float:
    return seconds_of(lambda: trainer.policy.rollout(["a cat"] * batch, list(range(batch))), device)


def seconds_of_an_update(trainer: DPOKTrainer, batch: int, device: torch.device) -> float:
    trajectory = trainer.policy.rollout(["a cat"] * batch, list(range(batch))).without_images()

    def learn() -> None:
        trainer.experience.add(0, [SampledBatch(trajectory, (None,) * batch)], torch.randn(batch))
        for transitions in trainer._updates(0, 0):
            trainer._update(transitions)

    return seconds_of(learn, device)


def rows(name: str, shape: Shape, arguments: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """The rows of a pipeline: eager, then compiled."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rate = matrix_rate(device, dtype, 8192 if device.type == "cuda" else 512)
    pipe = make_pipeline(shape, device, dtype)
    batch, steps = arguments.batch, arguments.steps
    operations: dict[str, int] = {}
    for compiled in (False,) if arguments.no_compile else (False, True):
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(pipe, batch, steps, folder, compiled)
            denoiser = Denoiser(trainer, Parts(time.perf_counter))
            trainer.step(0, 0)  # checks the ratio, warms up, compiles
            if not compiled:  # a compiled network does the same work, and cannot be counted
                operations = operations_of(denoiser, trainer, steps)
                transitions = batch * denoiser.count[FORWARD]  # steps without noise are none
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            repeats = range(arguments.repeats)
            sampling = statistics.median(seconds_of_a_rollout(trainer, batch, device) for _ in repeats)
            training = statistics.median(seconds_of_an_update(trainer, batch, device) for _ in repeats)
            shares = [
                100 * share_of_rate(operations[part], seconds, rate)
                for part, seconds in (("rollout", sampling), ("update", training))
            ]
            peak = (
                f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f}" if device.type == "cuda" else "not on a CPU"
            )
            yield (
                f"| {name} | {'compiled' if compiled else 'eager'} | {batch} | {batch / sampling:.3g} | {operations['rollout'] / 1e12:.3g} | "
                f"{shares[0]:.1f} % | {transitions / training:.3g} | {operations['update'] / 1e12:.3g} | {shares[1]:.1f} % | {peak} |"
            )


def operations_of(denoiser: Denoiser, trainer: DPOKTrainer, steps: int) -> dict[str, int]:
    """Of the network's calls in a rollout and in an update, which replays every stochastic step."""
    with torch.no_grad():
        sampling = flops(lambda: denoiser.bare(ROLLOUT))
        with trainer.policy.reference():
            reference = flops(lambda: denoiser.bare(REFERENCE))
    training = flops(lambda: denoiser.bare(FORWARD).sum().backward())
    trainer.optimizer.zero_grad()
    return {"rollout": steps * sampling, "update": denoiser.count[FORWARD] * (reference + training)}


def count(name: str, shape: Shape) -> str:
    """Parameters and operations of a shape's UNet, without its weights."""
    with torch.device("meta"):
        unet = shape.make_unet()
        latents = torch.empty(1, 4, shape.size, shape.size)
        arguments: dict[str, Any] = {"encoder_hidden_states": torch.empty(1, TOKENS, shape.text_width)}
        if shape.unet.get("addition_embed_type"):
            pooled = torch.empty(1, shape.widths[1])
            arguments["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.empty(1, 6)}
        with torch.no_grad():
            operations = flops(lambda: unet(latents, torch.empty(()), **arguments))
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    return f"| {name} | {parameters / 1e6:.1f} | 4×{shape.size}×{shape.size} | {operations / 1e12:.3f} | {TOKENS} tokens |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true", help="eager only: compilation takes minutes")
    parser.add_argument("--count", action="store_true", help="operations of the UNets, on any machine")
    parser.add_argument("--quick", action="store_true", help="a tiny network on the CPU, eager: does it run?")
    arguments = parser.parse_args()
    if arguments.count:
        print(COUNT_HEADER)
        for name in arguments.shapes:
            print(count(name, SHAPES[name]), flush=True)
        return
    chosen, device = {name: SHAPES[name] for name in arguments.shapes}, torch.device("cuda")
    if arguments.quick:
        chosen, device = {"quick": QUICK}, torch.device("cpu")
        arguments.batch, arguments.steps, arguments.repeats, arguments.no_compile = 2, 2, 1, True
    elif not torch.cuda.is_available():
        parser.error("there is no GPU here. On a CPU: --count, or --quick.")
    print(HEADER, flush=True)
    for name, shape in chosen.items():
        for line in rows(name, shape, arguments, device):
            print(line, flush=True)


if __name__ == "__main__":
    main()
