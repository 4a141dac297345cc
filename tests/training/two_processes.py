"""What each of two processes does in test_distributed.py. Launched by torchrun; not collected by pytest."""

import json
import random
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: F401  (offline, one thread)
import torch
from tiny import stable_diffusion

from dpok_trl import DPOKConfig, DPOKTrainer, RewardError


FOLDER = Path(sys.argv[1])
RUN = {
    "num_epochs": 3,
    "save_freq": 1,
    "sample_grid_freq": 1,
    "sample_num_steps": 3,
    "sample_guidance_scale": 3.0,
    "sample_batch_size": 4,
    "sample_num_batches_per_epoch": 2,
    "train_batch_size": 2,
    "train_gradient_accumulation_steps": 2,
    "train_learning_rate": 1e-2,
    "train_lr_scheduler": "linear",
    "train_num_inner_epochs": 2,
    "per_prompt_stat_tracking": True,
    "per_prompt_stat_tracking_min_count": 2,
}
PROMPTS = [f"number {i}" for i in range(8)]


def red(images, prompts, metadata):
    return images[:, 0].mean((1, 2)), {}


def random_prompt():
    return random.choice(PROMPTS[:4]), {}


def make(name, reward=red, prompts=PROMPTS, hook=None, **kwargs):
    config = DPOKConfig(output_dir=str(FOLDER / name), **{**RUN, **kwargs})
    return DPOKTrainer(config, reward, prompts, stable_diffusion(), hook)


def adapter(trainer):
    return {n: p.detach().clone() for n, p in trainer.policy.named_parameters() if p.requires_grad}


def remember(trainer, name, record):
    """Calls `record(result, *args)` after each call of a method."""
    method = getattr(trainer, name)

    def remembered(*args):
        result = method(*args)
        record(result, *args)
        return result

    setattr(trainer, name, remembered)


def whole_run(out):
    """A run, and what this process saw of it."""
    hooked = []
    trainer = make("whole", hook=lambda data, step, tracker: hooked.append(step))
    out["start"] = adapter(trainer)
    remember(trainer, "advantages", lambda result, *args: out.setdefault("advantages", []).append((*args[:2], result)))
    remember(trainer, "sample", lambda result, epoch: out.setdefault("sampled", []).append(describe(result[0])))
    remember(trainer.experience, "training_batches", lambda result, *_: out.setdefault("trained on", []).append(
        [batch.advantages[:, 0] for batch in result]))  # fmt: skip
    check_gradients(trainer, out)
    trainer.train()
    trainer.save_model(FOLDER / "model")  # the process group has outlived the training
    out["end"], out["hooked"], out["step"] = adapter(trainer), hooked, trainer.global_step
    out["has a log"] = trainer.run_log is not None


def describe(batches):
    return [
        {"prompts": b.trajectory.prompts, "seeds": b.trajectory.seeds, "noise": b.trajectory.latents[0], "rewards": b.rewards}
        for b in batches
    ]  # fmt: skip


def check_gradients(trainer, out):
    """The gradient that the optimizer gets is the mean of what the two processes have."""
    update, clip = trainer._update, trainer.accelerator.clip_grad_norm_
    expected = []

    def local_gradients(transitions):
        prepared, trainer.prepared_policy = trainer.prepared_policy, trainer.policy  # around the data-parallel wrapper
        total = [torch.zeros_like(p) for p in trainer.trainable_layers]
        for t in transitions:
            loss, _ = trainer.calculate_loss(t)
            for sum_, gradient in zip(
                total, torch.autograd.grad(loss / len(transitions), trainer.trainable_layers), strict=True
            ):
                sum_ += gradient  # fmt: skip
        trainer.prepared_policy = prepared
        return total

    def watched_update(transitions):
        mine = local_gradients(transitions)
        expected[:] = [trainer.accelerator.reduce(gradient, "mean") for gradient in mine]
        out.setdefault("local gradients differ", []).append(
            any(not torch.equal(a, b) for a, b in zip(mine, expected, strict=True))
        )
        return update(transitions)

    def watched_clip(parameters, limit):
        scale = max(gradient.abs().max().item() for gradient in expected)
        worst = max((p.grad - e).abs().max().item() for p, e in zip(parameters, expected, strict=True))
        out.setdefault("gradient errors", []).append(worst / scale)
        return clip(parameters, limit)

    trainer._update, trainer.accelerator.clip_grad_norm_ = watched_update, watched_clip


def interrupted_run(out):
    """One epoch, then a new trainer for the other two; the prompts come from the global generator."""
    for name, parts in (("uninterrupted", [3]), ("interrupted", [1, 3])):
        for epochs in parts:
            random.seed(len(name))
            trainer = make(name, prompts=random_prompt)
            trainer.train(epochs=epochs, resume_from_checkpoint=epochs == 3 and parts != [3])
        optimizer = trainer.optimizer.state_dict()["state"]
        out[name] = adapter(trainer), optimizer, trainer.stat_tracker.state_dict(), random.random()


# Everything that a run may remember beside adapter, optimizer and prompts.
REMEMBERING = {
    "value": {
        "per_prompt_stat_tracking": False,
        "per_prompt_stat_tracking_min_count": 16,  # the default
        "train_adv_type": "value",
        "value_batch_size": 8,
        "train_objective": "kl_mask",
        "train_buffer_rounds": 2,
        "kl_weight": 0.1,
        "target_kl": 1e-3,
        "reference_update_epochs": 2,
    },
    "statistics": {"kl_gradient": "exact", "train_buffer_rounds": 2},
}


def remembering_runs(out):
    """Two epochs, then a new trainer for the third; against three epochs of one trainer."""
    for name, settings in REMEMBERING.items():
        for kind, parts in (("whole", [3]), ("parts", [2, 3])):
            for epochs in parts:
                trainer = make(f"{name} {kind}", train_num_inner_epochs=1, **settings)
                trainer.train(epochs=epochs, resume_from_checkpoint=epochs == 3 and parts != [3])
            value = None if trainer.critic is None else trainer.critic.function.state_dict()
            remembered = value, trainer.kl_weight, trainer.stat_tracker and trainer.stat_tracker.state_dict()
            buffer = [
                (batch.trajectory.latents, batch.advantages, batch.charges)
                for batch in trainer.experience.buffer.training
            ]
            out[f"{name} {kind}"] = {"adapter": adapter(trainer), "remembered": remembered, "buffer": buffer}


def failing_reward(out):
    """Rewards or prompts fail in process 1 only; both must hear of it, and both can go on."""

    def fails_on_1(images, prompts, metadata):
        if trainer.accelerator.process_index == 1:
            raise ConnectionError("no route to host")
        return red(images, prompts, metadata)

    def nan_on_1(images, prompts, metadata):
        return torch.full((len(images),), float("nan") if trainer.accelerator.process_index == 1 else 1.0)

    def none_on_1(images, prompts, metadata):
        return [1.0] * len(images) if trainer.accelerator.process_index == 0 else [None] * len(images)

    def half(images, prompts, metadata):  # with `other_half`, not one image has both
        return [float("nan"), 1.0] * (len(images) // 2)

    def other_half(images, prompts, metadata):
        return [1.0, float("nan")] * (len(images) // 2)

    for name, reward, settings in (
        ("fails", fails_on_1, {}),
        ("fails in threads", fails_on_1, {"async_reward_computation": True}),
        ("one of two fails", [red, fails_on_1], {}),
        ("nothing finite on 1", nan_on_1, {}),
        ("not finite on 1", [red, nan_on_1], {"reward_on_error": "raise"}),
        ("no image counts", [half, other_half], {}),
    ):
        trainer = make(name, reward, **settings)
        started = time.monotonic()
        try:
            trainer.train()
        except RewardError as error:
            out[name] = str(error)
            out.setdefault("seconds to stop", []).append(time.monotonic() - started)
    trainer = make("does not apply on 1", none_on_1, num_epochs=1)
    trainer.train()
    out["does not apply on 1"] = trainer.last_metrics

    def prompt_fails_on_1():
        if trainer.accelerator.process_index == 1:
            raise KeyError("no such prompt")
        return "a cat", {}

    trainer = make("fails in the prompts", prompts=prompt_fails_on_1)
    try:
        trainer.train()
    except (KeyError, RuntimeError) as error:
        out["fails in the prompts"] = f"{type(error).__name__}: {error}"
    trainer.accelerator.wait_for_everyone()


def masked_rewards(out):
    """One reward fails for one image of process 1 in each batch; the other logs which process asked."""

    def fails_for_one(images, prompts, metadata):
        rewards = images[:, 0].mean((1, 2))
        if trainer.accelerator.process_index == 1:
            rewards[2] = float("nan")
        return rewards

    def index(images, prompts, log_metric):
        log_metric("process", trainer.accelerator.process_index)
        return [0.0] * len(images)

    trainer = make("masked", [fails_for_one, index], num_epochs=1)
    start = adapter(trainer)
    remember(trainer, "advantages", lambda result, *args: out.update({"masked advantages": (*args[:2], result)}))
    trainer.train()
    out["masked"] = {"start": start, "end": adapter(trainer), "metrics": trainer.last_metrics}


def other_networks(out):
    """Full fine-tuning, and adapters on the text encoder: two epochs, the second after a resume."""
    for name, settings in (("full", {"train_use_lora": False}), ("text", {"train_text_encoder": True})):
        for epochs in (1, 2):
            trainer = make(name, train_learning_rate=1e-3, train_num_inner_epochs=1, num_epochs=2, **settings)
            start = adapter(trainer)
            trainer.train(epochs=epochs, resume_from_checkpoint=epochs == 2)
        frozen = {n: p.clone() for module in trainer.tuned.frozen.values() for n, p in module.named_parameters()}
        out[name] = {"start": start, "end": adapter(trainer), "frozen": frozen}


def main():
    out = {"settings": RUN, "prompts": PROMPTS}
    whole_run(out)
    interrupted_run(out)
    remembering_runs(out)
    failing_reward(out)
    masked_rewards(out)
    other_networks(out)
    trainer = make("last", num_epochs=1)
    out["processes"], rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    torch.save(out, FOLDER / f"rank-{rank}.pt")
    (FOLDER / f"rank-{rank}.done").write_text(json.dumps(rank))


if __name__ == "__main__":
    main()
