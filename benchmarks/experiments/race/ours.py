"""Our side of the race: one training run of `DPOKTrainer` on the demo pipeline, measured as `trl_ddpo.py` measures TRL's.

    python ours.py '{"seed": 0, "epochs": 20, "config": {"kl_weight": 0.02, "train_lr_scheduler": "constant"}}'

The last line of stdout is the result, as JSON. Settings are the fields of [`Settings`]; `config` holds fields of `DPOKConfig`, over the preset "demo".
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field, replace
from typing import Any


if __name__ == "__main__":
    # compile in this process, so that its CPU time is counted; torch reads it when it is imported
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch
from evaluation import evaluate
from result import CommonSettings, Race, main, peak_rss_mb

from dpok_trl import DPOKConfig, DPOKTrainer
from dpok_trl.demo import load_demo_pipeline
from dpok_trl.demo.command import demo_lora_config
from dpok_trl.demo.world import soft_reward


@dataclass(kw_only=True)
class Settings(CommonSettings):
    compile_cache: str | None = None  # folder of compiled kernels, for torch_compile; None: an empty one
    config: dict[str, Any] = field(default_factory=dict)


class TimedTrainer(DPOKTrainer):
    race: Race

    def sample(self, epoch: int):
        sampled = super().sample(epoch)
        self.race.sampled()
        return sampled


def run(settings: Settings) -> dict[str, Any]:
    torch.set_num_threads(settings.threads)
    race = Race(soft_reward)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = settings.compile_cache or f"{folder}/kernels"
        config = DPOKConfig.preset(
            "demo",
            output_dir=f"{folder}/run",
            accelerator_kwargs={"cpu": True},
            seed=settings.seed,
            num_epochs=settings.epochs,
            save_freq=0,
            sample_grid_freq=0,
            **settings.config,
        )
        pipe = load_demo_pipeline()
        trainer = TimedTrainer(config, race.judge, [settings.prompt], pipe, peft_config=demo_lora_config())
        trainer.race = race
        race.run(trainer.step, settings.epochs, settings.stop_at)
        memory = peak_rss_mb()
        final = evaluate(pipe, settings.prompt, images=settings.eval_images, num_steps=config.sample_num_steps)
    left_out = ("output_dir", "accelerator_kwargs")  # of this machine
    resolved = {name: value for name, value in config.to_dict().items() if name not in left_out}
    return race.result("dpok-trl", replace(settings, config=resolved), trainer.trainable_layers, memory, final)


if __name__ == "__main__":
    main(run, Settings)
