"""What a reward server is asked and what it answers: JSON, with pictures as base64 PNG. `docs/remote-rewards.md` is its description.

    POST  {"images": ["iVBORw0...", ...], "prompts": ["a cat", ...], "metadata": [{...}, ...]}
    200   {"rewards": [0.3, null, ...], "info": ...}
    else  {"error": "a sentence"}

PNG is lossless for pictures of 8 bits, so a reward of such pictures is the same here and there. Nothing is ever pickled: to unpickle an answer
is to run what it says.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dpok_trl.rewards.pictures import to_pictures as to_pictures  # they are imported from here, too
from dpok_trl.rewards.pictures import to_tensor as to_tensor


PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}  # what PNG keeps without a change

# A PNG of a few kB can unpack to gigabytes.
MAX_PIXELS = 2**26


class ProtocolError(ValueError):
    """A request or an answer is not what it must be. The message says what is wrong with it."""


# --- pictures ---------------------------------------------------------------------------------------------------------


def encode_picture(picture: Image.Image) -> str:
    """Base64 of a PNG.

    Raises:
        `ValueError`: For a mode that PNG would change.
    """
    if picture.mode not in PNG_MODES:
        raise ValueError(
            f'PNG would change a picture of mode {picture.mode}: convert it first, picture.convert("RGB").'
        )
    file = io.BytesIO()
    # Of a noisy picture of 512 x 512: 35 ms for 59 at the default level, and 14 % larger.
    picture.save(file, format="PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode("ascii")


def decode_picture(text: Any, position: int) -> Image.Image:
    if not isinstance(text, str):
        raise ProtocolError(f'"images"[{position}] must be base64 in a string, it is {_kind(text)}')
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ProtocolError(f'"images"[{position}] is not base64 ({error})') from error
    try:
        picture = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        if picture.width * picture.height > MAX_PIXELS:
            raise ProtocolError(
                f'"images"[{position}] has {picture.width} x {picture.height} pixels, more than {MAX_PIXELS} in all'
            )
        picture.load()
    except ProtocolError:
        raise
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        # SyntaxError is Pillow's word for a PNG with a broken chunk, ValueError for one whose text unpacks to too much, or is cut off.
        raise ProtocolError(f'"images"[{position}] cannot be read as a PNG, JPEG or WebP picture ({error})') from error
    return picture


# --- request ----------------------------------------------------------------------------------------------------------


def encode_request(pictures: Sequence[Image.Image], prompts: Sequence[str], metadata: Sequence[Any]) -> bytes:
    """
    Raises:
        `ValueError`: If a picture cannot be kept as PNG.
        `TypeError`: If the metadata cannot be written as JSON.
    """
    request = {
        "images": [encode_picture(picture) for picture in pictures],
        "prompts": list(prompts),
        "metadata": list(metadata),
    }
    return _to_json(request)


def decode_request(body: bytes) -> tuple[list[Image.Image], list[str], list[Any]]:
    """Pictures, prompts and metadata; the metadata is `{}` for each picture where the request has none.

    Raises:
        [`ProtocolError`]: In words.
    """
    request = _from_json(body, "the request")
    lists = {}
    for name in ("images", "prompts"):
        if name not in request:
            raise ProtocolError(f'the request has no "{name}"')
        lists[name] = _list(request[name], name)
    count = len(lists["images"])
    lists["metadata"] = [{} for _ in range(count)]
    if request.get("metadata") is not None:
        lists["metadata"] = _list(request["metadata"], "metadata")
    for name, values in lists.items():
        if len(values) != count:
            raise ProtocolError(f'the request has {count} "images" but {len(values)} "{name}"')
    for position, prompt in enumerate(lists["prompts"]):
        if not isinstance(prompt, str):
            raise ProtocolError(f'"prompts"[{position}] must be a string, it is {_kind(prompt)}')
    pictures = [decode_picture(text, position) for position, text in enumerate(lists["images"])]
    return pictures, lists["prompts"], lists["metadata"]


# --- answer -----------------------------------------------------------------------------------------------------------


def encode_answer(rewards: Sequence[float | None], info: Any = None) -> bytes:
    """
    Args:
        rewards (`Sequence[float | None]`): `None` where the reward does not apply. A NaN, of a reward that failed, is written as `NaN`, which is
            Python's JSON though not the standard's.

    Raises:
        `TypeError`: If the info cannot be written as JSON.
    """
    return _to_json({"rewards": [None if reward is None else float(reward) for reward in rewards], "info": info})


def decode_answer(body: bytes, count: int) -> tuple[list[float | None], Any]:
    """
    Args:
        count (`int`): of the pictures that were sent.

    Returns:
        `tuple[list[float | None], Any]`: one reward per picture, `None` where it does not apply, NaN where the server said NaN or infinity; and
        the info, `None` where there is none.

    Raises:
        [`ProtocolError`]: In words.
    """
    answer = _from_json(body, "the answer")
    if "rewards" not in answer:
        raise ProtocolError(f'the answer has no "rewards", only {sorted(answer)}')
    rewards = _list(answer["rewards"], "rewards")
    if len(rewards) != count:
        raise ProtocolError(f'the answer has {len(rewards)} "rewards" for {count} images')
    for position, reward in enumerate(rewards):
        is_number = isinstance(reward, (int, float)) and not isinstance(reward, bool)
        if not (is_number or reward is None):
            raise ProtocolError(f'"rewards"[{position}] must be a number or null, it is {_kind(reward)}')
    return [None if reward is None else _finite_or_nan(reward) for reward in rewards], answer.get("info")


def _finite_or_nan(reward: float) -> float:
    try:
        value = float(reward)
    except OverflowError:  # JSON's integers have no largest
        return math.nan
    return value if math.isfinite(value) else math.nan


def join_infos(infos: Sequence[Any], sizes: Sequence[int]) -> Any:
    """
    One info for the batch: a mapping whose values have one entry per picture is joined key by key, with `None` for the pictures of a request that
    failed. Any others are listed, one per request, under the key `requests`.

    Args:
        infos (`Sequence`): of each request, `None` for one that failed.
        sizes (`Sequence[int]`): pictures in each.
    """
    pairs = list(zip(infos, sizes, strict=True))
    keys: dict[str, None] = {}
    for info, size in pairs:
        if info is None:
            continue
        if not isinstance(info, dict) or any(not isinstance(v, list) or len(v) != size for v in info.values()):
            return {"requests": list(infos)}
        keys.update(dict.fromkeys(info))
    return {key: [value for info, size in pairs for value in (info or {}).get(key, [None] * size)] for key in keys}


def plain_info(info: Any) -> Any:
    """The info as it will arrive: tensors, arrays and tuples as lists.

    Raises:
        `TypeError`: If it cannot be written as JSON.
    """
    return json.loads(_to_json(info))


# --- JSON -------------------------------------------------------------------------------------------------------------


def _to_json(value: Any) -> bytes:
    return json.dumps(value, default=_plain).encode("utf-8")


def _plain(value: Any) -> Any:
    """The tensors and arrays that datasets and rewards are full of."""
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON")


def _from_json(body: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:  # wrong UTF-8 is a ValueError too
        raise ProtocolError(f"{what} is not JSON ({error}); it begins {excerpt(body)}") from error
    if not isinstance(value, dict):
        raise ProtocolError(f"{what} must be a JSON object, it is {_kind(value)}")
    return value


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ProtocolError(f'"{name}" must be a list, it is {_kind(value)}')
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return f"{names.get(type(value), 'a number')} ({excerpt(json.dumps(value).encode())})"


def excerpt(body: bytes, length: int = 80) -> str:
    """The beginning of a body, for messages."""
    text = body[: 4 * length].decode("utf-8", errors="replace")
    return repr(text if len(text) <= length else text[: length - 3] + "...")
