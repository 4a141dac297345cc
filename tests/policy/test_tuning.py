"""What trains beside a denoiser's adapter: text encoders, the denoiser's own weights, an adapter on a quantised base."""

import pytest
import torch
from tiny import nudge
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from walks import (
    NUDGE,
    PROMPTS,
    SEEDS,
    call_arguments,
    image,
    kl,
    log_probs,
    pipeline,
    policy_of,
    trained,
    without_gradient,
)

from dpok_trl.policy.errors import ReplayError, UnsupportedPipelineError
from dpok_trl.policy.lora import default_lora_config, prepare_adapter
from dpok_trl.policy.policy import Policy
from dpok_trl.policy.tuning import Tuned, tune


# ---------------------------------------------------------------- text encoders


WITH_TEXT = {
    "StableDiffusionPipeline": ["text_encoder"],
    "StableDiffusionXLPipeline": ["text_encoder", "text_encoder_2"],
    "StableDiffusion3Pipeline": ["text_encoder", "text_encoder_2"],  # no place for its T5
    "FluxPipeline": ["text_encoder"],
}
# SDXL reads the layer before the last one, and of the first encoder nothing else.
LAST_LAYER = "networks.text_encoder.encoder.layers.1."
UNUSED = {"StableDiffusionXLPipeline": LAST_LAYER}


@pytest.mark.parametrize("name", WITH_TEXT)
def test_text_encoders_train_with_the_denoiser(name, tmp_path):
    pipe = pipeline(name)
    pretrained = image(pipe)
    policy = policy_of(pipe, nudged=False, text_encoders=True, rank=2, alpha=5)
    assert list(policy.tuned.text_encoders) == WITH_TEXT[name]
    assert policy.memo is None  # embeddings change with every update
    assert torch.equal(image(pipe), pretrained)
    assert kl(policy, policy.rollout(PROMPTS, SEEDS)).abs().max() == 0.0

    for module in policy.tuned.modules.values():
        nudge(module, NUDGE)
    missing = without_gradient(policy)
    last = [tensor for tensor in trained(policy) if tensor.startswith(UNUSED.get(name, ()))]
    assert missing == last and len(last) == (8 if name in UNUSED else 0)
    with policy.reference():
        assert torch.equal(image(pipe), pretrained)

    policy.tuned.save(pipe, tmp_path)
    stock = pipeline(name)
    stock.load_lora_weights(tmp_path)
    assert torch.equal(image(stock), image(pipe))
    assert not torch.equal(image(pipe), pretrained)


@pytest.mark.parametrize("name", WITH_TEXT)
def test_an_encoder_alone_moves_the_policy_away_from_the_reference(name):
    policy = policy_of(pipeline(name), nudged=False, text_encoders=True)
    trajectory = policy.rollout(PROMPTS, SEEDS)
    nudge(policy.tuned.text_encoders["text_encoder"], NUDGE)
    assert kl(policy, trajectory).min() > 0.0
    with policy.reference(), torch.no_grad():
        assert torch.equal(log_probs(policy(trajectory)), trajectory.log_probs)


def test_a_replay_of_one_step_gives_the_encoders_the_gradient_of_that_step():
    """The sum over single steps is the gradient of all: nothing of the embeddings' graph is lost or counted twice."""
    policy = policy_of(pipeline("StableDiffusionPipeline"), text_encoders=True)
    trajectory = policy.rollout(PROMPTS, SEEDS)
    encoder = [parameter for parameter in policy.networks["text_encoder"].parameters() if parameter.requires_grad]
    whole = torch.autograd.grad(log_probs(policy(trajectory)).sum(), encoder)
    apart = [torch.autograd.grad(policy(trajectory, steps=[k])[0].log_prob.sum(), encoder) for k in trajectory.steps]
    for together, single in zip(whole, zip(*apart, strict=True), strict=True):
        torch.testing.assert_close(together, sum(single), rtol=1e-4, atol=1e-6)


def test_an_encode_prompt_under_no_grad_is_refused():
    """DeepFloyd IF has one."""
    pipe = pipeline("IFPipeline")
    tuned = tune(pipe, {"unet": pipe.unet})
    prepare_adapter(pipe.text_encoder, default_lora_config(pipe.text_encoder, 4))
    policy = Policy(
        pipe, Tuned(tuned.denoisers, {"text_encoder": pipe.text_encoder}), call_kwargs=call_arguments(pipe)
    )
    trajectory = policy.rollout(PROMPTS, SEEDS)
    with torch.no_grad():
        assert torch.equal(log_probs(policy(trajectory)), trajectory.log_probs)
    with pytest.raises(
        ReplayError,
        match="embeddings carry no gradient: this pipeline's `encode_prompt` runs under `no_grad`.*train_text_encoder",
    ):
        policy(trajectory)
    assert torch.is_grad_enabled()


def test_a_text_encoder_whose_adapter_could_not_be_loaded_again_is_refused():
    """diffusers writes an adapter of Chroma's T5, and cannot read it."""
    with pytest.raises(
        ValueError, match="cannot load an adapter of `text_encoder`, a T5EncoderModel.*train_text_encoder = False"
    ):
        policy_of(pipeline("ChromaPipeline"), text_encoders=True)


def test_text_encoders_that_a_lora_file_cannot_hold_are_refused():
    with pytest.raises(
        ValueError,
        match="QwenImagePipeline has no place for an adapter of a text encoder. Set train_text_encoder = False",
    ):
        policy_of(pipeline("QwenImagePipeline"), text_encoders=True)


def test_components_that_are_not_trained_are_frozen():
    policy = policy_of(pipeline("StableDiffusionPipeline"))
    assert not any(p.requires_grad for p in [*policy.pipe.vae.parameters(), *policy.pipe.text_encoder.parameters()])


# ---------------------------------------------------------------- the denoiser's own weights


# SD3's last block computes queries of the text that it then drops.
UNUSED_WEIGHTS = {"StableDiffusion3Pipeline": ["add_q_proj.weight", "add_q_proj.bias", "norm_added_q.weight"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusion3Pipeline", "FluxPipeline"])
def test_full_fine_tuning(name, dtype):
    """fp32 master weights in a pipeline that goes on as it was loaded, and a frozen copy that answers for the pretrained model."""
    expected = Policy(pipeline(name, dtype), call_kwargs=call_arguments(pipeline(name))).rollout(PROMPTS, SEEDS)

    policy = policy_of(pipeline(name, dtype), nudged=False, full=True)
    ((component, module),) = policy.tuned.denoisers.items()
    assert len(trained(policy)) == len(list(module.parameters()))
    assert {weight.dtype for weight in trained(policy).values()} == {torch.float32}
    assert policy.tuned.frozen[component].dtype == dtype
    nudge(module, 0.02)

    assert [tensor.split("attn.")[-1] for tensor in without_gradient(policy)] == UNUSED_WEIGHTS.get(name, [])
    assert {weight.grad.dtype for weight in trained(policy).values() if weight.grad is not None} == {torch.float32}
    trajectory = policy.rollout(PROMPTS, SEEDS)
    assert {latent.dtype for latent in trajectory.latents} == {dtype}
    assert kl(policy, trajectory).min() > 0.0
    with policy.reference():
        pretrained = policy.rollout(PROMPTS, SEEDS)
    assert torch.equal(pretrained.latents[-1], expected.latents[-1])
    assert not torch.equal(trajectory.latents[-1], expected.latents[-1])
    assert getattr(policy.pipe, component) is module


def test_full_fine_tuning_starts_at_the_reference():
    policy = policy_of(pipeline("StableDiffusionPipeline"), nudged=False, full=True)
    assert kl(policy, policy.rollout(PROMPTS, SEEDS)).abs().max() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_full_fine_tuning_saves_is_the_component(dtype, tmp_path):
    policy = policy_of(pipeline("StableDiffusionPipeline", dtype), nudged=False, full=True)
    nudge(policy.networks["unet"], 0.02)
    policy.tuned.save(policy.pipe, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["unet"]
    network = type(policy.pipe.unet).from_pretrained(tmp_path / "unet")
    saved = {name: weight.detach().clone() for name, weight in policy.networks["unet"].named_parameters()}
    assert all(torch.equal(weight, saved[name]) for name, weight in network.named_parameters())

    nudge(policy.networks["unet"], 0.02)
    policy.tuned.load(policy.pipe, tmp_path)
    assert all(torch.equal(weight, saved[name]) for name, weight in policy.networks["unet"].named_parameters())


def test_an_adapter_beside_full_fine_tuning_is_refused():
    pipe = policy_of(pipeline("StableDiffusionPipeline")).pipe
    with pytest.raises(ValueError, match=r"has the active adapter 'default', and its own weights.*pipe.fuse_lora"):
        policy_of(pipe, full=True)


def test_nothing_trained_has_no_reference():
    policy = Policy(pipeline("StableDiffusionPipeline"))
    with pytest.raises(UnsupportedPipelineError, match="`unet` has no active LoRA adapter"), policy.reference():
        pass


# ---------------------------------------------------------------- a quantised base


def quantised(name: str, dtype: torch.dtype):
    pipe = pipeline(name, dtype)
    quantize_(pipe.unet if hasattr(pipe, "unet") else pipe.transformer, Int8WeightOnlyConfig())
    return pipe


# Without a config of transformers peft cannot merge into such weights, which nobody asks for here.
@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusion3Pipeline"])
def test_an_adapter_on_int8_weights(name, dtype, tmp_path):
    pipe = quantised(name, dtype)
    pretrained = image(pipe)
    policy = policy_of(pipe, nudged=False, rank=2, alpha=5)
    assert torch.equal(image(pipe), pretrained)
    assert kl(policy, policy.rollout(PROMPTS, SEEDS)).abs().max() == 0.0
    for module in policy.tuned.denoisers.values():
        nudge(module, NUDGE)
    assert without_gradient(policy) == []
    assert {tensor.grad.dtype for tensor in trained(policy).values()} == {torch.float32}
    assert kl(policy, policy.rollout(PROMPTS, SEEDS)).min() > 0.0
    with policy.reference():
        assert torch.equal(image(pipe), pretrained)

    policy.tuned.save(pipe, tmp_path)
    saved = {tensor: weight.detach().clone() for tensor, weight in trained(policy).items()}
    if dtype == torch.float32:  # a stock pipeline loads an adapter in its own dtype
        stock = quantised(name, dtype)
        stock.load_lora_weights(tmp_path)
        assert torch.equal(image(stock), image(pipe))
    policy.tuned.load(pipe, tmp_path)
    assert all(torch.equal(weight, saved[tensor]) for tensor, weight in trained(policy).items())


def test_quantised_weights_are_not_trained_themselves():
    with pytest.raises(ValueError, match=r"`unet` is quantised: its own weights cannot be trained. Train an adapter"):
        policy_of(quantised("StableDiffusionPipeline", torch.bfloat16), full=True)


@pytest.mark.parametrize("full", [False, True])
def test_the_same_networks_walk_another_number_of_steps(full):
    """Train with few steps, evaluate with many; and in the reference of one policy the other is the pretrained model too."""
    pipe = pipeline("StableDiffusionPipeline")
    many = {**call_arguments(pipe), "num_inference_steps": 9}
    pretrained = Policy(pipeline("StableDiffusionPipeline"), call_kwargs=many).rollout(PROMPTS, SEEDS).images
    policy = policy_of(pipe, full=full)
    longer = policy.with_call(num_inference_steps=9)
    tuned = longer.rollout(PROMPTS, SEEDS)
    assert len(tuned.latents) == 10 and len(policy.rollout(PROMPTS, SEEDS).latents) == 5
    assert torch.equal(tuned.images, Policy(pipe, policy.tuned, call_kwargs=many).rollout(PROMPTS, SEEDS).images)
    assert not torch.equal(tuned.images, pretrained)
    with policy.reference():
        with longer.reference():  # leaving the inner one must not end the outer
            pass
        assert torch.equal(longer.rollout(PROMPTS, SEEDS).images, pretrained)
    assert torch.equal(longer.rollout(PROMPTS, SEEDS).images, tuned.images)
