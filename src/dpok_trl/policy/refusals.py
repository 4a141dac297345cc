"""What a policy cannot be made of, and arguments that its pipeline would not understand."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from accelerate.hooks import AlignDevicesHook, CpuOffload, SequentialHook
from diffusers import DiffusionPipeline
from torch import nn

from dpok_trl.policy.errors import UnsupportedPipelineError


# Arguments of a pipeline's call that would be overridden or have no effect.
OWN_ARGUMENTS = {
    "prompt": "prompts are given to the rollout",
    "generator": "each sample has a generator of its own; give seeds to the rollout",
    "num_images_per_prompt": "repeat the prompt instead",
    "num_videos_per_prompt": "repeat the prompt instead",
    "eta": "the noise of the steps is the policy's own `eta`",
    "output_type": "images are always tensors",
    "return_dict": "the output is taken apart by the policy",
}


def refuse_unknown_arguments(pipe: DiffusionPipeline, call_kwargs: dict[str, Any]) -> None:
    """Raises `ValueError` for arguments that the policy sets itself, or that the pipeline's call does not name: many calls end in `**kwargs`
    and would drop them."""
    for name in call_kwargs:
        if name in OWN_ARGUMENTS:
            raise ValueError(f"'{name}' cannot be an argument of the call: {OWN_ARGUMENTS[name]}.")
    named = [
        name for name, p in inspect.signature(type(pipe).__call__).parameters.items() if p.kind is not p.VAR_KEYWORD
    ]
    for name in call_kwargs:
        if name not in named:
            close = difflib.get_close_matches(name, named, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise ValueError(
                f"the call of {type(pipe).__name__} takes no '{name}'.{hint} It takes: {', '.join(named[1:])}."
            )


def refuse_caches(modules: Mapping[str, Sequence[nn.Module]]) -> None:
    """Raises [`UnsupportedPipelineError`] where a cache hook would reuse one step's activations in another: a replay skips steps."""
    hooked = [(name, part) for name, parts in modules.items() for part in parts if hasattr(part, "_diffusers_hook")]
    for name, part in hooked:
        stateful = [hook for hook in part._diffusers_hook.hooks.values() if hook._is_stateful]
        if stateful:
            raise UnsupportedPipelineError(
                f"`{name}` has the cache hook {type(stateful[0]).__name__}, which carries activations from step to "
                "step; a step of such a policy depends on more than its latents and cannot be replayed alone. Take the hook out first "
                "(`disable_cache()`)."
            )


def refuse_offloading(pipe: DiffusionPipeline, modules: Iterable[nn.Module]) -> None:
    """Raises [`UnsupportedPipelineError`] where accelerate moves `modules`, all of the networks that are trained, off the device between their calls. Its hooks without offloading (a
    `device_map` over devices, a quantised base) and diffusers' group offloading, which moves layers within a call, are let be."""
    of_modules = [part._hf_hook for part in modules if hasattr(part, "_hf_hook")]
    hooks = [one for hook in of_modules for one in (hook.hooks if isinstance(hook, SequentialHook) else [hook])]
    # What `_all_hooks` lists is put on anew at the end of each call of the pipeline, on whatever stands in the place of its networks then.
    if getattr(pipe, "_all_hooks", []) or any(isinstance(hook, CpuOffload) for hook in hooks):
        found = "moves each network off the device after its use (`enable_model_cpu_offload`)"
    elif any(isinstance(hook, AlignDevicesHook) and hook.offload for hook in hooks):
        found = "moves each layer off the device after its use (`enable_sequential_cpu_offload`, or a `device_map` with layers on the CPU or the disk)"
    else:
        return
    raise UnsupportedPipelineError(
        f"{type(pipe).__name__} {found}, and a network that is trained has to stay there. Call `pipe.remove_all_hooks()` and then `pipe.to(device)`. What saves "
        "memory instead: sample_offload_encoders, sample_vae_slicing, train_gradient_checkpointing, and the pipeline in bf16."
    )
