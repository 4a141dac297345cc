"""The newest rounds of samples, from which training batches are drawn (off-policy reuse, as in the official DPOK code)."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dpok_trl.core.gaussian import Gaussian
from dpok_trl.core.trajectory import Trajectory
from dpok_trl.training.batches import SampledBatch, TrainingBatch


# (prompts, seeds, epoch) -> a trajectory of the same shapes and prompts, whatever is drawn in it
Walk = Callable[[Sequence[str], Sequence[int], int], Trajectory]

# What a trajectory may have beside its latents, by name.
SEEN_BY_VALUE = ("features", "prompt_embeddings")


@dataclass
class Round:
    """What one round of sampling leaves to learn from: all samples of this process, and those that the policy is trained on."""

    epoch: int
    sampled: list[SampledBatch]
    training: list[TrainingBatch]


class Buffer:
    """
    Args:
        rounds (`int`): How many to keep, `train_buffer_rounds`.
    """

    def __init__(self, rounds: int):
        self.rounds: deque[Round] = deque(maxlen=rounds)

    def make_room(self) -> None:
        """Frees the memory of the round that the next one has no use for."""
        if len(self.rounds) == self.rounds.maxlen:
            self.rounds.popleft()

    @property
    def newest(self) -> Round:
        return self.rounds[-1]

    @property
    def training(self) -> list[TrainingBatch]:
        return [batch for one in self.rounds for batch in one.training]

    @property
    def sampled(self) -> list[SampledBatch]:
        return [batch for one in self.rounds for batch in one.sampled]

    # ---------------------------------------------------------------- checkpoints

    def save(self, folder: Path, process_index: int) -> None:
        """Writes the rounds, if there are any."""
        if not self.rounds:
            return
        tensors: dict[str, torch.Tensor] = {}
        facts = [_describe_round(one, f"{index}", tensors) for index, one in enumerate(self.rounds)]
        save_file(tensors, _file(folder, process_index), metadata={"rounds": json.dumps(facts)})

    def load(self, folder: Path, process_index: int, walk: Walk) -> None:
        """Replaces the rounds by those of a checkpoint, if it has any.

        Args:
            walk (`Callable`): Walks the pipeline once more for a batch: shapes and embeddings are not in the file.
        """
        self.rounds.clear()
        path = _file(folder, process_index)
        if not path.exists():
            return
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["rounds"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        for index, fact in enumerate(facts):
            self.rounds.append(_restore_round(fact, f"{index}", tensors, walk))


def _file(folder: Path, process_index: int) -> Path:
    return folder / f"buffer-{process_index}.safetensors"


def _describe_round(one: Round, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What is no tensor; the tensors are added to `tensors`."""
    sampled = []
    for index, batch in enumerate(one.sampled):
        trajectory, prefix = batch.trajectory, f"{name}/sampled/{index}"
        tensors[f"{prefix}/latents"] = torch.stack(trajectory.latents)
        if any(a is not b for a, b in zip(trajectory.latents[1:], trajectory.next_latents, strict=True)):
            tensors[f"{prefix}/next_latents"] = torch.stack(trajectory.next_latents)
        tensors[f"{prefix}/log_probs"] = trajectory.log_probs
        tensors[f"{prefix}/rewards"] = batch.rewards
        for seen in SEEN_BY_VALUE:
            if getattr(trajectory, seen) is not None:
                tensors[f"{prefix}/{seen}"] = getattr(trajectory, seen).contiguous()
        sampled.append({"prompts": trajectory.prompts, "seeds": trajectory.seeds})
    training = []
    for index, batch in enumerate(one.training):
        prefix, steps = f"{name}/training/{index}", batch.trajectory.steps
        tensors[f"{prefix}/advantages"] = batch.advantages.contiguous()
        tensors[f"{prefix}/log_probs"] = batch.trajectory.log_probs[list(batch.samples)]
        if batch.charges is not None:
            tensors[f"{prefix}/charges"] = batch.charges.contiguous()
        if batch.old:
            tensors[f"{prefix}/old_mean"] = torch.stack([batch.old[step].mean for step in steps])
            tensors[f"{prefix}/old_std"] = torch.stack([batch.old[step].std for step in steps])
        of = next(i for i, other in enumerate(one.sampled) if other.trajectory.latents is batch.trajectory.latents)
        training.append({"sampled": of, "samples": batch.samples})
    return {"epoch": one.epoch, "sampled": sampled, "training": training}


def _restore_round(fact: dict[str, Any], name: str, tensors: dict[str, torch.Tensor], walk: Walk) -> Round:
    sampled = []
    for index, of_batch in enumerate(fact["sampled"]):
        prefix = f"{name}/sampled/{index}"
        walked = walk(of_batch["prompts"], of_batch["seeds"], fact["epoch"])
        device = walked.log_probs.device
        latents = tensors[f"{prefix}/latents"].to(device).unbind()
        others = tensors.get(f"{prefix}/next_latents")  # of a pipeline that changes the latents between the steps
        trajectory = replace(
            walked.without_images(),
            latents=latents,
            next_latents=latents[1:] if others is None else others.to(device).unbind(),
            log_probs=tensors[f"{prefix}/log_probs"].to(device),
            **{
                seen: tensors[f"{prefix}/{seen}"].to(device) for seen in SEEN_BY_VALUE if f"{prefix}/{seen}" in tensors
            },
        )
        sampled.append(SampledBatch(trajectory, (), rewards=tensors[f"{prefix}/rewards"]))
    training = []
    for index, of_batch in enumerate(fact["training"]):
        prefix, samples = f"{name}/training/{index}", tuple(of_batch["samples"])
        trajectory = sampled[of_batch["sampled"]].trajectory
        device = trajectory.log_probs.device
        log_probs = trajectory.log_probs.clone()
        log_probs[list(samples)] = tensors[f"{prefix}/log_probs"].to(device)
        batch = TrainingBatch(
            trajectory.with_log_probs(log_probs), samples, tensors[f"{prefix}/advantages"].to(device)
        )
        if f"{prefix}/charges" in tensors:
            batch.charges = tensors[f"{prefix}/charges"].to(device)
        if f"{prefix}/old_mean" in tensors:
            means, stds = tensors[f"{prefix}/old_mean"].to(device), tensors[f"{prefix}/old_std"]
            batch.old = {step: Gaussian(*one) for step, *one in zip(trajectory.steps, means, stds, strict=True)}
        training.append(batch)
    return Round(fact["epoch"], sampled, training)
