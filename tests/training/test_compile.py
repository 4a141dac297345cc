"""`torch_compile`: the graph with gradients is the one that must agree with the rollout, or old log-probabilities come from it."""

from types import SimpleNamespace

import pytest
import torch
from tiny import FAMILIES, stable_diffusion_3

from dpok_trl.core.gaussian import Gaussian
from dpok_trl.core.trajectory import Trajectory
from dpok_trl.policy.replayer import ReplayedStep
from dpok_trl.training.ratio import RatioError, check_ratio


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
    assert trainer.experience.reanchor is False  # one forward pass less for each transition
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


def decide(reanchor, *, compiled, with_grad=0.0, without=0.0, tolerance=1e-3, noise=0.0):
    """`check_ratio` for a policy whose replays are off by `with_grad` in gradient mode, and by `noise` more each time, and by `without` else. Returns the decision and
    the number of replays with gradients, of one step each."""
    steps, samples = (0, 1), (0, 2)
    states = tuple(torch.zeros(3, 4) for _ in range(3))
    trajectory = Trajectory(["a cat"] * 3, [0, 1, 2], None, states, states[1:], steps, torch.zeros(3, 2), {}, None)
    replays = []

    def policy(trajectory, samples, group, verify):
        replays.append(torch.is_grad_enabled())
        off = with_grad + noise * sum(replays) if torch.is_grad_enabled() else without
        gaussian = Gaussian(torch.zeros(len(samples), 4), torch.ones(len(samples)))
        return [ReplayedStep(torch.full((len(samples),), off), gaussian, gaussian.mean) for _ in group]

    decision = check_ratio(
        policy,
        SimpleNamespace(trajectory=trajectory, samples=samples),
        reanchor=reanchor,
        compiled=compiled,
        tolerance=tolerance,
        reduction="mean",
        largest=lambda values: values.max().item(),
    )
    return decision, sum(replays)


@pytest.mark.parametrize(
    ("deviations", "compiled", "decision", "replays"),
    [
        # eager kernels give the same bits: any deviation at all is mended, and gradients change nothing
        ({}, False, False, 0),
        ({"without": 1e-7}, False, True, 0),
        ({"with_grad": 0.02}, False, False, 0),
        # a compiled graph with gradients is compared itself; below the tolerance its deviation stays
        ({}, True, False, 2),
        ({"without": 2e-3}, True, False, 2),
        ({"with_grad": 0.9e-3}, True, False, 2),
        ({"with_grad": 1.1e-3}, True, True, 4),
    ],
)
def test_what_decides_on_re_anchoring(deviations, compiled, decision, replays):
    assert decide(None, compiled=compiled, **deviations) == (decision, replays)
    assert decide(True, compiled=compiled, **deviations)[0] is True  # whoever wants it gets it


def test_compiled_without_re_anchoring():
    assert decide(False, compiled=True, with_grad=0.9e-3)[0] is False
    with pytest.raises(RatioError, match=r"train_reanchor = False.*up to 0.0011, allowed are 0.001"):
        decide(False, compiled=True, with_grad=1.1e-3)


def test_a_compiled_network_that_does_not_reproduce_itself_is_refused():
    with pytest.raises(RatioError, match="two replays of one batch differ"):
        decide(None, compiled=True, with_grad=0.04, noise=9e-4)  # 2 replays later it is off by 1.8e-3
