"""`torch_compile`: old log-probabilities come from a replay with gradients, so that the first ratio is 1."""

import pytest
import torch
from tiny import FAMILIES, stable_diffusion_3


ROUNDING = 1e-6  # of pixels and KL: a traced graph may add up in another order


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


SHORT = {
    "sample_num_steps": 2,
    "sample_guidance_scale": 1.0,
    "train_num_inner_epochs": 2,
    "train_learning_rate": 1e-2,
}


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        ("sd3", "eager"),
        pytest.param("sd3", "aot_eager", marks=pytest.mark.slow),
        pytest.param("sd", "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_the_first_ratio_is_1_and_it_trains(family, backend, make_trainer, adapter, lines, tmp_path):
    pipe = FAMILIES[family]()
    trainer = make_trainer(pipe=pipe, torch_compile=True, torch_compile_backend=backend, **SHORT)
    (denoiser,) = trainer.tuned.denoisers.values()
    assert denoiser._compiled_call_impl is not None
    start = adapter(trainer)
    trainer.train()
    first, second = lines(trainer, "loss")
    assert first["policy/ratio_deviation_max"] <= trainer.config.train_clip_range / 10
    assert first["kl"] == pytest.approx(0.0, abs=ROUNDING)
    assert second["kl"] > 0 and second["policy/ratio_deviation_max"] > 0
    assert any(not torch.equal(value, start[name]) for name, value in adapter(trainer).items())
    plain = make_trainer(pipe=FAMILIES[family](), output_dir=str(tmp_path / "plain"), **SHORT)
    plain.train()
    for own, other in zip(lines(trainer, "reward"), lines(plain, "reward"), strict=True):
        assert own["reward"] == pytest.approx(other["reward"], abs=ROUNDING)


@pytest.mark.slow
def test_full_fine_tuning_compiles_the_frozen_copy_too(make_trainer, lines):
    trainer = make_trainer(
        pipe=stable_diffusion_3(), torch_compile=True, torch_compile_backend="eager", train_use_lora=False, **SHORT
    )
    assert trainer.tuned.frozen["transformer"]._compiled_call_impl is not None
    trainer.train()
    first, second = lines(trainer, "loss")
    assert first["policy/ratio_deviation_max"] <= trainer.config.train_clip_range / 10
    assert first["kl"] == pytest.approx(0.0, abs=ROUNDING) and second["kl"] > 0
