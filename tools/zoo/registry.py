"""Who makes which component.

A maker is a function without arguments that returns a new tiny component. It is registered for a component class (`@component("FluxTransformer2DModel")`)
or for an argument of some pipelines (`@argument("unet", "StableDiffusionXL*")`), which goes first: SD and SDXL have UNets of one class.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any


Maker = Callable[[], Any]

_BY_CLASS: dict[str, Maker] = {}
_BY_ARGUMENT: dict[tuple[str, str], Maker] = {}  # (argument, pattern of pipeline names) -> maker


def component(*class_names: str) -> Callable[[Maker], Maker]:
    """Registers a maker for component classes, by the names that stand in a pipeline's annotations."""

    def register(maker: Maker) -> Maker:
        for name in class_names:
            if name in _BY_CLASS:
                raise ValueError(f"two makers for {name}")
            _BY_CLASS[name] = maker
        return maker

    return register


def argument(name: str, *patterns: str) -> Callable[[Maker], Maker]:
    """Registers a maker for one argument of the pipelines whose class name matches a pattern. Of several, the longest pattern decides."""

    def register(maker: Maker) -> Maker:
        for pattern in patterns:
            if (name, pattern) in _BY_ARGUMENT:
                raise ValueError(f"two makers for {name} of {pattern}")
            _BY_ARGUMENT[name, pattern] = maker
        return maker

    return register


def maker_for(pipeline: str, name: str, class_names: list[str]) -> Maker | None:
    """The maker of an argument of a pipeline, or `None`."""
    matching = [pattern for argument, pattern in _BY_ARGUMENT if argument == name and fnmatchcase(pipeline, pattern)]
    if matching:
        return _BY_ARGUMENT[name, max(matching, key=len)]
    return next((_BY_CLASS[class_name] for class_name in class_names if class_name in _BY_CLASS), None)
