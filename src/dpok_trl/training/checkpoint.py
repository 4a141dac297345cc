"""Checkpoints: atomic, whole or not there, resumed bit for bit, rotated."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from dpok_trl.policy.saved import STATE_FILE, checkpoints_in, find_checkpoint, step_of
from dpok_trl.results.runlog import METRICS_FILE, without_secrets


if TYPE_CHECKING:
    from dpok_trl.training.trainer import DPOKTrainer


logger = logging.getLogger(__name__)

REFERENCE_FILE = "reference.safetensors"  # trained weights of a reference that has moved
VALUE_FILE = "value_function.pt"  # network, optimizer and target statistics


class Checkpoints:
    """Saves and resumes a trainer under `output_dir/checkpoint-<optimizer step>`.

    A checkpoint holds the adapter (which a stock pipeline loads), optimizer, learning-rate schedule, loss scale and the random states of
    every process as accelerate writes them; what is there of value function, moved reference and buffer; and `trainer_state.json`: epoch, step, prompts,
    weight of the KL, per-prompt statistics and the list of files.
    It is written under another name and renamed when it is complete.
    """

    def __init__(self, trainer: DPOKTrainer):
        self.trainer = trainer
        self.folder = trainer.output_dir
        self.limit = trainer.config.project_kwargs.get("total_limit") or trainer.config.num_checkpoint_limit
        trainer.accelerator.register_save_state_pre_hook(self._save_networks)
        trainer.accelerator.register_load_state_pre_hook(self._load_networks)

    # ---------------------------------------------------------------- save

    def save(self) -> Path:
        """Called on all processes. Returns the checkpoint's path."""
        trainer, accelerator = self.trainer, self.trainer.accelerator
        final = self.folder / f"checkpoint-{trainer.global_step}"
        unfinished = self.folder / f"unfinished-checkpoint-{trainer.global_step}"
        callbacks = trainer.callbacks.state_dict(final)
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(unfinished))
        trainer.experience.save(unfinished)
        accelerator.wait_for_everyone()  # save_state ends without a barrier
        if accelerator.is_main_process:
            state = {**self._state(unfinished), "callbacks": callbacks}
            (unfinished / STATE_FILE).write_text(json.dumps(state, indent=2, default=str))
            earlier = final.with_name(f"replaced-{final.name}")
            if final.exists():  # in a warm-up no optimizer step is done
                os.replace(final, earlier)
            os.replace(unfinished, final)
            shutil.rmtree(earlier, ignore_errors=True)
            for path in self._all()[: -self.limit]:
                if str(path) != callbacks["best_model_checkpoint"]:
                    shutil.rmtree(path)
        accelerator.wait_for_everyone()
        return final

    def _state(self, folder: Path) -> dict[str, Any]:
        trainer = self.trainer
        return {
            "epoch": trainer.first_epoch,
            "global_step": trainer.global_step,
            "seconds": trainer.seconds,
            "num_processes": trainer.accelerator.num_processes,
            "base_model": trainer.pipeline.config.get("_name_or_path"),
            "reanchor": trainer.experience.reanchor,
            "mixes": [[list(steps), mixes] for steps, mixes in trainer.experience.mixes.items()],
            "prompts": trainer.prompts.state_dict(),
            "kl_weight": trainer.kl_weight,
            "evaluations": trainer.evaluator.state_dict(),
            "stat_tracker": None if trainer.stat_tracker is None else trainer.stat_tracker.state_dict(),
            "last_metrics": trainer.last_metrics,
            "config": without_secrets(trainer.config.to_dict()),
            "files": {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()},
        }

    def _save_networks(self, models: list, weights: list, output_dir: str) -> None:
        if self.trainer.accelerator.is_main_process:
            self.trainer.tuned.save(self.trainer.pipeline, output_dir)
            if self.trainer.tuned.moved_reference is not None:
                save_file(self.trainer.tuned.moved_reference, Path(output_dir) / REFERENCE_FILE)
            if self.trainer.critic is not None:
                torch.save(self.trainer.critic.function.state_dict(), Path(output_dir) / VALUE_FILE)
        weights.clear()  # what is frozen need not be written again

    # ---------------------------------------------------------------- resume

    def resume(self, path: Path) -> None:
        """Called on all processes.

        Args:
            path (`Path`): A checkpoint, or a folder of checkpoints of which the newest whole one is taken. Instead of a half-written
                checkpoint the newest whole one beside it is taken, with a warning.

        Raises:
            `ValueError`: If there is no whole checkpoint, or it was written by another number of processes.
        """
        trainer = self.trainer
        checkpoint = find_checkpoint(path)
        state = json.loads((checkpoint / STATE_FILE).read_text())
        if state["num_processes"] != trainer.accelerator.num_processes:
            raise ValueError(
                f"{checkpoint} was written by {state['num_processes']} processes and this run has {trainer.accelerator.num_processes}: each draws "
                f"its own noise, so the run would not go on as it was. Launch {state['num_processes']} processes, or start a new run from the "
                "adapter (`pipe.load_lora_weights(checkpoint)`)."
            )
        if checkpoint.parent.resolve() != self.folder.resolve():
            self.refuse_other_run()
        for name, default in (("train_use_lora", True), ("train_text_encoder", False)):
            saved, now = state["config"].get(name, default), getattr(trainer.config, name)
            if saved != now:
                raise ValueError(
                    f"{checkpoint} was written with {name} = {saved}, and this run has {now}: other weights are trained. Set it to {saved}, or start a new run."
                )
        if trainer.critic is not None and not (checkpoint / VALUE_FILE).exists():
            raise ValueError(
                f"{checkpoint} holds no value function: it was written with train_adv_type = '{state['config']['train_adv_type']}', and this run has 'value'. Set it "
                "to what it was, or start a new run from the adapter (`pipe.load_lora_weights(checkpoint)`)."
            )
        if trainer.critic is not None and state["config"]["value_input"] != trainer.config.value_input:
            raise ValueError(
                f"the value function of {checkpoint} sees {state['config']['value_input']}, and this run has value_input = '{trainer.config.value_input}'. Set it to "
                f"'{state['config']['value_input']}', or start a new run."
            )
        if any(checkpoint.glob("buffer-*")):
            for name in OF_THE_BUFFER:
                saved, now = state["config"][name], getattr(trainer.config, name)
                if saved != now:
                    raise ValueError(
                        f"{checkpoint} holds rounds that were sampled with {name} = {saved!r}, and this run has {now!r}: they cannot be trained on beside its own. Set it to "
                        f"{saved!r}, or start a new run from the adapter."
                    )
        changed = changed_settings(state["config"], trainer.config.to_dict())
        if changed:
            logger.warning(
                "settings differ from those of %s: %s. The learning rate and the optimizer's other settings stay as they were saved; all else, the "
                "length of the learning-rate schedule too, is as it is set now.",
                checkpoint,
                ", ".join(changed),
            )
        trainer.accelerator.load_state(str(checkpoint))
        trainer.accelerator.wait_for_everyone()  # the main process is about to rename what the others may still look at
        trainer.first_epoch = state["epoch"]
        trainer.global_step = state["global_step"]
        trainer.seconds = state["seconds"]
        trainer.last_metrics = state["last_metrics"]
        if trainer.config.train_reanchor is None:
            # decided on the run's first batch; another batch might decide otherwise
            trainer.experience.reanchor = state["reanchor"]
        trainer.prompts.load_state_dict(state["prompts"])
        trainer.experience.mixes = {tuple(steps): mixes for steps, mixes in state["mixes"]}
        if trainer.config.target_kl is not None and state["config"]["target_kl"] is not None:
            trainer.kl_weight = state["kl_weight"]  # as far as it has been adapted
        trainer.callbacks.load_state_dict(state["callbacks"])
        trainer.evaluator.load_state_dict(state["evaluations"])
        trainer.experience.load(checkpoint)
        if trainer.stat_tracker is not None and state["stat_tracker"] is not None:
            trainer.stat_tracker.load_state_dict(state["stat_tracker"])
        if trainer.accelerator.is_main_process:
            trainer.run_log.keep_epochs(trainer.first_epoch, trainer.global_step)
            self._set_later_ones_aside()
            logger.info(
                "resumed from %s: %d epochs, %d optimizer steps done", checkpoint, state["epoch"], state["global_step"]
            )

    def _load_networks(self, models: list, input_dir: str) -> None:
        tuned, folder = self.trainer.tuned, Path(input_dir)
        tuned.load(self.trainer.pipeline, folder)
        tuned.moved_reference = None
        if (folder / REFERENCE_FILE).exists() and self.trainer.config.reference_update_epochs is not None:
            tuned.move_reference(load_file(folder / REFERENCE_FILE))
        if self.trainer.critic is not None:
            state = torch.load(folder / VALUE_FILE, map_location="cpu", weights_only=True)
            self.trainer.critic.function.load_state_dict(state)
        models.clear()

    def _set_later_ones_aside(self) -> None:
        """Checkpoints that come after the resumed one are another run's future: kept, but not resumed from or rotated again."""
        for path in self._all():
            if step_of(path) > self.trainer.global_step:
                aside = path.with_name(f"superseded-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(path, aside)
                logger.info("%s is later than the checkpoint resumed from; renamed to %s", path, aside.name)

    # ---------------------------------------------------------------- the folder

    def refuse_other_run(self) -> None:
        """Raises `ValueError` if the output folder holds a run already: its metrics and checkpoints would be mixed with ours."""
        checkpoints = [path.name for path in self._all()]
        found = checkpoints + [path.name for path in (self.folder / METRICS_FILE,) if path.exists()]
        if found:
            resume = (
                f"go on with it by trainer.train(resume_from_checkpoint=True) or --resume_from {self.folder}, "
                if checkpoints
                else ""
            )
            raise ValueError(
                f"output_dir = '{self.folder}' holds another run ({', '.join(found[:3])}{' ...' if len(found) > 3 else ''}). Choose another output_dir, "
                f"{resume}or remove it."
            )

    def _all(self) -> list[Path]:
        return checkpoints_in(self.folder)


# Settings that rounds of a buffer cannot be trained without.
OF_THE_BUFFER = (
    "train_objective",
    "train_log_prob_reduction",
    "kl_gradient",
    "sample_num_steps",
    "sample_sde_window_size",
    "train_adv_scale",
)

# Settings that may change between the parts of a run without changing what it computes.
FREE_SETTINGS = (
    "exp_name",
    "run_name",
    "output_dir",
    "logdir",
    "num_epochs",
    "save_freq",
    "num_checkpoint_limit",
    "resume_from",
    "log_with",
    "sample_grid_freq",
    "eval_freq",
    "eval_num_images_per_prompt",
    "eval_batch_size",
    "eval_num_steps",
    "metric_for_best_model",
    "greater_is_better",
    "log_gradient_cosine_freq",
    "tracker_project_name",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "hub_strategy",
)


def changed_settings(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`name (saved -> now)` of the settings that differ, but for [`FREE_SETTINGS`] and tracker and project arguments."""
    now = json.loads(json.dumps(now, default=str))
    names = sorted(set(saved) | set(now))
    free = set(FREE_SETTINGS)
    if not now["train_lr_scheduler"].startswith("constant"):
        free.remove("num_epochs")  # the learning rate falls until the last epoch
    relevant = [n for n in names if n not in free and not n.startswith(("tracker_kwargs/", "project_kwargs/"))]
    return [f"{n} ({saved.get(n)} -> {now.get(n)})" for n in relevant if saved.get(n) != now.get(n)]
