"""Settings that were published, or measured, under a name: data, with the source of every value.

`DPOKConfig.preset(name)` makes a configuration of one. docs/presets.md shows them all; a test holds the page to what stands here.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from dpok_trl.training.config import DPOKConfig


@dataclass(frozen=True)
class Preset:
    """
    Args:
        summary (`str`): What it is and where it comes from.
        fields (`Mapping[str, tuple[Any, str]]`): Field of `DPOKConfig` -> its value, and the source of the value. A field that is not in it keeps its default.
    """

    summary: str
    fields: Mapping[str, tuple[Any, str]]

    def values(self) -> dict[str, Any]:
        """Field -> value."""
        return {name: value for name, (value, _) in self.fields.items()}


# How K updates of n transitions in a round come about: a training batch is `train_batch_size` images at `train_timestep_fraction` of the
# steps, and an update takes `train_gradient_accumulation_steps` of them, or the part of them that `train_timesteps_per_update` allows.
_N48 = (
    "K = 5 updates (--p_step 5) of n = 48 transitions (README: --p_batch_size 4 x --gradient_accumulation_steps 12): 5 training batches of 2 images "
    "at 24 of the 50 steps"
)
_N24 = (
    "K = 5 updates (--p_step 5) of n = 24 transitions (README: --p_batch_size 2 x --gradient_accumulation_steps 12): 3 training batches of 2 images at "
    "20 of the 50 steps, 4 of them in each update"
)
_N32 = "K = 5 updates of n = 32 transitions: 5 training batches of 2 images at 16 of the 50 steps"
_K5 = (
    "K, n not found in the paper; K = 5 and the share of transitions of its single prompts (16 of 50 steps, here n = 144): 5 times 3 training batches "
    "of 3 images"
)
_N8 = "report: --grad_steps 5 --is_batch 8: 5 training batches of 2 images at 4 of the 20 steps"
_NOT_FOUND = "not found in the paper; as in the official code"

_OFFICIAL_CODE: dict[str, tuple[Any, str]] = {
    "num_epochs": (2000, "--max_train_steps 10000 // --p_step 5"),
    "save_freq": (100, "--save_interval 100"),
    "sample_grid_freq": (100, "ours: with the checkpoints"),
    "sample_num_steps": (50, "pipeline_stable_diffusion_extended.py: num_inference_steps = 50"),
    "sample_eta": (1.0, "pipeline_stable_diffusion_extended.py: eta = 1.0"),
    "sample_guidance_scale": (7.5, "pipeline_stable_diffusion_extended.py: guidance_scale = 7.5"),
    "sample_batch_size": (10, "README: --g_batch_size 10"),
    "sample_num_batches_per_epoch": (1, "--g_step 1"),
    "reward_weight": (10.0, "README: --reward_weight 10"),
    "train_adv_type": ("value", "README: --v_flag 1"),
    "train_adv_scale": (False, "_train_policy_func: the advantage is r - V, unscaled"),
    "train_adv_clip_max": (math.inf, "_train_policy_func: the advantage is not clipped"),
    "train_batch_size": (2, _N48),
    "train_gradient_accumulation_steps": (1, _N48),
    "train_timestep_fraction": (0.48, _N48),
    "train_mixed_timesteps": (True, "get_random_indices: each transition at a timestep of its own"),
    "train_num_inner_epochs": (1, "K counts all updates of a round"),
    "train_buffer_rounds": (2, "--buffer_size 1000: the transitions of 2 rounds of 10 images in 50 steps"),
    "train_objective": ("dpok", "_train_policy_func: torch.clamp of the ratio, no minimum"),
    "train_clip_range": (1e-4, "--ratio_clip 1e-4"),
    "train_log_prob_reduction": ("mean", "scheduling_ddim_extended.py: the mean over the dimensions of a latent"),
    "train_learning_rate": (1e-5, "README: --learning_rate 1e-5"),
    "train_lr_scheduler": ("constant", "--lr_scheduler constant"),
    "train_adam_beta1": (0.9, "--adam_beta1 0.9"),
    "train_adam_beta2": (0.999, "--adam_beta2 0.999"),
    "train_adam_weight_decay": (0.0, "--adam_weight_decay 0.0"),
    "train_adam_epsilon": (1e-8, "--adam_epsilon 1e-08"),
    "train_max_grad_norm": (0.1, "README: --clip_norm 0.1"),
    "train_use_lora": (True, "LoRACrossAttnProcessor on all attention layers of the UNet"),
    "train_lora_rank": (4, "--lora_rank 4"),
    "kl_weight": (0.01, "README: --kl_weight 0.01"),
    "kl_type": ("noise", "pipeline_stable_diffusion_extended.py: squared difference of the guided noise, unweighted"),
    "kl_gradient": ("paper", "_train_policy_func: the gradient of each step's own term only"),
    "kl_warmup_epochs": (0, "--kl_warmup -1: on from the first round"),
    "value_input": ("latents", "reward_model.py, ValueMulti: x_t, CLIP text embedding and step"),
    "value_learning_rate": (1e-4, "--v_lr 1e-4"),
    "value_batch_size": (256, "--v_batch_size 256"),
    "value_num_updates": (1, "main: one step of AdamW in a round, over --v_step 5 batches"),
    "value_gradient_accumulation_steps": (5, "main: one step of AdamW in a round, over --v_step 5 batches"),
    "value_scale_targets": (False, "_train_value_func: the raw reward"),
    "value_warmup_epochs": (0, "main: the policy is updated from the first round on"),
}

_PAPER: dict[str, tuple[Any, str]] = {
    **{name: (value, _NOT_FOUND) for name, (value, _) in _OFFICIAL_CODE.items()},
    "num_epochs": (2000, "20,000 images, m = 10 in a round"),
    "sample_grid_freq": _OFFICIAL_CODE["sample_grid_freq"],
    "sample_batch_size": (10, "m = 10"),
    "sample_num_batches_per_epoch": (1, "m = 10"),
    "reward_weight": (10.0, "alpha = 10"),
    "train_adv_type": ("value", "App. A.5; whether the runs on single prompts used it was not found; the README has --v_flag 1"),
    "train_adv_scale": (False, "App. A.5: r - V"),
    "train_batch_size": (2, _N32),
    "train_gradient_accumulation_steps": (1, _N32),
    "train_timestep_fraction": (0.32, _N32),
    "train_mixed_timesteps": (True, "algorithm 1: transitions drawn at random"),
    "train_buffer_rounds": (1, "algorithm 1: transitions of this round"),
    "train_objective": ("dpok", "App. A.6: the clipped ratio"),
    "train_clip_range": (1e-4, "App. A.6: epsilon = 1e-4"),
    "train_learning_rate": (1e-5, "1e-5, AdamW"),
    "train_max_grad_norm": (0.1, "norm of the gradient 0.1"),
    "train_use_lora": (True, "LoRA on the UNet"),
    "kl_weight": (0.01, "beta = 0.01"),
    "kl_type": ("gaussian", "lemma 4.2, eq. 8: the KL of each step"),
    "kl_gradient": ("paper", "eq. 9, App. A.3: without the term of the later steps"),
    "value_input": ("latents", "App. A.5: V(x_t, z)"),
}  # fmt: skip

_PAPER_MULTI: dict[str, tuple[Any, str]] = {
    **_PAPER,
    "num_epochs": (1111, "50,000 images, m = 45 in a round"),
    "sample_batch_size": (9, "m = 45, drawn 9 at a time"),
    "sample_num_batches_per_epoch": (5, "m = 45, drawn 9 at a time"),
    "reward_weight": (10.0, "not found in the paper; as for its single prompts. beta / alpha is then that of the README's many prompts"),
    "train_adv_type": ("value", "App. A.5"),
    "train_batch_size": (3, _K5),
    "train_gradient_accumulation_steps": (3, _K5),
    "train_timestep_fraction": (0.32, _K5),
    "train_clip_range": (1e-4, "not found in the paper; as for its single prompts"),
    "train_learning_rate": (1e-5, "not found in the paper; as for its single prompts"),
    "train_max_grad_norm": (0.1, "not found in the paper; as for its single prompts"),
    "kl_weight": (0.001, "beta = 0.001"),
}  # fmt: skip

_OFFICIAL_CODE_MULTI: dict[str, tuple[Any, str]] = {
    **_OFFICIAL_CODE,
    "num_epochs": (20000, "README: --max_train_steps 100000 // --p_step 5"),
    "sample_batch_size": (6, "README: --g_batch_size 6, per GPU"),
    "reward_weight": (1000.0, "README: --reward_weight 1000"),
    "train_batch_size": (2, _N24),
    "train_gradient_accumulation_steps": (3, _N24),
    "train_timestep_fraction": (0.4, _N24),
    "train_timesteps_per_update": (4, _N24),
    "train_buffer_rounds": (3, "--buffer_size 1000: the transitions of 3.3 rounds of 6 images in 50 steps"),
    "kl_weight": (0.1, "README: --kl_weight 0.1"),
}

_SPLIT_256 = "the paper and config/dgx.py: 256 images in a round, 4 updates; dgx.py splits them over 8 GPUs, these sizes are for one process"

_DDPO: dict[str, tuple[Any, str]] = {
    "num_epochs": (100, "TRL DDPOConfig"),
    "sample_num_steps": (50, "TRL DDPOConfig; config/dgx.py"),
    "sample_eta": (1.0, "TRL DDPOConfig"),
    "sample_guidance_scale": (5.0, "TRL DDPOConfig"),
    "sample_batch_size": (8, _SPLIT_256),
    "sample_num_batches_per_epoch": (32, _SPLIT_256),
    "reward_weight": (1.0, "DDPO has no such weight"),
    "per_prompt_stat_tracking": (True, "config/dgx.py; False in TRL"),
    "per_prompt_stat_tracking_buffer_size": (16, "TRL DDPOConfig; config/dgx.py"),
    "per_prompt_stat_tracking_min_count": (16, "TRL DDPOConfig; config/dgx.py"),
    "train_adv_scale": (True, "the rewards are whitened"),
    "train_adv_clip_max": (5.0, "TRL DDPOConfig; 10 in ddpo-pytorch"),
    "train_batch_size": (4, _SPLIT_256),
    "train_gradient_accumulation_steps": (16, _SPLIT_256),
    "train_timestep_fraction": (1.0, "TRL DDPOConfig"),
    "train_num_inner_epochs": (1, "TRL DDPOConfig"),
    "train_buffer_rounds": (1, "the images of this round"),
    "train_objective": ("ppo", "DDPO_IS: PPO's minimum"),
    "train_clip_range": (1e-4, "TRL DDPOConfig; config/dgx.py"),
    "train_log_prob_reduction": ("mean", "ddim_step_with_logprob: the mean over the dimensions of a latent"),
    "train_learning_rate": (3e-4, "TRL DDPOConfig; the paper (App. C) for LoRA"),
    "train_adam_weight_decay": (1e-4, "TRL DDPOConfig"),
    "train_max_grad_norm": (1.0, "TRL DDPOConfig"),
    "train_use_lora": (True, "TRL's example"),
    "train_lora_rank": (4, "TRL: LoraConfig(r=4)"),
    "kl_weight": (0.0, "DDPO has no KL term"),
}

_TUNED = "ours: found on this pipeline"

_DEMO: dict[str, tuple[Any, str]] = {
    "num_epochs": (48, _TUNED),
    "sample_num_steps": (10, _TUNED),
    "sample_guidance_scale": (1.0, "ours: the shipped pipeline needs no guidance"),
    "sample_batch_size": (64, _TUNED),
    "sample_num_batches_per_epoch": (1, _TUNED),
    "train_batch_size": (64, _TUNED),
    "train_timesteps_per_update": (2, _TUNED),
    "train_learning_rate": (2e-3, _TUNED),
    "train_lr_scheduler": ("cosine", _TUNED),
    "train_adam_beta2": (0.99, _TUNED),
    "train_log_prob_reduction": ("sum", "ours: over 256 latent dimensions, so that clip and KL are in nats"),
    "train_clip_range": (0.2, "PPO's, in nats"),
    "kl_weight": (0.02, _TUNED),
}

_SD15_LORA: dict[str, tuple[Any, str]] = {
    "num_epochs": (1500, "report: --total_samples 15000, 10 in a round"),
    "save_freq": (100, "report: --save_every 100"),
    "sample_grid_freq": (100, "ours: with the checkpoints"),
    "sample_num_steps": (20, "report: --num_steps 20"),
    "sample_eta": (1.0, "report: --eta 1.0"),
    "sample_guidance_scale": (7.5, "report: --guidance_scale 7.5"),
    "sample_batch_size": (10, "report: --sample_batch 10"),
    "sample_num_batches_per_epoch": (1, "report: --sample_batch 10"),
    "mixed_precision": ("no", "report: --pipe_dtype fp32"),
    "reward_weight": (5.0, "report: --alpha 5"),
    "train_adv_type": ("value", "report: --use_value_function"),
    "train_adv_scale": (False, "report: r - V, unscaled"),
    "train_adv_clip_max": (math.inf, "report: the advantage is not clipped (its reward is, at 5)"),
    "train_batch_size": (2, _N8),
    "train_gradient_accumulation_steps": (1, _N8),
    "train_timestep_fraction": (0.2, _N8),
    "train_mixed_timesteps": (True, "report: pairs drawn at random from those of the round"),
    "train_buffer_rounds": (1, "report: pairs of the round"),
    "train_objective": ("dpok", "report: the clipped ratio, no minimum"),
    "train_clip_range": (1e-3, "report: --is_clip 1e-3"),
    "train_log_prob_reduction": ("mean", "report: the mean over the dimensions of a latent"),
    "train_learning_rate": (1e-4, "report: --lr 1e-4"),
    "train_adam_weight_decay": (0.01, "report: torch's default of AdamW"),
    "train_max_grad_norm": (1.0, "report: --grad_norm_clip 1.0"),
    "train_use_lora": (True, "report: peft LoRA on the attention of the UNet"),
    "train_lora_rank": (4, "report: --lora_rank 4"),
    "kl_weight": (0.01, "report: --beta 0.01"),
    "kl_type": ("gaussian", "ours: the exact KL. The report divides the squared difference of the noise by 2 sigma^2"),
    "value_input": ("latents", "report: x_t, prompt and timestep"),
    "value_learning_rate": (1e-4, "report: --vf_lr 1e-4"),
    "value_batch_size": (128, "ours: the report fits V on the n transitions of each update"),
    "value_num_updates": (5, "report: as many as the policy has"),
}

_GROUPS = "config/grpo.py: 48 groups of 24 images in a round, 2 updates; the code splits them over 32 GPUs, these sizes are for one process"

_FLOW_GRPO: dict[str, tuple[Any, str]] = {
    "sample_num_steps": (10, "config/grpo.py: sample.num_steps = 10"),
    "sample_guidance_scale": (4.5, "config/grpo.py: sample.guidance_scale = 4.5"),
    "sample_transition": ("flow_sde", "the paper: from ODE to SDE"),
    "sample_noise_level": (0.7, "config/base.py: sample.noise_level = 0.7"),
    "sample_batch_size": (24, _GROUPS),
    "sample_num_batches_per_epoch": (48, _GROUPS),
    "sample_num_images_per_prompt": (24, "config/grpo.py: sample.num_image_per_prompt = 24"),
    "reward_weight": (1.0, "Flow-GRPO has no such weight"),
    "train_adv_type": ("group", "the mean of the group"),
    "train_adv_scale": (True, "the standard deviation of the group; config/grpo.py has global_std = True, that of the round"),
    "train_adv_clip_max": (5.0, "config/base.py: train.adv_clip_max = 5"),
    "train_batch_size": (8, _GROUPS),
    "train_gradient_accumulation_steps": (72, _GROUPS),
    "train_num_inner_epochs": (1, "config/grpo.py: train.num_inner_epochs = 1"),
    "train_timestep_fraction": (1.0, "config/grpo.py has 0.99, which leaves out the last of 10 steps; here it has no noise and is none"),
    "train_objective": ("ppo", "the minimum of PPO"),
    "train_clip_range": (1e-4, "config/base.py: train.clip_range = 1e-4"),
    "train_log_prob_reduction": ("mean", "sde_step_with_logprob: the mean over the dimensions of a latent"),
    "train_learning_rate": (3e-4, "config/base.py: train.learning_rate = 3e-4"),
    "train_adam_weight_decay": (1e-4, "config/base.py: train.adam_weight_decay = 1e-4"),
    "train_max_grad_norm": (1.0, "config/base.py: train.max_grad_norm = 1.0"),
    "train_use_lora": (True, "config/grpo.py: use_lora = True"),
    "train_lora_rank": (32, "scripts/train_sd3.py: r = 32"),
    "train_lora_alpha": (64, "scripts/train_sd3.py: lora_alpha = 64"),
    "kl_weight": (0.04, "config/grpo.py: train.beta = 0.04 for GenEval and text; 0.01 for PickScore"),
    "kl_type": ("gaussian", "the paper; its code leaves dt out of the variance"),
    "eval_num_steps": (40, "config/grpo.py: sample.eval_num_steps = 40"),
}  # fmt: skip

PRESETS: Mapping[str, Preset] = {
    "paper-single": Preset(
        "The DPOK paper (arXiv 2305.16381), one model for one prompt, on Stable Diffusion 1.5 with ImageReward. The paper's text was not at hand: its numbers, "
        "appendices and equations are those of a literature note on its third version.",
        _PAPER,
    ),
    "paper-multi": Preset(
        "The DPOK paper, one model for many prompts (183 of DrawBench), from the same note. K, n, alpha and the optimizer's settings were not found.",
        _PAPER_MULTI,
    ),
    "official-code": Preset(
        "The official code (google-research, dpok/train_online_pg.py) as its README runs it on a single prompt. --name is an argument, with its default "
        "where the README does not give it.",
        _OFFICIAL_CODE,
    ),
    "official-code-multi": Preset(
        "The official code as its README runs it on many prompts. Sizes are per GPU there, and per process here.", _OFFICIAL_CODE_MULTI
    ),
    "ddpo": Preset(
        "DDPO (arXiv 2305.13301; TRL v0.23, ddpo-pytorch): rewards whitened for each prompt, PPO's minimum, no KL term. With several processes, divide "
        "sample_num_batches_per_epoch and train_gradient_accumulation_steps by their number.",
        _DDPO,
    ),
    "flow-grpo": Preset(
        "Flow-GRPO (arXiv 2505.05470) on Stable Diffusion 3.5 medium at 512x512, for GenEval and text, without its average of the weights. Not run here: it needs "
        "GPUs. With several processes, divide sample_num_batches_per_epoch and train_gradient_accumulation_steps by their number.",
        _FLOW_GRPO,
    ),
    "sd15-lora": Preset(
        "A single prompt on Stable Diffusion 1.5 with settings that move it. The report: github.com/TommasoAiello08/diffusion-graphs-dpok, where the paper's own "
        "did not, and these took ImageReward from -0.38 to +1.37 on one prompt (one run). We have not run it.",
        _SD15_LORA,
    ),
    "demo": Preset(
        "The settings of `dpok-trl demo`, for the shipped pipeline of 3 million parameters and one prompt. The demo also gives a `peft_config` of rank 8.",
        _DEMO,
    ),
}  # fmt: skip


def preset_values(name: str, overrides: Mapping[str, Any], config_class: type[DPOKConfig]) -> dict[str, Any]:
    """The settings of a preset, with `overrides` in place of its own, and without what is moot then.

    Args:
        name (`str`): One of `PRESETS`.
        overrides (`Mapping[str, Any]`): Settings that win.
        config_class (`type`): [`DPOKConfig`] or a subclass.

    Raises:
        `ValueError`: If there is no such preset, or no such field.
    """
    if name not in PRESETS:
        raise ValueError(
            f"there is no preset {name!r}.{_nearest(str(name), list(PRESETS))} There are: {', '.join(PRESETS)}."
        )
    known = [item.name for item in fields(config_class)]
    for field in overrides:
        if field not in known:
            raise ValueError(f"preset({name!r}, ...) was given {field}, which is no setting.{_nearest(field, known)}")
    settings = {**PRESETS[name].values(), **overrides}
    defaults = {item.name: item.default for item in fields(config_class)}
    for moot, _ in config_class.moot_settings(SimpleNamespace(**{**defaults, **settings})):
        for field in set(moot) - set(overrides):
            settings.pop(field, None)
    return settings


def _nearest(word: str, words: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, words, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
