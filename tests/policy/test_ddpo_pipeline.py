"""`DefaultDPOKStableDiffusionPipeline` under DDPO's names, and pipelines loaded by name."""

import logging

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from tiny import nudge, stable_diffusion, stable_diffusion_xl

from dpok_trl import DefaultDPOKStableDiffusionPipeline, DPOKSchedulerOutput
from dpok_trl.policy.loading import load_pipeline
from dpok_trl.policy.lora import adapter_layers, prepare_adapter
from dpok_trl.policy.lora_files import lora_state_dict, save_lora
from dpok_trl.policy.schedulers import as_ddim


PNDM = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}  # as in Stable Diffusion 1.5's repository


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Stable Diffusion as it is published: with PNDM."""
    path = tmp_path_factory.mktemp("base")
    stable_diffusion(scheduler=PNDMScheduler(**PNDM)).save_pretrained(path)
    return str(path)


CALL = {"num_inference_steps": 3, "guidance_scale": 3.0, "seeds": [4, 5]}
PROMPTS = ["a cat", "two dogs"]


def test_it_is_loaded_with_ddim_on_the_same_noise_schedule(folder, caplog):
    with caplog.at_level(logging.INFO, logger="dpok_trl"):
        pipe = DefaultDPOKStableDiffusionPipeline(folder)
    assert type(pipe.scheduler) is DDIMScheduler
    assert torch.equal(pipe.scheduler.alphas_cumprod, PNDMScheduler(**PNDM).alphas_cumprod)
    assert not pipe.scheduler.config.clip_sample and pipe.scheduler.config.steps_offset == 1
    assert pipe.sd_pipeline.safety_checker is None
    assert (pipe.use_lora, pipe.pretrained_model, pipe.pretrained_revision) == (True, folder, "main")
    for name in ("unet", "vae", "tokenizer", "scheduler", "text_encoder"):
        assert getattr(pipe, name) is getattr(pipe.sd_pipeline, name)
    assert "no pytorch_lora_weights.safetensors in" in caplog.text


def test_a_ddim_of_the_users_own_is_kept(tmp_path):
    own = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    stable_diffusion(scheduler=DDIMScheduler(**own, steps_offset=1, clip_sample=False)).save_pretrained(tmp_path)
    config = DefaultDPOKStableDiffusionPipeline(str(tmp_path)).scheduler.config
    assert {name: config[name] for name in own} == own


def test_without_lora_all_weights_are_trained_and_saved_as_a_pipeline(folder, tmp_path):
    pipe = DefaultDPOKStableDiffusionPipeline(folder, use_lora=False)
    unet = pipe.get_trainable_layers()
    assert all(p.requires_grad and p.dtype == torch.float32 for p in unet.parameters()) and not adapter_layers(unet)
    nudge(unet, 0.01)
    pipe.save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert all(torch.equal(value, again.unet.state_dict()[key]) for key, value in unet.state_dict().items())


def test_its_call_draws_images_with_latents_and_log_probabilities(folder):
    pipe = DefaultDPOKStableDiffusionPipeline(folder)
    output = pipe(PROMPTS, **CALL)
    assert output.images.shape == (2, 3, 16, 16)
    assert [latent.shape for latent in output.latents] == [(2, 4, 8, 8)] * 4
    assert [log_prob.shape for log_prob in output.log_probs] == [(2,)] * 3
    again = pipe(PROMPTS, **CALL)
    assert torch.equal(output.images, again.images)
    (alone,) = pipe("a cat", **{**CALL, "seeds": [4]}).images
    assert torch.allclose(alone, output.images[0], atol=1e-5)  # another batch shape rounds differently
    assert not torch.equal(pipe(PROMPTS, **{**CALL, "seeds": None}).images, output.images)


def test_its_log_probabilities_are_those_of_scheduler_step(folder):
    """DDPO's way of replaying: `scheduler_step` with `prev_sample`, on the model output of the same step."""
    pipe = DefaultDPOKStableDiffusionPipeline(folder)
    output = pipe(PROMPTS, **{**CALL, "guidance_scale": 1.0})
    pipe.scheduler.set_timesteps(3)
    embeds, _ = pipe.sd_pipeline.encode_prompt(PROMPTS, "cpu", 1, False)
    for i, timestep in enumerate(pipe.scheduler.timesteps):
        with torch.no_grad():
            noise = pipe.unet(output.latents[i], timestep, encoder_hidden_states=embeds).sample
        step = pipe.scheduler_step(noise, timestep, output.latents[i], eta=1.0, prev_sample=output.latents[i + 1])
        assert isinstance(step, DPOKSchedulerOutput)
        torch.testing.assert_close(step.log_probs, output.log_probs[i], rtol=1e-5, atol=1e-5)


def test_its_trainable_layers_are_one_adapter(folder):
    pipe = DefaultDPOKStableDiffusionPipeline(folder)
    assert pipe.get_trainable_layers() is pipe.get_trainable_layers() is pipe.unet
    trainable = {name for name, p in pipe.unet.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in pipe.unet.named_parameters() if "lora_" in name}
    assert {tuple(layer.lora_A) for layer in adapter_layers(pipe.unet)} == {("default",)}
    assert {layer.r["default"] for layer in adapter_layers(pipe.unet)} == {4}


def trained(folder):
    """As after training, with an alpha that is not the rank."""
    pipe = DefaultDPOKStableDiffusionPipeline(folder)
    prepare_adapter(pipe.unet, LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"]))
    nudge(pipe.unet)
    return pipe


def test_what_it_saves_a_stock_pipeline_loads(folder, tmp_path):
    pipe = trained(folder)
    pipe.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    stock = stable_diffusion(scheduler=as_ddim(PNDMScheduler(**PNDM)))
    stock.load_lora_weights(str(tmp_path))
    images = [
        p("a cat", num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt").images
        for p in (pipe.sd_pipeline, stock)
    ]
    assert torch.equal(*images)


def test_an_adapter_in_the_repository_is_loaded(tmp_path):
    base = stable_diffusion()
    base.save_pretrained(tmp_path)
    prepare_adapter(base.unet, LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"]))
    nudge(base.unet)
    save_lora(base, {"unet": base.unet}, tmp_path)
    pipe = DefaultDPOKStableDiffusionPipeline(str(tmp_path))
    loaded, expected = lora_state_dict(pipe.unet), lora_state_dict(base.unet)
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[key], expected[key]) for key in expected)
    pipe.get_trainable_layers()
    assert {layer.scaling[name] for layer in adapter_layers(pipe.unet) for name in layer.lora_A} == {3.0}


def test_a_broken_adapter_file_is_an_error_and_not_a_fresh_start(tmp_path):
    stable_diffusion().save_pretrained(tmp_path)
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(OSError, match="Unable to load weights from checkpoint file"):
        DefaultDPOKStableDiffusionPipeline(str(tmp_path))


def test_its_checkpoint_hooks_bring_the_adapter_back_in_place(folder, tmp_path):
    pipe = trained(folder)
    before = {key: tensor.clone() for key, tensor in lora_state_dict(pipe.unet).items()}
    parameters = [p for p in pipe.unet.parameters() if p.requires_grad]
    weights, models = [1], [1]
    pipe.save_checkpoint(None, weights, tmp_path)
    nudge(pipe.unet)
    pipe.load_checkpoint(models, tmp_path)
    assert weights == models == []  # so that accelerate neither writes nor reads the base
    after = lora_state_dict(pipe.unet)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(a is b for a, b in zip(parameters, (p for p in pipe.unet.parameters() if p.requires_grad), strict=True))


# ---------------------------------------------------------------- by name


def test_a_pipeline_by_name_keeps_any_other_scheduler(tmp_path):
    stable_diffusion(scheduler=DDPMScheduler(clip_sample=False, steps_offset=1)).save_pretrained(tmp_path)
    assert type(load_pipeline(tmp_path).scheduler) is DDPMScheduler


def test_pipelines_as_objects_are_taken_as_they_are():
    pipe = stable_diffusion_xl()
    assert load_pipeline(pipe) is pipe


def test_anything_else_is_refused():
    with pytest.raises(
        ValueError, match="must be a diffusers pipeline, a Hub id or a folder; given: UNet2DConditionModel"
    ):
        load_pipeline(stable_diffusion().unet)


def test_ddim_does_not_clamp_x0_where_the_other_config_does_not_say():
    scheduler = as_ddim(PNDMScheduler(**PNDM))
    assert (scheduler.config.clip_sample, scheduler.config.set_alpha_to_one) == (False, False)
    clamping = as_ddim(DDPMScheduler(clip_sample=True))
    assert clamping.config.clip_sample is True
