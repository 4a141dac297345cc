"""Text is encoded once per prompt: a stand-in for `pipe.encode_prompt`, and row selection in what it returns.

What `encode_prompt` returns differs from family to family (tensors, lists, `None`; the batch is not always dimension 0, and some
outputs have no batch at all), so the place of the batch is *measured*, once, by encoding one row and the same row twice.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


LIST = "list"  # the batch is the length of a list
NOTHING = "nothing"  # `None` stood there
NO_ROWS = "no rows"

DEVICES = ("cpu", "cuda", "mps", "xpu")  # those that autocast knows

# Bounds the memory of a run over a long list of prompts: an embedding takes 0.3 MB with CLIP alone, and up to 11 MB with a T5.
MAX_CACHED_PROMPTS = 128


def batch_axes(some: Any, twice: Any, rows: int = 1) -> Any:
    """Where the batch lies in a nested output, from the outputs for `rows` rows and for twice as many.

    Returns the same nesting with, for each leaf, the batch dimension (`int`), `LIST`, `NOTHING`, or `None` for what does not depend on the batch; for
    the whole `NO_ROWS`, if a part of it depends on the batch in another way.
    """
    if isinstance(some, torch.Tensor):
        axes = [dim for dim in range(some.ndim) if some.shape[dim] == rows and twice.shape[dim] == 2 * rows]
        if not axes and some.shape != twice.shape:
            return NO_ROWS
        return axes[0] if axes else None
    if isinstance(some, (list, tuple)):
        if len(some) != len(twice):
            return LIST
        axes = [batch_axes(a, b, rows) for a, b in zip(some, twice, strict=True)]
        return NO_ROWS if NO_ROWS in axes else type(some)(axes)
    return NOTHING if some is None else None


def fits(axes: Any, tree: Any) -> bool:
    """Whether a nested output has the structure that was measured: some pipelines return a mask only where prompts differ in length."""
    if (axes == NOTHING) != (tree is None):
        return False
    if isinstance(axes, (list, tuple)):
        return all(fits(axis, leaf) for axis, leaf in zip(axes, tree, strict=True))
    return True


def select_rows(tree: Any, axes: Any, rows: Sequence[int]) -> Any:
    """The given rows of a nested output; fresh lists every time, since pipelines write into them."""
    if axes is None or axes == NOTHING:
        return tree
    if axes == LIST:
        return [tree[row] for row in rows]
    if isinstance(axes, int):
        return tree.index_select(axes, torch.tensor(rows, device=tree.device))
    return type(tree)(select_rows(leaf, axis, rows) for leaf, axis in zip(tree, axes, strict=True))


@dataclass(frozen=True)
class Encoded:
    """One call of `encode_prompt` in a rollout: its output for the distinct rows, and which of them each sample has."""

    output: Any
    axes: Any
    row_of_sample: tuple[int, ...]

    def select(self, samples: Sequence[int] | None) -> Any:
        rows = self.row_of_sample if samples is None else [self.row_of_sample[i] for i in samples]
        if samples is None and rows == tuple(range(len(rows))):
            return select_rows(self.output, self.axes, rows) if _has_lists(self.axes) else self.output
        return select_rows(self.output, self.axes, rows)


def _has_lists(axes: Any) -> bool:
    return axes == LIST or (isinstance(axes, (list, tuple)) and any(_has_lists(a) for a in axes))


class PromptMemo:
    """Stands in for `pipe.encode_prompt` and encodes each distinct prompt of a call once, however many images are drawn for it.

    A call is remembered as a whole and not prompt by prompt: a pipeline that pads to the longest prompt without a mask gives a prompt another embedding
    in another company, and what is drawn must not depend on what was encoded before. Calls that hand over anything but text (ready-made embeddings,
    images), and those whose output has no rows that could be told apart (cumulative lengths), are passed on unchanged and not remembered.
    """

    def __init__(self, encode_prompt: Callable[..., Any]):
        self.encode_prompt = encode_prompt
        self.signature = inspect.signature(encode_prompt)
        self._axes: dict[Any, Any] = {}
        self._calls: OrderedDict[Any, tuple[Any, Any]] = OrderedDict()  # kind and distinct rows -> output and its axes

    def __call__(self, args: tuple, kwargs: dict) -> tuple[Any, Encoded | None]:
        """Returns what `encode_prompt(*args, **kwargs)` returns, and a record of it (`None` where it was passed on)."""
        arguments = self.signature.bind(*args, **kwargs).arguments
        text = {name: value for name, value in arguments.items() if "prompt" in name and _is_list_of_text(value)}
        counts = {"batch_size"} & set(arguments)  # some pipelines say beside the prompts how many they are
        others = {name: value for name, value in arguments.items() if name not in text and name not in counts}
        if len({len(value) for value in text.values()}) != 1 or not all(map(_is_plain, others.values())):
            return self.encode_prompt(*args, **kwargs), None

        def encode(rows: Sequence[tuple[str, ...]]) -> Any:
            columns = dict(zip(text, (list(column) for column in zip(*rows, strict=True)), strict=True))
            return self.encode_prompt(**{**arguments, **columns, **dict.fromkeys(counts, len(rows))})

        samples = list(zip(*text.values(), strict=True))
        distinct = list(dict.fromkeys(samples))
        kind = (tuple(text), repr(others), _autocast())
        if kind not in self._axes:
            self._axes[kind] = batch_axes(encode(distinct[:1]), encode(distinct[:1] * 2))
        if self._axes[kind] is NO_ROWS:
            return self.encode_prompt(*args, **kwargs), None
        key = (kind, tuple(distinct))
        if key not in self._calls:
            output = encode(distinct)
            axes = self._axes[kind]
            if not fits(axes, output):
                axes = batch_axes(output, encode(distinct * 2), len(distinct))
            if axes is NO_ROWS:
                return self.encode_prompt(*args, **kwargs), None
            self._calls[key] = output, axes
        self._calls.move_to_end(key)
        while sum(len(rows) for _, rows in self._calls) > MAX_CACHED_PROMPTS and len(self._calls) > 1:
            self._calls.popitem(last=False)
        position = {row: index for index, row in enumerate(distinct)}
        record = Encoded(*self._calls[key], tuple(position[sample] for sample in samples))
        return record.select(None), record


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(item, str) for item in value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float, bool, torch.device, torch.dtype))


def _autocast() -> tuple[tuple[str, torch.dtype], ...]:
    """Under autocast an encoder gives other embeddings, and some pipelines hand them on in its dtype."""
    return tuple((device, torch.get_autocast_dtype(device)) for device in DEVICES if torch.is_autocast_enabled(device))
