"""A reward that another process computes, asked over HTTP."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from dpok_trl.rewards.base import RewardError
from dpok_trl.rewards.client import Client, RequestFailed, Transport
from dpok_trl.rewards.info import RewardInfo
from dpok_trl.rewards.pictures import to_pictures
from dpok_trl.rewards.protocol import ProtocolError, decode_answer, encode_request, join_infos


logger = logging.getLogger(__name__)


class RemoteReward:
    """
    Asks a reward server. `dpok-trl serve-reward` is one; `docs/remote-rewards.md` has the protocol for others.

    Args:
        url (`str`): where to POST, such as `"http://localhost:8000"`.
        timeout (`float`, defaults to 60): seconds to wait for an answer, for each attempt.
        retries (`int`, defaults to 4): attempts after the first where there is no connection, a timeout, or status 429 or 5xx.
        backoff (`float`, defaults to 0.5): seconds before the first of them; each further wait is twice the one before.
        batch_size (`int`, defaults to 8): pictures in a request.
        concurrency (`int`, defaults to 4): requests under way at once.
        headers (`Mapping[str, str]`, *optional*): sent with each request, such as `{"Authorization": "Bearer ..."}`.
        transport (`Callable`, *optional*): `(url, body, headers, timeout) -> (status, body)` in place of urllib.
        metadata_columns (`Sequence[str]`, *optional*): the columns to send, where the metadata is a mapping. Default: all.

    Raises:
        `ValueError`: For settings that cannot be.
    """

    info = RewardInfo(
        name="remote",
        summary="any reward behind an address",
        input="image, prompt, metadata",
        range="the server's",
        weights="none",
        licence="the server's",
        needs="a server (docs/remote-rewards.md)",
        overlooks="What the server's reward overlooks.",
    )
    image_type = "pil"
    overlaps = True

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 60,
        retries: int = 4,
        backoff: float = 0.5,
        batch_size: int = 8,
        concurrency: int = 4,
        headers: Mapping[str, str] | None = None,
        transport: Transport | None = None,
        metadata_columns: Sequence[str] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
        self.client = Client(
            url,
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            concurrency=concurrency,
            headers=headers,
            transport=transport,
        )
        self.batch_size = batch_size
        self.metadata_columns = metadata_columns

    def __call__(
        self, images: Sequence[Image.Image] | Tensor, prompts: Sequence[str], metadata: Sequence[Any] | None = None
    ) -> list[float | None] | tuple[list[float | None], Any]:
        """
        Args:
            images (`Sequence[PIL.Image.Image]` or `torch.Tensor` of shape `(B, 3, H, W)`): a tensor, of values in [0, 1], is rounded to 8 bits.
            metadata (`Sequence` of length B, *optional*): what JSON can say, tensors and arrays included.

        Returns:
            The rewards, `None` where the server says that it does not apply, NaN for the pictures of a request that failed, of which the log says why; and what the server
            gave as info, where it gave any.

        Raises:
            [`RewardError`]: If an answer is not what it must be.
            `ValueError`: If pictures, prompts and metadata differ in number, or cannot be sent.
        """
        pictures = to_pictures(images)
        metadata = [{} for _ in pictures] if metadata is None else self._columns(metadata)
        if not len(pictures) == len(prompts) == len(metadata):
            raise ValueError(
                f"images, prompts and metadata must be equally many; got {len(pictures)}, {len(prompts)} and {len(metadata)}."
            )
        parts = [slice(start, start + self.batch_size) for start in range(0, len(pictures), self.batch_size)]
        try:
            bodies = [encode_request(pictures[part], prompts[part], metadata[part]) for part in parts]
        except TypeError as error:
            raise ValueError(
                f"the metadata cannot be sent to {self.client.url}: {error}. Name the columns to send in metadata_columns, [] for none."
            ) from error

        rewards: list[float | None] = []
        infos: list[Any] = []
        sizes = [len(pictures[part]) for part in parts]
        for answer, size in zip(self._answers(bodies), sizes, strict=True):
            values, info = self._read(answer, size)
            rewards.extend(values)
            infos.append(info)
        if all(info is None or info == {} for info in infos):
            return rewards
        return rewards, join_infos(infos, sizes)

    def _answers(self, bodies: Sequence[bytes]) -> list[bytes | None]:
        """`None` for a request that failed. A server may be away for one batch: whether a run goes on without it is not decided here."""
        try:
            return self.client.post_all(bodies)
        except RequestFailed as failure:
            logger.warning("%d of %d requests failed. The last: %s", len(bodies), len(bodies), failure)
            return [None] * len(bodies)

    def _read(self, answer: bytes | None, size: int) -> tuple[list[float | None], Any]:
        if answer is None:
            return [math.nan] * size, None
        try:
            return decode_answer(answer, size)
        except ProtocolError as error:
            raise RewardError(
                f"the reward server {self.client.url} gave an answer that cannot be read: {error}."
            ) from error

    def _columns(self, metadata: Sequence[Any]) -> list[Any]:
        if self.metadata_columns is None:
            return list(metadata)
        chosen = []
        for position, row in enumerate(metadata):
            missing = [name for name in self.metadata_columns if not (isinstance(row, Mapping) and name in row)]
            if missing:
                raise ValueError(f"the metadata of image {position} has no column {missing[0]!r} to send.")
            chosen.append({name: row[name] for name in self.metadata_columns})
        return chosen
