"""`dpok-trl serve-reward`: a reward over HTTP, for runs on other machines or in other environments."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from dpok_trl.rewards.server import RewardServer


HELP = "serve a reward over HTTP"

MIB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reward", help="name of a shipped reward, or module:function for one of yours")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets every machine in")
    parser.add_argument("--port", type=_port, default=8000, help="0 for any that is free")
    parser.add_argument(
        "--batch-size", type=_positive, help="pictures in one call of the reward (default: the request's)"
    )
    parser.add_argument(
        "--device", help="such as cuda:1, for a reward with a model (default: cuda where there is one, else cpu)"
    )
    parser.add_argument("--max-megabytes", type=_positive, default=256, help="of a request")


def run(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with make_server(args) as server:
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"Serving {server.about['name']} at http://{host}:{server.server_port} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0


def make_server(args: argparse.Namespace) -> RewardServer:
    """The server of the reward, with its weights.

    Raises:
        `ValueError`: If there is no such reward, it cannot be moved to the device that was asked for, or it cannot be served.
    """
    import torch
    from PIL import Image

    from dpok_trl.rewards.registry import load_on_device
    from dpok_trl.rewards.server import RewardServer, about, reward_scorer
    from dpok_trl.rewards.weights import ModelReward

    reward = load_on_device(args.reward, args.device, default="cuda" if torch.cuda.is_available() else "cpu")
    scorer = reward_scorer(reward)
    if isinstance(reward, ModelReward):  # weights that are missing are better told now than to the first client
        print(f"Loading {args.reward} on {reward.device} ...", flush=True)
        reward([Image.new("RGB", (64, 64))], ["a picture"])
    return RewardServer(
        (args.host, args.port),
        scorer,
        about(reward),
        batch_size=args.batch_size,
        max_bytes=args.max_megabytes * MIB,
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 65535")
    return value
