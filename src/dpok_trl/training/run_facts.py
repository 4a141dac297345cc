"""What a trainer tells of its run, for the model card."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from diffusers import DiffusionPipeline

from dpok_trl.policy.lora import adapter_name
from dpok_trl.policy.tuning import Tuned
from dpok_trl.results.model_card import RunFacts, TrainedReward
from dpok_trl.results.provenance import machine
from dpok_trl.rewards.info import RewardInfo
from dpok_trl.training.config import DPOKConfig
from dpok_trl.training.evaluating import FOLDER
from dpok_trl.training.sft_config import DPOKSFTConfig


if TYPE_CHECKING:
    from dpok_trl.training.trainer import DPOKTrainer


def run_facts(trainer: DPOKTrainer) -> RunFacts:
    """What is known now; of a run that goes on, what has been done so far."""
    config, pipe = trainer.config, trainer.pipeline
    supervised = isinstance(config, DPOKSFTConfig)
    images = trainer.last_metrics.get("images")
    return RunFacts(
        pipeline=type(pipe).__name__,
        base_model=pipe.config.get("_name_or_path"),
        task=task_of(pipe, [*(config.sample_call_columns or []), *config.sample_call_kwargs]),
        full=trainer.tuned.full,
        trained=what_is_trained(trainer.tuned),
        objective=config.sft_loss if supervised else config.train_objective,
        kl=supervised_kl(config) if supervised else kl_term(config),
        reduction=config.train_log_prob_reduction,
        loading_code=lambda base, repository: trainer.tuned.loading_code(pipe, base, repository),
        call=dict(trainer.policy.call_kwargs),
        call_columns=config.sample_call_columns or (),
        prompts=trainer.prompts.listed,
        rewards=[
            TrainedReward(reward.name, weight, info if isinstance(info, RewardInfo) else None)
            for reward, weight in zip(trainer.rewards.rewards, trainer.rewards.weights.tolist(), strict=True)
            for info in [getattr(reward.function, "info", None)]
        ],
        settings=config.to_dict(),
        epochs=trainer.first_epoch,
        updates=trainer.global_step,
        images=None if images is None else int(images),
        seconds=trainer.seconds,
        hardware=hardware(trainer),
        run_folder=trainer.output_dir,
        evaluation_folder=trainer.output_dir / FOLDER,
    )


def task_of(pipe: DiffusionPipeline, given: list[str]) -> str:
    """The Hub's name for what a pipeline does, by its call: with a number of frames it makes videos, and a picture that is given is where it starts from.

    Args:
        given (`list[str]`): Names of the arguments that the run gives it.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    source = "image" if "image" in given else "text"
    return f"{source}-to-{'video' if 'num_frames' in parameters else 'image'}"


def what_is_trained(tuned: Tuned) -> str:
    count = sum(weight.numel() for weight in tuned.trained_weights().values())
    parameters = f"{count:,} parameters"
    if tuned.full:
        return f"all weights of {', '.join(tuned.denoisers)} ({parameters})"
    kinds: dict[str, list[str]] = {}
    for name, module in tuned.modules.items():
        adapter = module.peft_config[adapter_name(module)]
        kinds.setdefault(f"LoRA of rank {adapter.r} and alpha {adapter.lora_alpha:g}", []).append(name)
    adapters = "; ".join(f"{kind} on {', '.join(names)}" for kind, names in kinds.items())
    return f"{adapters} ({parameters})"


def kl_term(config: DPOKConfig) -> str | None:
    if not config.kl_weight and config.target_kl is None:
        return None
    kind = "the exact KL of each step" if config.kl_type == "gaussian" else "the squared difference of the outputs"
    if config.target_kl is not None:
        return f"{kind}, weighted to hold {config.target_kl:g} nats for a denoising path"
    return f"{config.kl_weight:g} × {kind}"


def supervised_kl(config: DPOKSFTConfig) -> str | None:
    """The paper's surrogates of it."""
    return (
        None if config.sft_kl == "none" else f"{config.sft_kl.upper().replace('_', '-')}, gamma {config.sft_gamma:g}"
    )


def hardware(trainer: DPOKTrainer) -> str:
    accelerator = trainer.accelerator
    processes = f"{accelerator.num_processes} × " if accelerator.num_processes > 1 else ""
    weights = str(next(iter(trainer.tuned.denoisers.values())).dtype).removeprefix("torch.")
    mixed = "" if accelerator.mixed_precision == "no" else f", {accelerator.mixed_precision} mixed precision"
    return f"{processes}{machine(accelerator.device)}; {weights} weights{mixed}"
