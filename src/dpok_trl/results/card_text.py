"""The sentences and tables of a model card."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from dpok_trl.results.estimates import Estimate
from dpok_trl.results.evaluation_files import FOOTNOTE, aligned, signed
from dpok_trl.results.runlog import format_reward


if TYPE_CHECKING:  # it imports this module
    from dpok_trl.results.model_card import Evaluated, RunFacts, TrainedReward


DPOK = "[DPOK](https://arxiv.org/abs/2305.16381)"

# How it was tuned, by `train_objective`, and of the supervised baseline by `sft_loss`.
METHODS = {
    "dpok": f"reinforcement learning with {DPOK}",
    "ppo": "reinforcement learning with the clipped objective of [DDPO](https://arxiv.org/abs/2305.13301)",
    "kl_mask": "reinforcement learning with a KL mask in place of a clip",
    "reinforce": "reinforcement learning with REINFORCE",
    "reward_weighted": f"supervised learning on images weighted by their rewards, the baseline of {DPOK}",
    "filtered": f"supervised learning on the images with the best rewards, a baseline of {DPOK}",
}
SUPERVISED = ("reward_weighted", "filtered")


def plain(text: str) -> str:
    """Any text on one line, with nothing in it that Markdown or HTML would take for markup. An underline within a word is none."""
    return re.sub(r"([\\`*{}\[\]<>|~#!$&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", " ".join(text.split()))


def summary(facts: RunFacts, base: str | None) -> str:
    """What it is, in a sentence."""
    origin = f"[{base}](https://huggingface.co/{base})" if base else f"a local `{facts.pipeline}`"
    what = f"All weights of the denoiser of {origin}," if facts.full else f"A LoRA adapter for {origin},"
    prompts = None if facts.prompts is None else list(dict.fromkeys(facts.prompts))
    if prompts is None:
        where = "prompts from a function"
    else:
        where = f"the prompt “{plain(prompts[0])}”" if len(prompts) == 1 else f"{len(prompts)} prompts"
    rewards = " and ".join(f"**{plain(reward.name)}**" for reward in facts.rewards)
    return (
        f"{what} tuned for {facts.task} by {METHODS[facts.objective]}, to raise the reward{'s' if len(facts.rewards) > 1 else ''} {rewards} on {where}. Made with "
        "[dpok-trl](https://pypi.org/project/dpok-trl/)."
    )


def scores(rewards: Sequence[TrainedReward], evaluation: Evaluated) -> tuple[list[str], list[str]]:
    """The tables of an evaluation, one for each set, and what is to be said of them."""
    tables = [aligned(_set_rows(name, one)) for name, one in evaluation.sets.items()]
    said = []
    for name, one in evaluation.sets.items():
        where = f" (set {plain(name)})" if len(evaluation.sets) > 1 else ""
        for reward, found in one["rewards"].items():
            base, tuned = found["nonfinite"]["base"], found["nonfinite"]["tuned"]
            if base or tuned:
                said.append(
                    f"{plain(reward)} is not finite for {base} of the {one['images']} pretrained and {tuned} of the tuned images{where}: these pairs are left out."
                )
    return tables, [*said, FOOTNOTE]


def _set_rows(name: str, one: Mapping[str, Any]) -> list[list[str]]:
    prompts, seeds = one["images"] // one["images_per_prompt"], one["seeds"]
    of = f"{prompts} prompt{'s' if prompts > 1 else ''} × {one['images_per_prompt']}, seeds {min(seeds)}–{max(seeds)}"
    rows = [[f"{plain(name)}: {of}", "pretrained", "tuned", "difference", "images"]]
    for reward, found in one["rewards"].items():
        parts = [_estimate(found[part]) for part in ("base", "tuned", "difference")]
        label = f"{plain(reward)} (held out)" if found["held_out"] else f"{plain(reward)} (trained on)"
        rows.append([label, str(parts[0]), str(parts[1]), signed(parts[2]), str(parts[2].images)])
    kl = _estimate(one["path_kl"])
    rows.append(["path KL (nats)", "0", str(kl), "", str(kl.images)])
    if one["diversity"] is not None:
        base, tuned, difference = (_estimate(one["diversity"][part]) for part in ("base", "tuned", "difference"))
        rows.append(["diversity", str(base), str(tuned), signed(difference), str(difference.images)])
    return rows


def _estimate(found: Mapping[str, Any]) -> Estimate:
    mean, error = (math.nan if found[name] is None else found[name] for name in ("mean", "standard_error"))
    return Estimate(mean, error, found["images"], found["prompts"])


def training_table(facts: RunFacts, metrics: Sequence[Mapping[str, Any]], evaluation: Evaluated | None) -> str:
    """The facts of the run. Of a run that has not begun there are few."""
    rows = [["trained", plain(facts.trained)], ["KL term", facts.kl or "none"]]
    rows.append(["epochs, optimizer steps", f"{facts.epochs:,}, {facts.updates:,}"])
    if facts.images is not None:
        rows.append(["images", f"{facts.images:,}"])
    rewards = [(line["epoch"], line["reward"]) for line in metrics if "reward" in line]
    if rewards:
        rows.append(_reward_row(rewards))
    path = [line["kl_path"] for line in metrics if "kl_path" in line]
    if path and evaluation is None:  # an evaluation has that of the tuned model, which is not the one of its training
        rows.append(["path KL, mean over the updates of the last epoch", f"{path[-1]:.3g} nats"])
    if facts.epochs:
        rows.append(["time", str(timedelta(seconds=round(facts.seconds)))])
    rows.append(["hardware", plain(facts.hardware)])
    return _table(["this run", ""], rows)


def _reward_row(rewards: Sequence[tuple[int, float]]) -> list[str]:
    """Epochs and their mean rewards, from the first to the last that are known: a run that was resumed in another folder has no others there."""
    (first, before), (last, after) = rewards[0], rewards[-1]
    label = "mean reward of the images"
    told = format_reward(after) if first == last else f"{format_reward(before)} → {format_reward(after)}"
    if first > 0:
        of = f"epoch {first}" if first == last else f"epoch {first} → {last}"
        return [f"{label}, {of} (the first is 0; earlier ones are not in this folder)", told]
    return [label if first == last else f"{label}, first → last epoch", told]


def rewards_table(rewards: Sequence[TrainedReward]) -> str:
    """The rewards of the run, with their weights where they have different ones, and what shipped ones say of themselves."""
    weighted = len({reward.weight for reward in rewards}) > 1
    header = ["reward", *(["weight"] if weighted else []), "what it is", "licence of its weights"]
    rows = []
    for reward in rewards:
        info = reward.info
        about = (plain(info.summary), plain(info.licence)) if info else ("not one that dpok-trl ships", "")
        rows.append([plain(reward.name), *([f"{reward.weight:g}"] if weighted else []), *about])
    return _table(header, rows)


def limits(facts: RunFacts, evaluation: Evaluated | None) -> list[str]:
    """What to be careful about, of this run."""
    names = " and ".join(f"**{plain(reward.name)}**" for reward in facts.rewards)
    said = [
        f"It was tuned to raise {names}, mistakes included. A reward can rise while pictures get worse: look at them before you use the model."
    ]
    for reward in facts.rewards:
        if reward.info is not None and reward.info.overlooks:
            said.append(f"What {plain(reward.name)} overlooks: {plain(reward.info.overlooks)}")
    if evaluation is not None:
        if evaluation.over_optimised:
            said.append(
                "The last evaluations of the run show signs of over-optimisation: the trained reward rises at the expense of others."
            )
        if not any(found["held_out"] for one in evaluation.sets.values() for found in one["rewards"].values()):
            said.append(
                "No reward that was not trained on was asked: the numbers above do not show that people prefer its pictures."
            )
        asked = {prompt for one in evaluation.sets.values() for prompt in one["prompts"]}
        if facts.prompts is not None and asked <= set(facts.prompts):
            said.append("It was evaluated on prompts that it was trained on. How it does on others is not known.")
    said.append(
        "It keeps the limits and biases of the pretrained model, and adds those of its reward: a model of taste prefers what the people liked who rated its training pictures."
        if any(reward.info is not None and reward.info.weights != "none" for reward in facts.rewards)
        else "It keeps the limits and biases of the pretrained model, and adds those of its reward."
    )
    return said


def licence(found: Mapping[str, str], base: str | None, facts: RunFacts) -> str:
    """What is known of the licence."""
    of = f"[{base}](https://huggingface.co/{base})" if base else "the pretrained model"
    said = (
        f"The licence `{found.get('license_name', found['license'])}` is that of {of}, read from its model card."
        if found
        else f"No licence is stated here: that of {of} could not be read. What is made from a model is subject to its licence, so look there before you use or share this."
    )
    if any(reward.info is not None and reward.info.weights != "none" for reward in facts.rewards):
        said += " The licences of the rewards are in the table above; their weights are not part of this model."
    return said


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
