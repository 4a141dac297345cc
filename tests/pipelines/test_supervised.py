"""The supervised arm on many families: noisy latents of a choice arrive at the network, whatever the pipeline does around it."""

import inspect

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from pipelines.families import FAMILIES

from dpok_trl import DPOKSFTConfig, DPOKSFTTrainer
from dpok_trl.policy.nested import num_rows


TRAINED = ["sd_zero_snr", "sdxl", "sd3", "flux", "flux2_klein", "sana", "qwenimage", "z_image", "lumina2", "wan_two_experts"]  # fmt: skip
PROMPTS = ["a cat", "a dog house in the sun"]


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)

    def forget():
        AcceleratorState._reset_state(True)
        PartialState._reset_state()
        GradientState._reset_state()

    forget()
    yield
    forget()


def brightness(images, prompts, metadata):
    return images.flatten(1).mean(1)


def trainer_of(name, folder, **settings) -> DPOKSFTTrainer:
    pipe = FAMILIES[name].pipe()
    call = FAMILIES[name].call(pipe)
    own = {"sample_num_steps": call.pop("num_inference_steps"), "negative_prompts": call.pop("negative_prompt", "")}
    if "guidance_scale" in call:
        own["sample_guidance_scale"] = float(call.pop("guidance_scale"))
    config = DPOKSFTConfig(
        output_dir=str(folder),
        num_epochs=1,
        save_freq=0,
        sample_grid_freq=0,
        sample_batch_size=4,
        sample_num_batches_per_epoch=1,
        train_batch_size=2,
        sample_call_kwargs=call,
        **own,
        **settings,
    )
    return DPOKSFTTrainer(config, brightness, PROMPTS, pipe)


@pytest.mark.parametrize("mixed", [False, True], ids=["one timestep", "mixed"])
@pytest.mark.parametrize("name", TRAINED)
def test_noisy_latents_arrive_at_the_network(name, mixed, tmp_path):
    trainer = trainer_of(name, tmp_path, train_mixed_timesteps=mixed)
    trainer.data = trainer._draw(0, 0)
    for item in next(trainer._updates(0, 0)):
        with trainer._unguided(), torch.no_grad():
            # `verify` compares what arrives at the step with x_t, exactly
            [replayed] = trainer.prepared_policy(item.trajectory, each=item.steps, verify=True)
        assert replayed.model_output.shape == item.target.shape
    start = [parameter.detach().clone() for parameter in trainer.trainable_layers]
    trainer.step(0, 0)
    assert any(not torch.equal(a, b) for a, b in zip(start, trainer.trainable_layers, strict=True))


@pytest.mark.parametrize("name", ["sd_zero_snr", "sdxl", "sd3", "flux", "z_image"])
def test_training_is_unguided(name, tmp_path):
    """Also where the call guides at a scale of 1 (Z-Image does): one row for each sample."""
    trainer = trainer_of(name, tmp_path)
    trainer.data = trainer._draw(0, 0)
    calls = trainer._settle_template().recording.templates[-1]
    assert sum(map(num_rows, calls)) == 2
    assert trainer._unguided_scale == (0.0 if name == "z_image" else 1.0)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name.endswith("_inpaint")])
def test_a_pipeline_that_changes_its_latents_is_refused(name, tmp_path):
    trainer = trainer_of(name, tmp_path)
    assert "mask_image" in inspect.signature(type(trainer.pipeline).__call__).parameters
    with pytest.raises(ValueError, match="changes the latents between the steps"):
        trainer.train()
