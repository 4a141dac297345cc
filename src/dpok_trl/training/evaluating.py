"""Evaluation in a run: the same prompts and seeds every time, on any number of processes, without a trace in the training."""

from __future__ import annotations

import difflib
import inspect
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import gather_object

from dpok_trl.results.drawing import EvaluationSampler, ModelSamples, SampledRows, refuse_less_than_one
from dpok_trl.results.evaluation import Evaluation, bind_rewards, compare_models
from dpok_trl.results.evaluation_files import evaluation_grid
from dpok_trl.results.prompt_sets import PromptSet, read_prompt_sets, refuse_wrong_sets
from dpok_trl.results.trackers import log_images_to
from dpok_trl.rewards.binding import BoundReward, TrainerState
from dpok_trl.rewards.combining import RewardSet
from dpok_trl.rewards.wrappers import Standardized
from dpok_trl.training.building import on_the_device
from dpok_trl.training.overoptimisation import WINDOW, Snapshot, over_optimisation, stronger_kl
from dpok_trl.training.processes import together
from dpok_trl.training.tracking import report


if TYPE_CHECKING:
    from dpok_trl.training.trainer import DPOKTrainer


logger = logging.getLogger(__name__)

FOLDER = "evaluation"  # of the newest one, in the output folder


class Evaluator:
    """Evaluates a trainer's policy against the pretrained model.

    The pretrained model does not change: its images are drawn and judged once, at the first evaluation.

    Args:
        trainer ([`DPOKTrainer`])
        eval_prompts: See [`DPOKTrainer`]; `None` without evaluations while training.
        eval_reward_function: Held-out rewards; likewise.

    Raises:
        `ValueError` or `TypeError`: For prompts and rewards that cannot be used, and for `eval_freq` without prompts.
    """

    def __init__(self, trainer: DPOKTrainer, eval_prompts: Any = None, eval_reward_function: Any = None):
        self.trainer = trainer
        config = trainer.config
        if config.eval_freq and eval_prompts is None:
            raise ValueError(
                f"eval_freq = {config.eval_freq} asks for evaluations while training, and there are no prompts for them. Give the trainer eval_prompts, such as "
                "{'training': [...], 'held-out': [...]}, or set eval_freq = 0."
            )
        self.sets = [] if eval_prompts is None else self._read(eval_prompts)
        self.held_out = None if eval_reward_function is None else self._held_out_rewards(eval_reward_function)
        if config.eval_freq:
            reward_sets, _ = bind_rewards(trainer.rewards, self.held_out, trainer.accelerator.device)
            refuse_running_statistics(reward_sets)
        self._policies: dict[int | None, Any] = {None: trainer.policy}  # by number of steps
        self._base: dict[str, ModelSamples] = {}
        self._base_rewards: RewardSet | None = None  # those that judged it
        self._history: deque[Snapshot] = deque(maxlen=WINDOW)
        self._warned = False
        self.newest: Evaluation | None = None  # of the training

    # ---------------------------------------------------------------- while training

    def after_epoch(self, epoch: int, last: bool, asked: bool = False) -> dict[str, float] | None:
        """Called on all processes when an epoch is done: evaluates every `eval_freq` epochs, at the end, and where it is asked for; logs and returns the
        metrics, `None` where no evaluation is due."""
        freq = self.trainer.config.eval_freq
        if not asked and (not freq or not (last or (epoch + 1) % freq == 0)):
            return None
        started = time.monotonic()
        evaluation = self.newest = self.evaluate()
        metrics = {"epoch": epoch, **evaluation.metrics(), **self._over_optimisation(evaluation, epoch)}
        trainer = self.trainer
        trainer._log({**metrics, "time/evaluation": time.monotonic() - started}, trainer.global_step)
        with together(trainer.accelerator):
            if trainer.accelerator.is_main_process:
                evaluation.save(trainer.output_dir / FOLDER)
                grid = evaluation_grid(evaluation)
                log_images_to(trainer.accelerator.trackers, FOLDER, [grid], [f"epoch {epoch}"], trainer.global_step)
                report(trainer, evaluation)
        return metrics

    def _over_optimisation(self, evaluation: Evaluation, epoch: int) -> dict[str, float]:
        """Whether the training reward rises at the expense of others, once there are enough evaluations to tell."""
        trainer = self.trainer
        self._history.append(Snapshot.of(evaluation, epoch, trainer.global_step))
        if len(self._history) < WINDOW:
            return {}
        weights = dict(zip(trainer.rewards.names, trainer.rewards.weights.tolist(), strict=True))
        found = over_optimisation(self._history[0], self._history[-1], weights, stronger_kl(trainer))
        if found is not None and not self._warned and trainer.accelerator.is_main_process:
            logger.warning("%s", found)
        self._warned = found is not None  # once for each event: again only after it was over
        return {"eval/over_optimisation": float(found is not None)}

    def state_dict(self) -> dict[str, Any]:
        """What the warning of over-optimisation remembers, for JSON."""
        return {"warned": self._warned, "history": [snapshot.state_dict() for snapshot in self._history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where the evaluations of a resumed run stood; not where other prompts are evaluated now."""
        names = {one.name for one in self.sets}
        history = [Snapshot.restored(one) for one in state["history"]]
        self._warned = state["warned"]
        self._history = deque([one for one in history if set(one.groups) == names], maxlen=WINDOW)

    # ---------------------------------------------------------------- at any time

    def evaluate(
        self,
        prompts: Any = None,
        reward_function: Any = None,
        *,
        sets: str | Sequence[str] | None = None,
        images_per_prompt: int | None = None,
        num_steps: int | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        **unknown: Any,
    ) -> Evaluation:
        """See [`DPOKTrainer.evaluate`]."""
        refuse_unknown(unknown)
        refuse_less_than_one(images_per_prompt=images_per_prompt, num_steps=num_steps, batch_size=batch_size)
        config, given = self.trainer.config, (prompts, reward_function, images_per_prompt, num_steps, batch_size)
        chosen = self._chosen(prompts, sets)
        held_out = self.held_out if reward_function is None else self._held_out_rewards(reward_function)
        reward_sets, held_out_names = bind_rewards(self.trainer.rewards, held_out, self.trainer.accelerator.device)
        refuse_running_statistics(reward_sets)
        sampler = self._sampler(
            reward_sets,
            num_steps=config.eval_num_steps if num_steps is None else num_steps,
            images_per_prompt=config.eval_num_images_per_prompt if images_per_prompt is None else images_per_prompt,
            batch_size=batch_size or config.eval_batch_size or config.sample_batch_size,
            seed=seed,
        )
        base = self._kept_base() if seed == 0 and all(one is None for one in given) else {}
        state = TrainerState(self.trainer.first_epoch, self.trainer.global_step)
        with random_states_kept(self.trainer.accelerator.device):
            return compare_models(
                sampler,
                chosen,
                held_out_names,
                config.sample_category_column,
                base=base,
                state=state,
                model=self.trainer.output_dir.resolve().name,
                epoch=state.epoch,
                step=state.global_step,
            )

    def _read(self, prompts: Any) -> list[PromptSet]:
        sets = read_prompt_sets(prompts)
        if self.trainer.prompts.listed is not None:  # a function does not tell what it returns
            refuse_wrong_sets(sets, self.trainer.prompts.listed)
        return sets

    def _chosen(self, prompts: Any, sets: str | Sequence[str] | None) -> list[PromptSet]:
        sets = [sets] if isinstance(sets, str) else sets
        available = self.sets if prompts is None else self._read(prompts)
        if not available:
            raise ValueError(
                "there are no prompts to evaluate on: give `evaluate` some, or the trainer eval_prompts, such as {'training': [...], 'held-out': [...]}."
            )
        names = [one.name for one in available]
        for name in names if sets is None else sets:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = f" Did you mean '{close[0]}'?" if close else ""
                raise ValueError(f"there is no set of prompts '{name}'.{hint} There are: {', '.join(names)}.")
        return [one for one in available if sets is None or one.name in sets]

    def _kept_base(self) -> dict[str, ModelSamples]:
        if self._base_rewards is not self.trainer.rewards:  # `reward_fn` was set
            self._base, self._base_rewards = {}, self.trainer.rewards
        return self._base

    def _held_out_rewards(self, given: Any) -> RewardSet:
        rewards = RewardSet(given, device=self.trainer.accelerator.device)
        if self.trainer.config.reward_offload:
            rewards.to("cpu")
        return rewards

    def _sampler(self, reward_sets: Sequence[RewardSet], num_steps: int | None, **settings: Any) -> EvaluationSampler:
        trainer, accelerator = self.trainer, self.trainer.accelerator
        if num_steps not in self._policies:
            self._policies[num_steps] = trainer.policy.with_call(num_inference_steps=num_steps)

        def work_of_all(work: Callable[[], list[SampledRows]]) -> list[SampledRows]:
            return on_all_processes(accelerator, work)

        def scoring(rewards: RewardSet) -> AbstractContextManager:
            return on_the_device(rewards, accelerator.device) if trainer.config.reward_offload else nullcontext()

        return EvaluationSampler(
            self._policies[num_steps],
            reward_sets,
            call_columns=trainer.config.sample_call_columns or (),
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            collect=work_of_all,
            drawing=accelerator.autocast,
            scoring=scoring,
            **settings,
        )


def refuse_unknown(given: Mapping[str, Any]) -> None:
    """Raises `TypeError` for arguments that [`DPOKTrainer.evaluate`] does not have."""
    known = [name for name in inspect.signature(Evaluator.evaluate).parameters if name not in ("self", "unknown")]
    for name in given:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise TypeError(f"evaluate() of the trainer has no argument '{name}'.{hint} It takes: {', '.join(known)}.")


def refuse_running_statistics(reward_sets: Sequence[RewardSet]) -> None:
    """Raises `ValueError` for rewards that an evaluation would change: the training would be another one."""
    for reward in (reward for rewards in reward_sets for reward in rewards.rewards):
        function = reward.function
        while function is not None:
            if isinstance(function, Standardized) and function.running:
                raise ValueError(
                    f"the reward {reward.name} is standardised by running statistics, which an evaluation would move; and by which no reward ever rises. Give "
                    "`Standardized` a mean and a std."
                )
            inner = getattr(function, "bound", None)  # of a wrapper
            function = inner.function if isinstance(inner, BoundReward) else None


def on_all_processes(accelerator: Accelerator, work: Callable[[], list[SampledRows]]) -> list[SampledRows]:
    """Runs `work` on every process, and returns what all of them returned, process after process; the pictures on the main process only.

    Raises:
        Whatever it raises; on the other processes [`RewardError`] or `RuntimeError` with the same message. They must hear of it, or they would wait for ever.
    """
    with together(accelerator):
        made = work()
    if accelerator.num_processes == 1:
        return made
    parts = gather_object([replace(part, pictures={}) for part in made])
    pictures = [None] * accelerator.num_processes if accelerator.is_main_process else None
    torch.distributed.gather_object([part.pictures for part in made], pictures)
    if pictures is None:
        return parts
    return [replace(part, pictures=shown) for part, shown in zip(parts, chain(*pictures), strict=True)]


@contextmanager
def random_states_kept(device: torch.device) -> Iterator[None]:
    """Within it anybody may draw from the global generators; afterwards they are as they were."""
    states = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
