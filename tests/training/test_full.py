"""Full fine-tuning: all weights of the denoiser train, a frozen copy answers for the pretrained model."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from tiny import FAMILIES, stable_diffusion, with_adapter


BF16_ROUNDING = 1e-2  # of the KL of a step for each dimension; after one update it is some 1e-2
FULL = {"train_use_lora": False, "train_learning_rate": 1e-3, "sample_num_steps": 3}


def image(pipe) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    output = pipe("a cat", num_inference_steps=3, guidance_scale=3.0, generator=generator, output_type="np")
    return torch.from_numpy(output.images)


def weights(module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_all_weights_move_and_the_reference_does_not(family, make_trainer, lines):
    pipe = FAMILIES[family]()
    trainer = make_trainer(pipe=pipe, num_epochs=2, **FULL)
    (name,) = trainer.tuned.denoisers
    pretrained = weights(getattr(pipe, name))
    frozen = trainer.tuned.frozen[name]
    others = {part: weights(getattr(pipe, part)) for part in ("vae", "text_encoder")}
    trainer.train()
    first, second = lines(trainer, "loss")
    assert (first["kl"], first["policy/ratio_deviation_max"], second["policy/ratio_deviation_max"]) == (0.0, 0.0, 0.0)
    assert second["kl"] > 0
    assert same(pretrained, weights(frozen))  # bit for bit
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert all(same(before, weights(getattr(pipe, part))) for part, before in others.items())
    parameters = dict(getattr(pipe, name).named_parameters())
    unmoved = [key for key, value in parameters.items() if torch.equal(value, pretrained[key])]
    # sd3's last block throws its text stream away, and its keys' biases cancel in the softmax
    assert len(unmoved) <= (0.1 * len(parameters) if family == "sd3" else 0)


def test_the_reference_is_the_pretrained_model(make_trainer):
    """The mean of a step under `reference()` is that of a policy that was never trained."""
    trainer = make_trainer(**FULL)
    trajectory = trainer.sample(0)[0][0].trajectory
    with torch.no_grad():
        (before,) = trainer.policy(trajectory, None, [1])
        for parameter in trainer.trainable_layers:
            parameter.add_(0.05 * torch.randn_like(parameter))
        (after,) = trainer.policy(trajectory, None, [1])
        with trainer.policy.reference():
            (reference,) = trainer.policy(trajectory, None, [1])
    assert torch.equal(reference.distribution.mean, before.distribution.mean)
    assert not torch.equal(after.distribution.mean, before.distribution.mean)


def test_interrupted_and_resumed_is_uninterrupted(make_trainer, adapter, tmp_path):
    settings = {**FULL, "num_epochs": 3, "train_num_inner_epochs": 2, "train_batch_size": 2}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **settings)
    whole.train()
    make_trainer(output_dir=str(tmp_path / "parts"), **settings).train(epochs=1)
    second = make_trainer(output_dir=str(tmp_path / "parts"), **settings)
    second.train(resume_from_checkpoint=True)
    assert same(adapter(whole), adapter(second))
    moments = [trainer.optimizer.state_dict()["state"] for trainer in (whole, second)]
    for index, state in moments[0].items():
        assert all(torch.equal(value, moments[1][index][key]) for key, value in state.items())
    assert same(weights(whole.tuned.frozen["unet"]), weights(second.tuned.frozen["unet"]))
    checkpoint = next((tmp_path / "whole").glob("checkpoint-*"))
    assert {path.name for path in checkpoint.iterdir() if path.is_dir()} == {"unet"}  # and nothing that is frozen


def test_the_saved_pipeline_gives_the_identical_image(make_trainer, tmp_path):
    trainer = make_trainer(num_epochs=2, **FULL)
    base = image(trainer.pipeline)
    trainer.train()
    trainer.save_model(tmp_path / "model")
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    loaded.set_progress_bar_config(disable=True)
    tuned = image(trainer.pipeline)
    assert torch.equal(image(loaded), tuned)
    assert not torch.equal(base, tuned)
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    card = (tmp_path / "model" / "README.md").read_text()
    assert "load_lora_weights" not in card and 'DiffusionPipeline.from_pretrained("path/to/model")' in card
    assert "- lora" not in card and "LoRA adapter" not in card


def test_a_checkpoint_is_a_denoiser_that_a_stock_pipeline_takes(make_trainer, tmp_path):
    trainer = make_trainer(**FULL)
    trainer.train()
    stock = stable_diffusion()
    stock.unet = UNet2DConditionModel.from_pretrained(trainer.output_dir / "checkpoint-1", subfolder="unet")
    assert torch.equal(image(stock), image(trainer.pipeline))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_half_precision_base_has_fp32_master_weights_and_a_copy_of_its_own_dtype(precision, make_trainer, lines):
    pipe = stable_diffusion().to(torch.bfloat16)
    trainer = make_trainer(pipe=pipe, num_epochs=2, mixed_precision=precision, **FULL)
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.float32}
    assert {p.dtype for p in trainer.tuned.frozen["unet"].parameters()} == {torch.bfloat16}
    assert (pipe.vae.dtype, pipe.text_encoder.dtype) == (torch.bfloat16, torch.bfloat16)
    trainer.train()
    first, second = lines(trainer, "loss")
    assert (first["policy/ratio_deviation_max"], second["policy/ratio_deviation_max"]) == (0.0, 0.0)
    # without autocast the master weights compute in fp32 and the copy in bf16, and the KL starts at that rounding
    assert (first["kl"] == 0.0) if precision == "bf16" else (0.0 < first["kl"] < BF16_ROUNDING)


@pytest.mark.parametrize(("dtype", "frozen"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_memory_that_the_docs_tell_of(dtype, frozen, make_trainer):
    """Bytes for each parameter: weights, gradients, AdamW, frozen copy."""
    trainer = make_trainer(pipe=stable_diffusion().to(dtype), **FULL)
    gradients = []
    clip = trainer.accelerator.clip_grad_norm_
    trainer.accelerator.clip_grad_norm_ = lambda parameters, limit: (
        gradients.extend(p.grad.nbytes for p in parameters) or clip(parameters, limit)
    )
    trainer.train()
    count = sum(parameter.numel() for parameter in trainer.pipeline.unet.parameters())
    states = trainer.optimizer.state_dict()["state"].values()
    moments = sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq"))
    weights, copies = (
        sum(p.nbytes for p in module.parameters()) for module in (trainer.pipeline.unet, trainer.tuned.frozen["unet"])
    )
    assert [size / count for size in (weights, sum(gradients), moments, copies)] == [4, 4, 8, frozen]
    docs = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert (
        "| full fine-tuning (`train_use_lora=False`) | 4 | 4 | 8 | 4, or 2 for a half-precision base | 20 or 18 |"
        in docs
    )


def test_a_denoiser_with_an_adapter_is_refused(make_trainer):
    with pytest.raises(
        ValueError,
        match=r"`unet` has the active adapter 'default', and its own weights are to be trained. Fuse it first",
    ):
        make_trainer(pipe=with_adapter(stable_diffusion()), **FULL)
