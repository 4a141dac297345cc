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


def shapes_beside(axes: Any, tree: Any) -> Any:
    """The sizes of a nested output but for its batch dimension."""
    if axes is None or isinstance(axes, str):
        return None
    if isinstance(axes, int):
        return [size for dim, size in enumerate(tree.shape) if dim != axes]
    return [shapes_beside(axis, leaf) for axis, leaf in zip(axes, tree, strict=True)]


def concatenate_rows(trees: Sequence[Any], axes: Any) -> Any:
    """Joins outputs row by row; they must agree in [`shapes_beside`]."""
    if axes is None or axes == NOTHING:
        return trees[0]
    if axes == LIST:
        return [row for tree in trees for row in tree]
    if isinstance(axes, int):
        return torch.cat(list(trees), dim=axes)
    return type(trees[0])(concatenate_rows([tree[i] for tree in trees], axis) for i, axis in enumerate(axes))


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
    """Stands in for `pipe.encode_prompt` and encodes each distinct prompt once, however many images are drawn for it.

    Calls that hand over anything but text (ready-made embeddings, images), and those whose output has no rows that could be told apart (cumulative
    lengths), are passed on unchanged and not remembered.
    """

    def __init__(self, encode_prompt: Callable[..., Any]):
        self.encode_prompt = encode_prompt
        self.signature = inspect.signature(encode_prompt)
        self._axes: dict[Any, Any] = {}
        self._rows: OrderedDict[Any, Any] = OrderedDict()

    def clear(self) -> None:
        """Forgets every embedding (after the text encoder changed)."""
        self._rows.clear()

    def __call__(self, args: tuple, kwargs: dict) -> tuple[Any, Encoded | None]:
        """Returns what `encode_prompt(*args, **kwargs)` returns, and a record of it (`None` where it was passed on)."""
        arguments = self.signature.bind(*args, **kwargs).arguments
        text = {name: value for name, value in arguments.items() if _is_list_of_text(value)}
        counts = {"batch_size"} & set(arguments)  # some pipelines say beside the prompts how many they are
        others = tuple((name, value) for name, value in arguments.items() if name not in text and name not in counts)
        if len({len(value) for value in text.values()}) != 1 or not all(_is_plain(value) for _, value in others):
            return self.encode_prompt(*args, **kwargs), None

        def encode(rows: Sequence[tuple[str, ...]]) -> Any:
            columns = dict(zip(text, (list(column) for column in zip(*rows, strict=True)), strict=True))
            return self.encode_prompt(**{**arguments, **columns, **dict.fromkeys(counts, len(rows))})

        samples = list(zip(*text.values(), strict=True))
        distinct = list(dict.fromkeys(samples))
        kind = (tuple(text), others, _autocast())
        if kind not in self._axes:
            self._axes[kind] = batch_axes(encode(distinct[:1]), encode(distinct[:1] * 2))
        if self._axes[kind] is NO_ROWS:
            return self.encode_prompt(*args, **kwargs), None
        position = {row: index for index, row in enumerate(distinct)}
        output, axes = self._encode_missing(distinct, kind, encode)
        record = Encoded(output, axes, tuple(position[s] for s in samples))
        return record.select(None), record

    def _encode_missing(self, distinct: list, kind: Any, encode: Callable) -> tuple[Any, Any]:
        """The output for distinct rows, from those that are remembered and the others, and where its batch lies."""
        axes = self._axes[kind]
        together = (kind, tuple(distinct))
        if together in self._rows:
            return self._rows[together]
        missing = [row for row in distinct if (kind, row) not in self._rows]
        if missing:
            encoded = encode(missing)
            if not fits(axes, encoded):
                return self._encode_together(together, distinct, encode)
            for index, row in enumerate(missing):
                self._rows[kind, row] = select_rows(encoded, axes, [index])
        found = []
        for row in distinct:
            self._rows.move_to_end((kind, row))
            found.append(self._rows[kind, row])
        self._forget_oldest(len(distinct))
        if len(missing) == len(distinct):
            return encoded, axes
        if len({repr(shapes_beside(axes, row)) for row in found}) == 1:
            return concatenate_rows(found, axes), axes
        encoded = encode(distinct)  # encoded at another time and padded to another length: now together
        return (encoded, axes) if fits(axes, encoded) else self._encode_together(together, distinct, encode)

    def _encode_together(self, together: Any, distinct: list, encode: Callable) -> tuple[Any, Any]:
        """For an output that has one structure for a row alone and another for these rows: remembered as a whole."""
        encoded = encode(distinct)
        axes = batch_axes(encoded, encode(distinct * 2), len(distinct))
        self._rows[together] = encoded, axes
        self._forget_oldest(1)
        return encoded, axes

    def _forget_oldest(self, needed: int) -> None:
        while len(self._rows) > max(MAX_CACHED_PROMPTS, needed):
            self._rows.popitem(last=False)


def _autocast() -> tuple[tuple[str, torch.dtype], ...]:
    """Under autocast an encoder gives other embeddings, and some pipelines hand them on in its dtype."""
    return tuple((device, torch.get_autocast_dtype(device)) for device in DEVICES if torch.is_autocast_enabled(device))


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(item, str) for item in value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (str, int, float, bool, torch.device, torch.dtype))
