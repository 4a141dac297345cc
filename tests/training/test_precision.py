"""A half-precision base without autocast, autocast, and both: the ratio starts at 1, and an fp32 adapter trains."""

import pytest
import torch
from tiny import FAMILIES, stable_diffusion


LEARN = {"train_num_inner_epochs": 2, "train_learning_rate": 1e-2}


# fp16 weights under bf16 autocast: torch's layer norm on the CPU refuses the mixture.
PRECISIONS = [("fp32", "no"), ("fp32", "bf16"), ("bf16", "no"), ("bf16", "bf16"), ("fp16", "no")]


@pytest.mark.parametrize("fp32_latents", [False, True])
@pytest.mark.parametrize(("base", "precision"), PRECISIONS)
def test_the_first_ratio_is_1_and_the_adapter_trains(base, precision, fp32_latents, make_trainer, adapter, lines):
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[base]
    trainer = make_trainer(
        pipe=stable_diffusion().to(dtype), mixed_precision=precision, sample_fp32_latents=fp32_latents, **LEARN
    )
    start = adapter(trainer)
    assert {value.dtype for value in start.values()} == {torch.float32}
    trainer.train()
    first, second = lines(trainer, "loss")
    assert (first["policy/ratio_deviation_max"], first["kl"]) == (0.0, 0.0)
    assert second["policy/ratio_deviation_max"] > 0 and second["kl"] > 0
    moved = [name for name, value in adapter(trainer).items() if not torch.equal(value, start[name])]
    assert len(moved) == len(start)
    frozen = {parameter.dtype for parameter in trainer.pipeline.unet.parameters() if not parameter.requires_grad}
    assert frozen == {dtype}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_on_a_bf16_base_without_autocast(family, make_trainer, lines):
    trainer = make_trainer(pipe=FAMILIES[family]().to(torch.bfloat16), mixed_precision="no", **LEARN)
    trainer.train()
    first, second = lines(trainer, "loss")
    assert (first["policy/ratio_deviation_max"], first["kl"]) == (0.0, 0.0)
    assert second["policy/ratio_deviation_max"] > 0 and second["kl"] > 0


def test_a_pipeline_by_name_is_loaded_in_the_dtype_that_is_asked_for(make_trainer, lines, tmp_path):
    stable_diffusion().save_pretrained(tmp_path / "base")
    trainer = make_trainer(pipe=str(tmp_path / "base"), model_dtype="bf16")
    assert {part.dtype for part in (trainer.pipeline.vae, trainer.pipeline.text_encoder)} == {torch.bfloat16}
    trainer.train()
    assert lines(trainer, "loss")[0]["policy/ratio_deviation_max"] == 0.0


def test_a_dtype_for_a_pipeline_that_is_loaded_is_refused(make_trainer):
    with pytest.raises(
        ValueError,
        match=r"model_dtype = 'fp16' is for pipelines given by name, and this StableDiffusionPipeline has been loaded. Load it in that dtype: "
        r"`from_pretrained\(..., (torch_)?dtype=torch.float16\)`",
    ):
        make_trainer(model_dtype="fp16")
