# /// script
# requires-python = ">=3.10"
# dependencies = ["dpok-trl"]
# ///
"""A reward behind an address, asked while the next images are sampled. On the embedded pipeline: no download, no GPU.

python examples/remote_reward.py --epochs 20                                # serves "demo-soft" to itself, in a thread
dpok-trl serve-reward demo-soft --port 8000                                 # or in another process, or on another machine:
python examples/remote_reward.py --epochs 20 --url http://localhost:8000
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from peft import LoraConfig

from dpok_trl import DPOKConfig, DPOKTrainer, RemoteReward, check_reward
from dpok_trl.demo import load_demo_pipeline
from dpok_trl.rewards.registry import load_reward
from dpok_trl.rewards.server import RewardServer, about, reward_scorer


@contextmanager
def served(name: str) -> Iterator[str]:
    """The address of a server on this computer; what `dpok-trl serve-reward` does, in a thread."""
    reward = load_reward(name)
    with RewardServer(("127.0.0.1", 0), reward_scorer(reward), about(reward)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def train(url: str, args: argparse.Namespace) -> None:
    # Failed requests are repeated; pictures whose requests fail for good are left out of the update (reward_on_error).
    reward = RemoteReward(url, timeout=30, retries=4, batch_size=args.batch_size // 2)
    report = check_reward(reward)
    print(report)
    if not report.ok:
        raise SystemExit(1)
    config = DPOKConfig(
        output_dir=args.output,
        num_epochs=args.epochs,
        save_freq=0,
        sample_num_steps=args.steps,
        sample_guidance_scale=1.0,
        sample_batch_size=args.batch_size,
        sample_num_batches_per_epoch=2,  # the first is scored while the second is sampled
        train_batch_size=args.batch_size,
        train_timesteps_per_update=2,
        train_learning_rate=2e-3,
        train_adam_beta2=0.99,
        train_log_prob_reduction="sum",
        train_clip_range=0.2,
        kl_weight=0.02,
    )
    layers = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "time_emb_proj"]
    lora = LoraConfig(r=8, lora_alpha=8, init_lora_weights="gaussian", target_modules=layers)
    DPOKTrainer(config, reward, ["a green triangle"], load_demo_pipeline(), peft_config=lora).train()
    print(f"Metrics: {args.output}/metrics.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="of a reward server (default: one is started here)")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64, help="images sampled, and trained on, at once")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps")
    parser.add_argument("--output", default="remote-reward", help="folder for metrics, pictures and checkpoints")
    args = parser.parse_args()
    if args.url:
        return train(args.url, args)
    with served("demo-soft") as url:
        train(url, args)


if __name__ == "__main__":
    main()
