"""The heart: rollout and replay through the pipeline's own `__call__`."""

import copy
import json

import pytest
import tiny
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from peft import LoraConfig

from dpok_trl.policy.errors import ReplayError, UnsupportedPipelineError
from dpok_trl.policy.hooks import PipelineHooks
from dpok_trl.policy.interception import Proxy
from dpok_trl.policy.lora import adapter_name, prepare_adapter
from dpok_trl.policy.policy import Policy
from dpok_trl.policy.schedulers import UnsupportedSchedulerError, scheduler_step


PROMPTS = ["a cat", "a dog", "a red cat", "a bird"]
SEEDS = [3, 1, 4, 159]
CALL = {"num_inference_steps": tiny.STEPS, "guidance_scale": 5.0, "height": tiny.SIZE, "width": tiny.SIZE}

OTHER_BATCH_SHAPE = 1e-5  # mean-reduced log-probability, fp32: kernels round differently at another batch shape
SAME_NOISE = 2e-5  # image values in [0, 1]: our mean is written in another (stabler) form than diffusers'


def make_policy(family: str, dtype=torch.float32, nudged: bool = True, **kwargs) -> Policy:
    pipe = tiny.with_adapter(tiny.FAMILIES[family]().to(dtype=dtype), nudged=nudged)
    return Policy(pipe, **{"call_kwargs": CALL, **kwargs})


@pytest.fixture(scope="module", params=list(tiny.FAMILIES))
def policy(request) -> Policy:
    return make_policy(request.param)


@pytest.fixture(scope="module")
def sd() -> Policy:
    return make_policy("sd")


def log_probs(outputs) -> torch.Tensor:
    return torch.stack([output.log_prob for output in outputs], dim=1)


# ---------------------------------------------------------------- ratio exactly 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_replay_gives_the_log_probabilities_of_the_rollout_exactly(family, dtype):
    policy = make_policy(family, dtype)
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    trajectory = policy.rollout(PROMPTS, SEEDS)
    assert trajectory.latents[1].dtype == dtype
    for column, step in enumerate(trajectory.steps):  # first and last stochastic step included
        (replayed,) = policy(trajectory, steps=[step], verify=True)
        assert replayed.log_prob.dtype == torch.float32
        assert (replayed.log_prob - trajectory.log_probs[:, column]).abs().max() == 0.0


def test_every_adapter_tensor_gets_a_gradient_from_every_step(policy):
    trajectory = policy.rollout(PROMPTS, SEEDS)
    for step in trajectory.steps:
        policy.zero_grad()
        (replayed,) = policy(trajectory, steps=[step])
        replayed.log_prob.sum().backward()
        gradients = [p.grad for p in policy.parameters() if p.requires_grad]
        assert len(gradients) > 0 and all(g is not None and g.abs().max() > 0 for g in gradients)


def test_a_shuffled_subset_replays_within_rounding(policy):
    trajectory = policy.rollout(PROMPTS, SEEDS)
    for samples in ([3, 1, 0, 2], [2, 0], [1]):
        replayed = log_probs(policy(trajectory, samples=samples))
        assert (replayed - trajectory.log_probs[samples]).abs().max() <= OTHER_BATCH_SHAPE


def test_several_steps_in_one_replay_equal_one_replay_each(policy):
    trajectory = policy.rollout(PROMPTS, SEEDS)
    together = policy(trajectory)
    assert len(together) == len(trajectory.steps)
    for step, output in zip(trajectory.steps, together, strict=True):
        (alone,) = policy(trajectory, steps=[step])
        assert torch.equal(alone.log_prob, output.log_prob)
        assert torch.equal(alone.model_output, output.model_output)


def test_the_replay_s_gradient_is_that_of_the_pipeline_written_by_hand(sd):
    """Guidance and log-probability spelled out for Stable Diffusion give the same value and the same gradient."""
    trajectory = sd.rollout(PROMPTS, SEEDS)
    step = trajectory.steps[1]
    sd.zero_grad()
    (replayed,) = sd(trajectory, steps=[step])
    replayed.log_prob.sum().backward()
    gradients = [p.grad.clone() for p in sd.parameters() if p.requires_grad]

    pipe = sd.pipe
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(tiny.STEPS)
    text, negative = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    latents = trajectory.latents[step]
    timestep = scheduler.timesteps[step]
    sd.zero_grad()
    output = pipe.unet(torch.cat([latents] * 2), timestep, torch.cat([negative, text])).sample
    unconditional, conditional = output.chunk(2)
    guided = unconditional + 5.0 * (conditional - unconditional)
    by_hand = scheduler_step(scheduler, guided, timestep, latents, prev_sample=trajectory.latents[step + 1])
    by_hand.log_probs.sum().backward()

    torch.testing.assert_close(replayed.log_prob, by_hand.log_probs, rtol=0, atol=OTHER_BATCH_SHAPE)
    expected = [p.grad for p in sd.parameters() if p.requires_grad]
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)


def test_under_no_grad_the_replay_has_no_graph_and_leaves_grad_mode_alone(sd):
    trajectory = sd.rollout(PROMPTS, SEEDS)
    with torch.no_grad():
        (replayed,) = sd(trajectory, steps=[1])
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert not replayed.log_prob.requires_grad


# ---------------------------------------------------------------- the rollout is the pipeline


def stock_image(pipe, **kwargs) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    with torch.no_grad():
        return pipe(PROMPTS, generator=generators, output_type="pt", return_dict=False, **CALL, **kwargs)[0]


@pytest.mark.parametrize("negative_prompt", [None, "a bad cat"])
def test_sd_rollout_equals_the_untouched_pipeline(sd, negative_prompt):
    policy = Policy(sd.pipe, call_kwargs={**CALL, **({"negative_prompt": negative_prompt} if negative_prompt else {})})
    expected = stock_image(sd.pipe, eta=1.0, **({"negative_prompt": [negative_prompt] * 4} if negative_prompt else {}))
    images = policy.rollout(PROMPTS, SEEDS).images
    assert images.shape == (4, 3, tiny.SIZE, tiny.SIZE)
    assert (images - expected).abs().max() <= SAME_NOISE


def test_sdxl_rollout_equals_the_untouched_pipeline_with_its_ancestral_scheduler():
    policy = make_policy("sdxl")
    policy.pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(policy.pipe.scheduler.config)
    images = policy.rollout(PROMPTS, SEEDS).images
    assert (images - stock_image(policy.pipe)).abs().max() <= SAME_NOISE


def test_sd3_rollout_equals_the_untouched_pipeline_with_stochastic_sampling(monkeypatch):
    """FlowMatchEuler's own stochastic sampling is the cps transition at eta 1; it draws from the global generator, which is fed here."""
    policy = make_policy("sd3", kind="cps", eta=1.0)
    policy.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    images = policy.rollout(PROMPTS, SEEDS).images

    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    channels, side = policy.pipe.transformer.config.in_channels, tiny.SIZE // 2

    def draw(*args, **kwargs):
        return torch.cat([torch.randn(1, channels, side, side, generator=g) for g in generators])

    latents = draw()
    monkeypatch.setattr("diffusers.schedulers.scheduling_flow_match_euler_discrete.randn_tensor", draw)
    with torch.no_grad():
        expected = policy.pipe(PROMPTS, latents=latents, output_type="pt", return_dict=False, **CALL)[0]
    assert (images - expected).abs().max() <= SAME_NOISE


def test_a_sample_depends_on_its_seed_and_not_on_its_batch(sd):
    many = sd.rollout(PROMPTS, SEEDS)
    one = sd.rollout(PROMPTS[2:3], SEEDS[2:3])
    assert torch.equal(one.latents[0][0], many.latents[0][2])
    assert (one.images[0] - many.images[2]).abs().max() <= 1e-4
    assert not torch.equal(many.latents[0][0], many.latents[0][1])


def test_a_rollout_repeats_itself(sd):
    first, second = sd.rollout(PROMPTS, SEEDS), sd.rollout(PROMPTS, SEEDS)
    assert torch.equal(first.images, second.images) and torch.equal(first.log_probs, second.log_probs)


def test_without_guidance_the_denoiser_sees_the_batch_once(sd):
    sizes = []
    handle = sd.pipe.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    try:
        unguided = Policy(sd.pipe, call_kwargs={**CALL, "guidance_scale": 1.0})
        trajectory = unguided.rollout(PROMPTS, SEEDS)
        assert torch.equal(log_probs(unguided(trajectory)), trajectory.log_probs)
    finally:
        handle.remove()
    assert set(sizes) == {4}


def test_only_the_selected_step_runs_the_network(policy):
    (denoiser,) = policy.tuned.denoisers.values()
    trajectory = policy.rollout(PROMPTS, SEEDS)
    calls = []
    handle = denoiser.register_forward_pre_hook(lambda module, args: calls.append(1))
    try:
        policy(trajectory, steps=[trajectory.steps[-1]])
    finally:
        handle.remove()
    assert len(calls) == 1


def test_latents_are_stored_once_each(policy):
    trajectory = policy.rollout(PROMPTS, SEEDS)
    assert len(trajectory.latents) == tiny.STEPS + 1
    assert len({latent.data_ptr() for latent in trajectory.latents}) == tiny.STEPS + 1


def test_deterministic_steps_are_no_actions():
    policy = make_policy("sd3")  # flow: the last step has std 0
    assert policy.rollout(PROMPTS[:1], [0]).steps == tuple(range(tiny.STEPS - 1))


def test_steps_below_min_std_are_sampled_and_not_trained(sd):
    floored = Policy(sd.pipe, call_kwargs=CALL, min_std=0.1)
    trajectory = floored.rollout(PROMPTS, SEEDS)
    assert trajectory.steps == (0, 1)  # std .78 .52 .04 .02
    assert torch.equal(trajectory.images, sd.rollout(PROMPTS, SEEDS).images)
    with pytest.raises(ValueError, match=r"steps \[3\] are not all actions of this trajectory, which are \[0, 1\]"):
        floored(trajectory, steps=[3])
    with pytest.raises(
        ValueError, match=r"no step is an action: the largest standard deviation of the 4 steps is 0\.78"
    ):
        Policy(sd.pipe, call_kwargs=CALL, min_std=1.0).rollout(PROMPTS, SEEDS)


def test_log_probabilities_can_be_summed(sd):
    mean = sd.rollout(PROMPTS, SEEDS)
    summed = Policy(sd.pipe, call_kwargs=CALL, log_prob_reduction="sum").rollout(PROMPTS, SEEDS)
    dimensions = mean.latents[0][0].numel()
    torch.testing.assert_close(summed.log_probs, dimensions * mean.log_probs)


# ---------------------------------------------------------------- nothing is left behind


def snapshot(pipe) -> dict:
    return {name: id(value) for name, value in vars(pipe).items() if not name.startswith("_")}


def saved_files(pipe, folder) -> dict[str, bytes]:
    pipe.save_pretrained(folder)
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.json")}


def test_the_pipeline_is_left_as_it_was(policy, tmp_path):
    pipe = policy.pipe
    files = saved_files(pipe, tmp_path / "before")  # first: it adds its own entries to the config
    before, config, scheduler = snapshot(pipe), dict(pipe.config), copy.deepcopy(vars(pipe.scheduler))
    trajectory = policy.rollout(PROMPTS, SEEDS)
    policy(trajectory)
    after = {name: value for name, value in snapshot(pipe).items() if name in before}
    assert after == before and dict(pipe.config) == config
    assert str(vars(pipe.scheduler)) == str(scheduler)
    assert saved_files(pipe, tmp_path / "after") == files
    index = json.loads(files["model_index.json"])
    assert index["scheduler"] == ["diffusers", type(pipe.scheduler).__name__]


@pytest.mark.parametrize("call", ["rollout", "replay"])
def test_the_pipeline_is_left_as_it_was_after_an_exception(policy, call):
    pipe = policy.pipe
    trajectory = policy.rollout(PROMPTS, SEEDS)
    before, config = snapshot(pipe), dict(pipe.config)

    def fail(module, args):
        raise KeyboardInterrupt

    (denoiser,) = policy.tuned.denoisers.values()
    handle = denoiser.register_forward_pre_hook(fail)
    try:
        with pytest.raises(KeyboardInterrupt):
            policy.rollout(PROMPTS, SEEDS) if call == "rollout" else policy(trajectory)
    finally:
        handle.remove()
    assert snapshot(pipe) == before and dict(pipe.config) == config
    assert torch.is_grad_enabled()
    assert torch.equal(log_probs(policy(trajectory)), trajectory.log_probs)


def test_a_safety_checker_is_not_asked(sd):
    def checker(**kwargs):
        raise AssertionError("the safety checker was called")

    sd.pipe.__dict__["safety_checker"] = checker
    try:
        sd.rollout(PROMPTS, SEEDS)
        assert sd.pipe.safety_checker is checker
    finally:
        sd.pipe.__dict__["safety_checker"] = None


# ---------------------------------------------------------------- text


def test_text_is_encoded_once_per_prompt_and_never_in_a_replay():
    policy = make_policy("sd")
    policy.rollout(PROMPTS, SEEDS)  # the place of the batch is measured here
    encoded = []
    handle = policy.pipe.text_encoder.register_forward_pre_hook(lambda m, args: encoded.append(len(args[0])))
    try:
        trajectory = policy.rollout([*PROMPTS, "new", "new", "other", "new"], list(range(8)))
        assert encoded == [6, 6]  # each distinct prompt, and the empty negative prompt of guidance beside it
        encoded.clear()
        assert torch.equal(log_probs(policy(trajectory)), trajectory.log_probs)
        policy(trajectory, samples=[7, 0], steps=[0])
        policy.rollout([*PROMPTS, "new", "other", "other"], list(range(7)))  # the same distinct prompts
        assert encoded == []
    finally:
        handle.remove()


def test_one_prompt_many_times_equals_the_untouched_pipeline(sd):
    prompts = ["a cat"] * 4
    images = sd.rollout(prompts, SEEDS).images
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    with torch.no_grad():
        expected = sd.pipe(prompts, eta=1.0, generator=generators, output_type="pt", return_dict=False, **CALL)[0]
    assert (images - expected).abs().max() <= SAME_NOISE


# ---------------------------------------------------------------- the reference


def kl(policy, trajectory) -> torch.Tensor:
    with torch.no_grad():
        tuned = policy(trajectory)
        with policy.reference():
            reference = policy(trajectory)
    return torch.stack([a.distribution.kl(b.distribution) for a, b in zip(tuned, reference, strict=True)], dim=1)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_reference_is_the_pipeline_without_its_adapter(family):
    policy = make_policy(family, nudged=False)
    trajectory = policy.rollout(PROMPTS, SEEDS)
    assert kl(policy, trajectory).abs().max() == 0.0  # B = 0 at the start
    for denoiser in policy.tuned.denoisers.values():
        tiny.nudge(denoiser)
    assert kl(policy, trajectory).min() > 0.0
    assert not torch.equal(log_probs(policy(trajectory)), trajectory.log_probs)
    with policy.reference(), torch.no_grad():
        assert torch.equal(log_probs(policy(trajectory)), trajectory.log_probs)


def test_adapters_and_requires_grad_are_restored_after_an_exception(sd):
    trajectory = sd.rollout(PROMPTS, SEEDS)
    trainable = {name for name, p in sd.named_parameters() if p.requires_grad}
    with pytest.raises(KeyboardInterrupt), sd.reference():
        raise KeyboardInterrupt
    assert {name for name, p in sd.named_parameters() if p.requires_grad} == trainable
    replayed = log_probs(sd(trajectory))
    assert torch.equal(replayed, trajectory.log_probs) and replayed.requires_grad
    parameters = [p for p in sd.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    with sd.reference():
        pass
    assert not any(p.requires_grad for p in sd.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)


def test_the_policy_stays_in_eval_mode(sd):
    assert sd.train() is sd
    assert not any(module.training for module in sd.networks.modules())


# ---------------------------------------------------------------- refusals


def test_a_pipeline_without_an_adapter_has_no_reference():
    policy = Policy(tiny.stable_diffusion(), call_kwargs=CALL)
    message = "`unet` has no active LoRA adapter"
    with pytest.raises(UnsupportedPipelineError, match=message), policy.reference():
        pass
    with pytest.raises(ValueError, match="no active adapter, and no `peft_config` was given"):
        prepare_adapter(policy.pipe.unet)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"lora_dropout": 0.1}, "lora_dropout = 0.1"),
        ({"bias": "lora_only"}, "bias = 'lora_only' trains biases of the base"),
        ({"modules_to_save": ["conv_in"]}, r"modules_to_save = \['conv_in'\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' changes the base weights"),
    ],
)
def test_lora_settings_that_would_do_nothing_or_harm_are_refused(settings, message):
    unet = tiny.stable_diffusion().unet
    with pytest.raises(ValueError, match=message):
        prepare_adapter(unet, LoraConfig(r=2, target_modules=["to_q"], **settings))
    assert adapter_name(unet) is None


def test_a_loaded_adapter_that_does_not_act_at_full_strength_is_refused():
    pipe = tiny.with_adapter(tiny.stable_diffusion(), rank=4, alpha=8, nudged=True)
    assert prepare_adapter(pipe.unet) == "default"
    pipe.set_adapters(["default"], [0.5])
    with pytest.raises(ValueError, match=r"is scaled by 0\.5, which its file would not hold. Call `pipe.set_adapters"):
        prepare_adapter(pipe.unet)
    pipe.set_adapters(["default"], [1.0])
    assert prepare_adapter(pipe.unet) == "default"
    pipe.unet.disable_adapters()
    with pytest.raises(ValueError, match=r"is disabled. Call `pipe.enable_lora\(\)`"):
        prepare_adapter(pipe.unet)
    pipe.unet.enable_adapters()
    pipe.unet.fuse_lora()
    with pytest.raises(ValueError, match=r"is fused into the base. Call `pipe.unfuse_lora\(\)`"):
        prepare_adapter(pipe.unet)


def test_images_that_are_no_numbers_are_not_rewarded(sd):
    handle = sd.pipe.vae.decoder.register_forward_hook(lambda module, args, output: output * float("nan"))
    try:
        with pytest.raises(
            FloatingPointError, match="images with NaN or infinite values. Usual causes: a VAE that overflows"
        ):
            sd.rollout(PROMPTS, SEEDS)
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["eta", "generator", "return_dict", "output_type", "num_images_per_prompt", "prompt"])
def test_arguments_that_the_policy_sets_are_refused(sd, name):
    with pytest.raises(ValueError, match=f"'{name}' cannot be an argument of the call"):
        Policy(sd.pipe, call_kwargs={name: 1})


def test_a_scheduler_that_is_not_markov_is_refused():
    pipe = tiny.with_adapter(tiny.stable_diffusion(HeunDiscreteScheduler()))
    with pytest.raises(
        UnsupportedSchedulerError, match=r"HeunDiscreteScheduler cannot be a policy.*EulerAncestralDiscreteScheduler"
    ):
        Policy(pipe, call_kwargs=CALL).rollout(PROMPTS, SEEDS)


def test_a_cache_hook_is_refused():
    policy = make_policy("sd")
    pyramid = PyramidAttentionBroadcastConfig(
        cross_attention_block_skip_range=2,
        cross_attention_block_identifiers=["down_blocks"],
        current_timestep_callback=lambda: 500,
    )
    apply_pyramid_attention_broadcast(policy.pipe.unet, pyramid)
    with pytest.raises(UnsupportedPipelineError, match="`unet` has the cache hook PyramidAttentionBroadcastHook"):
        policy.rollout(PROMPTS, SEEDS)


def test_a_pipeline_of_pipelines_is_refused():
    outer = tiny.with_adapter(tiny.stable_diffusion())
    outer.__dict__["prior_pipe"] = tiny.stable_diffusion()
    with pytest.raises(UnsupportedPipelineError, match=r"made of other pipelines \(prior_pipe\). Tune the inner one"):
        PipelineHooks().denoisers(outer)


def test_two_active_adapters_are_refused():
    pipe = tiny.with_adapter(tiny.stable_diffusion())
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "style")
    pipe.unet.set_adapters(["default", "style"])
    with pytest.raises(ValueError, match=r"UNet2DConditionModel has 2 active adapters \(default, style\)"):
        adapter_name(pipe.unet)


def test_a_second_adapter_is_not_put_over_a_loaded_one():
    pipe = tiny.with_adapter(tiny.stable_diffusion())
    assert prepare_adapter(pipe.unet, None) == "default"
    with pytest.raises(ValueError, match="already has the adapter 'default', and a `peft_config` was given"):
        prepare_adapter(pipe.unet, LoraConfig(r=2, target_modules=["to_q"]))


def test_a_pipeline_that_detaches_is_refused(sd):
    trajectory = sd.rollout(PROMPTS, SEEDS)
    handle = sd.pipe.unet.register_forward_hook(lambda m, args, output: tuple(o.detach() for o in output))
    try:
        with pytest.raises(ReplayError, match="model output of step 0 carries no gradient"):
            sd(trajectory)
    finally:
        handle.remove()


def test_a_pipeline_that_changes_its_latents_is_found(sd):
    calls = []

    def jitter(pipe, index, timestep, kwargs):
        calls.append(index)
        return {"latents": kwargs["latents"] + 0.01 * len(calls)}

    drifting = Policy(sd.pipe, call_kwargs={**CALL, "callback_on_step_end": jitter})
    trajectory = drifting.rollout(PROMPTS, SEEDS)
    with pytest.raises(ReplayError, match="step 1 got other latents than in the rollout"):
        drifting(trajectory, steps=[1], verify=True)


def test_an_argument_that_the_pipeline_does_not_take_is_refused(sd):
    """Stable Diffusion's call has **kwargs and would drop it in silence."""
    with pytest.raises(
        ValueError, match=r"StableDiffusionPipeline takes no 'guidence_scale'. Did you mean 'guidance_scale'\?"
    ):
        Policy(sd.pipe, call_kwargs={"guidence_scale": 5.0})


def test_prompts_and_seeds_must_match(sd):
    with pytest.raises(ValueError, match="got 4 prompts and 2 seeds"):
        sd.rollout(PROMPTS, [0, 1])


def test_a_grid_that_gives_two_steps_the_same_rounded_timestep_is_walked():
    """DPM-Solver++ with Karras sigmas does on Stable Diffusion's noise schedule, at levels that differ."""
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DPMSolverMultistepScheduler(**schedule, use_karras_sigmas=True, algorithm_type="sde-dpmsolver++")
    scheduler.set_timesteps(50)
    assert len(set(scheduler.timesteps.tolist())) == 49
    policy = Policy(
        tiny.with_adapter(tiny.stable_diffusion(scheduler)), call_kwargs={**CALL, "num_inference_steps": 50}
    )
    trajectory = policy.rollout(PROMPTS, SEEDS)
    with torch.no_grad():
        assert torch.equal(log_probs(policy(trajectory)), trajectory.log_probs)


def test_a_replay_walks_no_tree_of_modules(monkeypatch):
    """diffusers looks through all modules of a pipeline for hooks in every call; walking the trees each time is most of what a replay costs beside the network."""
    policy = make_policy("sd")
    trajectory = policy.rollout(PROMPTS, SEEDS)
    expected = [step.log_prob for step in policy(trajectory)]

    def walk(module, *args, **kwargs):
        raise AssertionError(f"the modules of {type(module).__name__} are walked over")

    for method in ("modules", "named_modules", "parameters", "named_parameters"):
        monkeypatch.setattr(torch.nn.Module, method, walk)
    assert all(map(torch.equal, (step.log_prob for step in policy(trajectory)), expected))
    for name in ("vae", "text_encoder", "unet"):  # the pipeline has its own again
        assert (
            isinstance(policy.pipe.__dict__[name], torch.nn.Module) and type(policy.pipe.__dict__[name]) is not Proxy
        )
