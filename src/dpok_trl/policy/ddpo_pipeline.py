"""The drop-in for TRL's `DefaultDDPOStableDiffusionPipeline`."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from dpok_trl.policy.lora_files import LORA_FILE
from dpok_trl.policy.policy import Policy
from dpok_trl.policy.schedulers import DPOKSchedulerOutput, as_ddim, scheduler_step
from dpok_trl.policy.tuning import Tuned, tune


logger = logging.getLogger(__name__)


@dataclass
class DPOKPipelineOutput:
    """Output of [`DefaultDPOKStableDiffusionPipeline`], as DDPO's.

    Args:
        images (`torch.Tensor` of shape `(B, 3, H, W)`): In [0, 1].
        latents (`list` of `T + 1` `torch.Tensor` of shape `(B, C, h, w)`): x_T first.
        log_probs (`list` of `torch.Tensor` of shape `(B,)`): One for each stochastic step; mean over the latent's dimensions.
    """

    images: torch.Tensor
    latents: list[torch.Tensor]
    log_probs: list[torch.Tensor]


class DefaultDPOKStableDiffusionPipeline:
    """Stable Diffusion 1.x/2.x with a LoRA adapter, under the names of TRL's `DefaultDDPOStableDiffusionPipeline`.

    [`DPOKTrainer`] takes any diffusers pipeline directly; this class exists so that a DDPO script needs only its names changed. An adapter
    in the repository (`pytorch_lora_weights.safetensors`) is loaded and trained on.

    Args:
        pretrained_model_name (`str`): Hub id or folder.
        pretrained_model_revision (`str`, defaults to `"main"`)
        use_lora (`bool`, defaults to `True`): `False`: all weights of the UNet are trained, and a frozen copy of it stays for the KL term.
    """

    def __init__(self, pretrained_model_name: str, *, pretrained_model_revision: str = "main", use_lora: bool = True):
        self.pretrained_model = str(pretrained_model_name)
        self.pretrained_revision = pretrained_model_revision
        self.use_lora = use_lora
        self.sd_pipeline = StableDiffusionPipeline.from_pretrained(
            self.pretrained_model, revision=pretrained_model_revision
        )
        try:
            self.sd_pipeline.load_lora_weights(
                self.pretrained_model, weight_name=LORA_FILE, revision=pretrained_model_revision
            )
        except OSError:  # diffusers' answer where there is no such file; and, alas, where there is a broken one
            if (Path(self.pretrained_model) / LORA_FILE).exists():
                raise
            logger.info("no %s in %s: a new adapter will be trained", LORA_FILE, self.pretrained_model)
        if not isinstance(self.sd_pipeline.scheduler, DDIMScheduler):
            self.sd_pipeline.scheduler = as_ddim(self.sd_pipeline.scheduler)
        self.sd_pipeline.safety_checker = None
        self.autocast = nullcontext
        self._tuned = Tuned({"unet": self.unet})

    @property
    def unet(self) -> torch.nn.Module:
        return self.sd_pipeline.unet

    @property
    def vae(self) -> torch.nn.Module:
        return self.sd_pipeline.vae

    @property
    def tokenizer(self) -> Any:
        return self.sd_pipeline.tokenizer

    @property
    def scheduler(self) -> Any:
        return self.sd_pipeline.scheduler

    @property
    def text_encoder(self) -> torch.nn.Module:
        return self.sd_pipeline.text_encoder

    def __call__(
        self,
        prompt: str | list[str],
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        eta: float = 1.0,
        seeds: list[int] | None = None,
        **call_kwargs: Any,
    ) -> DPOKPipelineOutput:
        """Draws one image for each prompt and says how probable each step was. `eta` must be in (0, 1]."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if seeds is None:
            seeds = torch.randint(2**63 - 1, (len(prompts),)).tolist()
        policy = Policy(
            self.sd_pipeline,
            call_kwargs={"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, **call_kwargs},
            eta=eta,
        )
        trajectory = policy.rollout(prompts, seeds)
        return DPOKPipelineOutput(trajectory.images, list(trajectory.latents), list(trajectory.log_probs.unbind(1)))

    def scheduler_step(self, *args: Any, **kwargs: Any) -> DPOKSchedulerOutput:
        """[`scheduler_step`] with this pipeline's scheduler."""
        return scheduler_step(self.scheduler, *args, **kwargs)

    def set_progress_bar_config(self, *args: Any, **kwargs: Any) -> None:
        self.sd_pipeline.set_progress_bar_config(*args, **kwargs)

    def get_trainable_layers(self) -> torch.nn.Module:
        """The UNet, with an fp32 adapter (rank 4 where there was none) as its only trainable part; with `use_lora=False`, all of it in fp32."""
        self._tuned = tune(self.sd_pipeline, {"unet": self.unet}, full=not self.use_lora)
        return self.unet

    def save_pretrained(self, output_dir: str | Path) -> None:
        """Writes the adapter for `load_lora_weights` (DDPO wrote the base too, in a form that could not be loaded), or the whole pipeline."""
        self._tuned.export(self.sd_pipeline, output_dir)

    def save_checkpoint(self, models: Any, weights: list, output_dir: str | Path) -> None:
        """An `accelerate` save hook: writes what is trained and keeps the rest out."""
        self._tuned.save(self.sd_pipeline, output_dir)
        weights.clear()

    def load_checkpoint(self, models: list, input_dir: str | Path) -> None:
        """An `accelerate` load hook: reads what [`save_checkpoint`] wrote into the adapter in place."""
        self._tuned.load(self.sd_pipeline, input_dir)
        models.clear()
