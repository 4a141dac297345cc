"""Adapters of any configuration: the pretrained model when untouched or off, and after a save the same image in a stock pipeline."""

import pytest
import torch
from peft import LoraConfig
from tiny import nudge
from walks import NUDGE, PROMPTS, SEEDS, image, kl, log_probs, pipeline, policy_of, trained, without_gradient

from dpok_trl.policy.lora import default_lora_config, prepare_adapter
from dpok_trl.policy.lora_files import load_lora_state_dict, lora_state_dict


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONFIGS = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 7}},
    "regular_expression": {"target_modules": r".*attn.*to_[qk]"},
    "all-linear": {"target_modules": "all-linear"},
}
PIPELINES = ["StableDiffusionPipeline", "StableDiffusion3Pipeline", "FluxPipeline"]

every_config = pytest.mark.parametrize("config", CONFIGS)
every_pipeline = pytest.mark.parametrize("name", PIPELINES)


def lora(config: str) -> LoraConfig:
    """Its alpha is not its rank: whoever forgets it gets another image."""
    return LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ATTENTION, **CONFIGS[config]})


def unused(name: str, config: str) -> list[str]:
    """The last block of SD3 drops the text after its attention, whose queries nobody then asks."""
    if (name, config) != ("StableDiffusion3Pipeline", "all-linear"):
        return []
    query = "networks.transformer.transformer_blocks.1.attn.add_q_proj"
    return [f"{query}.lora_A.default.weight", f"{query}.lora_B.default.weight"]


@every_config
@every_pipeline
def test_an_adapter_goes_the_whole_way(name, config, tmp_path):
    """Untouched it changes nothing, nudged it replays with the ratio 1, off it is the pretrained model, saved it comes back."""
    pipe = pipeline(name)
    pretrained = image(pipe)
    policy = policy_of(pipe, nudged=False, peft_config=lora(config))
    assert torch.equal(image(pipe), pretrained)
    assert kl(policy, policy.rollout(PROMPTS, SEEDS)).abs().max() == 0.0

    for module in policy.tuned.modules.values():
        nudge(module, NUDGE)
    assert without_gradient(policy) == unused(name, config)
    assert kl(policy, policy.rollout(PROMPTS, SEEDS)).min() > 0.0
    with policy.reference():
        assert torch.equal(image(pipe), pretrained)

    tuned = image(pipe)
    assert not torch.equal(tuned, pretrained)
    policy.tuned.save(pipe, tmp_path)
    stock = pipeline(name)
    stock.load_lora_weights(tmp_path)
    assert torch.equal(image(stock), tuned)


@pytest.mark.parametrize("config", ["dora", "rslora"])
def test_on_a_bf16_base_the_untouched_adapter_is_the_pretrained_model(config):
    pipe = pipeline("StableDiffusionPipeline", torch.bfloat16)
    pretrained = image(pipe)
    policy = policy_of(pipe, nudged=False, peft_config=lora(config))
    assert {tensor.dtype for tensor in trained(policy).values()} == {torch.float32}
    assert torch.equal(image(pipe), pretrained)
    assert kl(policy, policy.rollout(PROMPTS, SEEDS)).abs().max() == 0.0
    for module in policy.tuned.modules.values():
        nudge(module, NUDGE)
    assert without_gradient(policy) == []


def test_the_settings_of_the_config_reach_the_layers():
    policy = policy_of(pipeline("StableDiffusionPipeline"), peft_config=lora("rank_pattern"))
    layers = {name: part for name, part in policy.networks["unet"].named_modules() if hasattr(part, "lora_A")}
    assert {part.r["default"] for name, part in layers.items() if name.endswith("to_q")} == {2}
    assert {part.r["default"] for name, part in layers.items() if not name.endswith("to_q")} == {3}
    assert {part.scaling["default"] for name, part in layers.items() if name.endswith("to_k")} == {7 / 3}
    assert {part.scaling["default"] for name, part in layers.items() if name.endswith("to_v")} == {5 / 3}


@every_config
def test_what_is_saved_is_read_back_in_place(config, tmp_path):
    policy = policy_of(pipeline("StableDiffusionPipeline"), peft_config=lora(config))
    policy.tuned.save(policy.pipe, tmp_path)
    saved = {name: tensor.detach().clone() for name, tensor in trained(policy).items()}
    nudge(policy.networks["unet"], NUDGE)
    policy.tuned.load(policy.pipe, tmp_path)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in trained(policy).items())


def test_an_adapter_of_another_rank_does_not_fit_into_this_one():
    two, three = (policy_of(pipeline("StableDiffusionPipeline"), rank=rank).networks["unet"] for rank in (2, 3))
    with pytest.raises(
        ValueError, match=r"does not fit: \d+ tensors differ, the first is .*of shape \(2, \d+\) in the file and \(3, "
    ):
        load_lora_state_dict(three, lora_state_dict(two))


@pytest.mark.parametrize("config", ["dora", "rslora"])
def test_a_loaded_adapter_of_this_kind_is_trained_on(config, tmp_path):
    first = policy_of(pipeline("StableDiffusionPipeline"), peft_config=lora(config))
    first.tuned.save(first.pipe, tmp_path)
    pipe = pipeline("StableDiffusionPipeline")
    pretrained = image(pipe)
    pipe.load_lora_weights(tmp_path)
    second = policy_of(pipe, nudged=False)
    assert len(trained(second)) == len(trained(first))
    assert without_gradient(second) == []
    trajectory = first.rollout(PROMPTS, SEEDS)
    assert torch.equal(log_probs(second(trajectory)), trajectory.log_probs)
    with second.reference():
        assert torch.equal(image(pipe), pretrained)


# ---------------------------------------------------------------- a network per config


def test_a_config_for_each_network():
    policy = policy_of(
        pipeline("StableDiffusionXLPipeline"),
        text_encoders=True,
        peft_config={
            "unet": LoraConfig(r=5, target_modules=["to_q"]),
            "text_encoder_2": LoraConfig(r=2, target_modules=["q_proj"]),
        },
        rank=3,
    )
    ranks = {
        name: {(part.r["default"], path.split(".")[-1]) for path, part in module.named_modules() if hasattr(part, "r")}
        for name, module in policy.networks.items()
    }
    assert ranks["unet"] == {(5, "to_q")} and ranks["text_encoder_2"] == {(2, "q_proj")}
    # the one without a config gets the default: attention projections, of the rank given
    assert ranks["text_encoder"] == {(3, target) for target in ("q_proj", "k_proj", "v_proj", "out_proj")}


def test_a_config_for_a_network_that_is_not_trained_is_refused():
    config = {"transformer": LoraConfig(r=2, target_modules=["to_q"])}
    with pytest.raises(ValueError, match="peft_config has entries for transformer, but what is trained is unet"):
        policy_of(pipeline("StableDiffusionPipeline"), peft_config=config)


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("targets", "unmatched"),
    [(["query", "to_k"], "query"), (["to_qq", "to_kk"], "to_kk, to_qq"), (r".*\.to_qx", r"\.\*\\\.to_qx")],
    ids=["one of two", "all", "regular expression"],
)
def test_targets_that_match_nothing_are_refused_and_near_names_given(targets, unmatched):
    pipe = pipeline("StableDiffusionPipeline")
    with pytest.raises(
        ValueError,
        match=f"match nothing in UNet2DConditionModel: {unmatched}. The nearest names of its linear layers: .*to_[qk]",
    ):
        policy_of(pipe, peft_config=LoraConfig(r=2, target_modules=targets))
    assert not any("lora" in name for name, _ in pipe.unet.named_parameters())


def test_a_network_that_names_no_attention_gets_all_of_its_linear_layers(caplog):
    class Network(torch.nn.Module):
        dtype = torch.float32

        def __init__(self):
            super().__init__()
            self.mix = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.SiLU(), torch.nn.Linear(4, 4))
            self.out = torch.nn.Conv2d(1, 1, 1)

    network = Network()
    prepare_adapter(network, default_lora_config(network, 2))
    adapted = {name.split(".lora_A")[0] for name, p in network.named_parameters() if "lora_A" in name}
    assert adapted == {"mix.0", "mix.2"}
    assert "Network has no attention projections of a known name" in caplog.text


def test_a_loaded_adapter_of_another_rank_is_named_with_both_numbers(tmp_path):
    first = policy_of(pipeline("StableDiffusionPipeline"), rank=3)
    first.tuned.save(first.pipe, tmp_path)
    pipe = pipeline("StableDiffusionPipeline")
    pipe.load_lora_weights(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"has the adapter 'default_0' of rank 3 already, and train_lora_rank = 5.*unload_lora_weights",
    ):
        policy_of(pipe, rank=5)
    assert len(trained(policy_of(pipe, rank=3))) == len(trained(first))
