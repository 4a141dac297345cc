"""Callbacks: transformers' `TrainerCallback`s, driven from the loop of [`DPOKTrainer`]."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from dpok_trl.results.runlog import METRICS_FILE, read_metrics
from dpok_trl.training.processes import together


if TYPE_CHECKING:
    from dpok_trl.training.config import DPOKConfig
    from dpok_trl.training.trainer import DPOKTrainer


logger = logging.getLogger(__name__)

FLAGS = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")


class CallbackArguments:
    """What a callback gets as `args`: every setting of the run by its own name, and the following by the name that `transformers.TrainingArguments` has for it.

    It is no `TrainingArguments`: most of those 114 fields are about things that a run here does not have, and their defaults would be read as if they held.

    Args:
        trainer ([`DPOKTrainer`])

    Raises:
        `AttributeError`: For any other name; the message says where to look.
    """

    def __init__(self, trainer: DPOKTrainer):
        config, accelerator = trainer.config, trainer.accelerator
        self._config = config
        self.output_dir = str(trainer.output_dir)
        self.num_train_epochs = config.num_epochs
        self.learning_rate = config.train_learning_rate
        self.per_device_train_batch_size = config.train_batch_size
        self.gradient_accumulation_steps = config.train_gradient_accumulation_steps
        self.max_grad_norm = config.train_max_grad_norm
        self.gradient_checkpointing = config.train_gradient_checkpointing
        self.logging_strategy = IntervalStrategy.STEPS  # every optimizer step is logged
        self.logging_steps = 1
        self.logging_first_step = True
        self.eval_strategy = IntervalStrategy.EPOCH if config.eval_freq else IntervalStrategy.NO
        self.save_strategy = SaveStrategy.EPOCH if config.save_freq else SaveStrategy.NO
        self.save_total_limit = config.num_checkpoint_limit
        self.load_best_model_at_end = False
        self.fp16 = accelerator.mixed_precision == "fp16"
        self.bf16 = accelerator.mixed_precision == "bf16"
        self.device = accelerator.device
        self.world_size = accelerator.num_processes
        self.process_index = accelerator.process_index
        self.local_process_index = accelerator.local_process_index
        self.disable_tqdm = not accelerator.is_local_main_process

    def __getattr__(self, name: str) -> Any:  # only for what is not set above
        config: DPOKConfig = self.__dict__["_config"]
        if name in {item.name for item in fields(config)}:
            return getattr(config, name)
        if name in {item.name for item in fields(TrainingArguments)}:
            raise AttributeError(
                f"a callback reads args.{name}, a field of transformers.TrainingArguments that a run of {type(config).__name__} has nothing for. "
                "docs/callbacks.md lists what args holds; give the callback what it needs when you construct it, or leave it out."
            )
        raise AttributeError(
            f"a callback reads args.{name}, which is neither a setting of {type(config).__name__} nor listed in docs/callbacks.md."
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings of the run, as [`DPOKConfig.to_dict`] gives them."""
        return self._config.to_dict()


class Callbacks:
    """Calls the callbacks of a trainer, on every process, with transformers' `TrainerState` and `TrainerControl`.

    What one process asks for by `control`, all do: the flags are gathered at the end of an optimizer step, of an epoch, of an evaluation and of a save.

    Args:
        trainer ([`DPOKTrainer`]): It has everything but its callbacks.
        callbacks (`Sequence[TrainerCallback | type[TrainerCallback]]`)

    Raises:
        `TypeError`: For a callback that is none.
        `ValueError`: If no evaluation will log `config.metric_for_best_model`.
    """

    def __init__(self, trainer: DPOKTrainer, callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = ()):
        self.trainer = trainer
        self.callbacks = [_instance(callback) for callback in callbacks]
        check_metric_for_best_model(trainer)
        self.args = CallbackArguments(trainer)
        self.control = TrainerControl()
        self.state = TrainerState(
            logging_steps=1,
            eval_steps=None,
            save_steps=None,
            num_train_epochs=trainer.config.num_epochs,
            is_local_process_zero=trainer.accelerator.is_local_main_process,
            is_world_process_zero=trainer.accelerator.is_main_process,
        )
        self.call("on_init_end")

    @property
    def show_progress(self) -> bool:
        """Whether one of them draws a progress bar. By name, since those of other libraries have no base class in common."""
        classes = [base.__name__ for callback in self.callbacks for base in type(callback).__mro__]
        return any(name.endswith("ProgressCallback") for name in classes)

    def call(self, event: str, **given: Any) -> None:
        """Calls an event of the callbacks that have it, in order; on all processes.

        Raises:
            What a callback raises; on the other processes `RuntimeError` with the same message.
        """
        listening = [one for one in self.callbacks if getattr(type(one), event) is not getattr(TrainerCallback, event)]
        if not listening:
            return
        trainer = self.trainer
        with together(trainer.accelerator):
            for callback in listening:
                control = getattr(callback, event)(
                    self.args,
                    self.state,
                    self.control,
                    model=trainer.policy,
                    processing_class=None,
                    optimizer=trainer.optimizer,
                    lr_scheduler=trainer.lr_scheduler,
                    train_dataloader=None,
                    eval_dataloader=None,
                    **given,
                )
                self.control = self.control if control is None else control

    def _agree(self) -> None:
        accelerator = self.trainer.accelerator
        if not self.callbacks or accelerator.num_processes == 1:
            return
        own = torch.tensor([[int(getattr(self.control, flag)) for flag in FLAGS]], device=accelerator.device)
        for flag, asked in zip(FLAGS, accelerator.gather(own).amax(0).tolist(), strict=True):
            setattr(self.control, flag, bool(asked))

    # ---------------------------------------------------------------- the loop

    def train_begin(self, last: int) -> None:
        """A run until `last` epochs are done begins."""
        trainer, state = self.trainer, self.state
        updates = last - min(last, trainer.config.value_warmup_epochs)
        state.num_train_epochs = last
        state.max_steps = updates * self._updates_per_epoch()
        state.epoch, state.global_step = float(trainer.first_epoch), trainer.global_step
        if trainer.first_epoch and (trainer.output_dir / METRICS_FILE).exists():
            state.log_history = read_metrics(trainer.output_dir)
        self.control.should_training_stop = False
        self.call("on_train_begin")

    def epoch_begin(self, epoch: int) -> None:
        self.control.should_epoch_stop = False
        self.state.epoch = float(epoch)
        self.call("on_epoch_begin")

    def step_begin(self) -> None:
        self.call("on_step_begin")

    def step_end(self, epoch: int) -> bool:
        """An optimizer step is done. Returns whether the epoch ends with it."""
        self.state.global_step = self.trainer.global_step
        self.state.epoch = min(self.state.epoch + 1 / self._updates_per_epoch(), float(epoch + 1))
        self.call("on_step_end")
        self._agree()
        return self.control.should_epoch_stop or self.control.should_training_stop

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """What has just been logged. Nothing is left to log when a callback asks by `should_log`."""
        self.control.should_log = False
        if not self.callbacks:
            return
        self.state.log_history.append({"step": step, **metrics})
        self.call("on_log", logs=dict(metrics))

    def epoch_end(self, epoch: int) -> None:
        self.state.epoch = float(epoch + 1)
        self.call("on_epoch_end")
        self._agree()

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """An evaluation is done and logged.

        The metric to judge by is there under transformers' name too, `eval_` and its own name: that is where `EarlyStoppingCallback` looks.
        """
        state, config, name = self.state, self.trainer.config, self.trainer.config.metric_for_best_model
        value = None if name is None else metrics.get(name)  # what is not finite is not logged
        self.control.should_evaluate = False
        self.call("on_evaluate", metrics={**metrics, **({} if value is None else {f"eval_{name}": value})})
        self._agree()
        # after the callbacks, as in transformers: they compare with the best one before
        better = value is not None and (
            state.best_metric is None
            or (value > state.best_metric if config.greater_is_better else value < state.best_metric)
        )
        if better:
            state.best_metric, state.best_global_step = value, state.global_step

    def saved(self) -> None:
        self.control.should_save = False
        self.call("on_save")
        self._agree()

    def train_end(self) -> None:
        self.call("on_train_end")

    def _updates_per_epoch(self) -> int:
        """As the learning-rate schedule counts them."""
        return self.trainer.config.train_num_inner_epochs * self.trainer._updates_per_pass()

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self, checkpoint: Path) -> dict[str, Any]:
        """What is resumed from `checkpoint`, which is about to be written; called on all processes.

        Raises:
            `TypeError`: If the state of a callback (`ExportableState`) cannot be written as JSON.
        """
        state = self.state
        if state.best_metric is not None and state.best_global_step == state.global_step:
            state.best_model_checkpoint = str(checkpoint)
        with together(self.trainer.accelerator):
            stateful = [callback for callback in self.callbacks if isinstance(callback, ExportableState)]
            exported = TrainerState(stateful_callbacks=stateful).stateful_callbacks
            for name, values in exported.items():
                try:
                    json.dumps(values)
                except TypeError as raised:
                    raise TypeError(
                        f"the state of the callback {name} goes into a checkpoint as JSON, and it cannot: {raised}. Let its state() return numbers, "
                        "texts, lists and dicts."
                    ) from raised
        names = ("best_metric", "best_global_step", "best_model_checkpoint")
        return {**{name: getattr(state, name) for name in names}, "stateful_callbacks": exported}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Sets the attributes that callbacks had exported. What they were constructed with stays as it is now."""
        state = self.state
        state.best_metric, state.best_global_step = saved["best_metric"], saved["best_global_step"]
        if saved["best_model_checkpoint"] is not None:  # the run's folder may have moved
            best = self.trainer.output_dir / Path(saved["best_model_checkpoint"]).name
            state.best_model_checkpoint = str(best) if best.is_dir() else None
        stored = {
            name: list(values) if isinstance(values, list) else [values]
            for name, values in saved["stateful_callbacks"].items()
        }
        for callback in self.callbacks:
            of_its_class = stored.get(type(callback).__name__)
            if isinstance(callback, ExportableState) and of_its_class:
                for name, value in of_its_class.pop(0)["attributes"].items():
                    setattr(callback, name, value)
        left = [name for name, values in stored.items() if values]
        if left:
            logger.warning(
                "the checkpoint holds the state of callbacks that this run does not have: %s", ", ".join(left)
            )


def _instance(callback: Any) -> TrainerCallback:
    made = callback() if isinstance(callback, type) else callback
    if not isinstance(made, TrainerCallback):
        raise TypeError(
            f"callbacks are transformers.TrainerCallback classes or instances, given: {callback!r}. Derive the class from TrainerCallback."
        )
    return made


def check_metric_for_best_model(trainer: DPOKTrainer) -> None:
    """Raises `ValueError` for a `metric_for_best_model` that no evaluation of this run logs."""
    name = trainer.config.metric_for_best_model
    if name is None:
        return
    held_out = trainer.evaluator.held_out
    rewards = [*trainer.rewards.names, *([] if held_out is None else held_out.names)]
    parts = [f"{reward}/{part}" for reward in rewards for part in ("base", "tuned", "difference")]
    logged = [f"eval/{one.name}/{part}" for one in trainer.evaluator.sets for part in [*parts, "kl", "diversity"]]
    if name not in logged:
        close = difflib.get_close_matches(name, logged, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise ValueError(
            f"metric_for_best_model = '{name}' is logged by no evaluation of this run.{hint} There are: {', '.join(logged)}."
        )
