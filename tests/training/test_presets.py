"""Presets: they construct, they pass through a file, and they hold the published numbers."""

import dataclasses
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from trl import TrlParser

from dpok_trl import DPOKConfig, DPOKSFTConfig
from dpok_trl.core.gaussian import Gaussian
from dpok_trl.core.objectives import dpok_loss, probability_ratio
from dpok_trl.demo.command import demo_config
from dpok_trl.training.batches import TrainingBatch, plan_updates
from dpok_trl.training.presets import PRESETS


PAGE = Path(__file__).parents[2] / "docs" / "presets.md"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_configuration_with_its_values(name):
    config = DPOKConfig.preset(name)
    assert type(config) is DPOKConfig
    for field, (value, source) in PRESETS[name].fields.items():
        assert getattr(config, field) == value
        assert len(source) >= len("m = 10") and not source.endswith(".")
    unnamed = [field for field in dataclasses.fields(DPOKConfig) if field.name not in PRESETS[name].fields]
    default = DPOKConfig()
    assert all(getattr(config, field.name) == getattr(default, field.name) for field in unnamed)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_passes_through_a_file(name, tmp_path):
    config = DPOKConfig.preset(name)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
    (read,) = TrlParser((DPOKConfig,)).parse_args_and_config(args=["--config", str(tmp_path / "config.yaml")])
    assert read == config


def test_overrides_win():
    config = DPOKConfig.preset("official-code", kl_weight=0.5, output_dir="rabbit", seed=3)
    assert (config.kl_weight, config.output_dir, config.seed, config.reward_weight) == (0.5, "rabbit", 3, 10.0)
    assert DPOKConfig.preset("official-code").kl_weight == 0.01


def test_a_subclass_keeps_its_own_fields():
    @dataclasses.dataclass
    class Own(DPOKConfig):
        own: int = 1

    config = Own.preset("ddpo", own=2)
    assert (type(config), config.own, config.train_objective) == (Own, 2, "ppo")


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("papersingle", {}, "there is no preset 'papersingle'. Did you mean 'paper-single'? There are: paper-single, "),
        ("zzz", {}, "there is no preset 'zzz'. There are: paper-single, "),
        ("ddpo", {"kl_wieght": 1}, "preset('ddpo', ...) was given kl_wieght, which is no setting. Did you mean 'kl_weight'?"),
        ("paper-single", {"train_adv_type": "batch", "value_input": "latents"}, "would do nothing: train_adv_type = 'batch' has no value function."),
    ],
)  # fmt: skip
def test_what_is_no_preset_is_refused_in_words(name, overrides, message):
    with pytest.raises(ValueError) as error:
        DPOKConfig.preset(name, **overrides)
    assert message in str(error.value)


def test_what_an_override_makes_moot_is_left_out():
    config = DPOKConfig.preset("paper-single", train_adv_type="batch")
    assert (config.train_adv_type, config.value_input, config.reward_weight) == ("batch", DPOKConfig.value_input, 10.0)
    config = DPOKConfig.preset("demo", train_objective="kl_mask")
    assert (config.train_clip_range, config.train_learning_rate) == (DPOKConfig.train_clip_range, 2e-3)
    assert DPOKConfig.preset("official-code", kl_weight=0.0).kl_type == DPOKConfig.kl_type


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_of_the_supervised_trainer_is_what_both_have(name):
    config, values = DPOKSFTConfig.preset(name), PRESETS[name].values()
    assert config.sample_num_steps == values["sample_num_steps"]
    assert config.kl_weight == DPOKSFTConfig.kl_weight and config.train_objective == DPOKSFTConfig.train_objective


def test_the_demo_runs_its_preset():
    config = demo_config(Path("out"), epochs=PRESETS["demo"].values()["num_epochs"], kl_weight=0.02, seed=0, images=64)
    own = {
        "exp_name",
        "output_dir",
        "accelerator_kwargs",
        "save_freq",
        "sample_grid_freq",
        "eval_freq",
        "eval_num_images_per_prompt",
    }
    preset = dataclasses.asdict(DPOKConfig.preset("demo"))
    other = {name for name, value in dataclasses.asdict(config).items() if value != preset[name]}
    assert other == own


# ---------------------------------------------------------------- the numbers that were published


# images in a round, updates of a round (K), transitions of an update (n), stochastic steps of the sampler
ROUNDS = {
    "paper-single": (10, 5, 32, 50),
    "paper-multi": (45, 5, 144, 50),
    "official-code": (10, 5, 48, 50),
    "official-code-multi": (6, 5, 24, 50),
    "ddpo": (256, 4, 64 * 50, 50),
    "flow-grpo": (48 * 24, 2, 24 * 24 * 9, 9),  # the last of ten steps has no noise
    "sd15-lora": (10, 5, 8, 20),
    "demo": (64, 5, 128, 10),
}


@pytest.mark.parametrize("name", PRESETS)
def test_updates_and_transitions_of_a_round(name):
    """Counted on the plan that the trainer follows."""
    config = DPOKConfig.preset(name)
    images, updates, transitions, steps = ROUNDS[name]
    assert config.sample_batch_size * config.sample_num_batches_per_epoch == images
    trajectory = SimpleNamespace(steps=tuple(range(steps)))
    rows = torch.zeros(config.train_batch_size, steps)
    batch = [TrainingBatch(trajectory, tuple(range(config.train_batch_size)), rows)]
    one_round = images // config.train_batch_size
    plan = plan_updates(
        batch * one_round * config.train_buffer_rounds,
        count=one_round,
        timestep_fraction=config.train_timestep_fraction,
        accumulation=config.train_gradient_accumulation_steps,
        timesteps_per_update=config.train_timesteps_per_update,
        random=np.random.default_rng(0),
        mixed=config.train_mixed_timesteps,
    )
    assert len(plan) * config.train_num_inner_epochs == updates
    assert [sum(len(steps) for _, steps in update) for update in plan] == [transitions] * updates


def test_the_budgets():
    def images(name):
        config = DPOKConfig.preset(name)
        return config.num_epochs * config.sample_batch_size * config.sample_num_batches_per_epoch

    assert images("paper-single") == images("official-code") == 20_000
    assert images("paper-multi") == 50_000 - 5  # 1111 rounds of 45
    assert images("official-code-multi") == 120_000
    assert images("sd15-lora") == 15_000
    for name, gradient_steps in (("official-code", 10_000), ("official-code-multi", 100_000)):
        assert DPOKConfig.preset(name).num_epochs * 5 == gradient_steps


PAPER = {
    "train_learning_rate": 1e-5,
    "train_clip_range": 1e-4,
    "train_max_grad_norm": 0.1,
    "train_adv_type": "value",
    "train_adv_scale": False,
    "train_adv_clip_max": math.inf,
    "train_objective": "dpok",
    "train_log_prob_reduction": "mean",
    "train_lora_rank": 4,
    "sample_num_steps": 50,
    "sample_eta": 1.0,
    "sample_guidance_scale": 7.5,
    "kl_gradient": "paper",
}
NUMBERS = {
    "paper-single": {**PAPER, "reward_weight": 10, "kl_weight": 0.01, "kl_type": "gaussian", "train_buffer_rounds": 1},
    "paper-multi": {**PAPER, "reward_weight": 10, "kl_weight": 0.001, "kl_type": "gaussian"},
    "official-code": {
        **PAPER,
        "reward_weight": 10,
        "kl_weight": 0.01,
        "kl_type": "noise",
        "train_adam_weight_decay": 0,
        "value_learning_rate": 1e-4,
        "value_batch_size": 256,
        "value_num_updates": 1,
        "value_gradient_accumulation_steps": 5,
        "value_scale_targets": False,
    },
    "official-code-multi": {**PAPER, "reward_weight": 1000, "kl_weight": 0.1, "kl_type": "noise"},
    "ddpo": {
        "train_learning_rate": 3e-4,
        "train_clip_range": 1e-4,
        "train_max_grad_norm": 1,
        "train_objective": "ppo",
        "kl_weight": 0,
        "sample_guidance_scale": 5,
        "per_prompt_stat_tracking": True,
    },
    "flow-grpo": {"sample_num_steps": 10, "sample_noise_level": 0.7, "kl_weight": 0.04, "train_adv_type": "group"},
    "sd15-lora": {
        "train_learning_rate": 1e-4,
        "train_clip_range": 1e-3,
        "train_max_grad_norm": 1,
        "reward_weight": 5,
        "sample_num_steps": 20,
        "sample_guidance_scale": 7.5,
        "train_lora_rank": 4,
        "train_adv_type": "value",
    },
    "demo": {"train_learning_rate": 2e-3, "train_clip_range": 0.2, "kl_weight": 0.02, "sample_num_steps": 10},
}


@pytest.mark.parametrize("name", PRESETS)
def test_the_published_numbers(name):
    config = DPOKConfig.preset(name)
    assert {field: getattr(config, field) for field in NUMBERS[name]} == NUMBERS[name]


def test_the_buffer_of_the_code_in_rounds():
    """--buffer_size 1000 transitions, in whole rounds of the images of a round in 50 steps."""
    for name in ("official-code", "official-code-multi"):
        config = DPOKConfig.preset(name)
        assert config.train_buffer_rounds == 1000 // (config.sample_batch_size * config.sample_num_steps)


def test_beta_over_alpha_does_not_depend_on_the_reduction():
    """ "mean" divides log-probability and KL by D, so the gradient of alpha A log p - beta KL is the same but for that factor: the ratio of the paper's weights holds."""
    config = DPOKConfig.preset("paper-single")
    generator = torch.Generator().manual_seed(0)
    start, action, reference = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(3))
    advantage, std = torch.tensor([1.5, -0.5, 0.7]), torch.full((3,), 0.3)
    gradients = {}
    for reduction in ("mean", "sum"):
        mean = start.clone().requires_grad_()
        step = Gaussian(mean, std)
        log_prob = step.log_prob(action, reduction)
        policy = dpok_loss(probability_ratio(log_prob, log_prob.detach()), advantage, config.train_clip_range)
        kl = step.kl(Gaussian(reference, std), reduction).mean()
        (config.reward_weight * policy + config.kl_weight * kl).backward()
        gradients[reduction] = mean.grad
    torch.testing.assert_close(start[0].numel() * gradients["mean"], gradients["sum"], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- the page


def test_the_page_shows_what_the_presets_are():
    text = PAGE.read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## `([\w-]+)`\n(.*?)(?=^## |\Z)", text, re.S | re.M))
    assert list(sections) == list(PRESETS)
    for name, preset in PRESETS.items():
        assert preset.summary in sections[name], name
        shown = re.findall(r"^\| `(\w+)` \| `(.+?)` \| (.+) \|$", sections[name], re.M)
        assert shown == [(field, repr(value), source) for field, (value, source) in preset.fields.items()], name
