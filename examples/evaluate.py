# /// script
# requires-python = ">=3.10"
# dependencies = ["dpok-trl"]
# ///
"""Compares a tuned model with the one it was made from: same prompts, same seeds, on prompts and by rewards of your choice.

    python examples/evaluate.py logs/rabbit/model --prompts "A green colored rabbit." --reward image-reward --held-out-reward aesthetic

A model that was tuned on a pipeline without a name on the Hub needs `--base FOLDER` (or `--base demo`). `dpok-trl evaluate` is this as a command, with more options. What the numbers mean: docs/evaluation.md.
"""

from __future__ import annotations

import argparse

from dpok_trl import Policy, evaluate, load_tuned
from dpok_trl.demo import demo_pipeline_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder that `save_model` or a run left, or its Hub id")
    parser.add_argument(
        "--base", help="the pretrained pipeline, or 'demo' (default: what the model says it was made from)"
    )
    parser.add_argument("--prompts", nargs="+", required=True)
    parser.add_argument("--reward", nargs="+", default=["demo-soft"], help="trained on")
    parser.add_argument("--held-out-reward", nargs="+", help="not trained on")
    parser.add_argument("--images", type=int, default=16, help="of each prompt")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps")
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--output", default="evaluation", help="folder for tables, numbers and pictures")
    args = parser.parse_args()

    pipe = load_tuned(args.model, base=demo_pipeline_path() if args.base == "demo" else args.base)
    pipe.set_progress_bar_config(disable=True)
    # The pipeline's own call, made a policy: it can be drawn from with the adapter and without, and its KL be measured.
    policy = Policy(pipe, call_kwargs={"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale})
    evaluation = evaluate(
        policy,
        args.prompts,
        args.reward,
        held_out_rewards=args.held_out_reward,
        images_per_prompt=args.images,
    )
    print(evaluation.table())
    print(f"Saved to {evaluation.save(args.output)}")


if __name__ == "__main__":
    main()
