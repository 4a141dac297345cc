"""What the trainer stands on: accelerator, output folder, optimizer."""

from __future__ import annotations

import atexit
import logging
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration, broadcast_object_list

from dpok_trl.training.config import DPOKConfig


UNSUPPORTED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
SECONDS_TO_RELEASE = 0.2

logger = logging.getLogger(__name__)


def make_accelerator(config: DPOKConfig) -> Accelerator:
    """The accelerator of a run.

    Raises:
        `RuntimeError`: If a launcher started several processes and Accelerate sees one: each would believe to be the main one.
    """
    project = dict(config.project_kwargs)
    project.pop("project_dir", None)  # see settle_output_dir
    project.pop("total_limit", None)  # see Checkpoints
    if project.pop("automatic_checkpoint_naming", False):
        logger.info(
            "project_kwargs['automatic_checkpoint_naming'] is not needed: checkpoints are named checkpoint-<step>"
        )
    arguments = dict(config.accelerator_kwargs)
    accelerator = Accelerator(
        log_with=config.log_with,
        mixed_precision=config.mixed_precision,
        project_config=ProjectConfiguration(**{"logging_dir": config.logdir, **project}),
        step_scheduler_with_optimizer=False,  # or it would step once for each process
        **arguments,
    )
    atexit.unregister(let_gloo_threads_finish)
    atexit.register(let_gloo_threads_finish)
    if (
        accelerator.gradient_accumulation_steps != 1
    ):  # from `accelerate launch` or its config file; it would divide the loss once more
        logger.warning(
            "gradient_accumulation_steps = %d of the launcher is not used: train_gradient_accumulation_steps counts training batches",
            accelerator.gradient_accumulation_steps,
        )
        accelerator.gradient_accumulation_steps = 1
    if accelerator.distributed_type in UNSUPPORTED:
        raise ValueError(
            f"distributed_type = {accelerator.distributed_type.value} is not supported: a checkpoint and the exported model are written by one process, which would have "
            "a part of the weights. Launch with plain data parallelism (DDP: distributed_type MULTI_GPU)."
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        logger.warning("mixed_precision = 'fp16' does nothing on a CPU; use 'bf16' or 'no'")
    if config.log_with not in (None, "all") and not accelerator.log_with:
        raise ImportError(f"log_with = '{config.log_with}', but it is not installed: `pip install {config.log_with}`.")
    if config.log_with == "all" and not accelerator.log_with:
        raise ImportError(
            "log_with = 'all', and no tracker is installed: `pip install trackio`, or leave log_with out."
        )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise RuntimeError(
            f"WORLD_SIZE = {launched} processes were launched, but Accelerate runs {accelerator.num_processes}: each would believe to be the main "
            "one and write to the same folder. On a machine without GPUs set ACCELERATE_USE_CPU=true or accelerator_kwargs={'cpu': True}; note "
            "that `accelerate launch --cpu --num_processes 2` starts one process only (use `torchrun --nproc_per_node 2`)."
        )
    return accelerator


def let_gloo_threads_finish() -> None:
    """Lets go of the interpreter's lock for a moment when the process ends. A thread of gloo needs it to release the tensors of the last collectives, and a thread that still
    waits for it when Python shuts down aborts the process ("terminate called without an active exception"): to its launcher a failed run, though all work is done."""
    group = torch.distributed
    if group.is_available() and group.is_initialized() and group.get_backend() == "gloo":
        time.sleep(SECONDS_TO_RELEASE)


def settle_output_dir(config: DPOKConfig, accelerator: Accelerator) -> Path:
    """`output_dir`, or DDPO's `project_kwargs["project_dir"]`, or `{logdir}/{exp_name}-{run_name}`; the same on all processes.

    Trackers write there too, unless `project_kwargs["logging_dir"]` says otherwise.
    """
    given = config.output_dir or config.project_kwargs.get("project_dir")
    if not given:
        run_name = config.run_name or datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        name = [str(Path(config.logdir) / f"{config.exp_name or 'dpok'}-{run_name}")]
        broadcast_object_list(name)  # clocks differ between machines
        given = name[0]
    project = accelerator.project_configuration
    project.project_dir = str(given)
    project.logging_dir = config.project_kwargs.get("logging_dir", str(given))
    return Path(given)


def reward_threads(config: DPOKConfig, device: torch.device) -> ThreadPoolExecutor:
    """`max_workers` threads for rewards. The current CUDA device is a thread's own, and would be the first one in a new thread."""
    if device.type == "cuda":
        return ThreadPoolExecutor(config.max_workers, initializer=torch.cuda.set_device, initargs=(device,))
    return ThreadPoolExecutor(config.max_workers)


def make_optimizer(config: DPOKConfig, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, or AdamW8bit of bitsandbytes."""
    if config.train_use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as AdamW
    else:
        from torch.optim import AdamW
    return AdamW(
        parameters,
        lr=config.train_learning_rate,
        betas=(config.train_adam_beta1, config.train_adam_beta2),
        weight_decay=config.train_adam_weight_decay,
        eps=config.train_adam_epsilon,
    )
