"""A DDPO user's script runs with its names changed, and goes on from what it saved."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import stable_diffusion

from dpok_trl import DefaultDPOKStableDiffusionPipeline


SCRIPT = Path(__file__).parent / "ddpo_user_script.py"
FLAGS = [
    "--train_gradient_accumulation_steps=1",
    "--sample_num_steps=3",
    "--sample_batch_size=6",
    "--train_batch_size=3",
    "--sample_num_batches_per_epoch=2",
    "--per_prompt_stat_tracking=True",
    "--per_prompt_stat_tracking_buffer_size=32",
    "--tracker_project_name=stable_diffusion_training",
    "--log_with=tensorboard",
    "--mixed_precision=no",
    "--train_learning_rate=0.01",
]


@pytest.fixture
def run(tmp_path, monkeypatch, fresh_accelerate):
    """Runs the script in a folder of its own, as `python ddpo.py --flag=value` would."""
    stable_diffusion().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)

    def script(*flags):
        monkeypatch.setattr(sys, "argv", ["ddpo.py", *FLAGS, *flags])
        return runpy.run_path(str(SCRIPT), run_name="__main__")["trainer"]

    return script


def test_the_script_runs(run, tmp_path):
    trainer = run("--num_epochs=3")
    assert trainer.global_step == 3 * 4
    # folders as project_kwargs has them, with total_limit
    checkpoints = {path.name for path in (tmp_path / "save").glob("checkpoint-*")}
    assert checkpoints == {"checkpoint-8", "checkpoint-12"}
    events = EventAccumulator(str(tmp_path / "logs" / "stable_diffusion_training")).Reload()
    tags = events.Tags()
    assert {"reward", "kl", "loss"} <= set(tags["scalars"])
    assert any(tag.partition(" | ")[0] in ("cat", "dog", "horse", "rabbit") for tag in tags["images"])
    # what it saved, a stock pipeline loads
    stock = stable_diffusion()
    for folder in ("rabbit-lora", "save"):
        stock.load_lora_weights(str(tmp_path / folder))
        images = [
            pipe("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
            for pipe in (stock, trainer.pipeline)
        ]
        assert (images[0] == images[1]).all()
        stock.unload_lora_weights()


def test_the_script_goes_on_with_resume_from(run, tmp_path):
    run("--num_epochs=2")
    trainer = run("--num_epochs=3", "--resume_from=save")
    assert (trainer.first_epoch, trainer.global_step) == (3, 12)
    lines = [json.loads(line) for line in (tmp_path / "save" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if "reward" in line] == [0, 1, 2]


def test_a_saved_adapter_beside_the_base_is_trained_on(run, tmp_path):
    first = run("--num_epochs=1", "--train_lora_rank=2", "--train_lora_alpha=6")
    (tmp_path / "rabbit-lora" / "pytorch_lora_weights.safetensors").rename(
        tmp_path / "base" / "pytorch_lora_weights.safetensors"
    )
    (tmp_path / "save").rename(tmp_path / "first-run")
    second = run("--num_epochs=1", "--train_learning_rate=1e-30")
    pairs = list(zip(first.trainable_layers, second.trainable_layers, strict=True))
    assert all(torch.equal(a, b) for a, b in pairs) and len(pairs) > 0
    assert second.sd_pipeline.sd_pipeline is second.pipeline  # DDPO's attribute: the wrapper that was handed over


def test_use_lora_false_of_the_pipeline_class_trains_all_weights(make_trainer, tmp_path):
    stable_diffusion().save_pretrained(tmp_path / "base")
    pipe = DefaultDPOKStableDiffusionPipeline(str(tmp_path / "base"), use_lora=False)
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    trainer = make_trainer(pipe=pipe)
    assert trainer.config.train_use_lora is False
    trainer.train()
    assert all(not torch.equal(value, before[name]) for name, value in pipe.unet.named_parameters())
    trainer.save_pretrained(tmp_path / "tuned")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "tuned").unet.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in pipe.unet.state_dict().items())
    with pytest.raises(ValueError, match="train_lora_rank and train_lora_alpha would do nothing with train_use_lora"):
        make_trainer(pipe=pipe, train_lora_rank=8)
