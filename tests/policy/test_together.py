"""Modes that meet in one policy: each alone has its tests, and together the ratio is still exactly 1."""

import pytest
import torch
from peft import LoraConfig
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from walks import NUDGE, PROMPTS, SEEDS, image, kl, log_probs, nudge, pipeline, policy_of, trained
from zoo.inputs import picture
from zoo.wan import wan_transformer


PICTURES = {"image": [picture(0), picture(1)]}
EXPERTS = {"transformer_2": wan_transformer, "boundary_ratio": lambda: 0.875}
FP32 = {"policy": {"fp32_latents": True}}
SMALL_NUDGE = 0.02  # of all weights

# pipeline, settings of `policy_of`, what `rollout` is given, components
TOGETHER = {
    "text encoders, fp32 latents": ("StableDiffusion3Pipeline", {"text_encoders": True, **FP32}, {}, {}),
    "text encoders, window": ("FluxPipeline", {"text_encoders": True}, {"window": [1, 2]}, {}),
    "own weights, fp32 latents": ("QwenImagePipeline", {"full": True, **FP32}, {}, {}),
    "own weights, window": ("SanaPipeline", {"full": True}, {"window": [0, 1]}, {}),
    "own weights of two experts": ("WanPipeline", {"full": True}, {}, EXPERTS),
    "two experts, window": ("WanPipeline", {}, {"window": [0, 2]}, EXPERTS),
    "pictures, fp32 latents": ("StableDiffusionImg2ImgPipeline", FP32, {"arguments": PICTURES}, {}),
    "pictures, own weights": ("FluxImg2ImgPipeline", {"full": True}, {"arguments": PICTURES}, {}),
    "pictures, window": ("StableDiffusionXLImg2ImgPipeline", {}, {"arguments": PICTURES, "window": [1]}, {}),
    "pictures, text encoders": (
        "StableDiffusionImg2ImgPipeline",
        {"text_encoders": True},
        {"arguments": PICTURES},
        {},
    ),
    "inpainting, fp32 latents": ("FluxInpaintPipeline", FP32, {}, {}),
    "inpainting, window": ("StableDiffusionInpaintPipeline", {}, {"window": [1, 2]}, {}),
}


@pytest.mark.parametrize("modes", TOGETHER)
def test_the_ratio_is_exactly_1_on_a_bf16_pipeline(modes):
    name, settings, rollout, components = TOGETHER[modes]
    pipe = pipeline(name, torch.bfloat16, **{key: make() for key, make in components.items()})
    policy = policy_of(pipe, nudged=False, **settings)
    for module in policy.tuned.modules.values():
        nudge(module, SMALL_NUDGE if "full" in settings else NUDGE)
    trajectory = policy.rollout(PROMPTS, SEEDS, **rollout)
    replayed = log_probs(policy(trajectory, verify=True))
    assert torch.equal(replayed, trajectory.log_probs)
    replayed.sum().backward()
    for module in policy.tuned.modules.values():
        assert any(p.grad is not None and p.grad.any() for p in module.parameters() if p.requires_grad)
    assert kl(policy, trajectory).min() > 0.0


@pytest.mark.parametrize(
    "settings", [{}, {"text_encoders": True}, {"full": True}], ids=["adapter", "text", "own weights"]
)
def test_gradient_checkpointing_gives_the_same_gradients(settings):
    policy = policy_of(pipeline("StableDiffusionPipeline"), **settings)
    trajectory = policy.rollout(PROMPTS, SEEDS, window=[1, 2])
    weights = list(trained(policy).values())
    plain = torch.autograd.grad(log_probs(policy(trajectory)).sum(), weights)
    policy.networks["unet"].enable_gradient_checkpointing()
    replayed = log_probs(policy(trajectory, verify=True))
    assert torch.equal(replayed, trajectory.log_probs)
    again = torch.autograd.grad(replayed.sum(), weights)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize(
    "settings", [{"text_encoders": True}, {"full": True}, FP32], ids=["text", "own weights", "fp32 latents"]
)
def test_a_step_for_each_sample(settings):
    """The rows of a mixed replay are those of a replay of each step, in bf16 too where the batch is the same."""
    policy = policy_of(pipeline("StableDiffusion3Pipeline", torch.bfloat16), **settings)
    trajectory = policy.rollout(PROMPTS, SEEDS)
    (mixed,) = policy(trajectory, [0, 1], each=[2, 0])
    columns = [trajectory.steps.index(2), trajectory.steps.index(0)]
    assert torch.equal(mixed.log_prob, trajectory.log_probs[[0, 1], columns])
    assert mixed.log_prob.requires_grad


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without:UserWarning")
@pytest.mark.parametrize("targets", [["to_q"], ["to_q", "conv1"]], ids=["linear", "convolutions"])
def test_dora_on_int8_weights_in_a_bf16_pipeline(targets):
    pipe = pipeline("StableDiffusionPipeline", torch.bfloat16)
    quantize_(pipe.unet, Int8WeightOnlyConfig())  # of the linear layers
    pretrained = image(pipe)
    config = LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=targets)
    policy = policy_of(pipe, nudged=False, peft_config=config)
    assert torch.equal(image(pipe), pretrained)
    nudge(policy.networks["unet"], NUDGE)
    trajectory = policy.rollout(PROMPTS, SEEDS)
    assert torch.equal(log_probs(policy(trajectory, verify=True)), trajectory.log_probs)
    with policy.reference():
        assert torch.equal(image(pipe), pretrained)
