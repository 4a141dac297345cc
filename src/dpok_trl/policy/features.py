"""What a value function sees of a step: x_t and the prompt's embedding, or what the middle of the denoiser makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dpok_trl.core.trajectory import Trajectory
from dpok_trl.policy.errors import UnsupportedPipelineError
from dpok_trl.policy.memo import LIST, Encoded


VALUE_INPUTS = ("latents", "features")

WAY_OUT = "Take value_input='latents'."


def value_inputs(trajectory: Trajectory, samples: Sequence[int], steps: Sequence[int]) -> torch.Tensor:
    """The inputs of a value function for pairs of a sample and a step.

    Args:
        trajectory ([`Trajectory`]): Of a rollout with `value_input`.
        samples, steps (`Sequence[int]` of length `n`): Of each row; steps from `trajectory.steps`.

    Returns:
        `torch.Tensor` of shape `(n, D)`, float32: the features of the step, or x_t flattened and the embedding of the prompt behind it.

    Raises:
        `ValueError`: If the rollout recorded neither.
    """
    rows = torch.tensor(samples, device=trajectory.log_probs.device)
    if trajectory.features is not None:
        columns = torch.tensor([trajectory.steps.index(step) for step in steps], device=rows.device)
        return trajectory.features[rows, columns]
    if trajectory.prompt_embeddings is None:
        raise ValueError(
            "this trajectory has nothing that a value function could see. Sample with `policy.rollout(..., value_input='latents')` or 'features'."
        )
    latents = [trajectory.latents[step][sample].flatten() for sample, step in zip(samples, steps, strict=True)]
    return torch.cat([torch.stack(latents).float(), trajectory.prompt_embeddings[rows]], dim=1)


# ---------------------------------------------------------------- the prompt


def prompt_embeddings(encoded: Sequence[Encoded | None]) -> torch.Tensor:
    """One vector for each prompt: the mean over the tokens of the first embedding that `encode_prompt` returned, padding included.

    Args:
        encoded (`Sequence[Encoded]`): The calls of `encode_prompt` in a rollout.

    Returns:
        `torch.Tensor` of shape `(B, E)`, float32.

    Raises:
        [`UnsupportedPipelineError`]: If nothing was recorded that has a row for each prompt.
    """
    first = encoded[0] if encoded else None
    found = None if first is None else _first_embedding(first.select(None), first.axes)
    if found is None:
        raise UnsupportedPipelineError(
            "value_input='latents' needs the embedding of the prompt, and none was recorded: the pipeline has no `encode_prompt`, its text encoders train, or what it "
            "returns has no row for each prompt. Take value_input='features'."
        )
    return found


def _first_embedding(output: Any, axes: Any) -> torch.Tensor | None:
    """Of a nested output: the first floating-point part that has a row for each sample, averaged over all but its rows and its last dimension."""
    if isinstance(axes, int) and output.is_floating_point():
        return _mean_of_tokens(output.movedim(axes, 0))
    if axes == LIST:  # of one tensor for each sample, as long as its prompt
        if all(isinstance(entry, torch.Tensor) and entry.is_floating_point() for entry in output):
            return torch.stack([_mean_of_tokens(entry[None])[0] for entry in output])
        return None
    if isinstance(axes, (list, tuple)):
        parts = (_first_embedding(part, axis) for part, axis in zip(output, axes, strict=True))
        return next((part for part in parts if part is not None), None)
    return None


def _mean_of_tokens(embeddings: torch.Tensor) -> torch.Tensor:
    """`(B, *, E)` -> `(B, E)`"""
    return embeddings.float().reshape(len(embeddings), -1, embeddings.shape[-1]).mean(dim=1)


# ---------------------------------------------------------------- the middle of the denoiser


class MiddleFeatures:
    """Reads what the middle of each denoiser puts out in a rollout, and pools it to one vector for each sample and step.

    Explicit Critic Guidance (arXiv 2605.27736) found the denoiser itself to be the best reader of noisy latents; here the rollout's own forward pass is
    read, which costs nothing. Guidance runs several rows of a sample at once or calls the network several times in a step: their mean counts.

    Args:
        denoisers (`Mapping[str, torch.nn.Module]`): Those that answer. Of two experts the one that ran counts.
        count (`int`): Samples in the rollout.

    Raises:
        [`UnsupportedPipelineError`]: For a compiled denoiser, whose graph knows no hooks that come later, and for one without a middle.
    """

    def __init__(self, denoisers: Mapping[str, nn.Module], count: int):
        self.middles = {name: middle_of(name, module) for name, module in denoisers.items()}
        self.count = count
        self._outputs: list[
            list[torch.Tensor]
        ] = []  # of the denoiser's call in progress, each (rows of the middle, C)
        self._pooled: list[torch.Tensor] = []  # of the step in progress, each (B, C)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it the hooks are there."""
        handles = [module.register_forward_hook(self._hear) for module in self.middles.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hear(self, module: nn.Module, args: Any, output: Any) -> None:
        parts = output if isinstance(output, (tuple, list)) else [output]
        tensors = [part for part in parts if isinstance(part, torch.Tensor) and part.is_floating_point()]
        self._outputs.append(
            [mean_of_positions(tensor) for tensor in tensors]
        )  # at once: what comes next may write into them

    def end_call(self, name: str, output: Any) -> None:
        """After a call of the denoiser `name`, with what it returned."""
        rows = _num_rows(output)
        for tensors in self._outputs:
            if not tensors:
                raise UnsupportedPipelineError(
                    f"the middle of `{name}` ({type(self.middles[name]).__name__}) returns no tensor, so there are no features to be read. {WAY_OUT}"
                )
            # A block of two streams, of text and of picture, returns both.
            self._pooled.append(torch.cat([self._mean_of_rows(tensor, rows, name) for tensor in tensors], dim=1))
        self._outputs = []

    def _mean_of_rows(self, output: torch.Tensor, rows: int, name: str) -> torch.Tensor:
        """`(rows * f, C)` -> `(B, C)`: guidance runs all samples `k` times, one after the other, and the `f` frames of a row follow each other."""
        if rows % self.count or len(output) % rows:
            raise UnsupportedPipelineError(
                f"the middle of `{name}` ({type(self.middles[name]).__name__}) gives {len(output)} rows where the network has {rows} for {self.count} samples: which "
                f"of them belong to which sample is not known. {WAY_OUT}"
            )
        return output.reshape(rows // self.count, self.count, len(output) // rows, -1).mean(dim=(0, 2))

    def end_step(self) -> torch.Tensor:
        """The features of the step, `(B, C)`, float32.

        Raises:
            [`UnsupportedPipelineError`]: If the middle did not run in it, or not with the same channels in each call.
        """
        outputs, self._pooled = self._pooled, []
        names = ", ".join(f"{type(module).__name__} of `{name}`" for name, module in self.middles.items())
        if not outputs:
            raise UnsupportedPipelineError(
                f"the middle of the denoiser ({names}) did not run in a step, so there are no features to be read. {WAY_OUT}"
            )
        widths = sorted({output.shape[1] for output in outputs})
        if len(widths) > 1:
            raise UnsupportedPipelineError(
                f"the middle of the denoiser ({names}) gives {widths} channels in the calls of one step. {WAY_OUT}"
            )
        return torch.stack(outputs).mean(dim=0)


def middle_of(name: str, denoiser: nn.Module) -> nn.Module:
    """The `mid_block` of a UNet, or the middle one of a transformer's blocks: of the list of modules with most parameters.

    Raises:
        [`UnsupportedPipelineError`]: If there is neither, or the denoiser is compiled.
    """
    # `torch.nn.Module` writes the mark of `module.compile()`, also on blocks (`compile_repeated_blocks`); `torch.compile(module)` wraps.
    if any(part._compiled_call_impl is not None or hasattr(part, "_orig_mod") for part in denoiser.modules()):
        raise UnsupportedPipelineError(
            f"`{name}` is compiled, and hooks that come later do not run in a compiled graph: value_input='features' cannot be read. Take value_input='latents', or "
            "set torch_compile = False."
        )
    middle = getattr(denoiser, "mid_block", None)
    if middle is not None:
        return middle
    # By parameters and not by length: there are networks whose longest list projects the captions.
    lists = sorted(_outermost_lists(denoiser), key=lambda blocks: sum(p.numel() for p in blocks.parameters()))
    if not lists:
        raise UnsupportedPipelineError(
            f"`{name}` ({type(denoiser).__name__}) has no `mid_block` and no list of blocks, so its middle is not known. {WAY_OUT}"
        )
    return lists[-1][len(lists[-1]) // 2]


def _outermost_lists(module: nn.Module) -> list[nn.ModuleList]:
    """The lists of modules that are in no other list, but for empty ones."""
    found = []
    for child in module.children():
        if not isinstance(child, nn.ModuleList):
            found += _outermost_lists(child)
        elif len(child) > 0:
            found.append(child)
    return found


def mean_of_positions(output: torch.Tensor) -> torch.Tensor:
    """A hidden state without its positions, float32: `(rows, C, *spatial)` with two spatial dimensions or more, `(rows, L, C)` or `(rows, C)` -> `(rows, C)`."""
    output = output.float()
    if output.dim() == 3:
        return output.mean(dim=1)
    return output if output.dim() == 2 else output.flatten(2).mean(dim=2)


def _num_rows(output: Any) -> int:
    """Rows of the batch that a denoiser was given, from what it returned."""
    if isinstance(output, (torch.Tensor, list)):
        return len(output)  # a list has an entry for each row
    return _num_rows(output[0])
