"""docs/migrating-from-ddpo.md names everything that TRL v0.23 had of DDPO, and what it says of it here is so."""

import dataclasses
import inspect
import re

import pytest
import torch
from test_docs import section, tables, text_of
from tiny import stable_diffusion

import dpok_trl
from dpok_trl import DefaultDPOKStableDiffusionPipeline, DPOKConfig, DPOKSchedulerOutput, DPOKTrainer
from dpok_trl.core.trajectory import Trajectory


# The public surface of DDPO in TRL v0.23.0, read from its source: kind -> names.
DDPO = {
    "exports": "DDPOConfig DDPOTrainer DDPOPipelineOutput DDPOSchedulerOutput DDPOStableDiffusionPipeline DefaultDDPOStableDiffusionPipeline",
    "DDPOTrainer(...)": "config reward_function prompt_function sd_pipeline image_samples_hook",
    "DDPOTrainer": "train step compute_rewards calculate_loss loss create_model_card save_pretrained push_to_hub from_pretrained _save_pretrained "
    "_save_checkpoint _generate_samples _train_batched_samples _config_check _setup_optimizer _save_model_hook _load_model_hook _tag_names",
    "trainer.": "prompt_fn reward_fn config image_samples_callback num_train_timesteps accelerator sd_pipeline optimizer neg_prompt_embed stat_tracker "
    "autocast trainable_layers executor first_epoch",
    "called by the example, did not exist": "save_model is_world_process_zero model args",
    "DDPOConfig": "exp_name run_name seed log_with tracker_kwargs accelerator_kwargs project_kwargs tracker_project_name logdir num_epochs save_freq "
    "num_checkpoint_limit mixed_precision allow_tf32 resume_from sample_num_steps sample_eta sample_guidance_scale sample_batch_size "
    "sample_num_batches_per_epoch train_batch_size train_use_8bit_adam train_learning_rate train_adam_beta1 train_adam_beta2 train_adam_weight_decay "
    "train_adam_epsilon train_gradient_accumulation_steps train_max_grad_norm train_num_inner_epochs train_cfg train_adv_clip_max train_clip_range "
    "train_timestep_fraction per_prompt_stat_tracking per_prompt_stat_tracking_buffer_size per_prompt_stat_tracking_min_count "
    "async_reward_computation max_workers negative_prompts push_to_hub to_dict",
    "Default…(...)": "pretrained_model_name pretrained_model_revision use_lora",
    "Default…": "unet vae tokenizer scheduler text_encoder autocast sd_pipeline pretrained_model pretrained_revision scheduler_step set_progress_bar_config "
    "save_pretrained get_trainable_layers save_checkpoint load_checkpoint rgb_with_grad",
    "Default….__call__": "prompt height width num_inference_steps guidance_scale negative_prompt num_images_per_prompt eta generator latents prompt_embeds "
    "negative_prompt_embeds output_type return_dict callback callback_steps cross_attention_kwargs guidance_rescale",
    "DDPOPipelineOutput": "images latents log_probs",
    "DDPOSchedulerOutput": "latents log_probs",
    "scheduler_step": "model_output timestep sample eta use_clipped_model_output generator prev_sample",
    "helpers": "scheduler_step pipeline_step pipeline_step_with_grad _left_broadcast _get_variance PerPromptStatTracker",
    "a sample": "prompt_ids prompt_embeds timesteps latents next_latents log_probs negative_prompt_embeds",
    "metrics": "reward reward_mean reward_std approx_kl clipfrac loss epoch inner_epoch",
    "flags of the example": "pretrained_model pretrained_revision hf_hub_model_id hf_hub_aesthetic_model_id hf_hub_aesthetic_model_filename use_lora",
}
PAGE = text_of("migrating-from-ddpo")
EVERY = section(PAGE, "Every name")
SAME, GONE = "the same", "gone"


def every_name() -> dict[tuple[str, str], str]:
    """(kind, name) -> what it is here."""
    rows = {}
    for kind, table in re.findall(r"^### (.+?)\n(.*?)(?=^### |\Z)", EVERY, re.S | re.M):
        for name, (here, *_) in tables(table, "TRL v0.23").items():
            rows[kind.replace("`", ""), name] = here
    return rows


ROWS = every_name()


def of(kind: str) -> dict[str, str]:
    return {name: here for (a_kind, name), here in ROWS.items() if a_kind == kind}


def test_the_table_has_every_name_and_no_other():
    names = {(kind, name) for kind, text in DDPO.items() for name in text.split()}
    assert sorted(ROWS) == sorted(names)


def test_settings_are_all_there():
    fields = {field.name for field in dataclasses.fields(DPOKConfig)}
    settings = of("DDPOConfig")
    assert all(here.startswith(SAME) for here in settings.values())
    assert settings.keys() - {"to_dict"} <= fields and callable(DPOKConfig.to_dict)


def test_other_exports_are_exported():
    for old, here in of("exports").items():
        if not here.startswith(GONE):
            assert re.search(r"`(\w+)`", here)[1] in dpok_trl.__all__, old


def test_the_arguments_of_the_trainer_are_the_same_in_their_order():
    parameters = list(inspect.signature(DPOKTrainer).parameters.values())
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == list(of("DDPOTrainer(...)"))


@pytest.mark.parametrize("kind", ["DDPOTrainer", "Default…"])
def test_what_is_said_to_be_the_same_is_there_and_what_is_gone_is_not(kind):
    cls = DPOKTrainer if kind == "DDPOTrainer" else DefaultDPOKStableDiffusionPipeline
    source = inspect.getsource(cls)
    for name, here in of(kind).items():
        there = hasattr(cls, name) or re.search(rf"self\.{name}\b", source) is not None
        assert there == (not here.startswith(GONE)), f"{name}: {here}"


def test_the_attributes_of_a_trainer():
    source = inspect.getsource(DPOKTrainer)
    for name, here in of("trainer.").items():
        there = bool(re.search(rf"self\.{name}\b.*=", source)) or hasattr(DPOKTrainer, name)
        assert there == here.startswith(SAME), f"{name}: {here}"
        for other in re.findall(r"`trainer\.(\w+)", here):
            assert re.search(rf"self\.{other}\b", source), f"{name}: {here}"


def test_the_arguments_of_the_pipeline():
    assert list(of("Default…(...)")) == list(inspect.signature(DefaultDPOKStableDiffusionPipeline).parameters)
    own = inspect.signature(DefaultDPOKStableDiffusionPipeline.__call__).parameters
    for name, here in of("Default….__call__").items():
        if name in own:
            assert here.startswith(SAME), name


EXAMPLES = {  # of each argument of the old call, a value that it would take
    "height": 16,
    "width": 16,
    "negative_prompt": "a cat",
    "num_images_per_prompt": 2,
    "generator": torch.Generator(),
    "latents": torch.zeros(1, 4, 8, 8),
    "prompt_embeds": torch.zeros(1, 16, 16),
    "negative_prompt_embeds": torch.zeros(1, 16, 16),
    "output_type": "pil",
    "return_dict": True,
    "callback": print,
    "callback_steps": 1,
    "cross_attention_kwargs": {"scale": 1.0},
    "guidance_rescale": 0.5,
}


def test_what_is_refused_and_what_is_handed_on(tmp_path):
    stable_diffusion().save_pretrained(tmp_path)
    pipe = DefaultDPOKStableDiffusionPipeline(str(tmp_path))
    pipe.set_progress_bar_config(disable=True)
    for name, here in of("Default….__call__").items():
        if here.startswith(SAME):
            continue
        assert here.startswith(("refused", "handed to the pipeline's call")), name
        call = {"num_inference_steps": 2, "seeds": [0], name: EXAMPLES[name]}
        if here.startswith("refused"):
            with pytest.raises(ValueError):
                pipe("a cat", **call)
        else:
            assert isinstance(pipe("a cat", **call), dpok_trl.DPOKPipelineOutput), name


def test_a_sample():
    fields = {field.name for field in dataclasses.fields(Trajectory)}
    for name, here in of("a sample").items():
        named = set(re.findall(r"`trajectory\.(\w+)`", here))
        assert named <= fields and (named or here.startswith(GONE)), name


def test_the_outputs():
    fields = {field.name for field in dataclasses.fields(DPOKSchedulerOutput)}
    assert fields >= set(of("DDPOSchedulerOutput"))
    assert {field.name for field in dataclasses.fields(dpok_trl.DPOKPipelineOutput)} == set(of("DDPOPipelineOutput"))


def test_the_arguments_of_a_step():
    parameters = inspect.signature(dpok_trl.scheduler_step).parameters
    assert {name for name, here in of("scheduler_step").items() if here.startswith(SAME)} < set(parameters)
    assert {name for name, here in of("scheduler_step").items() if here.startswith(GONE)}.isdisjoint(parameters)


def test_metrics_lead_to_documented_ones():
    documented = set(tables(text_of("metrics"), "metric"))
    for old, here in of("metrics").items():
        new = old if here.startswith(SAME) else re.search(r"`([\w/]+)`", here)
        assert here.startswith(GONE) or (new if isinstance(new, str) else new[1]) in documented, old
