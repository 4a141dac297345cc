"""What a run does: train on the shipped pipeline, evaluate, and return numbers. All numbers that the tables and plots need come from here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from bound import kl_from_below
from transformers import TrainerCallback

from dpok_trl import DPOKConfig, DPOKSFTConfig, DPOKSFTTrainer, DPOKTrainer, Policy, evaluate
from dpok_trl.demo import load_demo_pipeline
from dpok_trl.demo.command import SAMPLING, demo_lora_config, demo_rewards, only_errors
from dpok_trl.demo.world import REWARDS, TASKS, exact_reward
from dpok_trl.results.estimates import Estimate
from dpok_trl.results.evaluation import Comparison


EVALUATION_SEED = 1_000_000  # far from the seeds of any training sample
BATCH = 64


def rl(tasks: Sequence[str], reward: str, seed: int, images: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """Trains by [`DPOKTrainer`].

    Args:
        tasks (`Sequence[str]`): Of `dpok_trl.demo.world.TASKS`: the prompts, drawn in turn.
        reward (`str`): Of `dpok_trl.demo.world.REWARDS`.
        images (`int`): Of the evaluation, for each prompt.
        config (`Mapping`): Of [`DPOKConfig`].
    """
    return _trained(DPOKTrainer, DPOKConfig, tasks, reward, seed, images, config)


def sft(tasks: Sequence[str], reward: str, seed: int, images: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """Trains by [`DPOKSFTTrainer`]; arguments as for [`rl`], of [`DPOKSFTConfig`]."""
    return _trained(DPOKSFTTrainer, DPOKSFTConfig, tasks, reward, seed, images, config)


def bound(
    tasks: Sequence[str], reward: str, seed: int, images: int, config: Mapping[str, Any], pairs: int
) -> dict[str, Any]:
    """As [`rl`] of one task, and what the KL between the distributions of x_0 is at least, by `pairs` samples of each model."""

    def from_below(trainer: DPOKTrainer) -> dict[str, Any]:
        policy, prompt = trainer.policy, TASKS[tasks[0]]
        tuned = _last_latents(policy, prompt, pairs, EVALUATION_SEED + images)
        with policy.pretrained():
            pretrained = _last_latents(policy, prompt, pairs, EVALUATION_SEED + images + pairs)
        return {"kl_from_below": _rounded(kl_from_below(tuned, pretrained, seed))}

    return _trained(DPOKTrainer, DPOKConfig, tasks, reward, seed, images, config, from_below)


def _last_latents(policy: Policy, prompt: str, count: int, first_seed: int) -> torch.Tensor:
    """x_0 of `count` samples, `(count, D)`."""
    found = []
    for start in range(0, count, BATCH):
        seeds = range(first_seed + start, first_seed + min(start + BATCH, count))
        found.append(policy.rollout([prompt] * len(seeds), seeds).next_latents[-1].flatten(1))
    return torch.cat(found)


def base(task: str, images: int, best_of: Sequence[int]) -> dict[str, Any]:
    """The pretrained model, and its best of n images."""
    with only_errors():
        pipeline = load_demo_pipeline()
        pipeline.unet.add_adapter(demo_lora_config())  # as it starts: it changes nothing
        policy = Policy(pipeline, call_kwargs={k: v for k, v in SAMPLING.items() if k != "eta"})
        found = evaluate(policy, [TASKS[task]], demo_rewards("greenness"), images_per_prompt=images, batch_size=BATCH)
    [comparison] = found.sets.values()
    return {
        "final": {task: measured(comparison)},
        "best_of": {"exact": [number(comparison.best_of("exact", n)) for n in best_of]},
    }


def ours(**settings: Any) -> dict[str, Any]:
    """Our side of the race, see race/README.md."""
    return _race(sys.executable, "ours.py", settings)


def trl(**settings: Any) -> dict[str, Any]:
    """TRL's side of the race, run by the environment that `DPOK_TRL_ENV` names."""
    return _race(str(Path(os.environ["DPOK_TRL_ENV"]) / "bin" / "python"), "trl_ddpo.py", settings)


def _race(python: str, script: str, settings: dict[str, Any]) -> dict[str, Any]:
    command = [python, str(Path(__file__).parent / "race" / script), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stderr)
    if done.returncode:
        raise RuntimeError(f"{script} failed: {done.stderr[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# --------------------------------------------------------------------------------------------------------------------------------------


class Judge:
    """A reward of the world, which also remembers how many pictures of the epoch were exact."""

    __name__ = "judge"

    def __init__(self, reward: str):
        self.reward, self.exact = REWARDS[reward], []

    def __call__(self, images: torch.Tensor, prompts: Sequence[str], metadata: Any) -> Any:
        self.exact += exact_reward(images, prompts)[0].tolist()
        return self.reward(images, prompts, metadata)

    def exact_rate(self) -> float:
        rate = sum(self.exact) / len(self.exact)
        self.exact.clear()
        return rate


class Curve(TrainerCallback):
    """An entry for each epoch: CPU seconds of the training so far, the exact rate of the epoch's samples, and what was logged."""

    LOGGED = ("images", "value/explained_variance", "gradient/cosine_mean", "gradient/cosine_min")

    def __init__(self, judge: Judge):
        self.judge, self.entries, self.seconds = judge, [], 0.0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.logged, self.started = {}, time.process_time()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **kwargs: Any) -> None:
        self.logged.update({name: logs[name] for name in self.LOGGED if name in logs})

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.process_time() - self.started
        # a supervised run draws in its first epoch only
        exact = {"exact": self.judge.exact_rate()} if self.judge.exact else {}
        self.entries.append({"cpu_s": self.seconds, **self.logged, **exact})


def _trained(
    trainer_class: type[DPOKTrainer],
    config_class: type[DPOKConfig],
    tasks: Sequence[str],
    reward: str,
    seed: int,
    images: int,
    config: Mapping[str, Any],
    also: Callable[[DPOKTrainer], dict[str, Any]] = lambda trainer: {},
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, only_errors():
        judge = Judge(reward)
        curve = Curve(judge)
        trainer = trainer_class(
            config_class(output_dir=folder, seed=seed, save_freq=0, accelerator_kwargs={"cpu": True}, **config),
            judge,
            [TASKS[task] for task in tasks],
            load_demo_pipeline(),
            peft_config=demo_lora_config(),
            callbacks=[curve],
        )
        trainer.train()
        found = evaluate(
            trainer.policy,
            {task: [TASKS[task]] for task in tasks},
            demo_rewards(reward),
            images_per_prompt=images,
            batch_size=BATCH,
            seed=EVALUATION_SEED,
        )
        others = also(trainer)
    return {
        "curve": [{name: _rounded(value) for name, value in entry.items()} for entry in curve.entries],
        "final": {task: measured(comparison) for task, comparison in found.sets.items()},
        **others,
    }


def measured(comparison: Comparison) -> dict[str, Any]:
    """Name of a quantity -> [of the pretrained model, of the tuned one], each with its standard error over images."""
    rewards = {
        name: [number(comparison.base_reward(name)), number(comparison.tuned_reward(name))]
        for name in comparison.rewards
    }
    before, after, _ = comparison.diversity()
    return {**rewards, "diversity": [number(before), number(after)], "kl": [[0.0, 0.0], number(comparison.kl)]}


def number(estimate: Estimate) -> list[float]:
    return [_rounded(estimate.mean), _rounded(estimate.standard_error)]


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


KINDS = {"rl": rl, "sft": sft, "bound": bound, "base": base, "ours": ours, "trl": trl}
