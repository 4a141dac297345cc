"""What the package promises of any pipeline, held against every family: nothing here knows more of a family than how to build and to call it."""

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import LoraConfig, PeftModel
from pipelines.families import FAMILIES
from tiny import nudge

from dpok_trl import DPOKConfig, DPOKTrainer, check_pipeline
from dpok_trl.policy.hooks import PipelineHooks
from dpok_trl.policy.lora_files import LORA_FILE, PEFT_FILE
from dpok_trl.policy.policy import Policy
from dpok_trl.policy.tuning import tune
from dpok_trl.results.runlog import read_metrics


PROMPTS = ["a cat", "two dogs"]
SEEDS = [3, 4]
# Other samples beside a sample, and so another order of its sums in a matrix product; mean-reduced log-probabilities, fp32.
REORDERED_TOLERANCE = 1e-5
# Text and pictures encoded in a batch of another shape.
ENCODED_TOLERANCE = 1e-5

every_family = pytest.mark.parametrize("name", FAMILIES)


def tuned_pipe(family, rank=4, alpha=4, dtype=torch.float32):
    """With adapters that are no longer at their start, where B = 0 and neither the image nor the gradient of A depends on them."""
    pipe = family.pipe().to(dtype)
    tuned = tune(pipe, PipelineHooks().denoisers(pipe), rank=rank, alpha=alpha)
    for denoiser in tuned.denoisers.values():
        nudge(denoiser, 0.1)
    return pipe, tuned


def policy_of(family, dtype=torch.float32):
    pipe, tuned = tuned_pipe(family, dtype=dtype)
    return Policy(pipe, tuned, call_kwargs=family.call(pipe))


def image_of(pipe, family):
    """By the untouched pipeline."""
    output = pipe(prompt=PROMPTS[0], **family.call(pipe), generator=torch.Generator().manual_seed(5), output_type="pt")
    return torch.as_tensor(output[0])


# ---------------------------------------------------------------- the rollout


def tensors_in(value):
    """All tensors of a nested value, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [tensor for part in value for tensor in tensors_in(part)]


def first_input(pipe, run):
    """What the network is given in its first call: latents, timestep, text and all other conditions."""
    seen = []
    hooks = [
        denoiser.register_forward_pre_hook(lambda _, *given: seen.append(given), with_kwargs=True)
        for denoiser in PipelineHooks().denoisers(pipe).values()
    ]
    run()
    for hook in hooks:
        hook.remove()
    return tensors_in(seen[0])


@every_family
def test_the_network_is_given_what_the_untouched_pipeline_gives_it(name):
    family = FAMILIES[name]
    policy = policy_of(family)
    # Eight samples of two prompts, of which one has been seen before: each text is encoded once, and put where it belongs.
    prompts, seeds = PROMPTS * 4, list(range(8))
    policy.rollout(PROMPTS[:1] * 8, seeds)
    given = first_input(policy.pipe, lambda: policy.rollout(prompts, seeds))

    call = family.call(policy.pipe)
    for argument in {"image", "mask_image"} & set(call):
        call[argument] = [call[argument]] * len(prompts)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with torch.no_grad():
        expected = first_input(policy.pipe, lambda: policy.pipe(prompt=list(prompts), generator=generators, **call))
    assert len(given) == len(expected)
    for ours, theirs in zip(given, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=ENCODED_TOLERANCE)


# ---------------------------------------------------------------- the replay


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_ratio_is_exactly_1(name, dtype):
    policy = policy_of(FAMILIES[name], dtype)
    adapter = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in adapter} == {torch.float32}
    trajectory = policy.rollout(PROMPTS, SEEDS)
    assert len(trajectory.steps) >= 2
    replayed = torch.stack([step.log_prob for step in policy(trajectory, verify=True)], dim=1)
    assert replayed.requires_grad
    assert torch.equal(replayed, trajectory.log_probs)


@every_family
def test_samples_replay_in_another_order(name):
    policy = policy_of(FAMILIES[name])
    trajectory = policy.rollout(PROMPTS, SEEDS)
    with torch.no_grad():
        replayed = policy(trajectory, samples=[1, 0])
    for column, step in enumerate(replayed):
        expected = trajectory.log_probs[[1, 0], column]
        torch.testing.assert_close(step.log_prob, expected, rtol=0, atol=REORDERED_TOLERANCE)


@every_family
def test_one_sample_of_a_batch_replays_alone(name):
    policy = policy_of(FAMILIES[name])
    trajectory = policy.rollout(PROMPTS, SEEDS)
    with torch.no_grad():
        replayed = policy(trajectory, samples=[1])
    for column, step in enumerate(replayed):
        expected = trajectory.log_probs[[1], column]
        torch.testing.assert_close(step.log_prob, expected, rtol=0, atol=REORDERED_TOLERANCE)


@every_family
def test_the_gradient_reaches_every_tensor_of_the_adapter(name):
    policy = policy_of(FAMILIES[name])
    adapter = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    trajectory = policy.rollout(PROMPTS, SEEDS)
    sum(step.log_prob.sum() for step in policy(trajectory)).backward()
    assert [name for name, tensor in adapter.items() if tensor.grad is None or not tensor.grad.any()] == []
    assert all(tensor.grad.isfinite().all() for tensor in adapter.values())


@every_family
def test_a_replay_encodes_no_text(name):
    policy = policy_of(FAMILIES[name])
    calls = []
    for component, module in policy.pipe.components.items():
        if component.startswith("text_encoder") and module is not None:
            for part in module.modules():
                part.register_forward_hook(lambda *_: calls.append(1))
    trajectory = policy.rollout(PROMPTS, SEEDS)
    assert calls
    calls.clear()
    with torch.no_grad():
        policy(trajectory)
    assert not calls


# ---------------------------------------------------------------- what is left behind


def load(pipe, folder):
    """As the docs say, with nothing but diffusers and peft."""
    if (folder / LORA_FILE).exists():
        pipe.load_lora_weights(folder)
    for name, denoiser in PipelineHooks().denoisers(pipe).items():
        second = LORA_FILE.replace(".", f"_{name}.")
        if (folder / second).exists():  # the second expert
            pipe.load_lora_weights(folder, weight_name=second, load_into_transformer_2=True)
        if (folder / name / PEFT_FILE).exists():  # a family without a LoRA loader
            setattr(pipe, name, PeftModel.from_pretrained(denoiser, folder / name))


@every_family
def test_a_saved_adapter_gives_the_identical_image_in_a_stock_pipeline(name, tmp_path):
    family = FAMILIES[name]
    pipe, tuned = tuned_pipe(family, rank=2, alpha=5)
    tuned.save(pipe, tmp_path)

    stock = family.pipe()
    for component in stock.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(
                False
            )  # as in the other one: torch chooses kernels by it, even where nothing needs a gradient
    base = image_of(stock, family)
    load(stock, tmp_path)
    image = image_of(stock, family)
    assert torch.equal(image, image_of(pipe, family))
    assert not torch.equal(image, base)


def state(pipe):
    """All of a pipeline that a policy could have changed: who its parts are, what they are set to."""
    modules = {key: value for key, value in pipe.components.items() if isinstance(value, torch.nn.Module)}
    return {
        "attributes": set(vars(pipe)),
        "config": dict(pipe.config),
        "components": {key: id(value) for key, value in pipe.components.items()},
        "scheduler": (type(pipe.scheduler), dict(pipe.scheduler.config), sorted(vars(pipe.scheduler))),
        "parameters": {
            f"{key}.{name}": (parameter.requires_grad, parameter.dtype, parameter.data_ptr())
            for key, module in modules.items()
            for name, parameter in module.named_parameters()
        },
        "training": {key: {m.training for m in module.modules()} for key, module in modules.items()},
    }


@every_family
def test_a_check_leaves_the_pipeline_as_it_was(name):
    family = FAMILIES[name]
    pipe = family.pipe()
    image_of(pipe, family)  # a pipeline keeps the arguments of its last call
    before, image = state(pipe), image_of(pipe, family)
    report = check_pipeline(pipe, **family.call(pipe))
    assert report.ok, report
    assert "step" not in vars(pipe.scheduler)
    image_again = image_of(pipe, family)
    after = state(pipe)
    for part, value in before.items():
        assert after[part] == value, part
    assert torch.equal(image_again, image)


# ---------------------------------------------------------------- training


@pytest.fixture
def fresh_accelerate(monkeypatch):
    """Accelerate keeps its state in singletons, and remembers mixed precision in the environment."""
    for name in ("ACCELERATE_MIXED_PRECISION", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for state_of in (AcceleratorState, PartialState, GradientState):
        state_of._reset_state()
    yield
    for state_of in (AcceleratorState, PartialState, GradientState):
        state_of._reset_state()


def brightness(images, prompts, metadata):
    return images.flatten(1).mean(1), {}


def last_layer(pipe, family):
    """The name of the layer that each network ends with, in the order of its calls and not of its attributes."""
    called, hooks = [], []
    for denoiser in PipelineHooks().denoisers(pipe).values():
        for name, module in denoiser.named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                hooks.append(module.register_forward_hook(lambda *_, name=name: called.append(name)))
    image_of(pipe, family)
    for hook in hooks:
        hook.remove()
    return called[-1]


@every_family
def test_training_moves_a_reward(name, tmp_path, fresh_accelerate):
    family = FAMILIES[name]
    pipe = family.pipe()
    call = family.call(pipe)
    guidance = {"sample_guidance_scale": call.pop("guidance_scale")} if "guidance_scale" in call else {}
    config = DPOKConfig(
        output_dir=str(tmp_path / "run"),
        num_epochs=2,
        sample_grid_freq=0,
        sample_num_steps=call.pop("num_inference_steps"),
        sample_batch_size=64,
        sample_num_batches_per_epoch=1,
        sample_min_std=0.1,  # the gradient of a step of tiny std hides that of the others
        negative_prompts=call.pop("negative_prompt", ""),
        sample_call_kwargs=call,
        train_batch_size=64,
        train_num_inner_epochs=2,
        train_timesteps_per_update=1,
        train_learning_rate=3e-2,
        train_clip_range=1.0,
        kl_weight=0.0,
        **guidance,
    )
    # Two epochs are few: with all attention layers of a random network, most of what moves is noise.
    adapter = LoraConfig(r=8, lora_alpha=8, init_lora_weights="gaussian", target_modules=[last_layer(pipe, family)])
    trainer = DPOKTrainer(config, brightness, PROMPTS, pipe, peft_config=adapter)

    def evaluate():
        prompts, seeds = PROMPTS * 8, list(range(1000, 1016))
        return brightness(trainer.policy.rollout(prompts, seeds).images, prompts, None)[0].mean().item()

    before = evaluate()
    trainer.train()
    assert evaluate() > before
    updates = [line for line in read_metrics(trainer.output_dir) if "loss" in line]
    assert updates[0]["policy/ratio_deviation_max"] == 0.0
