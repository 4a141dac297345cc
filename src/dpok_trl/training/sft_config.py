"""`DPOKSFTConfig`: the settings of the supervised baseline, on top of [`DPOKConfig`], and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from dpok_trl.training.config import DPOKConfig
from dpok_trl.training.config_checks import refuse_unused, selected_steps, smallest_fraction


# Settings of the policy gradient, its KL and its baselines, which a regression has no use for.
RL_ONLY = (
    "reward_weight",
    "sample_min_std",
    "train_cfg",
    "train_objective",
    "train_clip_range",
    "train_kl_threshold",
    "train_buffer_rounds",
    "train_log_prob_reduction",
    "train_reanchor",
    "train_adv_type",
    "train_adv_scale",
    "train_adv_clip_max",
    "train_keep_best",
    "train_keep_worst",
    "reference_update_epochs",
    "target_kl",
    "log_gradient_cosine_freq",
)
RL_ONLY_PREFIXES = ("kl_", "value_", "per_prompt_", "sample_sde_window_")


@dataclass
class DPOKSFTConfig(DPOKConfig):
    """Configuration of [`DPOKSFTTrainer`]: the supervised baseline of the paper (DPOK, arXiv 2305.16381, section 4.3).

    All other fields are those of [`DPOKConfig`]. Settings of the policy gradient and its KL are refused where they were changed; `kl_weight` keeps its default and
    is not used: `sft_gamma` is its counterpart.

    Raises:
        `ValueError`: For a value that could only fail later, or would do nothing.
    """

    sft_loss: str = field(
        default="reward_weighted",
        metadata={
            "help": "reward_weighted: squared error times the reward; filtered: the images with the best rewards only (`sft_keep_fraction`), all of weight 1.",
            "choices": ["reward_weighted", "filtered"],
        },
    )
    sft_kl: str = field(
        default="none",
        metadata={
            "help": "The paper's surrogates of the KL to the pretrained model. kl_d: `sft_gamma` is added to every weight, and what is negative then is 0; "
            "kl_o: `sft_gamma` times the squared difference of tuned and pretrained output is added to the loss; none.",
            "choices": ["none", "kl_d", "kl_o"],
        },
    )
    sft_gamma: float = field(
        default=1.0, metadata={"help": "Weight gamma of `sft_kl`; the paper tries 0.1, 1, 2 and 5."}
    )
    sft_keep_fraction: float = field(
        default=0.5,
        metadata={
            "help": "Fraction of the images that `sft_loss = filtered` keeps: of each group with sample_num_images_per_prompt above 1, else of all of a process."
        },
    )
    sft_redraw_epochs: int | None = field(
        default=None,
        metadata={
            "help": "Epochs after which the images are drawn again, from the model as it is then (online). None: once, from the pretrained model (the paper)."
        },
    )

    def __post_init__(self) -> None:
        self._refuse_rl_settings()  # first: what else is said of them would lead astray
        super().__post_init__()
        self._check_sft()

    @staticmethod
    def moot_settings(config: Any) -> Iterable[tuple[Sequence[str], str]]:
        """Those of the policy gradient, always."""
        names = [item.name for item in fields(DPOKConfig)]
        of_rl = [name for name in names if name in RL_ONLY or name.startswith(RL_ONLY_PREFIXES)]
        yield (
            of_rl,
            "the supervised trainer has no policy gradient, and its KL is sft_kl with sft_gamma (DPOKTrainer with DPOKConfig has the other)",
        )

    def _refuse_rl_settings(self) -> None:
        for names, why in self.moot_settings(self):
            refuse_unused(self, names, why)
        if self.sample_call_columns:
            raise ValueError(
                f"sample_call_columns = {self.sample_call_columns}: the supervised trainer keeps latents, prompts and rewards of the images it has drawn, and no arguments of "
                "the call. Leave it out, or take DPOKTrainer."
            )
        if self.sample_offload_encoders:
            raise ValueError(
                "sample_offload_encoders = True moves the text encoders away while the model is updated, and the supervised trainer encodes prompts just then. Set it to "
                "False."
            )

    def _check_sft(self) -> None:
        if not 0 <= self.sft_gamma < math.inf:
            raise ValueError(f"sft_gamma = {self.sft_gamma}, but it must be finite and not negative.")
        if not 0 < self.sft_keep_fraction <= 1:
            raise ValueError(f"sft_keep_fraction = {self.sft_keep_fraction}, but it must be in (0, 1].")
        if self.sft_redraw_epochs is not None and self.sft_redraw_epochs < 1:
            raise ValueError(
                f"sft_redraw_epochs = {self.sft_redraw_epochs}, but it must be at least 1, or None to draw once."
            )
        if self.sample_num_steps < 2:
            raise ValueError(
                f"sample_num_steps = {self.sample_num_steps}, but the supervised trainer needs at least 2: the first step starts from the noise that the pipeline draws "
                "itself, and is not trained on."
            )
        if self.sft_kl == "none":
            refuse_unused(self, ["sft_gamma"], "sft_kl = 'none'")
        if self.sft_loss != "filtered":
            refuse_unused(self, ["sft_keep_fraction"], f"sft_loss = '{self.sft_loss}' keeps all images")
        elif self.sft_kl == "kl_d":
            raise ValueError(
                "sft_loss = 'filtered' with sft_kl = 'kl_d': all images that are kept have weight 1, and sft_gamma would only scale the loss. Take sft_kl = 'kl_o', or "
                "sft_loss = 'reward_weighted'."
            )
        selected = selected_steps(self.sample_num_steps - 1, self.train_timestep_fraction)
        if selected < 1:
            raise ValueError(
                f"train_timestep_fraction = {self.train_timestep_fraction} of the {self.sample_num_steps - 1} steps that are trained on (all of sample_num_steps but the "
                f"first) selects none. Give at least {smallest_fraction(self.sample_num_steps - 1)}."
            )

    def images_kept(self, drawn: int, in_groups: bool = True) -> int:
        """How many of `drawn` images of a process are trained on.

        Args:
            in_groups (`bool`): Whether they lie in groups of `sample_num_images_per_prompt`, and not in a dataset.

        Raises:
            `ValueError`: If these are fewer than a training batch.
        """
        kept = drawn
        if self.sft_loss == "filtered":
            group = self.sample_num_images_per_prompt if in_groups and self.sample_num_images_per_prompt > 1 else drawn
            kept = drawn // group * kept_of(group, self.sft_keep_fraction)
        if kept < self.train_batch_size:
            of = f" that sft_keep_fraction = {self.sft_keep_fraction} keeps of {drawn}" if kept != drawn else ""
            raise ValueError(
                f"the {kept} images of a process{of} are fewer than train_batch_size = {self.train_batch_size}. Draw more, or lower train_batch_size"
                f"{', or keep more' if kept != drawn else ''}."
            )
        return kept


def kept_of(count: int, fraction: float) -> int:
    """`fraction` of `count`, rounded down, but for what binary fractions do to numbers like 0.29 of 100."""
    return math.floor(round(count * fraction, 6))
