"""Changing a field of `DPOKConfig` changes something that can be seen: field for field, and none without a case."""

import dataclasses
import sys
import threading
import types

import accelerate
import field_cases_of_the_update  # noqa: F401 (registers its cases)
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from field_cases import CASES, case
from PIL import Image
from tiny import stable_diffusion, stable_diffusion_3

from dpok_trl import DPOKConfig, RewardError
from dpok_trl.policy.lora import adapter_layers
from dpok_trl.training import publishing, setup
from dpok_trl.training.batches import TrainingBatch


@pytest.fixture
def run(make_trainer, tmp_path, request):
    """Trains a tiny run, each in a folder of its own, and returns the trainer."""
    count = iter(range(99))

    def train(**kwargs):
        trainer = make_trainer(
            **{"output_dir": str(tmp_path / f"run-{next(count)}"), "sample_num_steps": 2, "sample_batch_size": 2,
               "train_batch_size": 2, **kwargs}
        )  # fmt: skip
        trainer.train()
        return trainer

    return types.SimpleNamespace(train=train, make=make_trainer, folder=tmp_path, get=request.getfixturevalue)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(DPOKConfig)])
def test_changing_the_field_changes_something(name, run, monkeypatch):
    CASES[name](run, monkeypatch)


def rewards(trainer, lines) -> list[float]:
    return [line["reward"] for line in lines(trainer, "reward")]


def calls_of(run, **kwargs):
    """The calls of the denoiser in one epoch."""
    pipe = stable_diffusion()
    calls = run.get("watch")(pipe.unet)
    run.train(pipe=pipe, **kwargs)
    return calls


# ---------------------------------------------------------------- the run


@case("exp_name", "run_name", "logdir")
def _output_folder(run, monkeypatch):
    trainer = run.make(output_dir=None, logdir=str(run.folder / "runs"), exp_name="rabbit", run_name="first")
    assert trainer.output_dir == run.folder / "runs" / "rabbit-first"


@case("output_dir")
def _output_dir(run, monkeypatch):
    run.train(output_dir=str(run.folder / "here"))
    assert (run.folder / "here" / "metrics.jsonl").exists()


@case("seed")
def _seed(run, monkeypatch):
    lines = run.get("lines")
    first, again, other = (rewards(run.train(seed=seed), lines) for seed in (1, 1, 2))
    assert first == again != other


@case("log_with")
def _log_with(run, monkeypatch):
    assert not run.train().accelerator.trackers
    assert [tracker.name for tracker in run.train(log_with="tensorboard").accelerator.trackers] == ["tensorboard"]


@case("tracker_project_name")
def _tracker_project_name(run, monkeypatch):
    trainer = run.train(log_with="tensorboard", tracker_project_name="rabbits")
    assert list((trainer.output_dir / "rabbits").glob("events.out.tfevents.*"))


@case("tracker_kwargs")
def _tracker_kwargs(run, monkeypatch):
    given = []
    monkeypatch.setattr(
        accelerate.Accelerator, "init_trackers", lambda self, name, config, init_kwargs: given.append(init_kwargs)
    )
    run.train(tracker_kwargs={"wandb": {"entity": "me"}})
    assert given == [{"wandb": {"entity": "me"}}]


@case("accelerator_kwargs")
def _accelerator_kwargs(run, monkeypatch):
    assert run.make(accelerator_kwargs={"device_placement": False}).accelerator.device_placement is False
    assert run.make().accelerator.device_placement is True


@case("project_kwargs")
def _project_kwargs(run, monkeypatch):
    project = {"project_dir": str(run.folder / "p"), "logging_dir": str(run.folder / "l"), "total_limit": 1}
    trainer = run.train(output_dir=None, project_kwargs=project, num_epochs=2, save_freq=1, log_with="tensorboard")
    assert [path.name for path in (run.folder / "p").glob("checkpoint-*")] == ["checkpoint-2"]
    assert list((run.folder / "l").rglob("events.out.*")) and trainer.output_dir == run.folder / "p"


@case("num_epochs")
def _num_epochs(run, monkeypatch):
    assert len(rewards(run.train(num_epochs=3), run.get("lines"))) == 3


def saved(run, **kwargs):
    return sorted(path.name for path in run.train(num_epochs=5, **kwargs).output_dir.glob("checkpoint-*"))


@case("save_freq")
def _save_freq(run, monkeypatch):
    assert saved(run, save_freq=0) == ["checkpoint-5"]
    assert saved(run, save_freq=2) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]


@case("num_checkpoint_limit")
def _num_checkpoint_limit(run, monkeypatch):
    assert saved(run, save_freq=2, num_checkpoint_limit=2) == ["checkpoint-4", "checkpoint-5"]


@case("mixed_precision")
def _mixed_precision(run, monkeypatch):
    def dtype_of_the_output(**kwargs):
        pipe, seen = stable_diffusion(), set()
        pipe.unet.mid_block.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
        run.train(pipe=pipe, **kwargs)
        return seen

    assert dtype_of_the_output() == {torch.float32}
    assert dtype_of_the_output(mixed_precision="bf16") == {torch.bfloat16}


@case("allow_tf32")
def _allow_tf32(run, monkeypatch):
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allow in (True, False):
            run.make(allow_tf32=allow)
            assert torch.backends.cuda.matmul.allow_tf32 is allow
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@case("model_dtype")
def _model_dtype(run, monkeypatch):
    stable_diffusion().save_pretrained(run.folder / "base")

    def dtypes(**kwargs):
        pipe = run.make(pipe=run.folder / "base", **kwargs).pipeline
        return {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)}

    assert dtypes() == {torch.float32}
    assert dtypes(model_dtype="bf16") == {torch.bfloat16}


@case("torch_compile", "torch_compile_backend", "torch_compile_mode")
def _compile(run, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kwargs: compiled.append((self, kwargs)))
    run.make()
    assert compiled == []
    trainer = run.make(torch_compile=True, torch_compile_backend="aot_eager", torch_compile_mode="reduce-overhead")
    assert compiled == [(trainer.pipeline.unet, {"backend": "aot_eager", "mode": "reduce-overhead"})]


@case("resume_from")
def _resume_from(run, monkeypatch):
    first = run.train(num_epochs=1)
    second = run.train(num_epochs=2, resume_from=str(first.output_dir))
    assert [line["epoch"] for line in run.get("lines")(second, "reward")] == [1]


@case("sample_grid_freq")
def _sample_grid_freq(run, monkeypatch):
    def grids(freq):
        folder = run.train(num_epochs=3, sample_grid_freq=freq).output_dir
        return sorted(path.name for path in (folder / "samples").glob("*.png"))

    assert grids(0) == []
    assert grids(2) == ["epoch-0000.png", "epoch-0002.png"]


# ---------------------------------------------------------------- sampling


@case("sample_num_steps")
def _sample_num_steps(run, monkeypatch):
    batches, _ = run.make(sample_num_steps=7).sample(0)
    assert len(batches[0].trajectory.latents) == 8


@case("sample_eta")
def _sample_eta(run, monkeypatch):
    (std,), (half,) = (first_stds(run.make(sample_eta=eta)) for eta in (1.0, 0.5))
    assert half == pytest.approx(0.5 * std, rel=1e-6)


def first_stds(trainer):
    batches, _ = trainer.sample(0)
    (replayed,) = trainer.policy(batches[0].trajectory, None, [0])
    return replayed.distribution.std[:1].tolist()


@case("sample_guidance_scale")
def _guidance(run, monkeypatch):
    assert set(calls_of(run, sample_guidance_scale=3.0).rows) == {4}
    assert set(calls_of(run, sample_guidance_scale=1.0).rows) == {2}
    lines = run.get("lines")
    assert rewards(run.train(sample_guidance_scale=3.0), lines) != rewards(run.train(sample_guidance_scale=6.0), lines)


@case("sample_batch_size", "sample_num_batches_per_epoch")
def _images(run, monkeypatch):
    batches, _ = run.make(sample_batch_size=6, sample_num_batches_per_epoch=3, train_batch_size=1).sample(0)
    assert [len(batch.trajectory) for batch in batches] == [6, 6, 6]


@case("sample_num_images_per_prompt")
def _groups(run, monkeypatch):
    batches, _ = run.make(sample_num_images_per_prompt=2).sample(0)
    prompts = batches[0].trajectory.prompts
    assert prompts[0] == prompts[1] != prompts[2] == prompts[3]


@case("sample_transition")
def _transition(run, monkeypatch):
    (std,), (cps,) = (first_stds(run.make(sample_transition=kind)) for kind in ("ancestral", "cps"))
    assert std < cps  # sqrt(1 - r^2) of the next level's sigma against all of it


@case("sample_noise_level")
def _noise_level(run, monkeypatch):
    def std(level):
        return first_stds(run.make(pipe=stable_diffusion_3(), sample_noise_level=level))[0]

    assert std(0.7) == pytest.approx(7 * std(0.1), rel=1e-6)


@case("sample_min_std")
def _min_std(run, monkeypatch):
    every = run.make().sample(0)[0][0].trajectory
    some = run.make(sample_min_std=0.5).sample(0)[0][0].trajectory
    assert every.steps == (0, 1, 2, 3) and 0 < len(some.steps) < 4
    assert torch.equal(every.images, some.images)  # sampled all the same


@case("sample_fp32_latents")
def _fp32_latents(run, monkeypatch):
    def dtypes(**kwargs):
        trajectory = run.make(pipe=stable_diffusion().to(torch.bfloat16), **kwargs).sample(0)[0][0].trajectory
        return {action.dtype for action in trajectory.next_latents[:-1]}

    assert dtypes() == {torch.bfloat16}
    assert dtypes(sample_fp32_latents=True) == {torch.float32}


@case("sample_sde_window_size", "sample_sde_window_schedule", "sample_sde_window_start", "sample_sde_window_interval")
def _window(run, monkeypatch):
    def actions(**kwargs):
        trainer = run.make(sample_num_steps=4, **kwargs)
        return [trainer.sample(epoch)[0][0].trajectory.steps for epoch in range(3)]

    assert actions() == [(0, 1, 2, 3)] * 3
    window = {"sample_sde_window_size": 1, "sample_sde_window_interval": 1}
    assert actions(**window) == [(0,), (1,), (2,)]
    assert actions(**{**window, "sample_sde_window_interval": 2}) == [(0,), (0,), (1,)]
    assert actions(**{**window, "sample_sde_window_start": 1}) == [(1,), (2,), (3,)]
    assert actions(sample_sde_window_size=2, sample_sde_window_schedule="fixed") == [(0, 1)] * 3


@case("sample_vae_slicing", "sample_vae_tiling")
def _vae(run, monkeypatch):
    def settings(**kwargs):
        vae = run.make(**kwargs).pipeline.vae
        return vae.use_slicing, vae.use_tiling

    assert settings() == (False, False)
    assert settings(sample_vae_slicing=True) == (True, False)
    assert settings(sample_vae_tiling=True) == (False, True)


@case("sample_offload_encoders")
def _offload_encoders(run, monkeypatch):
    def journeys(offload):
        trainer = run.make(output_dir=str(run.folder / str(offload)), sample_offload_encoders=offload)
        sent = run.get("record_to")(trainer.pipeline.text_encoder)
        trainer.train()
        return len(sent)

    assert (journeys(False), journeys(True)) == (0, 2)  # away and back


@case("sample_call_columns")
def _call_columns(run, monkeypatch):
    picture = Image.new("RGB", (16, 16), "red")
    trainer = run.make(
        pipe=StableDiffusionImg2ImgPipeline(**stable_diffusion().components, requires_safety_checker=False),
        prompts=[("a cat", {"image": picture})],
        sample_call_columns=["image"],
    )
    assert trainer.sample(0)[0][0].trajectory.arguments == {"image": [picture] * 4}


@case("sample_call_kwargs")
def _call_kwargs(run, monkeypatch):
    batches, _ = run.make(sample_call_kwargs={"height": 32, "width": 24}).sample(0)
    assert batches[0].trajectory.images.shape == (4, 3, 32, 24)


@case("negative_prompts")
def _negative(run, monkeypatch):
    lines = run.get("lines")
    without, other = rewards(run.train(), lines), rewards(run.train(negative_prompts="blurry, dark"), lines)
    assert without != other


@case("sample_weight_column")
def _weight_column(run, monkeypatch):
    prompts = [("a cat", {"weight": 3.0}), ("a dog", {"weight": 0.0}), ("a bird", {"weight": 3.0})]

    def drawn(column):
        batches, _ = run.make(
            prompts=prompts, sample_batch_size=6, train_batch_size=6, sample_weight_column=column
        ).sample(0)
        return sorted(set(batches[0].trajectory.prompts))

    assert drawn(None) == ["a bird", "a cat", "a dog"]
    assert drawn("weight") == ["a bird", "a cat"]


@case("sample_category_column")
def _category_column(run, monkeypatch):
    prompts = [("a cat", {"kind": "one"}), ("two dogs", {"kind": "two"})]

    def of_categories(column):
        trainer = run.train(prompts=prompts, sample_category_column=column)
        (line,) = run.get("lines")(trainer, "reward")
        return {name for name in line if name.startswith("reward/")}

    assert of_categories(None) == set()
    assert of_categories("kind") == {"reward/one", "reward/two"}


# ---------------------------------------------------------------- rewards and advantages


class Judge(torch.nn.Module):
    def forward(self, images, prompts, metadata):
        return images.mean((1, 2, 3))


def total_of(values, **kwargs):
    """What `reward` is written with two rewards of two images of one prompt: one column each."""

    def reward(run):
        lines = run.get("lines")
        constant = [lambda images, prompts, metadata, column=column: column for column in values]
        return rewards(run.train(reward=constant, prompts=["a"], **kwargs), lines)

    return reward


@case("reward_weights")
def _reward_weights(run, monkeypatch):
    columns = [[1.0, 3.0], [10.0, 20.0]]  # means 2 and 15
    assert total_of(columns)(run) == [17.0]
    assert total_of(columns, reward_weights=[0.5, 2.0])(run) == [31.0]


@case("reward_aggregation")
def _reward_aggregation(run, monkeypatch):
    columns = [[1.0, 3.0], [10.0, 20.0]]
    groups = {"sample_num_images_per_prompt": 2}
    assert total_of(columns, **groups)(run) == [17.0]
    assert total_of(columns, reward_aggregation="normalize_then_sum", **groups)(run) == [0.0]  # -1 -1 and 1 + 1


@case("reward_on_error")
def _reward_on_error(run, monkeypatch):
    columns = [[float("nan"), 3.0], [10.0, 20.0]]
    assert total_of(columns)(run) == [23.0]
    with pytest.raises(RewardError, match="1 of the 2 rewards that <lambda> returned are not finite"):
        total_of(columns, reward_on_error="raise")(run)


@case("reward_offload")
def _reward_offload(run, monkeypatch):
    def journeys(**kwargs):
        judge = Judge()
        sent = run.get("record_to")(judge)
        run.train(reward=judge, **kwargs)
        return len(sent)

    assert journeys() == 0
    assert journeys(reward_offload=True) == 3  # away at the start, to the device, and away again


@case("async_reward_computation", "max_workers")
def _threads(run, monkeypatch):
    assert run.make().scoring.executor is None
    executor = run.make(async_reward_computation=True, max_workers=3).scoring.executor
    barrier_of_three = threading.Barrier(3, timeout=20)
    for job in [executor.submit(barrier_of_three.wait) for _ in range(3)]:
        job.result()  # three at a time, or the barrier breaks


PROMPT_LIST = ["a", "a", "a", "b"]
REWARDS = torch.tensor([0.0, 1.0, 2.0, 7.0])


@case("per_prompt_stat_tracking", "per_prompt_stat_tracking_min_count")
def _tracking(run, monkeypatch):
    def advantages(min_count):
        trainer = run.make(per_prompt_stat_tracking=True, per_prompt_stat_tracking_min_count=min_count)
        return trainer.advantages(PROMPT_LIST, REWARDS)

    whole = (REWARDS - 2.5) / REWARDS.std(correction=0)
    torch.testing.assert_close(run.make().advantages(PROMPT_LIST, REWARDS), whole, rtol=1e-5, atol=0)
    torch.testing.assert_close(advantages(4), whole, rtol=1e-5, atol=0)
    std = (2 / 3) ** 0.5  # of 0, 1, 2
    own = torch.tensor([-1 / std, 0.0, 1 / std, whole[3].item()])
    torch.testing.assert_close(advantages(3), own, rtol=1e-5, atol=0)


@case("per_prompt_stat_tracking_buffer_size")
def _buffer(run, monkeypatch):
    def advantage_of_a_2(buffer_size):
        trainer = run.make(
            per_prompt_stat_tracking=True,
            per_prompt_stat_tracking_buffer_size=buffer_size,
            per_prompt_stat_tracking_min_count=1,
        )
        trainer.advantages(["a"], torch.tensor([0.0]))
        return trainer.advantages(["a"], torch.tensor([2.0])).item()

    assert advantage_of_a_2(1) == 0.0  # compared with itself alone
    assert advantage_of_a_2(2) == pytest.approx(1.0, abs=1e-5)  # mean 1, std 1


@case("train_adv_type")
def _adv_type(run, monkeypatch):
    grouped = run.make(train_adv_type="group", sample_num_images_per_prompt=2).advantages(
        ["a", "a", "b", "b"], REWARDS
    )
    torch.testing.assert_close(grouped, torch.tensor([-1.0, 1.0, -1.0, 1.0]), rtol=1e-3, atol=0)


@case("train_adv_clip_max")
def _adv_clip(run, monkeypatch):
    assert run.make(train_adv_clip_max=0.25).advantages(PROMPT_LIST, REWARDS).abs().max() == 0.25


# ---------------------------------------------------------------- the update


@case("train_batch_size")
def _train_batch_size(run, monkeypatch):
    for size in (1, 2):
        assert set(calls_of(run, train_batch_size=size).rows_where(grad=True)) == {2 * size}  # times two: guidance


@case("train_use_8bit_adam")
def _adam8(run, monkeypatch):
    class AdamW8bit(torch.optim.AdamW):
        pass

    module = types.ModuleType("bitsandbytes")
    module.optim = types.ModuleType("bitsandbytes.optim")
    module.optim.AdamW8bit = AdamW8bit
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module.optim)
    assert isinstance(run.make(train_use_8bit_adam=True).optimizer.optimizer, AdamW8bit)
    assert type(run.make().optimizer.optimizer) is torch.optim.AdamW


def rates(run, **kwargs):
    trainer = run.train(num_epochs=4, train_learning_rate=0.01, **kwargs)
    return [line["learning_rate"] for line in run.get("lines")(trainer, "learning_rate")]


@case("train_learning_rate")
def _learning_rate(run, monkeypatch):
    assert rates(run) == [0.01] * 4


@case("train_lr_scheduler")
def _lr_scheduler(run, monkeypatch):
    assert rates(run, train_lr_scheduler="linear") == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


@case("train_lr_warmup_steps")
def _warmup(run, monkeypatch):
    warm = rates(run, train_lr_scheduler="linear", train_lr_warmup_steps=2)
    assert warm == pytest.approx([0.0, 0.005, 0.01, 0.005])


@case("train_adam_beta1", "train_adam_beta2", "train_adam_weight_decay", "train_adam_epsilon")
def _adam(run, monkeypatch):
    chosen = {"beta1": 0.8, "beta2": 0.9, "weight_decay": 0.5, "epsilon": 0.1}
    trainer = run.make(**{f"train_adam_{name}": value for name, value in chosen.items()})
    (group,) = trainer.optimizer.param_groups
    assert (*group["betas"], group["weight_decay"], group["eps"]) == tuple(chosen.values())


def updates(run, **kwargs):
    """Two training batches of two steps each; an update for each batch by default."""
    return run.train(sample_batch_size=2, train_batch_size=1, **kwargs).global_step


@case("train_gradient_accumulation_steps")
def _accumulation(run, monkeypatch):
    assert (updates(run), updates(run, train_gradient_accumulation_steps=2)) == (2, 1)


@case("train_num_inner_epochs")
def _inner_epochs(run, monkeypatch):
    assert updates(run, train_num_inner_epochs=3) == 6


@case("train_timesteps_per_update")
def _timesteps_per_update(run, monkeypatch):
    assert updates(run, train_timesteps_per_update=1) == 4


@case("train_max_grad_norm")
def _max_grad_norm(run, monkeypatch):
    limits = []
    clip = accelerate.Accelerator.clip_grad_norm_
    monkeypatch.setattr(
        accelerate.Accelerator,
        "clip_grad_norm_",
        lambda self, parameters, limit: limits.append(limit) or clip(self, parameters, limit),
    )
    run.train(train_max_grad_norm=0.125)
    assert limits == [0.125]


@case("train_cfg")
def _train_cfg(run, monkeypatch):
    run.make(train_cfg=True, sample_guidance_scale=3.0)
    run.make(train_cfg=False, sample_guidance_scale=1.0)
    with pytest.raises(ValueError, match="train_cfg = False with sample_guidance_scale = 3.0"):
        run.make(train_cfg=False, sample_guidance_scale=3.0)


@case("train_objective")
def _objective(run, monkeypatch):
    def loss(objective):
        trainer = run.make(train_objective=objective, kl_weight=0.0)
        batches, _ = trainer.sample(0)
        trajectory = batches[0].trajectory
        transitions = TrainingBatch(trajectory, (0,), -torch.ones(1, len(trajectory.steps))).transitions([1])
        # a ratio of e, with a negative advantage: PPO does not clip it, DPOK does
        transitions = dataclasses.replace(transitions, old_log_prob=transitions.old_log_prob - 1.0)
        return trainer.calculate_loss(transitions)[0].item()

    assert loss("dpok") == pytest.approx(1.0001, abs=1e-6)
    assert loss("ppo") == pytest.approx(2.718282, abs=1e-5)


@case("train_clip_range")
def _clip_range(run, monkeypatch):
    def clipped(clip_range):
        trainer = run.train(train_clip_range=clip_range, train_num_inner_epochs=2, train_learning_rate=0.02)
        return run.get("lines")(trainer, "policy/clip_fraction")[1]["policy/clip_fraction"]

    assert clipped(1e-4) > 0.5 and clipped(10.0) == 0.0


@case("train_log_prob_reduction")
def _reduction(run, monkeypatch):
    def log_probs(reduction):
        return run.make(train_log_prob_reduction=reduction).sample(0)[0][0].trajectory.log_probs

    torch.testing.assert_close(log_probs("sum"), 4 * 8 * 8 * log_probs("mean"), rtol=1e-5, atol=1e-4)


@case("train_timestep_fraction")
def _fraction(run, monkeypatch):
    def transitions(fraction):
        return len(calls_of(run, sample_num_steps=4, train_timestep_fraction=fraction).rows_where(grad=True))

    assert (transitions(1.0), transitions(0.5)) == (4, 2)


@case("train_mixed_timesteps")
def _mixed(run, monkeypatch):
    def steps(**kwargs):
        trainer = run.make(**kwargs)
        seen = []
        update = trainer._update
        trainer._update = lambda transitions: seen.extend(t.steps for t in transitions) or update(transitions)
        trainer.train()
        return seen

    assert all(len(set(together)) == 1 for together in steps())
    assert any(
        len(set(together)) > 1 for together in steps(train_mixed_timesteps=True, output_dir=str(run.folder / "mixed"))
    )


@case("train_reanchor")
def _reanchor(run, monkeypatch):
    def replays(reanchor):
        calls = calls_of(run, train_reanchor=reanchor)
        return len(calls.rows_where(grad=False)) - 2  # rollout

    # two steps each: the check at the start, together and apart; re-anchored: the check again, and the anchor
    assert (replays(None), replays(True)) == (4, 8)


@case("train_gradient_checkpointing")
def _checkpointing(run, monkeypatch):
    assert run.make(train_gradient_checkpointing=True).pipeline.unet.is_gradient_checkpointing
    assert not run.make().pipeline.unet.is_gradient_checkpointing


@case("train_lora_rank", "train_lora_alpha")
def _lora(run, monkeypatch):
    def rank_and_scale(**kwargs):
        layer = adapter_layers(run.make(**kwargs).pipeline.unet)[0]
        return layer.lora_A["default"].weight.shape[0], layer.scaling["default"]

    assert rank_and_scale() == (4, 1.0)
    assert rank_and_scale(train_lora_rank=2) == (2, 1.0)
    assert rank_and_scale(train_lora_rank=2, train_lora_alpha=6) == (2, 3.0)


@case("train_use_lora")
def _use_lora(run, monkeypatch):
    def trained(**kwargs):
        trainer = run.make(**kwargs)
        names = [name for name, p in trainer.policy.named_parameters() if p.requires_grad]
        return {"lora" in name for name in names}, len(names)

    assert trained()[0] == {True}
    assert trained(train_use_lora=False) == ({False}, len(list(stable_diffusion().unet.parameters())))


@case("train_text_encoder")
def _text_encoder(run, monkeypatch):
    def trained(**kwargs):
        trainer = run.make(**kwargs)
        return {name.split(".")[1] for name, p in trainer.policy.named_parameters() if p.requires_grad}

    assert trained() == {"unet"}
    assert trained(train_text_encoder=True) == {"unet", "text_encoder"}


# ---------------------------------------------------------------- the KL term and the Hub


def kl(run, **kwargs):
    trainer = run.train(train_num_inner_epochs=2, train_learning_rate=0.01, **kwargs)
    return [line.get("kl") for line in run.get("lines")(trainer, "loss")]


@case("kl_type")
def _kl_type(run, monkeypatch):
    gaussian, noise = kl(run), kl(run, kl_type="noise")
    assert gaussian[0] == noise[0] == 0.0
    assert gaussian[1] > 0 and noise[1] > 0 and gaussian[1] != noise[1]


@case("kl_weight")
def _kl_weight(run, monkeypatch):
    assert kl(run, kl_weight=0.0) == [None, None]
    assert len(calls_of(run, kl_weight=0.0).rows_where(grad=False, reference=True)) == 0
    assert len(calls_of(run, kl_weight=0.5).rows_where(grad=False, reference=True)) == 2


def evaluated(run, **kwargs):
    """The rows and the number of calls of the denoiser in an evaluation without training: the images of both models, and two replays for the KL."""
    trainer = run.make(
        eval_prompts=["a cat", "two dogs"],
        **{
            "sample_num_steps": 2,
            "sample_batch_size": 2,
            "sample_guidance_scale": 1.0,
            "train_batch_size": 2,
            **kwargs,
        },
    )
    calls = run.get("watch")(trainer.pipeline.unet)
    trainer.evaluate()
    return calls.rows


@case("eval_freq")
def _eval_freq(run, monkeypatch):
    def epochs(eval_freq):
        trainer = run.train(
            eval_prompts=["a cat"], num_epochs=2, eval_freq=eval_freq, eval_num_images_per_prompt=1, sample_guidance_scale=1.0
        )  # fmt: skip
        return [line["epoch"] for line in run.get("lines")(trainer, "eval/prompts/kl")]

    assert (epochs(1), epochs(2)) == ([0, 1], [1])


@case("eval_num_images_per_prompt")
def _eval_num_images_per_prompt(run, monkeypatch):
    # two prompts of four images in batches of two and two steps
    assert evaluated(run) == [2] * 4 * 2 * (1 + 2 + 1)
    assert evaluated(run, eval_num_images_per_prompt=2) == [2] * 2 * 2 * (1 + 2 + 1)


@case("eval_batch_size")
def _eval_batch_size(run, monkeypatch):
    assert evaluated(run) == [2] * 4 * 2 * (1 + 2 + 1)
    assert evaluated(run, eval_batch_size=8) == [8] * 1 * 2 * (1 + 2 + 1)


@case("eval_num_steps")
def _eval_num_steps(run, monkeypatch):
    assert evaluated(run) == [2] * 4 * 2 * (1 + 2 + 1)
    assert evaluated(run, eval_num_steps=3) == [2] * 4 * 3 * (1 + 2 + 1)


@case("metric_for_best_model", "greater_is_better")
def _best_checkpoint(run, monkeypatch):
    def kept(**kwargs):
        """Which of three checkpoints are there in the end, with a limit of one; the KL of the evaluations rises."""
        trainer = run.train(
            eval_prompts=["a cat"], eval_freq=1, eval_num_images_per_prompt=1, num_epochs=3, save_freq=1, num_checkpoint_limit=1, **kwargs
        )  # fmt: skip
        kl = [line["eval/prompts/kl"] for line in run.get("lines")(trainer, "eval/prompts/kl")]
        assert kl[0] < kl[1] < kl[2]
        return sorted(path.name for path in trainer.output_dir.glob("checkpoint-*"))

    assert kept() == ["checkpoint-3"]
    assert kept(metric_for_best_model="eval/prompts/kl") == ["checkpoint-3"]
    assert kept(metric_for_best_model="eval/prompts/kl", greater_is_better=False) == ["checkpoint-1", "checkpoint-3"]


@case("log_gradient_cosine_freq")
def _gradient_cosine(run, monkeypatch):
    def trained(**kwargs):
        return run.train(prompts=["a cat", "two dogs"], num_epochs=3, sample_batch_size=2, **kwargs)

    without, every_other = trained(), trained(log_gradient_cosine_freq=2)
    lines = run.get("lines")
    assert lines(without, "gradient/cosine_mean") == []
    measured = lines(every_other, "gradient/cosine_mean", "gradient/cosine_min", "gradient/norm_ratio", "time/update")
    assert [line["epoch"] for line in measured] == [0, 2]
    assert all(line["gradient/prompts"] == 2 for line in measured)
    adapter = run.get("adapter")  # training does not notice
    assert all(map(torch.equal, adapter(without).values(), adapter(every_other).values()))


def pushed(run, monkeypatch, **kwargs):
    calls = []
    monkeypatch.setattr(
        publishing,
        "push_folder",
        lambda folder, repo_id, **given: calls.append((repo_id, given)),
    )
    monkeypatch.setattr(publishing, "open_repository", lambda repo_id, *, private: repo_id)
    run.train(**kwargs)
    return calls


@case("push_to_hub")
def _push_to_hub(run, monkeypatch):
    assert pushed(run, monkeypatch, hub_model_id="me/rabbit") == []
    assert len(pushed(run, monkeypatch, hub_model_id="me/rabbit", push_to_hub=True)) == 1


@case("hub_model_id", "hub_private_repo")
def _repository(run, monkeypatch):
    ((repository, given),) = pushed(run, monkeypatch, push_to_hub=True, hub_model_id="me/hare", hub_private_repo=True)
    assert (repository, given["private"]) == ("me/hare", True)


@case("hub_strategy")
def _hub_strategy(run, monkeypatch):
    settings = {"push_to_hub": True, "hub_model_id": "me/rabbit", "num_epochs": 2, "save_freq": 1}
    for strategy, expected in {
        "end": [("End of training", None)],
        "every_save": [("Training in progress, step 1", None), ("End of training", None)],
        "checkpoint": [("Training in progress, step 1", "checkpoint-1"), ("End of training", "checkpoint-2")],
    }.items():
        calls = [given for _, given in pushed(run, monkeypatch, hub_strategy=strategy, **settings)]
        assert [(c["commit_message"], c["checkpoint"] and c["checkpoint"].name) for c in calls] == expected


def test_the_accelerator_is_asked_for_what_the_config_says(make_config, monkeypatch):
    asked = {}
    real = setup.Accelerator
    monkeypatch.setattr(setup, "Accelerator", lambda **kwargs: asked.update(kwargs) or real(**kwargs))
    setup.make_accelerator(make_config(log_with="tensorboard", mixed_precision="bf16"))
    assert (asked["log_with"], asked["mixed_precision"]) == ("tensorboard", "bf16")
    assert asked["step_scheduler_with_optimizer"] is False  # or the schedule would run num_processes times as fast
