"""Which schedulers are read, which are refused and in which words, and what a rollout walks on."""

import re
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from tiny import stable_diffusion

from dpok_trl.core.transitions import Transition
from dpok_trl.policy.policy import Policy
from dpok_trl.policy.schedulers import (
    UnsupportedSchedulerError,
    next_distribution,
    policy_scheduler,
    read_grid,
    scheduler_note,
)


SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
STEPS = 10


def flow_match(sigmas):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=sigmas)
    return scheduler


# ---------------------------------------------------------------------------------------------- refusals


REFUSED = [
    (diffusers.PNDMScheduler, {}, "not Markov"),
    (diffusers.IPNDMScheduler, {}, "not Markov"),
    (diffusers.CogVideoXDPMScheduler, {}, "not Markov"),
    (diffusers.HeunDiscreteScheduler, {}, "not Markov"),
    (diffusers.KDPM2DiscreteScheduler, {}, "not Markov"),
    (diffusers.KDPM2AncestralDiscreteScheduler, {}, "not Markov"),
    (diffusers.FlowMatchHeunDiscreteScheduler, {}, "not Markov"),
    (diffusers.DDIMScheduler, {"thresholding": True}, "thresholding"),
    (diffusers.DDPMScheduler, {"variance_type": "learned_range"}, "lets the network choose the noise"),
    (diffusers.DDPMScheduler, {"variance_type": "learned", "thresholding": True}, "thresholding.*choose the noise"),
    (diffusers.DPMSolverMultistepScheduler, {"prediction_type": "flow_prediction"}, "use_flow_sigmas=False"),
    (diffusers.DPMSolverMultistepScheduler, {"use_flow_sigmas": True}, "use_flow_sigmas=True"),
    (diffusers.EulerDiscreteScheduler, {"prediction_type": "x0"}, "'x0' is not one of"),
    (diffusers.FlowMatchLCMScheduler, {"scale_factors": [0.5] * (STEPS - 1)}, "enlarge the latents"),
    (diffusers.SASolverScheduler, {}, "not Markov"),
    (diffusers.FlowMapEulerDiscreteScheduler, {}, "can read"),
    (diffusers.DDIMInverseScheduler, {}, "can read"),
]


@pytest.mark.parametrize(("scheduler_class", "options", "why"), REFUSED)
def test_refusals_say_why_and_their_advice_works(scheduler_class, options, why):
    scheduler = scheduler_class(**options)
    scheduler.set_timesteps(STEPS)
    with pytest.raises(UnsupportedSchedulerError, match=why) as refusal:
        read_grid(scheduler)
    advice = str(refusal.value).split("Set pipe.scheduler = ")[1]
    pipe = SimpleNamespace(scheduler=scheduler)
    replacement = eval(advice, {**{name: getattr(diffusers, name) for name in advice.split(".")[:1]}, "pipe": pipe})
    replacement.set_timesteps(STEPS)
    assert len(read_grid(replacement)) == STEPS


def test_a_scheduler_without_a_grid_is_refused():
    for scheduler in (
        diffusers.DDIMScheduler(),
        diffusers.DDPMScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.LTXEulerAncestralRFScheduler(),
        diffusers.DPMSolverMultistepScheduler(),
        diffusers.LCMScheduler(),
        diffusers.SCMScheduler(),
    ):
        with pytest.raises(ValueError, match="set_timesteps"):
            read_grid(scheduler)


def test_grids_that_are_no_denoising_are_refused():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift_terminal=0.1)
    # A single step has no spacing to stretch: diffusers divides by zero.
    with np.errstate(all="ignore"):
        scheduler.set_timesteps(sigmas=[1.0])
    with pytest.raises(ValueError, match="must be finite.*take more steps"):
        read_grid(scheduler)
    scheduler = flow_match([1.0, 0.5, 0.5, 0.2])
    with pytest.raises(ValueError, match="steps 1 and 2 of 4, at the timesteps 500 and 500, both begin at sigma 0.5"):
        read_grid(scheduler)
    with pytest.raises(ValueError, match="must not add noise"):
        read_grid(flow_match([1.0, 0.5, 0.6]))


def test_a_repeated_timestep_with_levels_of_its_own_is_read():
    # Karras sigmas are rounded to integer timesteps: 50 steps of them end in 2, 1, 1, 0.
    scheduler = diffusers.DPMSolverMultistepScheduler(**SD15, use_karras_sigmas=True)
    scheduler.set_timesteps(50)
    assert len(scheduler.timesteps.unique()) < 50
    assert len(read_grid(scheduler)) == 50


@pytest.mark.parametrize("name", ["lcm", "scm", "flow_match"])
def test_a_grid_from_a_later_step_on(name):
    scheduler = {
        "lcm": lambda: diffusers.LCMScheduler(**SD15, timestep_scaling=0.001),
        "scm": diffusers.SCMScheduler,
        "flow_match": diffusers.FlowMatchEulerDiscreteScheduler,
    }[name]()
    scheduler.set_timesteps(4, **({"intermediate_timesteps": None} if name == "scm" else {}))
    grid = read_grid(scheduler)
    later, transition = grid.starting_at(1), Transition("cps")
    inputs = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert len(later) == 3
    for index in range(3):
        ours = next_distribution(later, transition, *inputs, index)
        whole = next_distribution(grid, transition, *inputs, index + 1)
        assert torch.equal(ours.mean, whole.mean) and torch.equal(ours.std, whole.std)


def test_step_indices_outside_the_grid_are_refused():
    scheduler = diffusers.DDIMScheduler(**SD15)
    scheduler.set_timesteps(STEPS)
    grid = read_grid(scheduler)
    for index in (-1, STEPS, torch.tensor([0, STEPS])):
        with pytest.raises(IndexError, match="step_index must be in"):
            grid.levels(index)


# ---------------------------------------------------------------------------------------------- what a rollout walks on


PNDM = SD15 | {"skip_prk_steps": True, "steps_offset": 1}


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_pndm_is_walked_as_ddim_on_its_schedule(spacing, prediction_type, set_alpha_to_one):
    pndm = diffusers.PNDMScheduler(
        **PNDM, timestep_spacing=spacing, prediction_type=prediction_type, set_alpha_to_one=set_alpha_to_one
    )
    before = dict(pndm.config)
    walked = policy_scheduler(pndm)
    assert type(walked) is diffusers.DDIMScheduler and not walked.config.clip_sample
    for scheduler in (pndm, walked):
        scheduler.set_timesteps(STEPS)
    once = list(dict.fromkeys(pndm.timesteps.tolist()))  # PNDM visits its second timestep twice
    assert len(pndm.timesteps) == STEPS + 1 and walked.timesteps.tolist() == once
    assert torch.equal(walked.alphas_cumprod, pndm.alphas_cumprod)
    assert walked.final_alpha_cumprod == pndm.final_alpha_cumprod
    assert walked.config.prediction_type == prediction_type
    assert dict(pndm.config) == before
    assert len(read_grid(walked)) == STEPS


def test_pndm_as_it_is_loaded_keeps_defaults_that_ddim_has_otherwise(tmp_path):
    # A config file without the keys: `from_config` would take DDIM's own defaults, which clamp.
    pndm = diffusers.PNDMScheduler.from_config({"num_train_timesteps": 1000, "skip_prk_steps": True})
    walked = policy_scheduler(pndm)
    assert (walked.config.clip_sample, walked.config.set_alpha_to_one) == (False, False)
    assert torch.equal(walked.final_alpha_cumprod, pndm.alphas_cumprod[0])


def test_cogvideox_dpm_is_walked_as_ddim_on_its_schedule():
    options = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "snr_shift_scale": 1.0}
    dpm = diffusers.CogVideoXDPMScheduler(**options, rescale_betas_zero_snr=True)
    walked = policy_scheduler(dpm)
    assert type(walked) is diffusers.CogVideoXDDIMScheduler
    for scheduler in (dpm, walked):
        scheduler.set_timesteps(STEPS)
    assert torch.equal(walked.timesteps, dpm.timesteps) and torch.equal(walked.alphas_cumprod, dpm.alphas_cumprod)


def test_all_others_are_walked_on_a_copy():
    for user in (diffusers.DDIMScheduler(**SD15), diffusers.UniPCMultistepScheduler(**FLOW)):
        walked = policy_scheduler(user)
        assert type(walked) is type(user) and walked is not user and walked.config == user.config
        walked.step = None
        walked.set_timesteps(3)
        assert user.step is not None and len(user.timesteps) != 3


NOTES = [
    (diffusers.PNDMScheduler, {}, "sampling with DDIMScheduler on the same noise schedule.*keeps its PNDMScheduler"),
    (diffusers.CogVideoXDPMScheduler, {}, "sampling with CogVideoXDDIMScheduler"),
    (diffusers.DPMSolverMultistepScheduler, {}, "order 2 .*forced to 1. Timesteps and noise levels stay"),
    (diffusers.DPMSolverSinglestepScheduler, {"solver_order": 3}, "order 3 .*forced to 1"),
    (diffusers.DPMSolverMultistepScheduler, {"solver_order": 1}, None),
    (diffusers.UniPCMultistepScheduler, {}, "order 2 .*forced to 1; its corrector"),
    (diffusers.UniPCMultistepScheduler, {"solver_order": 1}, "UniPCMultistepScheduler: its corrector"),
    (diffusers.EDMDPMSolverMultistepScheduler, {}, "forced to 1"),
    (diffusers.DDPMScheduler, {"variance_type": "fixed_large"}, "fixed_large.* becomes the variance of the posterior"),
    (diffusers.DDPMScheduler, {}, None),
    (diffusers.DDIMScheduler, {}, None),
    (diffusers.EulerDiscreteScheduler, {}, None),
    (diffusers.FlowMatchEulerDiscreteScheduler, {}, None),
    (diffusers.LCMScheduler, {}, None),
]


@pytest.mark.parametrize(("scheduler_class", "options", "note"), NOTES)
def test_what_is_changed_is_said(scheduler_class, options, note):
    said = scheduler_note(scheduler_class(**options))
    if note is None:
        assert said is None
    else:
        assert re.search(note, said) and "\n" not in said


def test_a_large_variance_becomes_the_posteriors():
    grids = []
    for variance in ("fixed_small", "fixed_large", "fixed_large_log"):
        scheduler = diffusers.DDPMScheduler(**SD15, variance_type=variance)
        scheduler.set_timesteps(STEPS)
        grids.append(read_grid(scheduler))
    assert torch.equal(grids[0].sigma, grids[1].sigma) and torch.equal(grids[0].sigma, grids[2].sigma)


# ---------------------------------------------------------------------------------------------- through a pipeline


# Images in [0, 1]; the steps are computed in another order than diffusers does it.
IMAGE_TOLERANCE = 2e-6


def rolled_out_and_untouched(scheduler, oracle, **call):
    """Images of the policy on `scheduler`, and of the untouched pipeline on `oracle`, from the same seeds."""
    pipe, prompts, seeds = stable_diffusion(scheduler=scheduler), ["a cat", "two dogs"], [1, 2]
    ours = Policy(pipe, call_kwargs={"num_inference_steps": 4}).rollout(prompts, seeds).images
    assert pipe.scheduler is scheduler
    pipe.scheduler = oracle
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return ours, pipe(prompts, generator=generators, num_inference_steps=4, output_type="pt", **call).images


@pytest.mark.parametrize("scheduler_class", [diffusers.LCMScheduler, diffusers.EulerAncestralDiscreteScheduler])
def test_a_rollout_draws_what_the_schedulers_own_steps_draw(scheduler_class):
    scheduler = scheduler_class(**SD15, steps_offset=1)
    ours, untouched = rolled_out_and_untouched(scheduler, scheduler)
    assert (ours - untouched).abs().max() <= IMAGE_TOLERANCE


def test_a_rollout_on_pndm_draws_what_ddim_draws(caplog):
    ddim = diffusers.DDIMScheduler(**SD15, steps_offset=1, clip_sample=False, set_alpha_to_one=False)
    ours, untouched = rolled_out_and_untouched(diffusers.PNDMScheduler(**PNDM), ddim, eta=1.0)
    assert (ours - untouched).abs().max() <= IMAGE_TOLERANCE
    assert "sampling with DDIMScheduler" in caplog.text


def test_a_rollout_of_a_second_order_solver_draws_what_the_first_order_draws(caplog):
    options = SD15 | {"algorithm_type": "sde-dpmsolver++", "steps_offset": 1}
    second, first = (diffusers.DPMSolverMultistepScheduler(**options, solver_order=order) for order in (2, 1))
    ours, untouched = rolled_out_and_untouched(second, first)
    assert (ours - untouched).abs().max() <= IMAGE_TOLERANCE
    assert "order 2 (solver_order)" in caplog.text
