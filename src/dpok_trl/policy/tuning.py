"""What of a pipeline is trained: adapters on its denoisers and text encoders, or the denoisers' own weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import nn

from dpok_trl.policy.errors import UnsupportedPipelineError
from dpok_trl.policy.lora import (
    adapter_name,
    adapters_disabled,
    default_lora_config,
    prepare_adapter,
    refuse_adapter,
)
from dpok_trl.policy.lora_files import (
    load_lora,
    loading_code,
    refuse_unloadable,
    save_lora,
    text_encoders_with_lora,
)


@dataclass
class Tuned:
    """The trained networks of a pipeline, by component name.

    Args:
        denoisers (`dict[str, torch.nn.Module]`): All of the pipeline's.
        text_encoders (`dict[str, torch.nn.Module]`): Those that are trained, with adapters.
        frozen (`dict[str, torch.nn.Module]`): Copies of the pretrained denoisers, where their own weights are trained; else empty.
    """

    denoisers: dict[str, nn.Module]
    text_encoders: dict[str, nn.Module] = field(default_factory=dict)
    frozen: dict[str, nn.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.answering = self.denoisers  # or the frozen copies, within `pretrained_answers`
        self.moved_reference: dict[str, torch.Tensor] | None = None  # the trained weights of a reference that moves

    @property
    def full(self) -> bool:
        """Whether the denoisers' own weights are trained."""
        return bool(self.frozen)

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {**self.denoisers, **self.text_encoders}

    @contextmanager
    def pretrained_answers(self) -> Iterator[None]:
        """Within it the pretrained networks answer: the adapters are off, or the frozen copies are in the denoisers' place.

        Raises:
            [`UnsupportedPipelineError`]: If there is neither an adapter nor a copy.
        """
        if self.full:
            before, self.answering = self.answering, self.frozen
            try:
                yield
            finally:
                self.answering = before
            return
        for name, module in self.modules.items():
            if adapter_name(module) is None:
                raise UnsupportedPipelineError(
                    f"`{name}` has no active LoRA adapter, so nothing can be trained and there is no reference to "
                    f"compare with. Add one first: `pipe.{name}.add_adapter(LoraConfig(...))`."
                )
        with adapters_disabled(list(self.modules.values())):
            yield

    def trained_weights(self) -> dict[str, nn.Parameter]:
        """By component and name."""
        return {
            f"{component}.{name}": parameter
            for component, module in self.modules.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def move_reference(self, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        """From here on [`~Tuned.reference_answers`] are those of the networks as they are now, or as they are with `weights`."""
        now = {name: parameter.detach().clone() for name, parameter in self.trained_weights().items()}
        if weights is not None:
            now = {name: weights[name].to(weight) for name, weight in now.items()}
        self.moved_reference = now

    @contextmanager
    def reference_answers(self) -> Iterator[None]:
        """Within it the reference answers: the pretrained networks, or what [`~Tuned.move_reference`] made of them."""
        if self.moved_reference is None:
            with self.pretrained_answers():
                yield
            return
        parameters = self.trained_weights()
        own = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.data = self.moved_reference[name]
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = own[name]

    def save(self, pipe: DiffusionPipeline, folder: str | Path) -> None:
        """Writes what is trained and nothing else: the adapters ([`save_lora`]), or each denoiser as `folder/<name>`."""
        if not self.full:
            save_lora(pipe, self.modules, folder)
            return
        for name, module in self.denoisers.items():
            module.save_pretrained(Path(folder) / name)

    def export(self, pipe: DiffusionPipeline, folder: str | Path) -> None:
        """Writes what a user loads: the adapters, or the whole pipeline."""
        if self.full:
            pipe.save_pretrained(folder)
        else:
            self.save(pipe, folder)

    def loading_code(self, pipe: DiffusionPipeline, base: str, repository: str) -> str:
        """The lines of Python that give a user the tuned pipeline."""
        name = type(pipe).__name__
        if getattr(diffusers, name, None) is type(pipe):
            name, first = "DiffusionPipeline", "from diffusers import DiffusionPipeline\n\n"
        else:  # `DiffusionPipeline` would look for it in diffusers
            first = f"# {name} is not a class of diffusers: import it from where it is defined\n"
        if self.full:
            return first + f'pipe = {name}.from_pretrained("{repository}")'
        return first + f'pipe = {name}.from_pretrained("{base}")\n' + loading_code(pipe, self.modules, repository)

    def load(self, pipe: DiffusionPipeline, folder: str | Path) -> None:
        """Reads what [`~Tuned.save`] wrote, in place."""
        if not self.full:
            load_lora(pipe, self.modules, folder)
            return
        for name, module in self.denoisers.items():
            module.load_state_dict(type(module).from_pretrained(Path(folder) / name).state_dict())


def tune(
    pipe: DiffusionPipeline,
    denoisers: dict[str, nn.Module],
    *,
    peft_config: LoraConfig | Mapping[str, LoraConfig] | None = None,
    rank: int | None = None,
    alpha: int | None = None,
    text_encoders: bool = False,
    full: bool = False,
) -> Tuned:
    """Makes networks of `pipe` trainable, in fp32 on whatever base, and freezes all else.

    Args:
        denoisers (`dict[str, torch.nn.Module]`): Of the pipeline.
        peft_config (`LoraConfig` or a mapping from component names to them, *optional*): Of new adapters. Without it, an adapter that is there
            already is trained on, or else one on the attention projections is added.
        rank, alpha (`int`, *optional*): Of that one.
        text_encoders (`bool`): Adapters on the text encoders too, those whose adapters the family's LoRA file can hold.
        full (`bool`): Train the denoisers' own weights, with fp32 master weights. A frozen copy of each, in the dtype it had, stays for the KL term.

    Raises:
        `ValueError`: For adapters and settings that do not fit; the message says what to change.
    """
    encoders = text_encoders_with_lora(pipe) if text_encoders else {}
    if text_encoders and not encoders:
        raise ValueError(
            f"the LoRA file of {type(pipe).__name__} has no place for an adapter of a text encoder. Set train_text_encoder = False."
        )
    networks = {**denoisers, **encoders}
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module) and name not in networks:
            refuse_adapter(component, name, networks.values())
            component.requires_grad_(False)
    if full:
        return Tuned(denoisers, {}, {name: _train_all(name, module) for name, module in denoisers.items()})
    configs = dict(peft_config) if isinstance(peft_config, Mapping) else dict.fromkeys(denoisers, peft_config)
    unknown = sorted(set(configs) - set(networks))
    if unknown:
        raise ValueError(
            f"peft_config has entries for {', '.join(unknown)}, but what is trained is {', '.join(networks)}."
        )
    for name, module in networks.items():
        config = configs.get(name)
        loaded = adapter_name(module)
        if config is None and loaded is None:
            config = default_lora_config(module, 4 if rank is None else rank, alpha)
        elif config is None:
            has = module.peft_config[loaded]
            for setting, given, there in (("rank", rank, has.r), ("alpha", alpha, has.lora_alpha)):
                if given is not None and given != there:
                    raise ValueError(
                        f"`{name}` has the adapter '{loaded}' of {setting} {there} already, and train_lora_{setting} = {given}. Leave train_lora_{setting} out "
                        "to go on training the loaded adapter, or call `pipe.unload_lora_weights()` first to start afresh."
                    )
        prepare_adapter(module, config)
        if name in encoders:
            refuse_unloadable(name, module)
    return Tuned(denoisers, encoders)


def _train_all(name: str, module: nn.Module) -> nn.Module:
    """Makes all weights of a denoiser trainable, in fp32, and returns a frozen copy of it as it was."""
    if adapter_name(module) is not None:
        raise ValueError(
            f"`{name}` has the active adapter '{adapter_name(module)}', and its own weights are to be trained. Fuse it first: "
            f"`pipe.fuse_lora(components=['{name}'])`, then `pipe.unload_lora_weights()`."
        )
    # by its weights: torchao's `quantize_` leaves no other mark
    if any(type(weight.data) is not torch.Tensor or not weight.is_floating_point() for weight in module.parameters()):
        raise ValueError(
            f"`{name}` is quantised: its own weights cannot be trained. Train an adapter on it (train_use_lora = True), or load it without quantisation."
        )
    frozen = copy.deepcopy(module).requires_grad_(False).eval()
    module.to(torch.float32).requires_grad_(True)
    return frozen
