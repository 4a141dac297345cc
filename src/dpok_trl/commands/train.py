"""`dpok-trl train`: any pipeline, reward and prompts, by flags and YAML; in several processes through Accelerate's launcher."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpok_trl.policy.shipped import DEMO


if TYPE_CHECKING:
    from dpok_trl.cli import CommandParser
    from dpok_trl.training.config import DPOKConfig
    from dpok_trl.training.parsing import DPOKParser, ScriptArguments


HELP = "tune a pipeline by a reward; without arguments, the shipped one"
DESCRIPTION = (
    "Tune any text-to-image pipeline by any reward on any prompts. A flag wins over the file of --config, the file over --preset, and the preset over the "
    "default. Flags of `accelerate launch` (--num_processes, --config_file ...) go to it; without any, one process trains here."
)

LAUNCHED = "--launched"  # says to the processes that Accelerate starts that they are to train
# of `accelerate launch`, in processes that it has started
LAUNCHER_VARIABLES = ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION")


def add_arguments(parser: CommandParser) -> None:
    parser.takes_all = (
        True  # see `run`: the settings are those of a dataclass, and some of its flags are the launcher's
    )


def run(args: argparse.Namespace) -> int:
    parser = make_parser()
    given = [word for word in args.arguments if word != LAUNCHED]
    # before anything is launched or loaded: what is wrong with the settings is told once, and at once
    script, config, unknown = parser.parse_known(given)
    is_launched = LAUNCHED in args.arguments or any(name in os.environ for name in LAUNCHER_VARIABLES)
    if not is_launched and (unknown or _is_configured()):
        own = without(given, unknown) + (["--debug"] if args.debug else [])
        return launch(parser, unknown, own)
    if unknown:
        parser.refuse_unknown(unknown)
    return train(script, config)


def make_parser() -> DPOKParser:
    from dpok_trl.cli import EXAMPLES
    from dpok_trl.training.config import DPOKConfig
    from dpok_trl.training.parsing import DPOKParser, ScriptArguments

    parser = DPOKParser(
        (ScriptArguments, DPOKConfig),
        prog="dpok-trl train",
        description=DESCRIPTION,
        epilog=f"example: {EXAMPLES['train']}",
    )
    parser.set_defaults(exp_name="dpok-trl")  # by whatever name this process was started
    return parser


def train(script: ScriptArguments, config: DPOKConfig) -> int:
    """One process of the run."""
    from dpok_trl.demo.command import demo_lora_config, only_errors

    if "" not in sys.path:
        sys.path.insert(0, "")  # the module of a reward may lie in the current folder
    if script.eval_prompts and not config.eval_freq:
        config.eval_freq = config.num_epochs  # at the end
    with only_errors():
        from dpok_trl.policy.saved import find_checkpoint
        from dpok_trl.training.trainer import DPOKTrainer

        if config.resume_from:  # what is not there is told before a model is loaded
            config.resume_from = str(find_checkpoint(Path(config.resume_from)))
        is_demo = script.model == DEMO
        own_lora = is_demo and config.train_use_lora and config.train_lora_rank is config.train_lora_alpha is None
        trainer = DPOKTrainer(
            config,
            script.reward,
            script.training_prompts(),
            script.model,
            peft_config=demo_lora_config() if own_lora else None,
            eval_prompts=script.evaluation_prompts(),
            eval_reward_function=script.eval_reward,
        )
        script.record(trainer)
        trainer.pipeline.set_progress_bar_config(disable=True)
        trainer.accelerator.print(summary(script, trainer), flush=True)
        trainer.train()
        folder = trainer.output_dir / "model"
        trainer.save_model(folder)
        trainer.accelerator.print(f"Model: {folder}")
    return 0


def summary(script: ScriptArguments, trainer: Any) -> str:
    config, processes, prompts = trainer.config, trainer.accelerator.num_processes, trainer.prompts.num_prompts
    images = config.sample_batch_size * config.sample_num_batches_per_epoch * processes
    trained = sum(parameter.numel() for parameter in trainer.trainable_layers)
    lines = [
        f"{script.model}: {trained:,} trained parameters, {processes} {'process' if processes == 1 else 'processes'} on {trainer.accelerator.device}",
        f"Reward {', '.join(script.reward)}; {prompts} {'prompt' if prompts == 1 else 'prompts'}; {config.num_epochs} epochs of {images} images in "
        f"{config.sample_num_steps} steps; kl_weight {config.kl_weight:g}"
        + (f"; preset {script.preset}" if script.preset else ""),
        f"Output: {trainer.output_dir}",
    ]
    return "\n".join(lines)


# --- several processes ------------------------------------------------------------------------------------------------


def launch(parser: DPOKParser, flags: Sequence[str], own: Sequence[str]) -> int:
    """Starts the processes by `accelerate launch`, and waits for them.

    Args:
        flags (`Sequence[str]`): Those of the launcher.
        own (`Sequence[str]`): Those of the run.

    Raises:
        `ValueError`: For a flag that nobody has, and where one process would start instead of several.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    launcher = launch_command_parser()
    names = {_name(flag) for flag in launcher._option_string_actions}
    strange = [word for word in flags if word.startswith("-") and _name(word) not in names]
    if strange or (flags and not flags[0].startswith("-")):
        parser.refuse_unknown(strange or flags, others=sorted(names))
    launched = launcher.parse_args([*flags, "--module", "dpok_trl.cli", "train", LAUNCHED, *own])
    refuse_one_process(launched)
    try:
        launch_command(launched)
    except ChildFailedError as error:  # it has said why
        _, first = error.get_first_failure()
        return first.exitcode
    except subprocess.CalledProcessError as error:
        return error.returncode
    except SignalException:  # passed on to the processes, which have saved and told
        raise KeyboardInterrupt("the processes were told to stop, and have said what is saved") from None
    return 0


def refuse_one_process(launched: argparse.Namespace) -> None:
    """Raises `ValueError` where Accelerate would start one process in silence, instead of the several that were asked for."""
    import torch
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType

    processes, cpu, kind = launched.num_processes, launched.cpu, DistributedType.NO
    if launched.config_file is not None or (_is_configured() and not cpu):
        config = load_config_from_file(launched.config_file)
        processes = processes or config.num_processes
        cpu, kind = cpu or config.use_cpu, config.distributed_type
    several = launched.multi_gpu or launched.use_fsdp or launched.use_deepspeed or launched.use_megatron_lm
    several = several or kind not in (DistributedType.NO, DistributedType.MULTI_CPU)
    several = several or (launched.config_file is None and torch.accelerator.device_count() > 1)
    if processes is not None and processes > 1 and (cpu or not several):
        raise ValueError(
            f"Accelerate would start one process instead of {processes}, since there are not several GPUs here or --cpu rules them out. On CPUs: "
            f"ACCELERATE_USE_CPU=true dpok-trl train --multi_gpu --num_processes {processes} --num_machines 1 ..."
        )


def without(words: Sequence[str], some: Sequence[str]) -> list[str]:
    """`words` less `some`, which stand among them in their order."""
    left, rest = list(some), []
    for word in words:
        if left and word == left[0]:
            left.pop(0)
        else:
            rest.append(word)
    return rest


def _name(flag: str) -> str:
    return flag.partition("=")[0].lstrip("-").replace("-", "_")


def _is_configured() -> bool:
    """Whether `accelerate config` was run on this machine."""
    from accelerate.commands.config.config_args import default_config_file

    return os.path.isfile(default_config_file)
