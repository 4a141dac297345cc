"""TRL's side of the race: one training run of v0.23's own DDPOTrainer on the demo pipeline.

    FOLDER/bin/python trl_ddpo.py '{"seed": 0, "epochs": 20, "learning_rate": 2e-3}'

FOLDER is an environment by `make_trl_env.sh`. The last line of stdout is the result, as JSON; the fields of [`Settings`] are the settings. Nothing of TRL is
patched. What its trainer needs to run here is given from outside:

* `accelerate.PartialState()` first: TRL's pipeline warns through accelerate's logger, which fails before there is a state;
* a `StableDiffusionPipeline` whose `_encode_prompt` returns the prompt alone without guidance: diffusers' own always puts the negative embeddings before
  it, so that TRL's sampler fails at a guidance of 1. The network then sees each image once and not twice, which is the cheaper half for TRL;
* `train_cfg = False`, which then trains the policy that is sampled;
* `save_freq` beyond the last epoch: TRL's checkpoints fail without a `project_dir`, and take time;
* the adapter of the demo, through `get_trainable_layers`: TRL's own is fixed at rank 4 on the attention;
* a copy of the shipped pipeline in the form of transformers 4, see [`pipeline_for_transformers_4`].
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline


SRC = Path(__file__).resolve().parents[3] / "src"
sys.path.insert(0, str(SRC))  # dpok_trl is not installed here; its world needs torch, numpy and PIL alone

from evaluation import evaluate  # noqa: E402
from result import CommonSettings, Race, main, peak_rss_mb  # noqa: E402

from dpok_trl.demo import demo_pipeline_path  # noqa: E402
from dpok_trl.demo.world import soft_reward  # noqa: E402


@dataclass(kw_only=True)
class Settings(CommonSettings):
    """Names without their prefix are DDPOConfig's. `clip_range` is 0.2 nats: TRL's log-probability is a mean over the 256 dimensions of a latent."""

    num_steps: int = 10
    sample_batch_size: int = 64
    num_batches: int = 1  # sampling batches of an epoch
    train_batch_size: int = 64
    gradient_accumulation: int = 1  # training batches of an optimizer step, each with all of its timesteps
    timestep_fraction: float = 1.0
    inner_epochs: int = 1
    learning_rate: float = 2e-3
    adam_beta1: float = 0.9
    adam_beta2: float = 0.99
    adam_weight_decay: float = 1e-4
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    clip_range: float = 0.2 / 256


class Unguided(StableDiffusionPipeline):
    def _encode_prompt(self, prompt, device, num_images_per_prompt, do_classifier_free_guidance, *args, **kwargs):
        if do_classifier_free_guidance:
            return super()._encode_prompt(
                prompt, device, num_images_per_prompt, do_classifier_free_guidance, *args, **kwargs
            )
        return self.encode_prompt(prompt, device, num_images_per_prompt, do_classifier_free_guidance, *args, **kwargs)[
            0
        ]


class DemoPipeline(DefaultDDPOStableDiffusionPipeline):
    def __init__(self, folder: Path):
        super().__init__(str(folder))
        self.sd_pipeline = Unguided(**self.sd_pipeline.components, requires_safety_checker=False)

    def get_trainable_layers(self) -> torch.nn.Module:
        """The adapter of `dpok-trl demo`: rank 8 on the linear maps and 1x1 convolutions of the transformer blocks, and on the time embeddings."""
        attention = ["to_q", "to_k", "to_v", "to_out.0"]
        others = ["proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "time_emb_proj"]
        self.sd_pipeline.unet.add_adapter(
            LoraConfig(r=8, lora_alpha=8, init_lora_weights="gaussian", target_modules=attention + others)
        )
        return self.sd_pipeline.unet  # in fp32, adapter and all


class TimedTrainer(DDPOTrainer):
    race: Race

    def compute_rewards(self, *args, **kwargs):
        scored = super().compute_rewards(*args, **kwargs)
        self.race.sampled()
        return scored


def pipeline_for_transformers_4(folder: Path) -> Path:
    """The shipped pipeline, which transformers 5 has written, in a form that transformers 4 reads: the text encoder's weights are named from one level further
    up, and the fast tokenizer reads `tokenizer.json`. Without the first, transformers 4 would warn, and draw random weights."""
    shipped = demo_pipeline_path()
    for part in ("scheduler", "tokenizer", "unet", "vae"):
        (folder / part).symlink_to(shipped / part)
    index = json.loads((shipped / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "CLIPTokenizerFast"]
    (folder / "model_index.json").write_text(json.dumps(index))
    encoder = folder / "text_encoder"
    encoder.mkdir()
    (encoder / "config.json").symlink_to(shipped / "text_encoder" / "config.json")
    weights = load_file(shipped / "text_encoder" / "model.safetensors")
    renamed = {f"text_model.{name}": value for name, value in weights.items()}
    save_file(renamed, encoder / "model.safetensors", metadata={"format": "pt"})
    return folder


def refuse_random_weights(text_encoder: torch.nn.Module, folder: Path) -> None:
    loaded = text_encoder.state_dict()
    for name, value in load_file(folder / "text_encoder" / "model.safetensors").items():
        if not torch.equal(loaded[name], value):
            raise RuntimeError(
                f"transformers did not load {name} of the text encoder: its names changed. Fix pipeline_for_transformers_4."
            )


def config_of(settings: Settings) -> DDPOConfig:
    return DDPOConfig(
        seed=settings.seed,
        num_epochs=settings.epochs,
        save_freq=settings.epochs + 1,
        mixed_precision="no",
        accelerator_kwargs={"cpu": True},
        sample_num_steps=settings.num_steps,
        sample_eta=1.0,
        sample_guidance_scale=1.0,
        sample_batch_size=settings.sample_batch_size,
        sample_num_batches_per_epoch=settings.num_batches,
        train_batch_size=settings.train_batch_size,
        train_gradient_accumulation_steps=settings.gradient_accumulation,
        train_timestep_fraction=settings.timestep_fraction,
        train_num_inner_epochs=settings.inner_epochs,
        train_learning_rate=settings.learning_rate,
        train_adam_beta1=settings.adam_beta1,
        train_adam_beta2=settings.adam_beta2,
        train_adam_weight_decay=settings.adam_weight_decay,
        train_adam_epsilon=settings.adam_epsilon,
        train_max_grad_norm=settings.max_grad_norm,
        train_clip_range=settings.clip_range,
        train_cfg=False,
    )


def run(settings: Settings) -> dict[str, Any]:
    torch.set_num_threads(settings.threads)
    PartialState(cpu=True)
    race = Race(soft_reward)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pipeline_for_transformers_4(Path(temporary))
        pipeline = DemoPipeline(folder)
        refuse_random_weights(pipeline.text_encoder, folder)
        trainer = TimedTrainer(config_of(settings), race.judge, lambda: (settings.prompt, {}), pipeline)
    trainer.race = race
    race.run(trainer.step, settings.epochs, settings.stop_at)
    memory = peak_rss_mb()
    stock = pipeline.sd_pipeline
    stock.set_progress_bar_config(disable=True)
    final = evaluate(stock, settings.prompt, images=settings.eval_images, num_steps=settings.num_steps)
    trainable = [parameter for parameter in stock.unet.parameters() if parameter.requires_grad]
    return race.result("trl", settings, trainable, memory, final)


if __name__ == "__main__":
    main(run, Settings)
