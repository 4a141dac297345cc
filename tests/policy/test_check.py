"""`check_pipeline` on pipelines that work and on pipelines that do not."""

import pytest
import tiny
import torch
from diffusers import HeunDiscreteScheduler
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from walks import call_arguments, image, pipeline
from zoo.inputs import picture
from zoo.wan import wan_transformer

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


# ---------------------------------------------------------------- what it is told


def test_fp32_latents_are_checked_as_they_are_trained():
    pipe = pipeline("StableDiffusionPipeline", torch.bfloat16)
    call = call_arguments(pipe)
    rounded = check_pipeline(pipe, **call)
    exact = check_pipeline(pipe, fp32_latents=True, **call)
    assert rounded.ok and exact.ok
    pairs = [(a.gradient_norm, b.gradient_norm) for a, b in zip(rounded.steps, exact.steps, strict=True)]
    assert all(a != b and a == pytest.approx(b, rel=0.2) for a, b in pairs)
    assert {parameter.dtype for parameter in pipe.unet.parameters()} == {torch.bfloat16}


def test_the_kind_and_the_amount_of_noise():
    pipe = pipeline("StableDiffusion3Pipeline")
    sde = check_pipeline(pipe, noise_level=0.3, **call_arguments(pipe))
    more = check_pipeline(pipe, noise_level=0.6, **call_arguments(pipe))
    assert [step.std for step in more.steps] == pytest.approx([2 * step.std for step in sde.steps])
    cps = check_pipeline(pipe, kind="cps", eta=1.0, **call_arguments(pipe))
    pipe.scheduler.set_timesteps(tiny.STEPS)
    assert [step.std for step in cps.steps] == pytest.approx(pipe.scheduler.sigmas[1:-1].tolist())
    assert sde.ok and more.ok and cps.ok


def test_a_check_is_repeatable_and_leaves_random_numbers_alone():
    pipe = pipeline("StableDiffusionPipeline")
    reports, states = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        reports.append(check_pipeline(pipe, **call_arguments(pipe)))
        states.append((before, torch.get_rng_state()))
    assert reports[0] == reports[1] and reports[0].ok
    assert all(torch.equal(before, after) for before, after in states)


def test_arguments_of_the_call_named_like_those_of_the_check():
    pipe = pipeline("StableDiffusionUpscalePipeline")
    call = {name: value for name, value in call_arguments(pipe).items() if name != "noise_level"}
    seen = []
    original = pipe.low_res_scheduler.add_noise
    pipe.low_res_scheduler.add_noise = lambda x, noise, level: (
        seen.append(level.unique().tolist()) or original(x, noise, level)
    )
    assert check_pipeline(pipe, call_kwargs={"noise_level": 7}, noise_level=0.3, **call).ok
    assert seen and all(levels == [7] for levels in seen)
    with pytest.raises(ValueError, match="'eta' cannot be an argument of the call: the noise of the steps"):
        check_pipeline(pipe, call_kwargs={"eta": 0.5}, **call)
    with pytest.raises(ValueError, match="num_inference_steps is given twice"):
        check_pipeline(pipe, call_kwargs={"num_inference_steps": 2}, **call)


def test_arguments_with_a_value_for_each_prompt():
    pipe = pipeline("StableDiffusionImg2ImgPipeline")
    call = {name: value for name, value in call_arguments(pipe).items() if name != "image"}
    report = check_pipeline(pipe, prompts=["a", "b", "c"], arguments={"image": [picture(i) for i in range(3)]}, **call)
    assert report.ok and len(report.steps) == 3
    with pytest.raises(ValueError, match="'image' has 2 values for 3 prompts"):
        check_pipeline(pipe, prompts=["a", "b", "c"], arguments={"image": [picture(0), picture(1)]}, **call)


# ---------------------------------------------------------------- what it finds


@pytest.mark.parametrize(("boundary", "idle"), [(0.0, "transformer_2"), (1.0, "transformer")])
def test_a_network_that_no_step_uses(boundary, idle):
    """Wan 2.2 changes its expert at a share of the timesteps; at 0 and 1 it never does."""
    pipe = pipeline("WanPipeline", transformer_2=wan_transformer(), boundary_ratio=boundary)
    report = check_pipeline(pipe, **call_arguments(pipe))
    assert not report.ok and report.reason == f"no step gives {idle} a gradient: the call does not use it."
    assert all(step.log_prob_error == 0.0 for step in report.steps)


def test_both_experts_are_used_between():
    pipe = pipeline("WanPipeline", transformer_2=wan_transformer(), boundary_ratio=0.875)
    assert check_pipeline(pipe, **call_arguments(pipe)).ok


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without:UserWarning")
def test_int8_weights_are_left_as_they_were():
    pipe = pipeline("StableDiffusionPipeline")
    quantize_(pipe.unet, Int8WeightOnlyConfig())
    before, kinds = image(pipe), {name: type(p.data) for name, p in pipe.unet.named_parameters()}
    assert check_pipeline(pipe, **call_arguments(pipe)).ok
    assert torch.equal(image(pipe), before)
    assert {name: type(p.data) for name, p in pipe.unet.named_parameters()} == kinds
