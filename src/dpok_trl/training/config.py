"""`DPOKConfig`: every setting of a run, TRL's DDPOConfig kept by name and type, and checked before anything is loaded."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dpok_trl.training.config_checks import check, moot_settings
from dpok_trl.training.presets import preset_values


TRACKERS = ("all", "tensorboard", "wandb", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab")


@dataclass
class DPOKConfig:
    """Configuration of [`DPOKTrainer`].

    All fields of TRL v0.23's `DDPOConfig` keep their name and type; `docs/migrating-from-ddpo.md` lists the defaults that differ. It is
    a plain dataclass: `trl.TrlParser((DPOKConfig,))` reads it from flags and YAML.

    Raises:
        `ValueError`: For a value that could only fail later. The message says what was given, what is needed and what to change.
    """

    # --- the run
    exp_name: str = field(
        default=os.path.basename(sys.argv[0]).removesuffix(".py"),
        metadata={"help": "Name of the experiment: the default output folder is `{logdir}/{exp_name}-{run_name}`."},
    )
    run_name: str = field(default="", metadata={"help": "Name of this run; empty means date and time."})
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where checkpoints, metrics.jsonl and sample grids go. Default: `{logdir}/{exp_name}-{run_name}`."
        },
    )
    seed: int = field(
        default=0,
        metadata={"help": "Every draw of the run follows from it: prompts, noise, shuffling, adapter initialisation."},
    )
    log_with: str | None = field(
        default=None,
        metadata={
            "help": "Tracker, e.g. tensorboard, wandb or trackio. metrics.jsonl is always written.",
            "choices": [None, *TRACKERS],
        },
    )
    tracker_kwargs: dict | str | None = field(
        default_factory=dict,
        metadata={"help": "`init_kwargs` of `accelerator.init_trackers`, as JSON on the command line."},
    )
    accelerator_kwargs: dict | str | None = field(
        default_factory=dict,
        metadata={"help": "Further arguments of `accelerate.Accelerator`, as JSON on the command line."},
    )
    project_kwargs: dict | str | None = field(
        default_factory=dict,
        metadata={
            "help": "Arguments of `accelerate.utils.ProjectConfiguration`. `project_dir` stands for `output_dir`, `total_limit` for "
            "`num_checkpoint_limit`."
        },
    )
    tracker_project_name: str = field(default="dpok", metadata={"help": "Name of the project in the tracker."})
    logdir: str = field(default="logs", metadata={"help": "Parent of the default output folder."})
    num_epochs: int = field(default=100, metadata={"help": "Rounds of sampling and updating."})
    save_freq: int = field(
        default=1, metadata={"help": "Epochs between checkpoints; the last epoch is always saved. 0: only the last."}
    )
    num_checkpoint_limit: int = field(default=5, metadata={"help": "Checkpoints to keep; the oldest go first."})
    mixed_precision: str | None = field(
        default=None,
        metadata={
            "help": "no, fp16 or bf16. None: what `accelerate launch` says.",
            "choices": [None, "no", "fp16", "bf16"],
        },
    )
    allow_tf32: bool = field(default=True, metadata={"help": "Allow TF32 matrix products on Ampere and later GPUs."})
    model_dtype: str | None = field(
        default=None,
        metadata={
            "help": "dtype in which a pipeline that is given by name is loaded: fp32, bf16 or fp16. None: diffusers' default.",
            "choices": [None, "fp32", "bf16", "fp16"],
        },
    )
    torch_compile: bool = field(
        default=False,
        metadata={
            "help": "Compile the denoisers. Compiled graphs round differently with and without gradients: the first ratio is 1 up to a tenth of the clip, and "
            "exactly 1 with train_reanchor = True."
        },
    )
    torch_compile_backend: str = field(default="inductor", metadata={"help": "Backend of `torch.compile`."})
    torch_compile_mode: str | None = field(
        default=None, metadata={"help": "Mode of `torch.compile`, such as max-autotune-no-cudagraphs."}
    )
    resume_from: str = field(
        default="",
        metadata={"help": "A checkpoint, or a folder of checkpoints of which the newest whole one is taken."},
    )
    sample_grid_freq: int = field(
        default=1,
        metadata={"help": "Epochs between sample grids in `output_dir/samples` and in the tracker. 0: none."},
    )

    # --- sampling
    sample_num_steps: int = field(default=50, metadata={"help": "Denoising steps of an image."})
    sample_eta: float = field(
        default=1.0,
        metadata={"help": "Noise of the ancestral and cps transitions, in (0, 1]; 0 would leave nothing to train."},
    )
    sample_guidance_scale: float = field(
        default=5.0,
        metadata={"help": "Classifier-free guidance; at most 1 means without guidance (for SD-like pipelines)."},
    )
    sample_batch_size: int = field(default=1, metadata={"help": "Images sampled at a time, per process."})
    sample_num_batches_per_epoch: int = field(
        default=2, metadata={"help": "Sampling batches of an epoch, per process."}
    )
    sample_num_images_per_prompt: int = field(
        default=1, metadata={"help": "Images of a prompt in a sampling batch (a group)."}
    )
    sample_transition: str = field(
        default="auto",
        metadata={
            "help": "The Gaussian of a step. auto: cps for consistency schedulers and stochastic_sampling, flow_sde for other flow-matching ones, ancestral for the rest.",
            "choices": ["auto", "ancestral", "cps", "flow_sde"],
        },
    )
    sample_noise_level: float = field(
        default=0.7, metadata={"help": "Noise level a of the flow_sde transition (Flow-GRPO)."}
    )
    sample_min_std: float = field(
        default=0.0,
        metadata={"help": "Steps whose standard deviation is at most this are sampled but not trained on."},
    )
    sample_fp32_latents: bool = field(
        default=False,
        metadata={
            "help": "On a pipeline in half precision, keep the latents in fp32 between the steps, so that rounding is no part of the actions."
        },
    )
    sample_sde_window_size: int | None = field(
        default=None,
        metadata={
            "help": "Steps of the stochastic window (MixGRPO): steps outside it are deterministic and not trained on. None: all steps are stochastic."
        },
    )
    sample_sde_window_schedule: str = field(
        default="progressive",
        metadata={
            "help": "Where the window is, among the steps that have noise. progressive: from `sample_sde_window_start` one step later every `sample_sde_window_interval` epochs; random: drawn "
            "for each epoch; fixed: at `sample_sde_window_start`.",
            "choices": ["progressive", "random", "fixed"],
        },
    )
    sample_sde_window_start: int = field(
        default=0, metadata={"help": "First step of the window, counted from 0; of a progressive one at the start."}
    )
    sample_sde_window_interval: int = field(
        default=25, metadata={"help": "Epochs between two moves of a progressive window."}
    )
    sample_vae_slicing: bool = field(
        default=False, metadata={"help": "Decode images one at a time, for less memory (diffusers' VAE slicing)."}
    )
    sample_vae_tiling: bool = field(
        default=False, metadata={"help": "Decode images in tiles, for less memory at high resolutions."}
    )
    sample_offload_encoders: bool = field(
        default=False, metadata={"help": "Move the text encoders off the device while the policy is updated."}
    )
    sample_call_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Entries of the prompt metadata that are arguments of the pipeline's call, one for each image (image, mask_image ...)."
        },
    )
    sample_call_kwargs: dict | str | None = field(
        default_factory=dict,
        metadata={
            "help": "Further arguments of the pipeline's call, the same for every image (height, width ...), as JSON."
        },
    )
    negative_prompts: str = field(default="", metadata={"help": "One negative prompt, used with every prompt."})
    sample_weight_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the prompts (entry of their metadata) that holds a weight: how often a prompt is drawn, compared with the others. None: all alike."
        },
    )
    sample_category_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the prompts (entry of their metadata) that holds a category: rewards are logged, and evaluations shown, for each category too."
        },
    )

    # --- rewards and advantages
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward, in their order. None: 1 for each."}
    )
    reward_weight: float = field(
        default=1.0,
        metadata={"help": "Weight alpha of the policy gradient, against `kl_weight` (beta) of the KL term."},
    )
    reward_aggregation: str = field(
        default="sum",
        metadata={
            "help": "sum: of the weighted rewards; normalize_then_sum: of each after it was normalised over the images of its prompt.",
            "choices": ["sum", "normalize_then_sum"],
        },
    )
    reward_on_error: str = field(
        default="mask",
        metadata={
            "help": "What a NaN or infinite reward does. mask: its image gets no advantage and is out of all statistics, and counted; raise: the run stops. "
            "If all that a process asked for in a round fail, the run always stops.",
            "choices": ["mask", "raise"],
        },
    )
    reward_offload: bool = field(
        default=False, metadata={"help": "Keep rewards that run a network off the device but while they score."}
    )
    async_reward_computation: bool = field(
        default=False,
        metadata={
            "help": "Compute rewards in threads while the next batch is sampled. A reward that draws random numbers then needs a generator of its own."
        },
    )
    max_workers: int = field(default=2, metadata={"help": "Threads of `async_reward_computation`."})
    per_prompt_stat_tracking: bool = field(
        default=False,
        metadata={"help": "Whiten rewards with running statistics of their prompt (DDPO); else see `train_adv_type`."},
    )
    per_prompt_stat_tracking_buffer_size: int = field(
        default=16, metadata={"help": "Rewards remembered for each prompt."}
    )
    per_prompt_stat_tracking_min_count: int = field(
        default=16,
        metadata={"help": "Rewards of a prompt before its own statistics are used; the batch's until then."},
    )
    train_adv_type: str = field(
        default="batch",
        metadata={
            "help": "Baseline of the advantage without per_prompt_stat_tracking. batch: mean of all rewards of the epoch; group: mean of those with the same prompt; "
            "leave_one_out: mean of the others with the same prompt; value: a learned V(x_t, prompt, t); none.",
            "choices": ["batch", "group", "leave_one_out", "value", "none"],
        },
    )
    train_adv_scale: bool = field(
        default=True,
        metadata={
            "help": "Divide advantages by the standard deviation of the rewards: of the prompt for group, leave_one_out and per_prompt_stat_tracking, else of the epoch."
        },
    )
    train_adv_clip_max: float = field(
        default=5.0, metadata={"help": "Advantages are clipped to plus and minus this; inf: not at all."}
    )
    train_keep_best: int | None = field(
        default=None,
        metadata={
            "help": "Train on this many images of each group with the highest rewards (and on `train_keep_worst`), of all that were drawn. None: on all."
        },
    )
    train_keep_worst: int | None = field(
        default=None, metadata={"help": "Train on this many images of each group with the lowest rewards."}
    )

    # --- the update
    train_batch_size: int = field(default=1, metadata={"help": "Samples in a forward and backward pass, per process."})
    train_use_8bit_adam: bool = field(
        default=False, metadata={"help": "AdamW8bit of bitsandbytes (`pip install dpok-trl[bnb]`)."}
    )
    train_learning_rate: float = field(default=3e-4, metadata={"help": "Learning rate of AdamW."})
    train_lr_scheduler: str = field(
        default="constant",
        metadata={
            "help": "Schedule of the learning rate over the optimizer steps of the run, by diffusers' name.",
            "choices": ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"],
        },
    )
    train_lr_warmup_steps: int = field(
        default=0, metadata={"help": "Optimizer steps of warm-up, for the schedules that have one."}
    )
    train_adam_beta1: float = field(default=0.9, metadata={"help": "Beta 1 of AdamW."})
    train_adam_beta2: float = field(default=0.999, metadata={"help": "Beta 2 of AdamW."})
    train_adam_weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay of AdamW."})
    train_adam_epsilon: float = field(default=1e-8, metadata={"help": "Epsilon of AdamW."})
    train_gradient_accumulation_steps: int = field(
        default=1,
        metadata={"help": "Training batches of an optimizer step, each with all of its timesteps (as in DDPO)."},
    )
    train_timesteps_per_update: int | None = field(
        default=None,
        metadata={
            "help": "Split the timesteps of a training batch over several optimizer steps, at most this many in each. None: all in one."
        },
    )
    train_max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    train_num_inner_epochs: int = field(default=1, metadata={"help": "Passes over the samples of an epoch."})
    train_cfg: bool = field(
        default=True,
        metadata={
            "help": "Train the guided policy, the one that is sampled. False is refused unless sampling is unguided too."
        },
    )
    train_objective: str = field(
        default="dpok",
        metadata={
            "help": "dpok: advantage times clipped ratio (official DPOK code); ppo: the pessimistic minimum (DDPO); kl_mask: the ratio without a clip, but for "
            "transitions beyond `train_kl_threshold` that would go further (Flow-DPPO); reinforce: advantage times log-probability.",
            "choices": ["dpok", "ppo", "kl_mask", "reinforce"],
        },
    )
    train_clip_range: float = field(
        default=1e-4,
        metadata={
            "help": "Clip of the ratio, in units of `train_log_prob_reduction`: 1e-4 on the mean is 1.64 nats for SD 1.5 at 512x512."
        },
    )
    train_kl_threshold: float = field(
        default=1e-5,
        metadata={
            "help": "Largest KL of a step from the policy that sampled, for `train_objective = kl_mask`; in units of `train_log_prob_reduction`."
        },
    )
    train_buffer_rounds: int = field(
        default=1,
        metadata={
            "help": "Rounds of samples to draw training batches from, the newest ones; as many are drawn as one round has. 1: on-policy. 2 or 3 is what the official "
            "DPOK code does."
        },
    )
    train_log_prob_reduction: str = field(
        default="mean",
        metadata={
            "help": "Log-probability and KL as the mean over latent dimensions (as published clip ranges assume) or the true sum.",
            "choices": ["mean", "sum"],
        },
    )
    train_timestep_fraction: float = field(
        default=1.0,
        metadata={"help": "Fraction of the stochastic timesteps of each training batch to train on, drawn at random."},
    )
    train_mixed_timesteps: bool = field(
        default=False,
        metadata={
            "help": "Each sample of a training batch at a timestep of its own, if a trial at the start finds that the pipeline can."
        },
    )
    train_reanchor: bool | None = field(
        default=None,
        metadata={
            "help": "Take the old log-probabilities from a replay at the training batch shape. None: where the check at the start finds that "
            "the rollout's own differ (with torch_compile: by more than a tenth of the clip)."
        },
    )
    train_gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Less memory for about a third more time in the backward pass."}
    )
    train_use_lora: bool = field(
        default=True,
        metadata={
            "help": "Train a LoRA adapter. False: all weights of the denoiser in fp32, with a frozen copy of it for the KL term."
        },
    )
    train_text_encoder: bool = field(
        default=False,
        metadata={"help": "Train adapters on the text encoders too, those that the family's LoRA file can hold."},
    )
    train_lora_rank: int | None = field(
        default=None,
        metadata={"help": "Rank of a new LoRA adapter, when no `peft_config` is given. None: 4, as in DDPO and DPOK."},
    )
    train_lora_alpha: int | None = field(default=None, metadata={"help": "Alpha of the LoRA adapter; None: the rank."})

    # --- the KL term
    kl_weight: float = field(
        default=0.02, metadata={"help": "Weight of the KL to the pretrained model; 0 turns it off."}
    )
    kl_type: str = field(
        default="gaussian",
        metadata={
            "help": "gaussian: the exact KL of each step; noise: squared difference of the model outputs (official DPOK code).",
            "choices": ["gaussian", "noise"],
        },
    )
    kl_gradient: str = field(
        default="paper",
        metadata={
            "help": "paper: the gradient of each step's own KL; exact: each action is charged with the KL of the later steps as well, the term that the paper drops; "
            "reward: no gradient of a KL, all of it is charged to the actions, as a penalty in the reward.",
            "choices": ["paper", "exact", "reward"],
        },
    )
    kl_warmup_epochs: int = field(default=0, metadata={"help": "Epochs before the KL term is switched on."})
    target_kl: float | None = field(
        default=None,
        metadata={
            "help": "KL of a whole denoising path in nats to hold: `kl_weight` is adapted after each epoch, by at most 20 percent. None: it stays as it is."
        },
    )
    reference_update_epochs: int | None = field(
        default=None,
        metadata={
            "help": "Epochs after which the reference of the KL becomes the policy as it is then, again and again. None: the pretrained model, always."
        },
    )

    # --- the value function, for `train_adv_type = value`
    value_input: str = field(
        default="features",
        metadata={
            "help": "What V sees. latents: x_t and the prompt's embedding, as in the paper; features: what the middle of the denoiser makes of them.",
            "choices": ["latents", "features"],
        },
    )
    value_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of its own AdamW."})
    value_batch_size: int | None = field(
        default=None,
        metadata={"help": "Transitions in a batch of its regression, per process. None: 256, or all there are."},
    )
    value_num_updates: int = field(default=20, metadata={"help": "Its optimizer steps after each round of sampling."})
    value_gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Batches of one of its optimizer steps."}
    )
    value_scale_targets: bool = field(
        default=True,
        metadata={"help": "Regress on rewards that are normalised by their running mean and standard deviation."},
    )
    value_warmup_epochs: int = field(
        default=0, metadata={"help": "Epochs in which V is fitted and the policy not yet updated."}
    )

    # --- evaluation
    eval_freq: int = field(
        default=0,
        metadata={
            "help": "Epochs between evaluations on `eval_prompts`, tuned against pretrained; 0: none while training."
        },
    )
    eval_num_images_per_prompt: int = field(
        default=4, metadata={"help": "Images of each prompt in an evaluation, of the same seeds every time."}
    )
    eval_batch_size: int | None = field(
        default=None, metadata={"help": "Images drawn at a time in an evaluation. None: `sample_batch_size`."}
    )
    eval_num_steps: int | None = field(
        default=None, metadata={"help": "Denoising steps in an evaluation. None: `sample_num_steps`."}
    )
    metric_for_best_model: str | None = field(
        default=None,
        metadata={
            "help": "Metric of the evaluations by which the best checkpoint is kept and early stopping decides, such as eval/held-out/exact/tuned. None: no checkpoint is the best."
        },
    )
    greater_is_better: bool = field(
        default=True, metadata={"help": "Whether more of `metric_for_best_model` is better."}
    )
    log_gradient_cosine_freq: int = field(
        default=0,
        metadata={
            "help": "Epochs between measurements of the cosine between the policy gradients of different prompts, at the cost of one more pass; 0: none."
        },
    )

    # --- the Hub
    push_to_hub: bool = field(
        default=False,
        metadata={"help": "Push the model to `hub_model_id` when training ends, and see `hub_strategy`."},
    )
    hub_model_id: str | None = field(default=None, metadata={"help": "Repository on the Hub, such as me/rabbit-lora."})
    hub_strategy: str = field(
        default="end",
        metadata={
            "help": "When `push_to_hub` pushes. end: when training ends; every_save: with each checkpoint too; checkpoint: likewise, and the newest checkpoint goes "
            "along as `last-checkpoint/`, to resume from.",
            "choices": ["end", "every_save", "checkpoint"],
        },
    )
    hub_private_repo: bool | None = field(
        default=None, metadata={"help": "Make a new repository private. None: the account's default."}
    )

    def __post_init__(self) -> None:
        for name in ("tracker_kwargs", "accelerator_kwargs", "project_kwargs", "sample_call_kwargs"):
            setattr(self, name, _as_dict(name, getattr(self, name)))
        if self.mixed_precision is False:
            self.mixed_precision = "no"  # YAML reads a bare no as false
        check(self)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> DPOKConfig:
        """A published or measured setting by name, with the source of every value on docs/presets.md.

        Args:
            name (`str`): `"paper-single"`, `"official-code"`, `"ddpo"` ...: a key of `dpok_trl.training.presets.PRESETS`.
            overrides: Fields that are to be other than in the preset; they win. What the preset says of things that they do away with (the value function, the KL
                term ...) is left out.

        Raises:
            `ValueError`: If there is no such preset or no such field, with the nearest that there is; and as the constructor.
        """
        return cls(**preset_values(name, overrides, cls))

    @staticmethod
    def moot_settings(config: Any) -> Iterable[tuple[Sequence[str], str]]:
        """See [`~dpok_trl.training.config_checks.moot_settings`]."""
        return moot_settings(config)

    def to_dict(self) -> dict[str, Any]:
        """A flat dict; keys of nested dicts are joined by "/"."""
        return dict(_flat(asdict(self)))


def _flat(nested: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in nested.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _as_dict(name: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{name} = {value!r} is not JSON ({error}); give something like '{{\"height\": 512}}'."
            ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a dict, given: {value!r}")
    return value
