"""What makes a configuration wrong before anything is loaded: types, choices, ranges, settings that do not go together.

Each message says what was given, what is needed and what to change.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import fields
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints


if TYPE_CHECKING:
    from dpok_trl.training.config import DPOKConfig


VALUE_SETTINGS = (
    "value_input",
    "value_learning_rate",
    "value_batch_size",
    "value_num_updates",
    "value_gradient_accumulation_steps",
    "value_scale_targets",
    "value_warmup_epochs",
)


def check(config: DPOKConfig) -> None:
    """Raises `ValueError` for a value that could only fail later."""
    check_types(config)
    check_choices(config)
    check_ranges(config)
    check_combinations(config)


def check_types(config: DPOKConfig) -> None:
    """Every value is of its field's type."""
    for name, hint in get_type_hints(type(config)).items():
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        allowed = [get_origin(kind) or kind for kind in kinds]
        value = getattr(config, name)
        if float in allowed and type(value) is int:
            continue
        if type(value) not in allowed:
            needed = " or ".join("None" if kind is type(None) else kind.__name__ for kind in allowed)
            raise ValueError(f"{name} = {value!r} is of type {type(value).__name__}, but it must be {needed}.")


def check_choices(config: DPOKConfig) -> None:
    """Every value is one of its field's choices."""
    for item in fields(config):
        choices = item.metadata.get("choices")
        if choices is not None and getattr(config, item.name) not in choices:
            raise ValueError(_unknown_choice(item.name, getattr(config, item.name), choices))


def check_ranges(config: DPOKConfig) -> None:
    """Every number is in its field's range."""
    for name in (
        "num_epochs",
        "num_checkpoint_limit",
        "sample_num_steps",
        "sample_batch_size",
        "sample_num_batches_per_epoch",
        "sample_num_images_per_prompt",
        "max_workers",
        "sample_sde_window_interval",
        "per_prompt_stat_tracking_buffer_size",
        "per_prompt_stat_tracking_min_count",
        "train_batch_size",
        "train_gradient_accumulation_steps",
        "train_num_inner_epochs",
        "train_buffer_rounds",
        "value_num_updates",
        "value_gradient_accumulation_steps",
        "eval_num_images_per_prompt",
    ):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} = {getattr(config, name)}, but it must be at least 1.")
    for name in (
        "save_freq",
        "sample_grid_freq",
        "sample_min_std",
        "sample_sde_window_start",
        "train_lr_warmup_steps",
        "train_adam_weight_decay",
        "kl_weight",
        "kl_warmup_epochs",
        "value_warmup_epochs",
        "eval_freq",
        "log_gradient_cosine_freq",
    ):
        if not 0 <= getattr(config, name) < math.inf:  # NaN neither
            raise ValueError(f"{name} = {getattr(config, name)}, but it must be finite and not negative.")
    for name in (
        "sample_noise_level",
        "train_learning_rate",
        "train_max_grad_norm",
        "train_clip_range",
        "train_kl_threshold",
        "train_adam_epsilon",
        "reward_weight",
        "value_learning_rate",
    ):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} = {getattr(config, name)}, but it must be positive and finite.")
    if not config.train_adv_clip_max > 0:
        raise ValueError(
            f"train_adv_clip_max = {config.train_adv_clip_max}, but it must be positive; inf clips nothing."
        )
    for name, nothing in (
        ("eval_batch_size", "sample_batch_size"),
        ("eval_num_steps", "sample_num_steps"),
        ("reference_update_epochs", "a reference that stays"),
        ("value_batch_size", "256 or all there are"),
    ):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise ValueError(f"{name} = {getattr(config, name)}, but it must be at least 1, or None for {nothing}.")
    for name in ("train_keep_best", "train_keep_worst"):
        if getattr(config, name) is not None and getattr(config, name) < 0:
            raise ValueError(f"{name} = {getattr(config, name)}, but it must not be negative.")
    if config.target_kl is not None and not 0 < config.target_kl < math.inf:
        raise ValueError(
            f"target_kl = {config.target_kl}, but it must be positive and finite, or None for a kl_weight that stays."
        )
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed = {config.seed}, but it must be in [0, 2^32), as numpy takes it.")
    if not 0 < config.sample_eta <= 1:
        raise ValueError(
            f"sample_eta = {config.sample_eta}, but it must be in (0, 1]: at 0 every step is deterministic and there is no policy to train."
        )
    if not 0 < config.train_timestep_fraction <= 1:
        raise ValueError(f"train_timestep_fraction = {config.train_timestep_fraction}, but it must be in (0, 1].")
    for name, default in (("train_lora_rank", "4"), ("train_lora_alpha", "the rank")):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise ValueError(f"{name} = {getattr(config, name)}, but it must be at least 1, or None for {default}.")
    if selected_steps(config.sample_num_steps, config.train_timestep_fraction) < 1:
        raise ValueError(
            f"train_timestep_fraction = {config.train_timestep_fraction} of sample_num_steps = {config.sample_num_steps} selects no step. "
            f"Give at least {smallest_fraction(config.sample_num_steps)}."
        )
    if config.train_timesteps_per_update is not None and config.train_timesteps_per_update < 1:
        raise ValueError(
            f"train_timesteps_per_update = {config.train_timesteps_per_update}, but it must be at least 1, or None for all."
        )


def _check_window(config: DPOKConfig) -> None:
    size, start = config.sample_sde_window_size, config.sample_sde_window_start
    if size is None:
        unused = [
            item.name
            for item in fields(config)
            if item.name.startswith("sample_sde_window_") and getattr(config, item.name) != item.default
        ]
        if unused:
            raise ValueError(f"{', '.join(unused)} would do nothing: set sample_sde_window_size as well.")
        return
    if start >= config.sample_num_steps:
        raise ValueError(
            f"sample_sde_window_start = {start}, but the {config.sample_num_steps} steps of sample_num_steps are counted from 0. The largest start is "
            f"{config.sample_num_steps - 1}."
        )
    if size < 1 or start + size > config.sample_num_steps:
        raise ValueError(
            f"sample_sde_window_size = {size} from sample_sde_window_start = {start} does not lie in the {config.sample_num_steps} steps of "
            f"sample_num_steps. The size must be between 1 and {config.sample_num_steps - start}."
        )
    if selected_steps(size, config.train_timestep_fraction) < 1:
        raise ValueError(
            f"train_timestep_fraction = {config.train_timestep_fraction} of sample_sde_window_size = {size} selects no step. Give at least "
            f"{smallest_fraction(size)}."
        )


def refuse_unused(config: DPOKConfig, names: Sequence[str], needed: str) -> None:
    """Raises `ValueError` for settings that were changed and would do nothing."""
    default = {item.name: item.default for item in fields(config)}
    unused = [name for name in names if getattr(config, name) != default[name]]
    if unused:
        given = ", ".join(f"{name} = {getattr(config, name)!r}" for name in unused)
        raise ValueError(f"{given} would do nothing: {needed}. Change the latter, or leave the former out.")


def moot_settings(config: Any) -> Iterator[tuple[Sequence[str], str]]:
    """Settings that do nothing beside the others, and why.

    Args:
        config: A [`DPOKConfig`], or anything else with its fields.
    """
    objective, baseline = config.train_objective, config.train_adv_type
    if objective in ("kl_mask", "reinforce"):
        yield ["train_clip_range"], f"train_objective = '{objective}' has no clip"
    if objective != "kl_mask":
        yield ["train_kl_threshold"], f"train_objective = '{objective}' has no such threshold"
    if config.kl_weight == 0:
        names = ("kl_type", "kl_gradient", "kl_warmup_epochs", "target_kl", "reference_update_epochs")
        yield names, "kl_weight = 0 turns the KL term off"
    if config.kl_type == "noise":
        yield ("kl_gradient", "target_kl"), "kl_type = 'noise' is no KL in nats; take 'gaussian'"
    if not config.per_prompt_stat_tracking:
        names = ("per_prompt_stat_tracking_buffer_size", "per_prompt_stat_tracking_min_count")
        yield names, "per_prompt_stat_tracking = False keeps no statistics of prompts"
    if config.train_lr_scheduler == "constant":
        yield ["train_lr_warmup_steps"], "train_lr_scheduler = 'constant' has no warm-up ('constant_with_warmup' has)"
    if config.sample_transition == "flow_sde":
        yield ["sample_eta"], "sample_transition = 'flow_sde' has its noise from sample_noise_level"
    if config.sample_transition in ("ancestral", "cps"):
        yield ["sample_noise_level"], f"sample_transition = '{config.sample_transition}' has its noise from sample_eta"
    if baseline != "value":
        yield VALUE_SETTINGS, f"train_adv_type = '{baseline}' has no value function"


def _check_objective(config: DPOKConfig) -> None:
    if config.train_objective == "reinforce":
        for name in ("train_buffer_rounds", "train_num_inner_epochs"):
            if getattr(config, name) > 1:
                raise ValueError(
                    f"{name} = {getattr(config, name)} uses samples again after the policy has moved, and train_objective = 'reinforce' has no ratio that corrects "
                    f"for it. Set {name} = 1, or take 'dpok', 'ppo' or 'kl_mask'."
                )


def _check_kl(config: DPOKConfig) -> None:
    if config.target_kl is not None and config.kl_warmup_epochs:
        raise ValueError(
            f"target_kl = {config.target_kl} adapts kl_weight from the first epoch on, and kl_warmup_epochs = {config.kl_warmup_epochs} holds it at 0 that long. "
            "Choose one."
        )
    if config.train_buffer_rounds > 1 and config.reference_update_epochs is not None and config.kl_gradient != "paper":
        raise ValueError(
            f"kl_gradient = '{config.kl_gradient}' charges the actions of older rounds (train_buffer_rounds = {config.train_buffer_rounds}) with the KL to a reference "
            f"that reference_update_epochs = {config.reference_update_epochs} replaces. Take kl_gradient = 'paper', or leave out one of the other two."
        )
    if config.reference_update_epochs is not None and config.reference_update_epochs >= config.num_epochs:
        raise ValueError(
            f"reference_update_epochs = {config.reference_update_epochs} with num_epochs = {config.num_epochs}: the reference would never move. Leave it out, or take "
            f"less than {config.num_epochs}."
        )
    if config.kl_warmup_epochs >= config.num_epochs:
        raise ValueError(
            f"kl_warmup_epochs = {config.kl_warmup_epochs} with num_epochs = {config.num_epochs}: the KL term would never be switched on. Set kl_weight = 0 if that "
            f"is what you want, or kl_warmup_epochs below {config.num_epochs}."
        )


def _check_value(config: DPOKConfig) -> None:
    if config.train_adv_type != "value":
        return
    if config.value_warmup_epochs >= config.num_epochs:
        raise ValueError(
            f"value_warmup_epochs = {config.value_warmup_epochs} with num_epochs = {config.num_epochs}: the policy would never be updated. Lower the first or "
            "raise the second."
        )
    if config.value_input == "latents" and config.train_text_encoder:
        raise ValueError(
            "value_input = 'latents' gives V the prompt's embedding, which changes while train_text_encoder = True trains it. Take value_input = 'features'."
        )
    if config.value_input == "features" and config.torch_compile:
        raise ValueError(
            "value_input = 'features' listens to the middle of the denoiser, which torch_compile = True compiles away. Take value_input = 'latents'."
        )
    per_round = config.sample_batch_size * config.sample_num_batches_per_epoch
    steps = config.sample_sde_window_size or config.sample_num_steps
    most = per_round * steps * config.train_buffer_rounds
    if config.value_batch_size is not None and config.value_batch_size > most:
        raise ValueError(
            f"value_batch_size = {config.value_batch_size} transitions, but {config.train_buffer_rounds} round(s) of {per_round} images in {steps} steps leave at most "
            f"{most} in a process. Leave value_batch_size out, or sample more images."
        )


def _check_buffer(config: DPOKConfig) -> None:
    if config.train_buffer_rounds > config.num_epochs:
        raise ValueError(
            f"train_buffer_rounds = {config.train_buffer_rounds} with num_epochs = {config.num_epochs}: the buffer would never be full. Take at most "
            f"{config.num_epochs}."
        )
    if config.train_buffer_rounds > 1 and config.sample_call_columns:
        raise ValueError(
            f"train_buffer_rounds = {config.train_buffer_rounds} keeps samples for later rounds and in checkpoints, which cannot hold what sample_call_columns = "
            f"{config.sample_call_columns} hands to the pipeline. Set train_buffer_rounds = 1."
        )


def _check_curation(config: DPOKConfig) -> None:
    if config.train_keep_best is None and config.train_keep_worst is None:
        return
    group, kept = config.sample_num_images_per_prompt, kept_of_group(config)
    if not 0 < kept < group:
        raise ValueError(
            f"train_keep_best = {config.train_keep_best} and train_keep_worst = {config.train_keep_worst} are {kept} images of the {group} of a group "
            "(sample_num_images_per_prompt). Together they must be at least 1 and less than that; leave both out to train on all."
        )


def kept_of_group(config: DPOKConfig) -> int:
    """Images of each group that are trained on."""
    if config.train_keep_best is None and config.train_keep_worst is None:
        return config.sample_num_images_per_prompt
    return (config.train_keep_best or 0) + (config.train_keep_worst or 0)


def check_combinations(config: DPOKConfig) -> None:
    """The settings go together."""
    for names, why in moot_settings(config):
        refuse_unused(config, names, why)
    _check_window(config)
    _check_objective(config)
    _check_kl(config)
    _check_value(config)
    _check_buffer(config)
    _check_curation(config)
    if config.train_mixed_timesteps and config.train_batch_size < 2:
        raise ValueError(
            f"train_mixed_timesteps = True with train_batch_size = {config.train_batch_size}: one sample cannot be at different timesteps. Raise "
            "train_batch_size to 2 or more."
        )
    if not config.torch_compile and (
        config.torch_compile_backend != "inductor" or config.torch_compile_mode is not None
    ):
        raise ValueError("torch_compile_backend and torch_compile_mode would do nothing: set torch_compile = True.")
    if config.train_text_encoder and (config.sample_offload_encoders or not config.train_use_lora):
        other = "sample_offload_encoders = True" if config.sample_offload_encoders else "train_use_lora = False"
        raise ValueError(
            f"train_text_encoder = True trains adapters on the text encoders in every update; it does not go with {other}."
        )
    if not config.train_use_lora and (config.train_lora_rank is not None or config.train_lora_alpha is not None):
        raise ValueError("train_lora_rank and train_lora_alpha would do nothing with train_use_lora = False.")
    if config.reward_aggregation == "normalize_then_sum" and config.sample_num_images_per_prompt < 2:
        raise ValueError(
            "reward_aggregation = 'normalize_then_sum' compares images of the same prompt and needs sample_num_images_per_prompt of at least 2; given: "
            f"{config.sample_num_images_per_prompt}."
        )
    if config.reward_offload and config.async_reward_computation:
        raise ValueError(
            "reward_offload = True keeps the reward off the device while images are sampled, and async_reward_computation = True scores just "
            "then. Choose one."
        )
    if not config.train_cfg and config.sample_guidance_scale > 1:
        raise ValueError(
            f"train_cfg = False with sample_guidance_scale = {config.sample_guidance_scale} would train another distribution than the one that "
            "was sampled (95 % of the ratios are clipped before any update). Set sample_guidance_scale = 1.0, or train_cfg = True."
        )
    if config.per_prompt_stat_tracking and config.train_adv_type != "batch":
        raise ValueError(
            f"per_prompt_stat_tracking = True and train_adv_type = '{config.train_adv_type}' both say how to whiten rewards; choose one."
        )
    if config.per_prompt_stat_tracking and (
        config.per_prompt_stat_tracking_min_count > config.per_prompt_stat_tracking_buffer_size
    ):
        raise ValueError(
            f"per_prompt_stat_tracking_min_count = {config.per_prompt_stat_tracking_min_count} is larger than "
            f"per_prompt_stat_tracking_buffer_size = {config.per_prompt_stat_tracking_buffer_size}: no prompt would ever have enough rewards for "
            "statistics of its own. Lower the first or raise the second."
        )
    if config.train_adv_type in ("group", "leave_one_out") and config.sample_num_images_per_prompt < 2:
        raise ValueError(
            f"train_adv_type = '{config.train_adv_type}' compares images of the same prompt and needs sample_num_images_per_prompt of at least 2; "
            f"given: {config.sample_num_images_per_prompt}."
        )
    limit = config.project_kwargs.get("total_limit")
    if limit is not None and limit < 1:
        raise ValueError(f"project_kwargs['total_limit'] = {limit}, but at least 1 checkpoint must be kept.")
    clash = {
        "eta",
        "num_inference_steps",
        "guidance_scale",
        "negative_prompt",
    }  # the policy refuses what has no field at all
    columns = config.sample_call_columns or []
    for name, arguments in (("sample_call_kwargs", config.sample_call_kwargs), ("sample_call_columns", columns)):
        given = sorted(clash & set(arguments))
        if given:
            raise ValueError(f"{name} must not hold {', '.join(given)}: the trainer sets it from a field of its own.")
    twice = sorted(set(config.sample_call_kwargs) & set(columns))
    if twice:
        raise ValueError(
            f"sample_call_kwargs and sample_call_columns both hold {', '.join(twice)}; it is either the same for every image or not."
        )
    if config.push_to_hub and not config.hub_model_id:
        raise ValueError("push_to_hub = True needs hub_model_id, such as 'me/rabbit-lora'.")
    if not config.push_to_hub:
        refuse_unused(config, ["hub_strategy"], "push_to_hub = False pushes nothing during a run")
    if config.metric_for_best_model is not None and not config.eval_freq:
        raise ValueError(
            f"metric_for_best_model = '{config.metric_for_best_model}' is a metric of evaluations, and eval_freq = 0 asks for none. Set eval_freq to "
            "the epochs between two."
        )
    if config.train_use_8bit_adam:
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise ImportError("train_use_8bit_adam = True needs bitsandbytes: `pip install dpok-trl[bnb]`.") from error
    _check_divides(
        "sample_batch_size",
        config.sample_batch_size,
        "sample_num_images_per_prompt",
        config.sample_num_images_per_prompt,
    )
    kept, what = (
        config.sample_batch_size // config.sample_num_images_per_prompt * kept_of_group(config),
        "sample_batch_size",
    )
    if kept != config.sample_batch_size:
        what = "what train_keep_best and train_keep_worst keep of a sampling batch"
    _check_divides(what, kept, "train_batch_size", config.train_batch_size)
    _check_divides(
        f"{what} * sample_num_batches_per_epoch",
        kept * config.sample_num_batches_per_epoch,
        "train_batch_size * train_gradient_accumulation_steps",
        config.train_batch_size * config.train_gradient_accumulation_steps,
    )


def selected_steps(steps: int, fraction: float) -> int:
    """How many of `steps` a `train_timestep_fraction` selects."""
    return math.floor(steps * fraction + 1e-9)  # 0.58 of 50 is 28.999999999999996 in binary


def smallest_fraction(steps: int) -> float:
    """The smallest `train_timestep_fraction` of three decimals that selects one of `steps` steps."""
    return math.ceil(1000 / steps) / 1000


def _unknown_choice(name: str, value: Any, choices: list) -> str:
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"{name} = {value!r}, but it must be one of {', '.join(map(str, choices))}.{hint}"


def _check_divides(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value % divisor == 0:
        return
    below, above = value // divisor * divisor, (value // divisor + 1) * divisor
    near = f"{below} or {above}" if below else f"{above}"
    raise ValueError(
        f"{name} = {value} is not a multiple of {divisor_name} = {divisor}. The nearest that are: {near}."
    )
