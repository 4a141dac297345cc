"""`check_pipeline` on pipelines that work and on pipelines that do not."""

import pytest
import tiny
import torch
from diffusers import HeunDiscreteScheduler

from dpok_trl import check_pipeline


CALL = {"num_inference_steps": tiny.STEPS, "guidance_scale": 5.0, "height": tiny.SIZE, "width": tiny.SIZE}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_pipeline_that_works(family):
    pipe = tiny.FAMILIES[family]()
    (name,) = [n for n in ("unet", "transformer") if getattr(pipe, n, None) is not None]
    denoiser = getattr(pipe, name).train()
    before = {key: value.clone() for key, value in denoiser.state_dict().items()}
    report = check_pipeline(pipe, **CALL)
    assert report.ok and report.reason == ""
    assert len(report.steps) == (4 if family == "sd" else 3)
    for step in report.steps:
        assert (step.log_prob_error, step.ratio) == (0.0, 1.0)
        assert step.gradient_norm > 0 and step.std > 0
    assert report.steps[0].step_index == 0 and report.steps[0].timestep > report.steps[-1].timestep
    # the adapter of the check is gone, and the rest is as it was
    after = denoiser.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert denoiser.training and all(p.requires_grad for p in denoiser.parameters())
    lines = str(report).splitlines()
    assert lines[0].endswith("ok") and len(lines) == 2 + len(report.steps)


def test_an_adapter_that_is_there_stays():
    pipe = tiny.with_adapter(tiny.stable_diffusion().to(dtype=torch.bfloat16), nudged=True)
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    assert check_pipeline(pipe, **CALL).ok
    assert all(torch.equal(value, before[key]) for key, value in pipe.unet.state_dict().items())


def test_a_scheduler_that_is_no_policy_is_reported():
    pipe = tiny.stable_diffusion(HeunDiscreteScheduler())
    report = check_pipeline(pipe, **CALL)
    assert not report.ok and report.scheduler == "HeunDiscreteScheduler"
    assert "EulerAncestralDiscreteScheduler" in report.reason and "not usable" in str(report)


def test_a_random_denoiser_is_reported():
    pipe = tiny.stable_diffusion()
    handle = pipe.unet.register_forward_hook(lambda m, args, out: tuple(o + 0.01 * torch.randn_like(o) for o in out))
    report = check_pipeline(pipe, **CALL)
    handle.remove()
    assert not report.ok and "replays with another log-probability" in report.reason
    assert report.steps[-1].log_prob_error > 0 and report.steps[-1].ratio != 1.0


def test_a_wrong_argument_is_raised_and_the_pipeline_restored():
    pipe = tiny.stable_diffusion()
    keys = set(pipe.unet.state_dict())
    with pytest.raises(ValueError, match="takes no 'no_such_argument'"):
        check_pipeline(pipe, no_such_argument=1)
    assert set(pipe.unet.state_dict()) == keys
