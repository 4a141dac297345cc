"""A tiny pipeline of any class, from the annotations of its `__init__`."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any, get_args

import torch
from diffusers import DiffusionPipeline

import zoo
from zoo.registry import maker_for


class NotBuildable(Exception):
    """There is no maker for a component that the pipeline needs."""


def build(pipeline_class: type[DiffusionPipeline], seed: int = 0, **given: Any) -> DiffusionPipeline:
    """A tiny pipeline with random weights, in eval mode and without progress bars.

    Args:
        seed (`int`): Of the weights.
        given: Components to use instead of those that would be made (`scheduler=...`), or other arguments of the constructor.

    Raises:
        [`NotBuildable`]: Naming the component that nobody makes.
    """
    _load_makers()
    arguments = dict(given)
    for name, parameter in list(inspect.signature(pipeline_class.__init__).parameters.items())[1:]:
        if name in arguments or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        maker = maker_for(pipeline_class.__name__, name, class_names(parameter.annotation))
        if maker is not None:
            torch.manual_seed(seed)  # for each component, so that adding one does not change the others
            arguments[name] = maker()
        elif parameter.default is parameter.empty:
            raise NotBuildable(f"`{name}` ({', '.join(class_names(parameter.annotation)) or 'no annotation'})")
    pipe = pipeline_class(**arguments)
    pipe.set_progress_bar_config(disable=True)
    for value in pipe.components.values():
        if isinstance(value, torch.nn.Module):
            value.eval()
    return pipe


def class_names(annotation: Any) -> list[str]:
    """The classes that an annotation allows, by name, in its order."""
    if get_args(annotation):
        return [name for part in get_args(annotation) for name in class_names(part)]
    if isinstance(annotation, str):
        return [name.strip().rpartition(".")[2] for name in annotation.split("|") if name.strip() != "None"]
    if annotation is inspect.Parameter.empty or annotation is type(None) or annotation is Ellipsis:
        return []
    return [getattr(annotation, "__name__", str(annotation))]


def _load_makers() -> None:
    for module in pkgutil.iter_modules(zoo.__path__):
        importlib.import_module(f"zoo.{module.name}")
