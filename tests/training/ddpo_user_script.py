"""A training script as users of TRL v0.23 wrote it for DDPO, with the three names changed. Run by test_ddpo_script.py."""

from dataclasses import dataclass, field

import numpy as np
from transformers import HfArgumentParser

from dpok_trl import DefaultDPOKStableDiffusionPipeline, DPOKConfig, DPOKTrainer


@dataclass
class ScriptArguments:
    pretrained_model: str = field(default="base", metadata={"help": "Hub id or folder of a Stable Diffusion."})
    pretrained_revision: str = field(default="main", metadata={"help": "Its revision."})
    use_lora: bool = field(default=True, metadata={"help": "Train a LoRA."})


animals = ["cat", "dog", "horse", "rabbit"]


def prompt_fn():
    return np.random.choice(animals), {}


def brightness_scorer():
    def score(images, prompts, metadata):
        return images.mean(dim=(1, 2, 3)), {"darkest": images.amin(dim=(1, 2, 3))}

    return score


def image_outputs_logger(samples, global_step, tracker):
    images, prompts, _, rewards, reward_metadata = samples[-1]
    assert len(reward_metadata["darkest"]) == len(images)
    shown = {}
    for i in range(len(images)):
        shown[f"{prompts[i]:.25} | {rewards[i].item():.2f}"] = images[i].unsqueeze(0).float()
    tracker.log_images(shown, step=global_step)


if __name__ == "__main__":
    script_args, training_args = HfArgumentParser((ScriptArguments, DPOKConfig)).parse_args_into_dataclasses()
    training_args.project_kwargs = {
        "logging_dir": "./logs",
        "automatic_checkpoint_naming": True,
        "total_limit": 2,
        "project_dir": "./save",
    }
    pipeline = DefaultDPOKStableDiffusionPipeline(
        script_args.pretrained_model,
        pretrained_model_revision=script_args.pretrained_revision,
        use_lora=script_args.use_lora,
    )
    trainer = DPOKTrainer(
        training_args,
        brightness_scorer(),
        prompt_fn,
        pipeline,
        image_samples_hook=image_outputs_logger,
    )
    trainer.train()
    trainer.save_pretrained("rabbit-lora")
    trainer.save_model(training_args.output_dir)
