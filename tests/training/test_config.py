"""`DPOKConfig`: DDPO's fields by name and type, flags and YAML, and every error by its message."""

import dataclasses
import json
import sys
import typing

import pytest
import yaml
from trl import TrlParser

from dpok_trl import DPOKConfig


# TRL v0.23.0, trl/trainer/ddpo_config.py: name -> (type, default)
DDPO_FIELDS = {
    "exp_name": (str, None),  # the script's name
    "run_name": (str, ""),
    "seed": (int, 0),
    "log_with": (str | None, None),
    "tracker_kwargs": (dict, {}),
    "accelerator_kwargs": (dict, {}),
    "project_kwargs": (dict, {}),
    "tracker_project_name": (str, "trl"),
    "logdir": (str, "logs"),
    "num_epochs": (int, 100),
    "save_freq": (int, 1),
    "num_checkpoint_limit": (int, 5),
    "mixed_precision": (str, "fp16"),
    "allow_tf32": (bool, True),
    "resume_from": (str, ""),
    "sample_num_steps": (int, 50),
    "sample_eta": (float, 1.0),
    "sample_guidance_scale": (float, 5.0),
    "sample_batch_size": (int, 1),
    "sample_num_batches_per_epoch": (int, 2),
    "train_batch_size": (int, 1),
    "train_use_8bit_adam": (bool, False),
    "train_learning_rate": (float, 3e-4),
    "train_adam_beta1": (float, 0.9),
    "train_adam_beta2": (float, 0.999),
    "train_adam_weight_decay": (float, 1e-4),
    "train_adam_epsilon": (float, 1e-8),
    "train_gradient_accumulation_steps": (int, 1),
    "train_max_grad_norm": (float, 1.0),
    "train_num_inner_epochs": (int, 1),
    "train_cfg": (bool, True),
    "train_adv_clip_max": (float, 5.0),
    "train_clip_range": (float, 1e-4),
    "train_timestep_fraction": (float, 1.0),
    "per_prompt_stat_tracking": (bool, False),
    "per_prompt_stat_tracking_buffer_size": (int, 16),
    "per_prompt_stat_tracking_min_count": (int, 16),
    "async_reward_computation": (bool, False),
    "max_workers": (int, 2),
    "negative_prompts": (str, ""),
    "push_to_hub": (bool, False),
}
# Defaults that could only fail, or name another project.
OTHER_DEFAULTS = {"exp_name", "tracker_project_name", "mixed_precision"}

PARSER = TrlParser((DPOKConfig,))


def parse(*args: str) -> DPOKConfig:
    (config,) = PARSER.parse_args_and_config(args=list(args))
    return config


@pytest.fixture
def from_yaml(tmp_path):
    def read(content: dict, *args: str) -> DPOKConfig:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
        (config,) = TrlParser((DPOKConfig,)).parse_args_and_config(
            args=["--config", str(tmp_path / "config.yaml"), *args]
        )
        return config

    return read


@pytest.mark.parametrize("name", DDPO_FIELDS)
def test_a_field_of_ddpo_is_kept_by_name_type_and_default(name):
    kind, default = DDPO_FIELDS[name]
    ours = typing.get_type_hints(DPOKConfig)[name]
    accepted = set(typing.get_args(ours)) or {ours}  # ours may accept more: a dict is also read from JSON
    assert set(typing.get_args(kind) or (kind,)) <= accepted
    if name not in OTHER_DEFAULTS:
        assert getattr(DPOKConfig(), name) == default


@pytest.mark.parametrize("field", dataclasses.fields(DPOKConfig), ids=lambda field: field.name)
def test_every_field_says_what_it_is(field):
    text = field.metadata["help"]
    assert len(text) > 15 and text.rstrip().endswith(".")


def test_the_help_can_be_printed():
    assert "--kl_weight" in PARSER.format_help()  # a lone percent sign in a help text would raise


# A value other than the default for each field, as one writes it on the command line.
FLAGS = {
    "exp_name": "rabbit",
    "run_name": "first",
    "output_dir": "somewhere",
    "seed": "7",
    "log_with": "tensorboard",
    "tracker_kwargs": '{"tensorboard": {"flush_secs": 5}}',
    "accelerator_kwargs": '{"cpu": true}',
    "project_kwargs": '{"logging_dir": "elsewhere"}',
    "tracker_project_name": "rabbits",
    "logdir": "runs",
    "num_epochs": "3",
    "save_freq": "2",
    "num_checkpoint_limit": "1",
    "mixed_precision": "bf16",
    "allow_tf32": "False",
    "model_dtype": "bf16",
    "torch_compile": "True",
    "torch_compile_backend": "eager",
    "torch_compile_mode": "max-autotune-no-cudagraphs",
    "resume_from": "runs/rabbit",
    "sample_grid_freq": "0",
    "sample_num_steps": "8",
    "sample_eta": "0.5",
    "sample_guidance_scale": "1.0",
    "sample_batch_size": "4",
    "sample_num_batches_per_epoch": "3",
    "sample_num_images_per_prompt": "2",
    "sample_transition": "cps",
    "sample_noise_level": "0.9",
    "sample_min_std": "0.01",
    "sample_fp32_latents": "True",
    "sample_sde_window_size": "5",
    "sample_sde_window_schedule": "random",
    "sample_sde_window_start": "3",
    "sample_sde_window_interval": "7",
    "sample_vae_slicing": "True",
    "sample_vae_tiling": "True",
    "sample_offload_encoders": "True",
    "sample_call_columns": "image mask_image",
    "sample_call_kwargs": '{"height": 512, "width": 256}',
    "negative_prompts": "blurry",
    "sample_weight_column": "weight",
    "sample_category_column": "category",
    "reward_weights": "1.0 0.25",
    "reward_weight": "10.0",
    "reward_aggregation": "normalize_then_sum",
    "reward_on_error": "raise",
    "reward_offload": "True",
    "async_reward_computation": "True",
    "max_workers": "3",
    "per_prompt_stat_tracking": "True",
    "per_prompt_stat_tracking_buffer_size": "32",
    "per_prompt_stat_tracking_min_count": "8",
    "train_adv_type": "group",
    "train_adv_scale": "False",
    "train_adv_clip_max": "inf",
    "train_keep_best": "1",
    "train_keep_worst": "1",
    "train_batch_size": "2",
    "train_use_8bit_adam": "False",
    "train_learning_rate": "1e-4",
    "train_lr_scheduler": "cosine",
    "train_lr_warmup_steps": "10",
    "train_adam_beta1": "0.8",
    "train_adam_beta2": "0.99",
    "train_adam_weight_decay": "0.0",
    "train_adam_epsilon": "1e-6",
    "train_gradient_accumulation_steps": "2",
    "train_timesteps_per_update": "5",
    "train_max_grad_norm": "0.1",
    "train_num_inner_epochs": "2",
    "train_cfg": "True",
    "train_objective": "ppo",
    "train_clip_range": "1e-3",
    "train_kl_threshold": "1e-4",
    "train_buffer_rounds": "2",
    "train_log_prob_reduction": "sum",
    "train_timestep_fraction": "0.5",
    "train_mixed_timesteps": "True",
    "train_reanchor": "True",
    "train_gradient_checkpointing": "True",
    "train_use_lora": "False",
    "train_text_encoder": "True",
    "train_lora_rank": "8",
    "train_lora_alpha": "16",
    "kl_weight": "0.1",
    "kl_type": "noise",
    "kl_gradient": "exact",
    "kl_warmup_epochs": "5",
    "target_kl": "12.0",
    "reference_update_epochs": "20",
    "value_input": "latents",
    "value_learning_rate": "1e-4",
    "value_batch_size": "64",
    "value_num_updates": "1",
    "value_gradient_accumulation_steps": "5",
    "value_scale_targets": "False",
    "value_warmup_epochs": "3",
    "eval_freq": "10",
    "eval_num_images_per_prompt": "8",
    "eval_batch_size": "16",
    "eval_num_steps": "20",
    "metric_for_best_model": "eval/held-out/red/tuned",
    "greater_is_better": "False",
    "log_gradient_cosine_freq": "5",
    "push_to_hub": "True",
    "hub_model_id": "me/rabbit-lora",
    "hub_private_repo": "True",
    "hub_strategy": "checkpoint",
}
# What a field needs beside it to be valid.
WITH = {
    "metric_for_best_model": {"eval_freq": "1"},
    "torch_compile_backend": {"torch_compile": "True"},
    "torch_compile_mode": {"torch_compile": "True"},
    "sample_sde_window_schedule": {"sample_sde_window_size": "5"},
    "sample_sde_window_start": {"sample_sde_window_size": "5"},
    "sample_sde_window_interval": {"sample_sde_window_size": "5"},
    "train_mixed_timesteps": {"train_batch_size": "2", "sample_batch_size": "2"},
    "reward_aggregation": {"sample_num_images_per_prompt": "2", "sample_batch_size": "2"},
    "train_adv_type": {"sample_num_images_per_prompt": "2", "sample_batch_size": "2"},
    "sample_num_images_per_prompt": {"sample_batch_size": "4"},
    "train_batch_size": {"sample_batch_size": "4"},
    "push_to_hub": {"hub_model_id": "me/rabbit-lora"},
    "hub_strategy": {"push_to_hub": "True", "hub_model_id": "me/rabbit-lora"},
    "train_keep_best": {"sample_num_images_per_prompt": "2", "sample_batch_size": "2"},
    "train_keep_worst": {"sample_num_images_per_prompt": "2", "sample_batch_size": "2"},
    "train_kl_threshold": {"train_objective": "kl_mask"},
    "per_prompt_stat_tracking_buffer_size": {"per_prompt_stat_tracking": "True"},
    "per_prompt_stat_tracking_min_count": {"per_prompt_stat_tracking": "True"},
    "train_lr_warmup_steps": {"train_lr_scheduler": "cosine"},
    **{
        field.name: {"train_adv_type": "value", "value_batch_size": "64"}
        for field in dataclasses.fields(DPOKConfig)
        if field.name.startswith("value_")
    },
}


def read(name: str, text: str):
    """What a flag's text stands for."""
    kinds = typing.get_type_hints(DPOKConfig)[name]
    kinds = set(typing.get_args(kinds)) or {kinds}
    if dict in kinds:
        return json.loads(text)
    (kind,) = kinds - {type(None)}
    if typing.get_origin(kind) is list:
        return [typing.get_args(kind)[0](part) for part in text.split()]
    return text == "True" if kind is bool else kind(text)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(DPOKConfig)])
def test_every_field_is_read_from_a_flag(name):
    flags = {**WITH.get(name, {}), name: FLAGS[name]}
    lists = {key for key in flags if isinstance(read(key, flags[key]), list)}
    config = parse(
        *(part for key, value in flags.items() for part in (f"--{key}", *(value.split() if key in lists else [value])))
    )
    assert getattr(config, name) == read(name, FLAGS[name])


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(DPOKConfig)])
def test_every_field_is_read_from_yaml(name, from_yaml):
    content = {key: read(key, value) for key, value in {**WITH.get(name, {}), name: FLAGS[name]}.items()}
    assert getattr(from_yaml(content), name) == read(name, FLAGS[name])


def test_flags_win_over_yaml_and_yaml_reads_numbers_like_1e_4(from_yaml, tmp_path):
    (tmp_path / "numbers.yaml").write_text("train_learning_rate: 1e-4\nsample_guidance_scale: 1\nnum_epochs: 7\n")
    config = parse("--config", str(tmp_path / "numbers.yaml"), "--num_epochs", "9")
    assert (config.train_learning_rate, config.sample_guidance_scale, config.num_epochs) == (1e-4, 1.0, 9)
    PARSER.set_defaults_with_config(train_learning_rate=3e-4, sample_guidance_scale=5.0, num_epochs=100)
    # YAML takes a bare no for false
    (tmp_path / "precision.yaml").write_text("mixed_precision: no\n")
    assert parse("--config", str(tmp_path / "precision.yaml")).mixed_precision == "no"
    PARSER.set_defaults_with_config(mixed_precision=None)
    # a dict in YAML may also be written as JSON
    assert from_yaml({"sample_call_kwargs": '{"height": 64}'}).sample_call_kwargs == {"height": 64}


def test_unknown_names_are_errors(from_yaml):
    with pytest.raises(ValueError, match="--kl_wieght"):
        parse("--kl_wieght", "0.1")
    with pytest.raises(ValueError, match="--kl_wieght"):
        from_yaml({"kl_wieght": 0.1})
    with pytest.raises(TypeError, match="kl_wieght"):
        DPOKConfig(kl_wieght=0.1)


def test_to_dict_is_flat():
    config = DPOKConfig(
        seed=3, project_kwargs={"project_dir": "save", "total_limit": 5}, tracker_kwargs={"wandb": {"a": 1}}
    )
    flat = config.to_dict()
    assert flat["seed"] == 3
    assert flat["project_kwargs/project_dir"] == "save" and flat["project_kwargs/total_limit"] == 5
    assert flat["tracker_kwargs/wandb/a"] == 1
    assert not any(isinstance(value, dict) for value in flat.values())
    scalars = {f.name for f in dataclasses.fields(config)} - {
        "tracker_kwargs", "accelerator_kwargs", "project_kwargs", "sample_call_kwargs"
    }  # fmt: skip
    assert scalars <= set(flat)


# ---------------------------------------------------------------- errors

ERRORS = {
    "an unknown choice, with a suggestion": (
        {"sample_transition": "ancestrel"},
        "sample_transition = 'ancestrel', but it must be one of auto, ancestral, cps, flow_sde. Did you mean 'ancestral'?",
    ),
    "an unknown choice that resembles none": (
        {"kl_type": "xxxxxxxx"},
        "kl_type = 'xxxxxxxx', but it must be one of gaussian, noise.",
    ),
    "an unknown tracker": ({"log_with": "tensorbord"}, "Did you mean 'tensorboard'?"),
    "an unknown precision": ({"mixed_precision": "fp61"}, "one of None, no, fp16, bf16. Did you mean 'fp16'?"),
    "a sampling batch that does not divide": (
        {"sample_batch_size": 10, "train_batch_size": 4},
        "sample_batch_size = 10 is not a multiple of train_batch_size = 4. The nearest that are: 8 or 12.",
    ),
    "a sampling batch that is too small": (
        {"sample_batch_size": 3, "train_batch_size": 4},
        "sample_batch_size = 3 is not a multiple of train_batch_size = 4. The nearest that are: 4.",
    ),
    "groups that do not divide": (
        {"sample_batch_size": 8, "sample_num_images_per_prompt": 3},
        "sample_batch_size = 8 is not a multiple of sample_num_images_per_prompt = 3. The nearest that are: 6 or 9.",
    ),
    "accumulation that does not divide": (
        {"sample_batch_size": 2, "sample_num_batches_per_epoch": 5, "train_gradient_accumulation_steps": 4},
        "sample_batch_size * sample_num_batches_per_epoch = 10 is not a multiple of train_batch_size * "
        "train_gradient_accumulation_steps = 4. The nearest that are: 8 or 12.",
    ),
    "no noise": (
        {"sample_eta": 0},
        "sample_eta = 0, but it must be in (0, 1]: at 0 every step is deterministic and there is no policy to train.",
    ),
    "too much noise": ({"sample_eta": 1.5}, "sample_eta = 1.5, but it must be in (0, 1]"),
    "a fraction that selects nothing": (
        {"sample_num_steps": 5, "train_timestep_fraction": 0.1},
        "train_timestep_fraction = 0.1 of sample_num_steps = 5 selects no step. Give at least 0.2.",
    ),
    "a fraction of nothing": ({"train_timestep_fraction": 0.0}, "train_timestep_fraction = 0.0, but it must be in (0, 1]"),
    "a fraction of more than all": ({"train_timestep_fraction": 2.0}, "train_timestep_fraction = 2.0, but it must be in"),
    "a negative KL weight": ({"kl_weight": -0.1}, "kl_weight = -0.1, but it must be finite and not negative."),
    "a KL weight that is no number": ({"kl_weight": float("nan")}, "kl_weight = nan, but it must be finite and not negative."),
    "a negative weight decay": ({"train_adam_weight_decay": -1.0}, "train_adam_weight_decay = -1.0, but"),
    "a negative floor": ({"sample_min_std": -1.0}, "sample_min_std = -1.0, but it must be finite and not negative."),
    "a clip range of zero": ({"train_clip_range": 0.0}, "train_clip_range = 0.0, but it must be positive and finite."),
    "a learning rate of zero": ({"train_learning_rate": 0.0}, "train_learning_rate = 0.0, but it must be positive and finite."),
    "no epochs": ({"num_epochs": 0}, "num_epochs = 0, but it must be at least 1."),
    "no images": ({"sample_batch_size": 0}, "sample_batch_size = 0, but it must be at least 1."),
    "no timesteps": ({"train_timesteps_per_update": 0}, "train_timesteps_per_update = 0, but it must be at least 1, or None"),
    "training another policy than the sampled one": (
        {"train_cfg": False, "sample_guidance_scale": 7.5},
        "train_cfg = False with sample_guidance_scale = 7.5 would train another distribution than the one that was sampled",
    ),
    "groups of one": (
        {"train_adv_type": "group"},
        "train_adv_type = 'group' compares images of the same prompt and needs sample_num_images_per_prompt of at least 2; given: 1.",
    ),
    "two baselines": (
        {"train_adv_type": "group", "per_prompt_stat_tracking": True, "sample_batch_size": 2, "sample_num_images_per_prompt": 2},
        "per_prompt_stat_tracking = True and train_adv_type = 'group' both say how to whiten rewards; choose one.",
    ),
    "statistics that never count": (
        {"per_prompt_stat_tracking": True, "per_prompt_stat_tracking_buffer_size": 4},
        "per_prompt_stat_tracking_min_count = 16 is larger than per_prompt_stat_tracking_buffer_size = 4",
    ),
    "an argument of the call that has a field": (
        {"sample_call_kwargs": {"guidance_scale": 3.0}},
        "sample_call_kwargs must not hold guidance_scale: the trainer sets it from a field of its own.",
    ),
    "a metric without evaluations": (
        {"metric_for_best_model": "eval/held-out/red/tuned"},
        "metric_for_best_model = 'eval/held-out/red/tuned' is a metric of evaluations, and eval_freq = 0 asks for none.",
    ),
    "no repository": ({"push_to_hub": True}, "push_to_hub = True needs hub_model_id, such as 'me/rabbit-lora'."),
    "a column that has a field": (
        {"sample_call_columns": ["negative_prompt", "image"]},
        "sample_call_columns must not hold negative_prompt: the trainer sets it from a field of its own.",
    ),
    "an argument twice": (
        {"sample_call_columns": ["image", "strength"], "sample_call_kwargs": {"strength": 0.5}},
        "sample_call_kwargs and sample_call_columns both hold strength; it is either the same for every image or not.",
    ),
    "a column that is no list": (
        {"sample_call_columns": "image"},
        "sample_call_columns = 'image' is of type str, but it must be list or None.",
    ),
    "a window that is too long": (
        {"sample_num_steps": 8, "sample_sde_window_size": 9},
        "sample_sde_window_size = 9 from sample_sde_window_start = 0 does not lie in the 8 steps of sample_num_steps. The size must be between 1 and 8.",
    ),
    "a window that starts too late": (
        {"sample_num_steps": 8, "sample_sde_window_size": 3, "sample_sde_window_start": 6},
        "sample_sde_window_size = 3 from sample_sde_window_start = 6 does not lie in the 8 steps of sample_num_steps. The size must be between 1 and 2.",
    ),
    "an empty window": ({"sample_sde_window_size": 0}, "sample_sde_window_size = 0 from sample_sde_window_start = 0 does not"),
    "a window before the start": (
        {"sample_sde_window_size": 2, "sample_sde_window_start": -1},
        "sample_sde_window_start = -1, but it must be finite and not negative.",
    ),
    "a window that never moves": (
        {"sample_sde_window_size": 2, "sample_sde_window_interval": 0},
        "sample_sde_window_interval = 0, but it must be at least 1.",
    ),
    "a window without a size": (
        {"sample_sde_window_schedule": "random", "sample_sde_window_start": 2},
        "sample_sde_window_schedule, sample_sde_window_start would do nothing: set sample_sde_window_size as well.",
    ),
    "a fraction that selects nothing of the window": (
        {"sample_sde_window_size": 3, "train_timestep_fraction": 0.2},
        "train_timestep_fraction = 0.2 of sample_sde_window_size = 3 selects no step. Give at least 0.334.",
    ),
    "an unknown window": ({"sample_sde_window_size": 2, "sample_sde_window_schedule": "fixd"}, "Did you mean 'fixed'?"),
    "an unknown dtype": ({"model_dtype": "float16"}, "model_dtype = 'float16', but it must be one of None, fp32, bf16, fp16."),
    "mixed timesteps of one sample": (
        {"train_mixed_timesteps": True},
        "train_mixed_timesteps = True with train_batch_size = 1: one sample cannot be at different timesteps. Raise train_batch_size to 2 or more.",
    ),
    "a backend of nothing": (
        {"torch_compile_backend": "aot_eager"},
        "torch_compile_backend and torch_compile_mode would do nothing: set torch_compile = True.",
    ),
    "a mode of nothing": ({"torch_compile_mode": "reduce-overhead"}, "would do nothing: set torch_compile = True."),
    "text encoders that train and are away": (
        {"train_text_encoder": True, "sample_offload_encoders": True},
        "train_text_encoder = True trains adapters on the text encoders in every update; it does not go with sample_offload_encoders = True.",
    ),
    "adapters on text encoders beside full fine-tuning": (
        {"train_text_encoder": True, "train_use_lora": False},
        "it does not go with train_use_lora = False.",
    ),
    "a rank of no adapter": (
        {"train_use_lora": False, "train_lora_rank": 8},
        "train_lora_rank and train_lora_alpha would do nothing with train_use_lora = False.",
    ),
    "an alpha of no adapter": ({"train_use_lora": False, "train_lora_alpha": 8}, "would do nothing with train_use_lora = False."),
    "a rank of nothing": ({"train_lora_rank": 0}, "train_lora_rank = 0, but it must be at least 1, or None for 4."),
    "an alpha of nothing": ({"train_lora_alpha": 0}, "train_lora_alpha = 0, but it must be at least 1, or None for the rank."),
    "a reward that scores while it is away": (
        {"reward_offload": True, "async_reward_computation": True},
        "reward_offload = True keeps the reward off the device while images are sampled, and async_reward_computation = True scores just then. Choose one.",
    ),
    "prompts that have one image each": (
        {"reward_aggregation": "normalize_then_sum"},
        "reward_aggregation = 'normalize_then_sum' compares images of the same prompt and needs sample_num_images_per_prompt of at least 2; given: 1.",
    ),
    "a clip of nothing": (
        {"train_objective": "kl_mask", "train_clip_range": 1e-3},
        "train_clip_range = 0.001 would do nothing: train_objective = 'kl_mask' has no clip. Change the latter, or leave the former out.",
    ),
    "a clip of REINFORCE": (
        {"train_objective": "reinforce", "train_clip_range": 1e-3},
        "train_clip_range = 0.001 would do nothing: train_objective = 'reinforce' has no clip.",
    ),
    "a threshold of nothing": (
        {"train_kl_threshold": 1e-3},
        "train_kl_threshold = 0.001 would do nothing: train_objective = 'dpok' has no such threshold.",
    ),
    "old samples without a ratio": (
        {"train_objective": "reinforce", "train_buffer_rounds": 2},
        "train_buffer_rounds = 2 uses samples again after the policy has moved, and train_objective = 'reinforce' has no ratio that corrects for it.",
    ),
    "samples twice without a ratio": (
        {"train_objective": "reinforce", "train_num_inner_epochs": 3},
        "train_num_inner_epochs = 3 uses samples again after the policy has moved",
    ),
    "settings of a KL that is off": (
        {"kl_weight": 0.0, "kl_gradient": "exact", "kl_warmup_epochs": 3},
        "kl_gradient = 'exact', kl_warmup_epochs = 3 would do nothing: kl_weight = 0 turns the KL term off.",
    ),
    "a target of no KL": ({"kl_weight": 0.0, "target_kl": 5.0}, "target_kl = 5.0 would do nothing: kl_weight = 0 turns the KL term off."),
    "a target of another unit": (
        {"kl_type": "noise", "target_kl": 5.0},
        "target_kl = 5.0 would do nothing: kl_type = 'noise' is no KL in nats; take 'gaussian'.",
    ),
    "an exact gradient of no KL": ({"kl_type": "noise", "kl_gradient": "exact"}, "kl_gradient = 'exact' would do nothing: kl_type = 'noise'"),
    "a target and a warm-up": (
        {"target_kl": 5.0, "kl_warmup_epochs": 3},
        "target_kl = 5.0 adapts kl_weight from the first epoch on, and kl_warmup_epochs = 3 holds it at 0 that long. Choose one.",
    ),
    "a warm-up that never ends": (
        {"kl_warmup_epochs": 10, "num_epochs": 10},
        "kl_warmup_epochs = 10 with num_epochs = 10: the KL term would never be switched on. Set kl_weight = 0 if that is what you want, or "
        "kl_warmup_epochs below 10.",
    ),
    "a target of zero": ({"target_kl": 0.0}, "target_kl = 0.0, but it must be positive and finite, or None"),
    "charges to a reference that goes": (
        {"kl_gradient": "exact", "train_buffer_rounds": 2, "reference_update_epochs": 5},
        "kl_gradient = 'exact' charges the actions of older rounds (train_buffer_rounds = 2) with the KL to a reference that reference_update_epochs = 5 replaces.",
    ),
    "a reference that never stays": ({"reference_update_epochs": 0}, "reference_update_epochs = 0, but it must be at least 1, or None for"),
    "leave one out of one": (
        {"train_adv_type": "leave_one_out"},
        "train_adv_type = 'leave_one_out' compares images of the same prompt and needs sample_num_images_per_prompt of at least 2; given: 1.",
    ),
    "settings of no value function": (
        {"value_batch_size": 64, "value_warmup_epochs": 2},
        "value_batch_size = 64, value_warmup_epochs = 2 would do nothing: train_adv_type = 'batch' has no value function.",
    ),
    "a value function that waits for ever": (
        {"train_adv_type": "value", "value_batch_size": 64, "value_warmup_epochs": 10, "num_epochs": 10},
        "value_warmup_epochs = 10 with num_epochs = 10: the policy would never be updated.",
    ),
    "a buffer smaller than a batch": (
        {"train_adv_type": "value", "value_batch_size": 256, "sample_num_steps": 50, "sample_batch_size": 5, "sample_num_batches_per_epoch": 1},
        "value_batch_size = 256 transitions, but 1 round(s) of 5 images in 50 steps leave at most 250 in a process.",
    ),
    "an embedding that is trained": (
        {"train_adv_type": "value", "value_batch_size": 64, "value_input": "latents", "train_text_encoder": True},
        "value_input = 'latents' gives V the prompt's embedding, which changes while train_text_encoder = True trains it.",
    ),
    "features of a compiled network": (
        {"train_adv_type": "value", "value_batch_size": 64, "value_input": "features", "torch_compile": True},
        "value_input = 'features' listens to the middle of the denoiser, which torch_compile = True compiles away. Take value_input = 'latents'.",
    ),
    "a curated group that is larger than the group": (
        {"sample_num_images_per_prompt": 4, "sample_batch_size": 4, "train_keep_best": 3, "train_keep_worst": 2},
        "train_keep_best = 3 and train_keep_worst = 2 are 5 images of the 4 of a group (sample_num_images_per_prompt). Together they must be at least 1 and less",
    ),
    "all of a group": (
        {"sample_num_images_per_prompt": 4, "sample_batch_size": 4, "train_keep_best": 2, "train_keep_worst": 2},
        "are 4 images of the 4 of a group",
    ),
    "a reference that never moves": (
        {"reference_update_epochs": 200},
        "reference_update_epochs = 200 with num_epochs = 100: the reference would never move. Leave it out, or take less than 100.",
    ),
    "a buffer that is never full": (
        {"train_buffer_rounds": 5, "num_epochs": 3},
        "train_buffer_rounds = 5 with num_epochs = 3: the buffer would never be full. Take at most 3.",
    ),
    "statistics that nobody keeps": (
        {"per_prompt_stat_tracking_min_count": 8},
        "per_prompt_stat_tracking_min_count = 8 would do nothing: per_prompt_stat_tracking = False keeps no statistics of prompts.",
    ),
    "a warm-up of nothing": ({"train_lr_warmup_steps": 10}, "train_lr_warmup_steps = 10 would do nothing: train_lr_scheduler = 'constant' has no warm-up"),
    "a noise that is another's": (
        {"sample_transition": "flow_sde", "sample_eta": 0.5},
        "sample_eta = 0.5 would do nothing: sample_transition = 'flow_sde' has its noise from sample_noise_level.",
    ),
    "a noise level that is another's": ({"sample_transition": "cps", "sample_noise_level": 0.5}, "sample_noise_level = 0.5 would do nothing: sample_transition = 'cps'"),
    "nothing of a group": ({"train_keep_best": 0}, "are 0 images of the 1 of a group"),
    "curated batches that do not divide": (
        {"sample_num_images_per_prompt": 4, "sample_batch_size": 8, "train_keep_best": 1, "train_keep_worst": 1, "train_batch_size": 3},
        "what train_keep_best and train_keep_worst keep of a sampling batch = 4 is not a multiple of train_batch_size = 3. The nearest that are: 3 or 6.",
    ),
    "a buffer of pictures": (
        {"train_buffer_rounds": 2, "sample_call_columns": ["image"]},
        "train_buffer_rounds = 2 keeps samples for later rounds and in checkpoints, which cannot hold what sample_call_columns = ['image'] hands to the",
    ),
    "no limit but below zero": ({"train_adv_clip_max": -1.0}, "train_adv_clip_max = -1.0, but it must be positive; inf clips nothing."),
    "broken JSON": ({"sample_call_kwargs": "{height: 512}"}, "sample_call_kwargs = '{height: 512}' is not JSON"),
    "JSON of another kind": ({"tracker_kwargs": "[1]"}, "tracker_kwargs must be a dict, given: [1]"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_what_could_only_fail_later_is_refused_in_words(case):
    kwargs, message = ERRORS[case]
    with pytest.raises(ValueError) as error:
        DPOKConfig(**kwargs)
    assert message in str(error.value)


def test_the_smallest_fraction_that_an_error_names_is_accepted():
    for steps in range(2, 101):
        with pytest.raises(ValueError, match="Give at least") as error:
            DPOKConfig(sample_num_steps=steps, train_timestep_fraction=0.5 / steps)
        advice = str(error.value).split("Give at least ")[1].rstrip(".")
        DPOKConfig(sample_num_steps=steps, train_timestep_fraction=float(advice))


def test_a_policy_without_guidance_needs_no_train_cfg():
    assert DPOKConfig(train_cfg=False, sample_guidance_scale=1.0).train_cfg is False


def test_8_bit_adam_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        ImportError, match=r"train_use_8bit_adam = True needs bitsandbytes: `pip install dpok-trl\[bnb\]`"
    ):
        DPOKConfig(train_use_8bit_adam=True)
