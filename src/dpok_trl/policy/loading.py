"""Pipelines by name, and what was trained of them."""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
from accelerate.utils import compare_versions
from diffusers import DiffusionPipeline
from peft import LoraConfig

from dpok_trl.policy.hooks import PipelineHooks
from dpok_trl.policy.lora import adapter_name, prepare_adapter
from dpok_trl.policy.lora_files import LORA_FILE, PEFT_FILE, file_of, load_lora, text_encoders_with_lora
from dpok_trl.policy.saved import DEMO, PIPELINE_FILE, SHIPPED_PIPELINE, base_model, find_model, is_left_by_training
from dpok_trl.policy.tuning import Tuned, tune


# diffusers 0.40 renamed it, and 0.39 drops what it does not know
DTYPE_ARGUMENT = "dtype" if compare_versions("diffusers", ">=", "0.40") else "torch_dtype"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_pipeline(pipeline: DiffusionPipeline | str | Path, dtype: str | None = None) -> DiffusionPipeline:
    """A pipeline, or one loaded from a Hub id or folder, as it is: rollouts walk on a scheduler of their own where its is no policy.

    Args:
        pipeline (`DiffusionPipeline`, `str` or `Path`): "demo" is the one that is shipped, "./demo" a folder.
        dtype (`"fp32"`, `"bf16"` or `"fp16"`, *optional*): Of a pipeline that is loaded. Default: diffusers' own.

    Raises:
        `ValueError`: For anything else, for a `dtype` with a pipeline that has been loaded already, and for a class that is not diffusers' own.
        `OSError`: For a name that is neither a folder nor a pipeline of the Hub.
    """
    if isinstance(pipeline, DiffusionPipeline):
        if dtype is not None:
            raise ValueError(
                f"model_dtype = '{dtype}' is for pipelines given by name, and this {type(pipeline).__name__} has been loaded. Load it in that dtype: "
                f"`from_pretrained(..., {DTYPE_ARGUMENT}={DTYPES[dtype]})`."
            )
        return pipeline
    if not isinstance(pipeline, (str, Path)):
        raise ValueError(
            f"sd_pipeline must be a diffusers pipeline, a Hub id or a folder; given: {type(pipeline).__name__}. A loaded pipeline comes from "
            "`DiffusionPipeline.from_pretrained(...)`."
        )
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype!r}, but it must be one of {', '.join(DTYPES)}.")
    given = {} if dtype is None else {DTYPE_ARGUMENT: DTYPES[dtype]}
    if pipeline == DEMO:
        pipeline = SHIPPED_PIPELINE
    try:
        return DiffusionPipeline.from_pretrained(str(pipeline), **given)
    except AttributeError as error:  # what diffusers raises for a class that it does not have
        name = DiffusionPipeline.load_config(str(pipeline))["_class_name"]
        if not isinstance(name, str) or hasattr(diffusers, name):
            raise
        raise ValueError(
            f"the class {name} is not diffusers' own: load it yourself (`{name}.from_pretrained(...)`) and hand over the object."
        ) from error
    except OSError as error:
        if is_left_by_training(Path(pipeline)):
            raise FileNotFoundError(
                f"{pipeline} is what a training left (a run, a checkpoint or a saved model), and no pipeline. Give the pipeline that it was trained on. To go on with a run: "
                f"resume_from = '{pipeline}'; to draw: load_tuned('{pipeline}')."
            ) from error
        if Path(pipeline).exists():
            raise
        raise OSError(f"there is no folder {pipeline} here, and as a Hub id: {error}") from error


def load_tuned(
    model: str | Path,
    dtype: str | None = None,
    device: str | torch.device | None = None,
    base: DiffusionPipeline | str | Path | None = None,
) -> DiffusionPipeline:
    """The pipeline that a training left, ready to draw: `load_tuned("me/rabbit-lora")("a green rabbit").images[0]`.

    Args:
        model (`str` or `Path`): A repository of the Hub, a saved model, a checkpoint, or the output folder of a run (its newest checkpoint).
        dtype (`"fp32"`, `"bf16"` or `"fp16"`, *optional*): Of the pipeline. Default: diffusers' own, which is fp32.
        device (`str` or `torch.device`, *optional*): Where to put it. Default: cuda where there is one, else cpu.
        base (`DiffusionPipeline`, `str` or `Path`, *optional*): The pretrained pipeline, changed in place if it is an object; "demo" for the shipped one. Default:
            what the model card or the checkpoint says; a whole fine-tuned pipeline needs none.

    Raises:
        `FileNotFoundError`: If there is no such model, or nothing in it that fits the base.
        `ValueError`: If the base is not known; and as [`load_pipeline`].
    """
    folder = find_model(model)
    whole = (folder / PIPELINE_FILE).is_file()
    if base is None and whole:
        pipe = load_pipeline(folder, dtype)
    else:
        base = base_model(folder) if base is None else base
        if base is None:
            raise ValueError(
                f"neither a model card nor a checkpoint in {model} says which pipeline this was trained on (a card names no folder of somebody's computer). Give it: "
                f"load_tuned('{model}', base='owner/name'), or base='{DEMO}' for the shipped pipeline."
            )
        pipe = load_pipeline(base, dtype)
        load_trained(pipe, folder, keep_pretrained=False)
    return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_trained(pipe: DiffusionPipeline, folder: Path, *, keep_pretrained: bool = True) -> Tuned:
    """Loads what `save_model` or a checkpoint holds into a pretrained pipeline: a LoRA file, adapters in peft's layout, or whole denoisers.

    Args:
        keep_pretrained (`bool`): Of whole denoisers, keep a copy as they were, which a KL needs.

    Raises:
        `FileNotFoundError`: If the folder has none of them for this pipeline.
    """
    denoisers = PipelineHooks().denoisers(pipe)
    if (folder / LORA_FILE).is_file():
        pipe.load_lora_weights(str(folder), weight_name=LORA_FILE)
        for name in denoisers:
            if (folder / file_of(name)).is_file():  # a second expert
                pipe.load_lora_weights(str(folder), weight_name=file_of(name), **{f"load_into_{name}": True})
        encoders = text_encoders_with_lora(pipe)
        return Tuned(denoisers, {name: one for name, one in encoders.items() if adapter_name(one) is not None})
    if all((folder / name / PEFT_FILE).is_file() for name in denoisers):
        for name, module in denoisers.items():
            prepare_adapter(module, LoraConfig.from_pretrained(str(folder / name)))
        load_lora(pipe, denoisers, folder)
        return Tuned(denoisers)
    if all((folder / name / "config.json").is_file() for name in denoisers):
        tuned = tune(pipe, denoisers, full=True) if keep_pretrained else Tuned(denoisers)
        for name, module in denoisers.items():
            module.load_state_dict(type(module).from_pretrained(folder / name).state_dict())
        return tuned
    looked_for = ", ".join(
        [LORA_FILE, *(f"{name}/{PEFT_FILE}" for name in denoisers), *(f"{name}/config.json" for name in denoisers)]
    )
    raise FileNotFoundError(
        f"{folder} holds nothing that was trained of this {type(pipe).__name__}: looked for {looked_for}."
    )
