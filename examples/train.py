# /// script
# requires-python = ">=3.10"
# dependencies = ["dpok-trl"]
# ///
"""Tunes any diffusers pipeline by any reward on any prompts. Without arguments: the shipped pipeline, on a CPU, in two minutes.

    accelerate launch examples/train.py
    accelerate launch examples/train.py --config examples/recipes/sd15-24gb.yaml --kl_weight 0.05
    accelerate launch examples/train.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --preset sd15-lora \
        --reward image-reward --prompts "A green colored rabbit." --eval_prompts "A green colored cat." --eval_reward aesthetic

`--help` lists every setting. A flag wins over the file of --config, the file over --preset, and that over the default.
`dpok-trl train` does the same without this file, which is there to be changed.
"""

from __future__ import annotations

from dpok_trl import DPOKConfig, DPOKParser, DPOKTrainer, ScriptArguments
from dpok_trl.demo.command import demo_lora_config


def main() -> None:
    script, config = DPOKParser(
        (ScriptArguments, DPOKConfig), description=__doc__.splitlines()[0]
    ).parse_args_and_config()
    if script.eval_prompts and not config.eval_freq:
        config.eval_freq = config.num_epochs  # compare with the pretrained model once, at the end

    lora = None  # an adapter of `train_lora_rank` on the attention layers
    if script.model == "demo" and config.train_use_lora and config.train_lora_rank is config.train_lora_alpha is None:
        lora = demo_lora_config()

    trainer = DPOKTrainer(
        config,
        script.reward,  # names, "module:function", addresses; a function of yours may stand here
        script.training_prompts(),
        script.model,
        peft_config=lora,
        eval_prompts=script.evaluation_prompts(),
        eval_reward_function=script.eval_reward,
    )
    script.record(trainer)  # names model, reward and prompts in the run's config.yaml
    trainer.pipeline.set_progress_bar_config(disable=True)
    trainer.train()
    trainer.save_model(trainer.output_dir / "model")
    trainer.accelerator.print(f"Model: {trainer.output_dir / 'model'}")


if __name__ == "__main__":
    main()
