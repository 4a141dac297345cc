"""Serves a reward over HTTP, for `RemoteReward` and for anybody else who speaks `protocol.py`."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

from dpok_trl.rewards.base import RewardError, RewardFunction, reward_name, score_batch
from dpok_trl.rewards.binding import BoundReward, RewardInputs
from dpok_trl.rewards.info import RewardInfo
from dpok_trl.rewards.pictures import to_tensor
from dpok_trl.rewards.protocol import ProtocolError, decode_request, encode_answer, join_infos, plain_info


logger = logging.getLogger(__name__)

# (pictures, prompts, metadata) -> one reward per picture, None where it does not apply; and info
Scorer = Callable[[list[Image.Image], list[str], list[Any]], tuple[Sequence[float | None], Any]]

DEFAULT_MAX_BYTES = 256 * 2**20
DISCARD_BYTES = 2**20
MAX_DIGITS = 18  # of a Content-Length: Python refuses to read thousands of them
UNPROCESSABLE = 422  # the reward raised: no 5xx, which is asked again, since it would only raise again


class RewardServer(ThreadingHTTPServer):
    """
    One thread for each connection, and one call of the reward at a time: models are rarely safe to call from several threads.

    Args:
        address (`tuple[str, int]`): host and port; port 0 is any that is free, then in `server_port`.
        scorer (`Callable`): `(pictures, prompts, metadata) -> (rewards, info)`, see [`reward_scorer`].
        about (`dict`): what GET / answers.
        batch_size (`int`, *optional*): pictures in one call of the reward. Default: those of the request.
        max_bytes (`int`): of a request.
    """

    daemon_threads = True

    def __init__(
        self,
        address: tuple[str, int],
        scorer: Scorer,
        about: dict[str, Any],
        *,
        batch_size: int | None = None,
        max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
        self.scorer = scorer
        self.about = about
        self.batch_size = batch_size
        self.max_bytes = max_bytes
        self.lock = threading.Lock()
        super().__init__(address, RewardHandler)

    def answer(self, body: bytes) -> bytes:
        """
        Raises:
            [`ProtocolError`]: If the request is not what it must be.
            [`RewardError`]: If the reward fails.
        """
        pictures, prompts, metadata = decode_request(body)
        size = self.batch_size or max(1, len(pictures))
        rewards: list[float | None] = []
        sizes: list[int] = []
        infos: list[Any] = []
        for start in range(0, len(pictures), size):
            part = slice(start, start + size)
            with self.lock:
                values, info = self.scorer(pictures[part], prompts[part], metadata[part])
            rewards.extend(values)
            sizes.append(len(values))
            try:
                infos.append(plain_info(info))
            except TypeError as error:
                raise RewardError(f"the info of the reward cannot be sent: {error}.") from error
        return encode_answer(rewards, infos[0] if len(infos) == 1 else join_infos(infos, sizes))


class RewardHandler(BaseHTTPRequestHandler):
    server: RewardServer
    timeout = 120  # seconds of silence after which a connection is given up
    server_version = "dpok-trl"

    def do_GET(self) -> None:
        if self.path != "/":
            return self._fail(404, f"there is nothing at {self.path}: GET / or POST /")
        self._send(200, json.dumps(self.server.about).encode())

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            return self._fail(411, "the request has no Content-Length")
        if len(length) > MAX_DIGITS:
            return self._fail(400, f"a Content-Length of {len(length)} digits")
        if int(length) > self.server.max_bytes:
            self._discard(int(length))
            return self._fail(
                413, f"the request has {length} bytes, more than {self.server.max_bytes}: send fewer pictures"
            )
        body = self.rfile.read(int(length))
        if self.path != "/":
            return self._fail(404, f"there is nothing at {self.path}: GET / or POST /")
        try:
            answer = self.server.answer(body)
        except ProtocolError as error:
            return self._fail(400, str(error))
        except RewardError as error:
            logger.error("%s", error, exc_info=error.__cause__)
            return self._fail(UNPROCESSABLE, str(error))
        self._send(200, answer)

    def _discard(self, length: int) -> None:
        """Reads on. A client that is still sending would see a broken connection, and send it all again."""
        while length > 0:
            read = len(self.rfile.read(min(length, DISCARD_BYTES)))
            length = length - read if read else 0

    def _fail(self, status: int, message: str) -> None:
        self._send(status, json.dumps({"error": message}).encode())

    def _send(self, status: int, body: bytes) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except ConnectionError:
            logger.warning("%s did not wait for its answer", self.client_address[0])

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug("%s " + format, self.client_address[0], *args)


def reward_scorer(reward: RewardFunction) -> Scorer:
    """A reward with the contract of `docs/rewards.md`, of pictures as they arrive.

    Raises:
        `ValueError`: For one that needs all images of a prompt together.
        `TypeError`: As [`~dpok_trl.rewards.binding.BoundReward`].
    """
    bound = BoundReward(reward)
    if bound.wants_groups:
        raise ValueError(
            f"{bound.name} cannot be served: it is a reward of all images of a prompt together (wants_groups), and a request holds some of a batch only, "
            "so its numbers would be others. Use it in the process of the run."
        )

    def scorer(pictures: list[Image.Image], prompts: list[str], metadata: list[Any]) -> tuple[list[float | None], Any]:
        try:
            images = to_tensor(pictures)
        except ValueError as error:
            raise ProtocolError(f'the "images" of the request: {error}') from error
        scored = score_batch(bound, RewardInputs(images, tuple(prompts), tuple(metadata)))
        pairs = zip(scored.values.tolist(), scored.applies.tolist(), strict=True)
        return [value if applies else None for value, applies in pairs], scored.info

    return scorer


def about(reward: RewardFunction) -> dict[str, Any]:
    """What GET / answers: the name of the reward and, of a shipped one, its description."""
    info = getattr(reward, "info", None)
    return {
        "name": reward_name(reward),
        "info": dataclasses.asdict(info) if isinstance(info, RewardInfo) else None,
    }
