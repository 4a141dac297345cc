"""The loop of `DPOKTrainer`: it learns, its updates are the ones that the settings say, and its ratio starts at exactly 1."""

import dataclasses
import threading
from collections import Counter

import datasets
import pytest
import torch
from peft import LoraConfig
from tiny import FAMILIES, ddim, stable_diffusion, with_adapter

from dpok_trl import RatioError
from dpok_trl.core.gaussian import Gaussian
from dpok_trl.training.batches import TrainingBatch


# Gradients of the same samples in other micro-batches, relative to the largest entry: float32 sums in another order.
GRADIENT_TOLERANCE = 1e-5


def captured_gradients(trainer) -> list[list[torch.Tensor]]:
    """The gradients of each coming update, before they are clipped."""
    captured = []
    clip = trainer.accelerator.clip_grad_norm_

    def capture(parameters, limit):
        captured.append([parameter.grad.clone() for parameter in parameters])
        return clip(parameters, limit)

    trainer.accelerator.clip_grad_norm_ = capture
    return captured


def largest_difference(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    """Relative to the largest entry of all."""
    scale = max(tensor.abs().max().item() for tensor in first)
    return max((a - b).abs().max().item() for a, b in zip(first, second, strict=True)) / scale


def nudged():
    """An adapter that is not at its start, so that the KL and the gradient of A are not zero."""
    return with_adapter(stable_diffusion(), nudged=True)


# ---------------------------------------------------------------- it learns


@pytest.mark.parametrize("seed", [0, 1])
def test_a_simple_reward_rises(seed, make_trainer, lines):
    trainer = make_trainer(
        prompts=["a cat"],
        peft_config=LoraConfig(r=8, lora_alpha=8, target_modules=["conv_in", "conv_out", "conv1", "conv2"]),
        seed=seed,
        num_epochs=8,
        sample_batch_size=32,
        sample_guidance_scale=1.0,
        sample_min_std=0.1,  # the last step's std is 0.03, and its gradient hides the others'
        train_batch_size=32,
        train_learning_rate=5e-3,
        train_clip_range=0.1,
        train_timesteps_per_update=1,
        train_num_inner_epochs=2,
        kl_weight=0.01,
    )
    trainer.train()
    rounds = lines(trainer, "reward")
    first, last = rounds[0], rounds[-1]
    # 2 standard deviations of an image are 11 standard errors of the mean of 32
    assert last["reward"] - first["reward"] > 2 * first["reward_std"]
    assert all(line["policy/ratio_deviation_max"] < 1.0 for line in lines(trainer, "loss"))


@pytest.mark.parametrize("family", FAMILIES)
def test_any_pipeline_is_trained(family, make_trainer, adapter, lines):
    trainer = make_trainer(pipe=FAMILIES[family](), train_learning_rate=1e-2, num_epochs=2)
    start = adapter(trainer)
    trainer.train()
    assert all(line["policy/ratio_deviation_max"] == 0.0 for line in lines(trainer, "loss"))
    moved = [name for name, value in adapter(trainer).items() if not torch.equal(value, start[name])]
    # sd3's last block throws its text stream away, so that one LoRA-B there has no gradient
    assert len(moved) > 0.9 * len(start)
    assert lines(trainer, "loss")[1]["kl"] > 0


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_without_guidance_the_denoiser_runs_on_the_samples_alone(scale, make_trainer, watch, lines):
    pipe = stable_diffusion()
    calls = watch(pipe.unet)
    trainer = make_trainer(pipe=pipe, sample_guidance_scale=scale)
    trainer.train()
    assert set(calls.rows) == {4}
    assert lines(trainer, "loss")[0]["policy/ratio_deviation_max"] == 0.0


def test_every_prompt_of_a_list_is_used_equally_often(make_trainer):
    seen = Counter()

    def count(images, prompts, metadata):
        seen.update(prompts)
        return list(range(len(prompts)))

    prompts = [f"a {word}" for word in ("cat", "dog", "bird", "house", "tree", "car")]
    make_trainer(count, prompts=prompts, num_epochs=3, sample_num_steps=2).train()
    assert seen == {prompt: 2 for prompt in prompts}  # 12 images


def test_a_dataset_hands_its_columns_to_the_reward(make_trainer):
    def points(images, prompts, metadata):
        assert [row["word"] for row in metadata] == [prompt.removeprefix("a ") for prompt in prompts]
        return [float(row["points"]) for row in metadata]

    rows = [
        {"prompt": f"a {word}", "word": word, "points": i} for i, word in enumerate(["cat", "dog", "bird", "tree"])
    ]
    trainer = make_trainer(points, prompts=datasets.Dataset.from_list(rows))
    trainer.train()
    assert trainer.last_metrics["reward"] == 1.5


def test_text_is_encoded_in_the_first_rollout_only(make_trainer):
    pipe = stable_diffusion()
    encoded = []
    pipe.text_encoder.register_forward_hook(lambda *_: encoded.append(1))
    trainer = make_trainer(pipe=pipe, prompts=["a cat", "two dogs"], num_epochs=2, train_num_inner_epochs=2)
    trainer.sample(0)
    after_rollout = len(encoded)
    assert after_rollout > 0
    trainer.train()
    assert len(encoded) == after_rollout


# ---------------------------------------------------------------- the update


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kl_type", ["gaussian", "noise"])
@pytest.mark.parametrize("objective", ["dpok", "ppo"])
def test_the_loss_by_hand(objective, kl_type, reduction, make_trainer):
    trainer = make_trainer(
        pipe=nudged(),
        sample_min_std=0.1,
        train_clip_range=0.1,
        train_objective=objective,
        train_log_prob_reduction=reduction,
        kl_weight=0.3,
        kl_type=kl_type,
    )
    trajectory = trainer.sample(0)[0][0].trajectory
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None].expand(4, len(trajectory.steps))
    batch = TrainingBatch(trajectory, (0, 1, 2, 3), advantages)
    trainer.experience.ask_reference([[(batch, (1,) * 4)]])
    transitions = batch.transitions((1,) * 4)
    shift = torch.tensor([0.5, -0.5, 0.5, -0.5])  # of the new log-probability over the old: ratios 1.65 and 0.61
    transitions = dataclasses.replace(transitions, old_log_prob=transitions.old_log_prob - shift)
    loss, metrics = trainer.calculate_loss(transitions)

    (new,) = trainer.policy(trajectory, None, [1])
    with torch.no_grad(), trainer.policy.reference():
        (reference,) = trainer.policy(trajectory, None, [1])
    ratio = shift.exp()
    clipped = ratio.clamp(0.9, 1.1)
    surrogate = transitions.advantage * clipped
    if objective == "ppo":
        surrogate = torch.minimum(transitions.advantage * ratio, surrogate)
    if kl_type == "gaussian":
        difference = (new.distribution.mean - reference.distribution.mean) / new.distribution.std.reshape(4, 1, 1, 1)
        kl = difference.square() / 2
    else:
        kl = (new.model_output - reference.model_output).square()
    kl = (kl.sum((1, 2, 3)) if reduction == "sum" else kl.mean((1, 2, 3))).mean()
    assert kl > 1e-3
    torch.testing.assert_close(loss, -surrogate.mean() + 0.3 * kl, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics["kl"], kl.detach(), rtol=1e-5, atol=0)
    assert metrics["policy/clip_fraction"] == 1.0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("objective", ["kl_mask", "reinforce"])
def test_the_loss_of_the_objectives_without_a_clip_by_hand(objective, reduction, make_trainer):
    trainer = make_trainer(
        pipe=nudged(),
        sample_min_std=0.1,
        train_objective=objective,
        train_log_prob_reduction=reduction,
        **({"train_kl_threshold": 0.5} if objective == "kl_mask" else {}),
        reward_weight=10.0,
        kl_weight=0.3,
    )
    trajectory = trainer.sample(0)[0][0].trajectory
    (new,) = [one.detach() for one in trainer.policy(trajectory, None, [1])]
    dimensions = new.distribution.mean[0].numel()
    # the old means are off by a number of standard deviations, the same in each dimension: a KL of its square over 2 for each
    offsets = torch.tensor([2.0, 2.0, 2.0, 0.5]) / (dimensions**0.5 if reduction == "sum" else 1.0)
    old_mean = new.distribution.mean + (offsets * new.distribution.std)[:, None, None, None]
    columns = len(trajectory.steps)
    batch = TrainingBatch(trajectory, (0, 1, 2, 3), torch.tensor([1.0, 1.0, -1.0, 1.0])[:, None].expand(4, columns))
    batch.old = {step: Gaussian(old_mean, new.distribution.std) for step in trajectory.steps}
    batch.charges = torch.full((4, columns), 2.0)
    trainer.experience.ask_reference([[(batch, (1,) * 4)]])
    transitions = batch.transitions((1,) * 4, charge_weight=0.3 / 10.0)
    torch.testing.assert_close(transitions.advantage, torch.tensor([0.94, 0.94, -1.06, 0.94]))
    shift = torch.tensor([0.5, -0.5, 0.5, 0.5])  # ratios 1.65, 0.61, 1.65, 1.65
    transitions = dataclasses.replace(transitions, old_log_prob=new.log_prob - shift)
    loss, metrics = trainer.calculate_loss(transitions)
    with torch.no_grad(), trainer.policy.reference():
        (reference,) = trainer.policy(trajectory, None, [1])
    kl = new.distribution.kl(reference.distribution, reduction).mean()
    if objective == "reinforce":
        policy_loss = -(transitions.advantage * new.log_prob).mean()
    else:  # the first would go further than a KL of 2: it counts as at ratio 1; the fourth is below the threshold
        weights = torch.tensor([1.0, *shift[1:].exp()])
        policy_loss = -(transitions.advantage * weights).mean()
        assert metrics["policy/mask_fraction"] == 0.25
    torch.testing.assert_close(loss, 10.0 * policy_loss + 0.3 * kl, rtol=1e-5, atol=1e-6)
    assert "policy/clip_fraction" not in metrics


@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
def test_8x1_equals_2x4_micro_batches(kl_weight, make_trainer, tmp_path):
    def gradients(train_batch_size, accumulation):
        trainer = make_trainer(
            pipe=nudged(),
            output_dir=str(tmp_path / f"{train_batch_size}x{accumulation}"),
            sample_batch_size=8,
            train_batch_size=train_batch_size,
            train_gradient_accumulation_steps=accumulation,
            kl_weight=kl_weight,
        )
        captured = captured_gradients(trainer)
        trainer.train()
        assert len(captured) == 1
        return captured[0]

    whole, parts, single = gradients(8, 1), gradients(2, 4), gradients(1, 8)
    assert all(gradient.abs().max() > 0 for gradient in whole)
    assert largest_difference(whole, parts) < GRADIENT_TOLERANCE
    assert largest_difference(whole, single) < GRADIENT_TOLERANCE


def test_an_update_over_two_sampling_batches_is_the_mean_of_the_two(make_trainer, tmp_path):
    def gradients(accumulation):
        trainer = make_trainer(
            pipe=nudged(),
            output_dir=str(tmp_path / str(accumulation)),
            sample_num_batches_per_epoch=2,
            train_gradient_accumulation_steps=accumulation,
            train_learning_rate=1e-30,  # both updates start from the same adapter
        )
        captured = captured_gradients(trainer)
        trainer.train()
        return captured

    (together,), (first, second) = gradients(2), gradients(1)
    mean = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    assert largest_difference(together, mean) < GRADIENT_TOLERANCE


def test_every_sample_is_trained_with_its_own_advantage(make_trainer):
    prompts = [(f"number {i}", float(i)) for i in range(8)]
    trainer = make_trainer(
        lambda images, prompts, metadata: list(metadata),
        prompts=prompts,
        sample_num_batches_per_epoch=2,
        train_batch_size=2,
        train_num_inner_epochs=2,
    )
    update = trainer._update
    seen = {}

    def remember(transitions):
        for t in transitions:
            for row, advantage in zip(t.samples, t.advantage.tolist(), strict=True):
                seen.setdefault(t.trajectory.prompts[row], set()).add(advantage)
        return update(transitions)

    trainer._update = remember
    trainer.train()
    rewards = torch.arange(8.0)
    advantages = (rewards - rewards.mean()) / rewards.std(correction=0)
    assert seen.keys() == {prompt for prompt, _ in prompts}
    for (prompt, _), advantage in zip(prompts, advantages.tolist(), strict=True):
        (value,) = seen[prompt]
        assert value == pytest.approx(advantage, rel=1e-6)


@pytest.mark.parametrize("reanchor", [None, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_first_ratio_is_1_at_another_batch_shape(reanchor, reduction, make_trainer, lines):
    trainer = make_trainer(
        pipe=nudged(),
        sample_batch_size=8,
        train_batch_size=2,
        train_gradient_accumulation_steps=4,
        train_reanchor=reanchor,
        train_log_prob_reduction=reduction,
        train_clip_range=1e-4 if reduction == "mean" else 1.0,
    )
    trainer.train()
    (update,) = lines(trainer, "loss")
    assert update["policy/ratio_deviation_max"] == 0.0 and update["policy/clip_fraction"] == 0.0


def test_the_first_ratio_of_every_epoch_is_1(make_trainer, lines):
    trainer = make_trainer(sample_batch_size=4, train_batch_size=2, train_gradient_accumulation_steps=2, num_epochs=3,
                           train_num_inner_epochs=2, train_learning_rate=1e-2)  # fmt: skip
    trainer.train()
    deviations = [line["policy/ratio_deviation_max"] for line in lines(trainer, "loss")]
    assert deviations[::2] == [0.0] * 3 and min(deviations[1::2]) > 0


@pytest.mark.parametrize(("reanchor", "replays"), [(False, 2), (True, 3 + 3)])
def test_the_ratio_is_checked_once_in_a_run(reanchor, replays, make_trainer, watch):
    pipe = stable_diffusion()
    calls = watch(pipe.unet)
    make_trainer(pipe=pipe, num_epochs=3, train_reanchor=reanchor).train()
    rollouts = 3
    assert len(calls.rows_where(grad=False)) == (rollouts + replays) * 4


def test_without_reanchoring_the_deviation_is_bounded_or_refused(make_trainer, lines, tmp_path):
    shape = {"sample_batch_size": 8, "train_batch_size": 2, "train_gradient_accumulation_steps": 4}
    trainer = make_trainer(pipe=nudged(), train_reanchor=False, **shape)
    trainer.train()
    deviation = lines(trainer, "loss")[0]["policy/ratio_deviation_max"]
    assert deviation <= trainer.config.train_clip_range / 10
    if deviation > 0:  # kernels of this machine depend on the batch shape
        narrow = {"train_clip_range": deviation / 10, "output_dir": str(tmp_path / "narrow")}
        with pytest.raises(RatioError, match="train_reanchor = False, and the replay differs from the rollout"):
            make_trainer(pipe=nudged(), train_reanchor=False, **shape, **narrow).train()
        narrow["output_dir"] = str(tmp_path / "re-anchored")
        make_trainer(pipe=nudged(), train_reanchor=None, **shape, **narrow).train()


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_the_first_ratio_is_1_in_any_precision(precision, family, make_trainer, lines):
    pipe = with_adapter(FAMILIES[family](), nudged=True)
    trainer = make_trainer(pipe=pipe, mixed_precision=precision, train_num_inner_epochs=2, train_learning_rate=1e-2)
    trainer.train()
    first, second = lines(trainer, "loss")
    assert first["policy/ratio_deviation_max"] == 0.0 < second["policy/ratio_deviation_max"]
    assert first["kl"] > 0


def test_without_a_precision_the_launchers_is_taken(make_trainer, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert make_trainer(mixed_precision=None).accelerator.mixed_precision == "bf16"
    assert make_trainer(mixed_precision="no").accelerator.mixed_precision == "no"


def test_the_reference_is_asked_once_per_transition(make_trainer, watch):
    pipe = nudged()
    calls = watch(pipe.unet)
    trainer = make_trainer(
        pipe=pipe, sample_batch_size=4, sample_num_batches_per_epoch=2, train_batch_size=2, train_num_inner_epochs=3
    )
    trainer.train()
    transitions = 8 * 4
    assert sum(calls.rows_where(grad=False, reference=True)) == 2 * transitions  # guidance doubles the rows
    assert sum(calls.rows_where(grad=True)) == 2 * transitions * 3
    assert calls.rows_where(grad=True, reference=True) == []


def test_the_reference_is_asked_for_chosen_steps_only(make_trainer, watch):
    pipe = nudged()
    calls = watch(pipe.unet)
    make_trainer(pipe=pipe, train_timestep_fraction=0.25).train()
    assert (len(calls.rows_where(grad=True)), len(calls.rows_where(grad=False, reference=True))) == (1, 1)


def test_every_transition_is_trained_on_once_in_each_inner_epoch(make_trainer):
    trainer = make_trainer(
        sample_num_batches_per_epoch=2,
        train_batch_size=2,
        train_gradient_accumulation_steps=2,
        train_timesteps_per_update=3,
        train_num_inner_epochs=2,
        kl_weight=0.0,
    )
    updates = []
    update = trainer._update
    trainer._update = lambda transitions: updates.append(transitions) or update(transitions)
    trainer.step(0, 0)
    assert len(updates) == 2 * 2 * 2  # inner epochs, batches of 4 samples, halves of the steps
    pairs = [
        (id(t.trajectory.latents), *pair) for u in updates for t in u for pair in zip(t.samples, t.steps, strict=True)
    ]
    trained = Counter(pairs)
    assert len(trained) == 8 * 4 and set(trained.values()) == {2}
    orders = [[t.steps for t in u] for u in updates]
    assert len({tuple(order) for order in orders}) > 1  # shuffled


@pytest.mark.parametrize("settings", [{}, {"train_use_lora": False}], ids=["LoRA", "all weights"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(family, settings, make_trainer, tmp_path):
    def gradients(checkpointing):
        trainer = make_trainer(
            pipe=FAMILIES[family](),
            output_dir=str(tmp_path / str(checkpointing)),
            sample_num_steps=2,
            train_gradient_checkpointing=checkpointing,
            **settings,
        )
        (denoiser,) = trainer.tuned.denoisers.values()
        assert denoiser.is_gradient_checkpointing is checkpointing
        captured = captured_gradients(trainer)
        trainer.train()
        names = [name for name, parameter in trainer.policy.named_parameters() if parameter.requires_grad]
        return dict(zip(names, captured[0], strict=True))

    plain, checkpointed = gradients(False), gradients(True)
    zero = [name for name, gradient in checkpointed.items() if "lora_A" not in name and not gradient.any()]
    # sd3's last block throws its text stream away
    assert all("transformer_blocks.1.attn" in name for name in zero) if family == "sd3" else not zero
    assert largest_difference(list(plain.values()), list(checkpointed.values())) < CHECKPOINTING_TOLERANCE


CHECKPOINTING_TOLERANCE = 1e-6  # the same numbers, computed twice


SCHEDULES = {  # of 6 steps, the first 2 of which warm up
    "constant": [1, 1, 1, 1, 1, 1],
    "constant_with_warmup": [0, 1 / 2, 1, 1, 1, 1],
    "linear": [0, 1 / 2, 1, 3 / 4, 2 / 4, 1 / 4],
    "cosine": [0, 1 / 2, 1, 0.5 + 2**-1.5, 0.5, 0.5 - 2**-1.5],
    "cosine_with_restarts": [0, 1 / 2, 1, 0.5 + 2**-1.5, 0.5, 0.5 - 2**-1.5],
    "polynomial": [0, 1 / 2, 1, 3 / 4, 2 / 4, 1 / 4],
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rate_schedules(name, make_trainer, lines):
    trainer = make_trainer(
        num_epochs=3, sample_num_steps=2, train_batch_size=2, train_learning_rate=0.1, train_lr_scheduler=name,
        train_lr_warmup_steps=0 if name == "constant" else 2,
    )  # fmt: skip
    trainer.train()
    rates = [line["learning_rate"] / 0.1 for line in lines(trainer, "learning_rate")]
    assert rates == pytest.approx(SCHEDULES[name], abs=1e-5)  # polynomial goes to 1e-7 instead of 0


def test_a_step_that_is_no_action_is_left_out(make_trainer, watch):
    """The last step of this grid is deterministic: 3 actions in 4 steps, and still the updates that were asked for."""
    pipe = stable_diffusion(scheduler=ddim(set_alpha_to_one=True))
    calls = watch(pipe.unet)
    trainer = make_trainer(pipe=pipe, train_timesteps_per_update=1, train_lr_scheduler="linear")
    trainer.train()
    assert (trainer.global_step, len(calls.rows_where(grad=True))) == (3, 3)


# ---------------------------------------------------------------- DDPO's methods


def test_loss_is_ddpos(make_trainer):
    loss = make_trainer().loss(torch.tensor([-1.0]), 0.0001, torch.tensor([1.0]))
    assert loss.item() == 1.0  # as TRL's own test has it
    ratio = torch.tensor([0.5, 2.0, 0.5, 2.0])
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    loss = make_trainer(train_objective="ppo").loss(advantages, 0.1, ratio)
    assert loss.item() == pytest.approx((-0.5 - 1.1 + 0.9 + 2.0) / 4, abs=1e-7)
    loss = make_trainer(train_objective="dpok").loss(advantages, 0.1, ratio)
    assert loss.item() == pytest.approx((-0.9 - 1.1 + 0.9 + 1.1) / 4, abs=1e-7)


@pytest.mark.parametrize("is_async", [False, True])
def test_compute_rewards(is_async, make_trainer):
    def reward(images, prompts, metadata):
        return images.sum((1, 2, 3)), {"of": prompts}

    pairs = [[torch.full((2, 3, 1, 1), float(i)), (f"{i}a", f"{i}b"), ({}, {})] for i in range(5)]
    rewards, metadata = make_trainer(reward).compute_rewards(pairs, is_async=is_async)
    assert [r.tolist() for r in rewards] == [[3.0 * i, 3.0 * i] for i in range(5)]
    assert [m["of"] for m in metadata] == [(f"{i}a", f"{i}b") for i in range(5)]


def test_step_may_be_called_by_hand(make_trainer):
    trainer = make_trainer(sample_num_batches_per_epoch=2)
    assert trainer.step(0, 0) == 2
    assert trainer.step(1, 2) == 4


def test_sd_pipeline_is_the_pipeline_also_where_a_name_was_given(make_trainer, tmp_path):
    stable_diffusion().save_pretrained(tmp_path / "base")
    trainer = make_trainer(pipe=tmp_path / "base")
    assert trainer.sd_pipeline is trainer.pipeline and trainer.pipeline.unet is trainer.policy.tuned.denoisers["unet"]


def test_train_takes_the_number_of_epochs(make_trainer, lines):
    trainer = make_trainer(num_epochs=5)
    trainer.train(epochs=2)
    trainer.train(epochs=3)
    assert [line["epoch"] for line in lines(trainer, "reward")] == [0, 1, 2]


# ---------------------------------------------------------------- rewards in threads


def test_rewards_in_threads_are_the_same_rewards(make_trainer, lines, adapter, tmp_path):
    def rewards(in_threads):
        trainer = make_trainer(
            output_dir=str(tmp_path / str(in_threads)),
            num_epochs=2,
            sample_num_batches_per_epoch=3,
            async_reward_computation=in_threads,
        )
        trainer.train()
        return [line["reward"] for line in lines(trainer, "reward")], adapter(trainer)

    (plain, first), (threaded, second) = rewards(False), rewards(True)
    assert plain == threaded
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rewards_are_computed_in_threads_beside_the_sampling(make_trainer):
    """Two reward calls at once, both begun while batches are still sampled: in one thread the barrier would break."""
    barrier = threading.Barrier(2, timeout=30)
    log = []

    def reward(images, prompts, metadata):
        log.append(threading.current_thread() is threading.main_thread())
        barrier.wait()
        return images.mean((1, 2, 3))

    trainer = make_trainer(reward, sample_num_batches_per_epoch=2, async_reward_computation=True, max_workers=2)
    rollout = trainer.policy.rollout
    begun = []

    def slow_rollout(*args):
        trajectory = rollout(*args)
        begun.append(len(log))
        return trajectory

    trainer.policy.rollout = slow_rollout
    submit = trainer.scoring.executor.submit

    def submit_and_wait_for_the_start(*args):
        job = submit(*args)
        while len(log) < len(begun):
            threading.Event().wait(0.001)
        return job

    trainer.scoring.executor.submit = submit_and_wait_for_the_start
    trainer.train()
    assert log == [False, False]
    assert begun == [0, 1]  # when the second batch was sampled, the first was being scored
