"""What goes wrong in a run stops it in words, and leaves pipeline and adapter as they were."""

import datasets
import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    HeunDiscreteScheduler,
    PyramidAttentionBroadcastConfig,
    apply_pyramid_attention_broadcast,
)
from peft import LoraConfig
from tiny import stable_diffusion

from dpok_trl import RatioError, RewardError
from dpok_trl.policy.errors import ReplayError, UnsupportedPipelineError
from dpok_trl.policy.lora import adapter_layers
from dpok_trl.policy.schedulers import UnsupportedSchedulerError


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3))


# ---------------------------------------------------------------- rewards

BAD_REWARDS = {
    "one too few": (lambda i, p, m: torch.zeros(3), "returned 3 rewards for 4 images"),
    "a matrix": (lambda i, p, m: torch.zeros(4, 4), r"of shape \(4, 4\) for 4 images"),
    "one for all": (lambda i, p, m: i.mean(), r"of shape \(\).*leave the batch dimension"),
    "nothing finite": (
        lambda i, p, m: torch.full((4,), float("nan")),
        "gave in this round on process 0 is finite: there is nothing to learn",
    ),
    "None": (lambda i, p, m: None, "returned None: it must return one number per image"),
    "None and a dict": (lambda i, p, m: (None, {}), "returned None"),
}


@pytest.mark.parametrize("kind", BAD_REWARDS)
@pytest.mark.parametrize("in_threads", [False, True])
def test_what_is_no_reward_stops_the_run(kind, in_threads, make_trainer):
    reward, message = BAD_REWARDS[kind]
    reward.__name__ = "my_reward"
    trainer = make_trainer(reward, async_reward_computation=in_threads)
    with pytest.raises(RewardError, match=f"the reward function my_reward .*{message}|that my_reward {message}"):
        trainer.train()
    assert trainer.global_step == 0


@pytest.mark.parametrize("in_threads", [False, True])
def test_one_reward_that_is_not_finite_stops_the_run_on_demand(in_threads, make_trainer):
    def my_reward(images, prompts, metadata):
        return torch.tensor([0.0, float("nan"), 1.0, 2.0])

    trainer = make_trainer(my_reward, reward_on_error="raise", async_reward_computation=in_threads)
    with pytest.raises(
        RewardError, match=r"that my_reward returned are not finite.*1 NaN, 0 infinite.*image 1, prompt '"
    ):
        trainer.train()
    assert trainer.global_step == 0


@pytest.mark.parametrize(
    "rewards", [torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 4]).bfloat16(), [1, 2, 3, 4]], ids=lambda r: str(getattr(r, "dtype", "list"))
)  # fmt: skip
@pytest.mark.parametrize("tracking", [False, True])
def test_integer_and_half_precision_rewards_train_like_floats(rewards, tracking, make_trainer, adapter, tmp_path):
    def trained(rewards, name):
        trainer = make_trainer(
            lambda images, prompts, metadata: rewards,
            prompts=["a cat"],
            output_dir=str(tmp_path / name),
            per_prompt_stat_tracking=tracking,
            **({"per_prompt_stat_tracking_min_count": 2} if tracking else {}),
        )
        trainer.train()
        return adapter(trainer)

    given, floats = trained(rewards, "given"), trained(torch.tensor([1.0, 2.0, 3.0, 4.0]), "floats")
    assert all(torch.equal(given[name], floats[name]) for name in floats)


def test_a_reward_that_raises_is_named(make_trainer):
    def needs_a_server(images, prompts, metadata):
        raise ConnectionError("no route to host")

    with pytest.raises(
        RewardError, match="the reward function needs_a_server raised ConnectionError: no route to host"
    ) as e:
        make_trainer(needs_a_server).train()
    assert isinstance(e.value.__cause__.__cause__ or e.value.__cause__, (RewardError, ConnectionError))


# ---------------------------------------------------------------- prompts


def test_no_prompts(make_trainer):
    with pytest.raises(ValueError, match="prompt_function is an empty list: give at least one prompt"):
        make_trainer(prompts=[])


def test_a_dataset_without_prompts(make_trainer):
    with pytest.raises(ValueError, match='the dataset has no column "prompt"; its columns are .*caption'):
        make_trainer(prompts=datasets.Dataset.from_dict({"caption": ["a"]}))


def test_a_pipeline_of_another_kind(make_trainer):
    with pytest.raises(
        ValueError, match="sd_pipeline must be a diffusers pipeline, a Hub id or a folder; given: Linear"
    ):
        make_trainer(pipe=torch.nn.Linear(1, 1))


# ---------------------------------------------------------------- pipelines that are no policy


def test_a_scheduler_with_a_memory(make_trainer):
    pipe = stable_diffusion(scheduler=HeunDiscreteScheduler(steps_offset=1))
    with pytest.raises(UnsupportedSchedulerError, match="HeunDiscreteScheduler.*EulerAncestralDiscreteScheduler"):
        make_trainer(pipe=pipe).train()


@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_a_pipeline_that_is_moved_off_the_device(offload, make_trainer):
    pipe = stable_diffusion()
    getattr(pipe, offload)(device="cpu")
    with pytest.raises(UnsupportedPipelineError, match=f"StableDiffusionPipeline moves each .*{offload}"):
        make_trainer(pipe=pipe)
    assert not adapter_layers(pipe.unet)  # nothing was added to it before


def test_a_cache_on_the_denoiser(make_trainer):
    pipe = stable_diffusion()
    pab = PyramidAttentionBroadcastConfig(
        cross_attention_block_skip_range=2,
        cross_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: 500,
    )
    apply_pyramid_attention_broadcast(pipe.unet, pab)
    with pytest.raises(UnsupportedPipelineError, match=r"cache hook PyramidAtt.*disable_cache"):
        make_trainer(pipe=pipe).train()


# ---------------------------------------------------------------- the ratio


def noise_hook(scale):
    def hook(module, args, output):
        return output + scale * torch.randn_like(output)

    return hook


@pytest.mark.parametrize("scale", [10.0, 1e-3])
@pytest.mark.parametrize("reanchor", [None, False, True])
def test_something_random_in_the_denoiser(scale, reanchor, make_trainer, adapter):
    pipe = stable_diffusion()
    pipe.unet.conv_out.register_forward_hook(noise_hook(scale))
    trainer = make_trainer(pipe=pipe, train_reanchor=reanchor)
    start = adapter(trainer)
    with pytest.raises(RatioError, match=r"(?s)differ.*something random in the denoiser.*check_pipeline\(pipe"):
        trainer.train()
    assert all(torch.equal(start[name], value) for name, value in adapter(trainer).items())


def test_a_pipeline_that_changes_its_latents_from_call_to_call(make_trainer):
    pipe = stable_diffusion()
    prepare = pipe.prepare_latents
    calls = iter(range(99))
    pipe.prepare_latents = lambda *args: prepare(*args) + next(calls)
    with pytest.raises(ReplayError, match="step 0 got other latents than in the rollout"):
        make_trainer(pipe=pipe).train()


# ---------------------------------------------------------------- numbers


def with_output(pipe, change):
    """Changes what the UNet answers where gradients are on, so in updates only."""
    pipe.unet.conv_out.register_forward_hook(lambda m, a, output: change(output) if torch.is_grad_enabled() else None)
    return pipe


def test_a_loss_that_is_no_number_stops_before_the_adapter_is_touched(make_trainer, adapter):
    pipe = with_output(stable_diffusion(), lambda output: output * float("nan"))
    trainer = make_trainer(pipe=pipe)
    start = adapter(trainer)
    with pytest.raises(FloatingPointError, match="the loss is nan in optimizer step 1. The adapter was not updated"):
        trainer.train()
    assert all(torch.equal(start[name], value) for name, value in adapter(trainer).items())
    assert all(parameter.grad is None for parameter in trainer.trainable_layers)  # a later update would take them


class RootOfZero(torch.autograd.Function):
    """The identity, with the gradient that the square root has at 0."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf") * 0.0


def test_a_gradient_that_is_no_number_stops_before_the_adapter_is_touched(make_trainer, adapter):
    trainer = make_trainer(pipe=with_output(stable_diffusion(), RootOfZero.apply))
    start = adapter(trainer)
    with pytest.raises(FloatingPointError, match="the norm of the gradient is nan in optimizer step 1"):
        trainer.train()
    assert all(torch.equal(start[name], value) for name, value in adapter(trainer).items())


def test_the_optimizer_step_that_failed_is_named(make_trainer):
    updates = []

    def break_at_the_third(output):
        return output * float("nan") if len(updates) == 2 else output

    trainer = make_trainer(
        pipe=with_output(stable_diffusion(), break_at_the_third), sample_num_batches_per_epoch=4, sample_num_steps=2
    )
    update = trainer._update
    trainer._update = lambda transitions, *args: (update(transitions, *args), updates.append(1))[0]
    with pytest.raises(FloatingPointError, match="in optimizer step 3"):
        trainer.train()


# ---------------------------------------------------------------- folders


def test_a_folder_that_holds_another_run(make_trainer):
    make_trainer(save_freq=1).train()
    with pytest.raises(
        ValueError, match=r"holds another run \(checkpoint-1, metrics.jsonl\).*resume_from_checkpoint=True"
    ):
        make_trainer().train()


def test_a_folder_that_holds_a_run_without_a_checkpoint(make_trainer, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(
        ValueError, match=r"holds another run \(metrics.jsonl\). Choose another output_dir, or remove it"
    ):
        make_trainer().train()  # there is nothing to go on from


def test_a_launcher_that_accelerate_does_not_see(make_trainer, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        RuntimeError, match="WORLD_SIZE = 2 processes were launched, but Accelerate runs 1.*ACCELERATE_USE_CPU"
    ):
        make_trainer()
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the pipeline afterwards


def state(pipe, folder):
    """Everything of a pipeline that training must leave alone."""
    pipe.save_pretrained(folder)
    files = {name: (folder / name).read_bytes() for name in ("model_index.json", "scheduler/scheduler_config.json")}
    base = {n: p.clone() for n, p in pipe.unet.state_dict().items() if "lora_" not in n}
    return {
        "files": files,
        "config": dict(pipe.config),
        "attributes": dict(vars(pipe)),
        "scheduler": {k: str(v) for k, v in vars(pipe.scheduler).items()},
        "base": {name.replace(".base_layer", ""): tensor for name, tensor in base.items()},
        "vae": {n: p.clone() for n, p in pipe.vae.state_dict().items()},
        "text encoder": {n: p.clone() for n, p in pipe.text_encoder.state_dict().items()},
    }


def assert_same(before, after):
    for name in ("base", "vae", "text encoder"):
        first, second = before.pop(name), after.pop(name)
        assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first), name
    for name in before:
        assert before[name] == after[name], name


def raise_at_call(pipe, number):
    """Raises in the `number`-th call of the UNet."""
    calls = iter(range(10**6))

    def hook(module, args, output):
        if next(calls) == number:
            raise KeyboardInterrupt

    return pipe.unet.register_forward_hook(hook)


@pytest.mark.parametrize("interrupted", [None, "in the rollout", "in the replay", "in the reward", "in the reference"])
def test_the_pipeline_is_as_it_was(interrupted, make_trainer, tmp_path):
    pipe = stable_diffusion()
    pipe("a cat", num_inference_steps=4, guidance_scale=3.0)  # a call of its own sets attributes too
    before = state(pipe, tmp_path / "before")
    trainer = make_trainer(pipe=pipe)
    if interrupted is None:
        trainer.train()
    elif interrupted == "in the reward":
        trainer.reward_fn = lambda images, prompts, metadata: None
        with pytest.raises(RewardError):
            trainer.train()
    else:
        # an epoch: 4 calls in the rollout, 4 in the check of the ratio, 4 of the reference, 4 in the update
        hook = raise_at_call(pipe, {"in the rollout": 2, "in the reference": 9, "in the replay": 14}[interrupted])
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        hook.remove()
    assert_same(before, state(pipe, tmp_path / "after"))
    assert torch.is_grad_enabled()
    assert all(parameter.requires_grad for parameter in trainer.trainable_layers)
    if interrupted is not None:  # and it can go on
        trainer.reward_fn = brightness
        assert trainer.step(0, 0) == 1


# ---------------------------------------------------------------- settings that do not fit the pipeline


@pytest.mark.parametrize("option", ["slicing", "tiling"])
def test_a_vae_that_does_not_know_the_option(option, make_trainer):
    pipe = stable_diffusion()
    pipe.vae = AsymmetricAutoencoderKL(
        down_block_out_channels=(8, 16),
        up_block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    pipe.vae.__dict__.pop(f"use_{option}", None)
    with pytest.raises(
        ValueError,
        match=f"sample_vae_{option} = True, but AsymmetricAutoencoderKL knows no {option} in this StableDiffusionPipeline. Set it to False",
    ):
        make_trainer(pipe=pipe, **{f"sample_vae_{option}": True})


def test_a_pipeline_without_a_vae(make_trainer):
    pipe = stable_diffusion()
    pipe.vae = None
    with pytest.raises(
        ValueError, match="sample_vae_tiling = True, but there is no VAE in this StableDiffusionPipeline"
    ):
        make_trainer(pipe=pipe, sample_vae_tiling=True)


def test_a_peft_config_beside_full_fine_tuning(make_trainer):
    with pytest.raises(
        ValueError, match="a peft_config was given, and train_use_lora = False trains the denoiser's own"
    ):
        make_trainer(peft_config=LoraConfig(target_modules=["to_k"]), train_use_lora=False)


def test_a_pipeline_with_a_state_between_steps_is_found_at_the_start(make_trainer):
    """Guidance with momentum: a walk over all steps rebuilds it as the rollout did, a step alone does not."""
    pipe = stable_diffusion()
    before = []

    def momentum(module, args, kwargs, output):
        if args[1].max() > 700:  # the first step of four
            before.clear()
        blended = output[0] + (0.05 * before[-1] if before else 0)
        before.append(output[0].detach())
        return (blended,)

    pipe.unet.register_forward_hook(momentum, with_kwargs=True)
    with pytest.raises(
        RatioError, match="the pipeline carries something from step to step: the difference is up to 0.0"
    ):
        make_trainer(pipe=pipe).train()
