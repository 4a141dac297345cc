# /// script
# requires-python = ">=3.10"
# dependencies = ["dpok-trl"]
# ///
"""Draws with a tuned model, from the Hub or a folder, in two ways.

    python examples/load_from_hub.py me/rabbit-lora --prompt "A green colored rabbit."

`load_tuned` finds the base in the model card. With a stock pipeline you name the base yourself, and need nothing of this package. Both draw
the same picture.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import DiffusionPipeline

from dpok_trl import load_tuned
from dpok_trl.demo import demo_pipeline_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="Hub id, or a folder")
    parser.add_argument("--base", help="the pretrained pipeline, or 'demo': draws with a stock pipeline too")
    parser.add_argument("--prompt", default="a green triangle")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps")
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="tuned.png")
    args = parser.parse_args()
    base = demo_pipeline_path() if args.base == "demo" else args.base

    def draw(pipe: DiffusionPipeline) -> torch.Tensor:
        generator = torch.Generator().manual_seed(args.seed)
        call = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale, "generator": generator}
        return pipe(args.prompt, output_type="pt", **call).images

    pipe = load_tuned(args.model, base=base)
    pictures = draw(pipe)
    pipe.image_processor.numpy_to_pil(pictures.permute(0, 2, 3, 1).float().cpu().numpy())[0].save(args.output)
    print(f"Saved to {args.output}")

    if base is not None:
        stock = DiffusionPipeline.from_pretrained(base).to(pipe.device)
        stock.load_lora_weights(args.model)
        print(f"Largest difference from a stock pipeline: {(draw(stock) - pictures).abs().max().item()}")


if __name__ == "__main__":
    main()
