"""The grid and the transition against diffusers' own `step`, with its noise forced to 0 (the mean) and to 1 (the std)."""

import copy
import itertools
import math
import sys
from unittest import mock

import diffusers
import pytest
import torch
from diffusers.utils import is_scipy_available

from dpok_trl.core.transitions import Transition
from dpok_trl.policy.schedulers import (
    make_transition,
    next_distribution,
    read_grid,
    scheduler_step,
)


# All errors are relative to the largest value of the expected tensor.
# Both sides compute in float32, each in its own order.
FLOAT32_TOLERANCE = 1e-6
# diffusers' DDIM takes `1 - alpha_t / alpha_prev` in float32, which cancels in the last step of a leading grid.
DDIM_CANCELLATION_TOLERANCE = 2e-5
# diffusers' DEIS converts a flow to noise predictions, through a division by alpha = 3e-4 in the first step.
DEIS_FLOW_TOLERANCE = 5e-5
# diffusers keeps SCM's angles in float32, where cos(1.5708) is off by 4e-6 (and below zero).
TRIGFLOW_TOLERANCE = 1e-5
# diffusers adds 1e-12 to a denominator and subtracts two squares under the root of the noise.
LTX_TOLERANCE = 5e-6
# Ours against the textbook's formula in float64, from the same float32 table of alphas_cumprod.
REFERENCE_TOLERANCE = 6e-7
# For deterministic limits: noise of this size moves a mean by its square, out of the sight of float32.
VANISHING_NOISE = 1e-5

SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
STEPS = 10
SHAPE = (2, 4, 8, 8)


def random_inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)


def native_step(scheduler, index, model_output, sample, noise, **kwargs):
    """Step `index` of diffusers' own, with all of its noise equal to `noise`."""
    scheduler = copy.deepcopy(scheduler)
    timestep = scheduler.timesteps[index]
    if not isinstance(scheduler, (diffusers.DDIMScheduler, diffusers.DDPMScheduler, diffusers.CogVideoXDDIMScheduler)):
        scheduler.set_begin_index(index)
    scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "is_scale_input_called") else None

    def constant(shape, generator=None, device=None, dtype=None):
        return torch.full(tuple(shape), noise, dtype=dtype)

    with mock.patch.object(sys.modules[type(scheduler).__module__], "randn_tensor", constant, create=True):
        return scheduler.step(model_output, timestep, sample, return_dict=False, **kwargs)[0]


def relative_error(actual, expected):
    actual, expected = actual.double(), expected.double()
    # The floor is for the last step of DDPM, which diffusers gives a std of 1e-10 and we give one of 0.
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-3)).item()


def assert_same_as_native(
    scheduler, transition, indices=None, tolerance=FLOAT32_TOLERANCE, has_std=True, native=None, **kwargs
):
    """`native` is the oracle where it has other options than the scheduler that is read, order 1 instead of 2, say."""
    grid = read_grid(scheduler)
    native = native or scheduler
    assert grid.timesteps.tolist() == native.timesteps.double().tolist()[: len(grid)]
    model_output, sample = random_inputs()
    zeros = torch.zeros(SHAPE)
    for index in range(len(grid)) if indices is None else indices:
        ours = next_distribution(grid, transition, model_output, sample, index)
        mean = native_step(native, index, model_output, sample, 0.0, **kwargs)
        assert relative_error(ours.mean, mean) <= tolerance, f"mean of step {index}"
        if has_std:
            # From zeros the mean is zero: the std need not be the small difference of two large numbers.
            std = native_step(native, index, zeros, zeros, 1.0, **kwargs).flatten()[:2]
            assert relative_error(ours.std, std) <= tolerance, f"std of step {index}"


def ddim_reference(scheduler, index, model_output, sample, eta):
    """DDIM as in the paper (arXiv:2010.02502, eq. 12 and 16), in float64; the next timestep is that of the loop."""
    cumprod, config = scheduler.alphas_cumprod.double(), scheduler.config
    timesteps = scheduler.timesteps
    here = cumprod[timesteps[index]]
    there = cumprod[timesteps[index + 1]] if index + 1 < len(timesteps) else scheduler.final_alpha_cumprod.double()
    output, x = model_output.double(), sample.double()
    if config.prediction_type == "epsilon":
        x0, eps = (x - (1 - here).sqrt() * output) / here.sqrt(), output
    elif config.prediction_type == "sample":
        x0, eps = output, (x - here.sqrt() * output) / (1 - here).sqrt()
    else:
        x0, eps = here.sqrt() * x - (1 - here).sqrt() * output, here.sqrt() * output + (1 - here).sqrt() * x
    if config.clip_sample:
        x0 = x0.clamp(-config.clip_sample_range, config.clip_sample_range)
    std = eta * ((1 - there) / (1 - here) * (1 - here / there)).sqrt()
    return there.sqrt() * x0 + (1 - there - std**2).sqrt() * eps, std


DDIM_CASES = list(
    itertools.product(
        ["epsilon", "v_prediction", "sample"], ["leading", "linspace", "trailing"], [False, True], [False, True]
    )
)


def ddim(prediction_type, spacing, clip_sample, set_alpha_to_one, steps=STEPS):
    scheduler = diffusers.DDIMScheduler(
        **SD15,
        prediction_type=prediction_type,
        timestep_spacing=spacing,
        clip_sample=clip_sample,
        set_alpha_to_one=set_alpha_to_one,
        steps_offset=1 if spacing == "leading" else 0,
    )
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize(("prediction_type", "spacing", "clip_sample", "set_alpha_to_one"), DDIM_CASES)
@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_ddim_equals_diffusers_where_it_goes_to_the_next_timestep(
    prediction_type, spacing, clip_sample, set_alpha_to_one, eta
):
    # 10 divides 1000: "leading" and "trailing" agree everywhere, "linspace" on the last step only (see the next test).
    scheduler = ddim(prediction_type, spacing, clip_sample, set_alpha_to_one)
    timesteps = scheduler.timesteps.tolist()
    following = [*timesteps[1:], -1]
    agree = [i for i in range(STEPS) if max(timesteps[i] - 1000 // STEPS, -1) == following[i]]
    assert agree == ([STEPS - 1] if spacing == "linspace" else list(range(STEPS)))
    transition = Transition("ancestral", eta=eta)
    assert_same_as_native(scheduler, transition, agree, DDIM_CANCELLATION_TOLERANCE, eta=eta)


@pytest.mark.parametrize(("prediction_type", "spacing", "clip_sample", "set_alpha_to_one"), DDIM_CASES)
@pytest.mark.parametrize("steps", [10, 30])
def test_ddim_equals_the_paper_in_float64_on_every_step(
    prediction_type, spacing, clip_sample, set_alpha_to_one, steps
):
    # Where diffusers goes to t - 1000 // steps instead of the loop's next timestep, only this formula is the truth.
    scheduler = ddim(prediction_type, spacing, clip_sample, set_alpha_to_one, steps)
    grid, transition = read_grid(scheduler), Transition("ancestral", eta=0.8)
    model_output, sample = random_inputs()
    for index in range(steps):
        ours = next_distribution(grid, transition, model_output, sample, index)
        mean, std = ddim_reference(scheduler, index, model_output, sample, eta=0.8)
        assert relative_error(ours.mean, mean) <= REFERENCE_TOLERANCE, f"mean of step {index}"
        assert relative_error(ours.std, std.expand(2)) <= REFERENCE_TOLERANCE, f"std of step {index}"


def test_v_prediction_at_zero_snr_equals_the_posterior_in_float64():
    # diffusers' own step is no oracle here: it is off by 4e-3, by cancellation in sqrt(1 - alpha'^2 - std^2).
    scheduler = diffusers.DDIMScheduler(
        **SD15,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        rescale_betas_zero_snr=True,
    )
    scheduler.set_timesteps(STEPS)
    assert scheduler.alphas_cumprod[-1] == 0
    grid, transition = read_grid(scheduler), Transition("ancestral", eta=1.0)
    model_output, sample = random_inputs()
    for index in range(STEPS):
        # q(x_{t-1} | x_t, x0) in the form of DDPM (arXiv:2006.11239, eq. 7), in which nothing is subtracted.
        here = scheduler.alphas_cumprod[scheduler.timesteps[index]].double()
        last = index == STEPS - 1
        there = (
            torch.tensor(1.0).double() if last else scheduler.alphas_cumprod[scheduler.timesteps[index + 1]].double()
        )
        x0 = here.sqrt() * sample.double() - (1 - here).sqrt() * model_output.double()
        beta = 1 - here / there
        mean = there.sqrt() * beta / (1 - here) * x0
        mean = mean + (here / there).sqrt() * (1 - there) / (1 - here) * sample.double()
        ours = next_distribution(grid, transition, model_output, sample, index)
        assert relative_error(ours.mean, mean) <= REFERENCE_TOLERANCE
        std = ((1 - there) / (1 - here) * beta).sqrt()
        assert relative_error(ours.std, std.expand(2)) <= REFERENCE_TOLERANCE


@pytest.mark.parametrize("clip_sample", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_ddpm_equals_diffusers(prediction_type, spacing, clip_sample):
    scheduler = diffusers.DDPMScheduler(
        **SD15, prediction_type=prediction_type, timestep_spacing=spacing, clip_sample=clip_sample
    )
    scheduler.set_timesteps(STEPS)
    assert_same_as_native(scheduler, make_transition(read_grid(scheduler)))


def test_ddpm_with_custom_timesteps_equals_diffusers():
    scheduler = diffusers.DDPMScheduler(**SD15, clip_sample=False)
    scheduler.set_timesteps(timesteps=[900, 500, 100, 3])
    assert_same_as_native(scheduler, make_transition(read_grid(scheduler)))


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_euler_ancestral_equals_diffusers(prediction_type, spacing):
    scheduler = diffusers.EulerAncestralDiscreteScheduler(
        **SD15, prediction_type=prediction_type, timestep_spacing=spacing
    )
    scheduler.set_timesteps(STEPS)
    assert_same_as_native(scheduler, make_transition(read_grid(scheduler)))


SIGMAS = [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}]


@pytest.mark.parametrize("options", [*SIGMAS, {"final_sigmas_type": "sigma_min"}], ids=str)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "original_sample"])
def test_ode_is_euler(prediction_type, spacing, options):
    scheduler = diffusers.EulerDiscreteScheduler(
        **SD15, prediction_type=prediction_type, timestep_spacing=spacing, **options
    )
    scheduler.set_timesteps(STEPS)
    assert_same_as_native(scheduler, Transition("ode"))


@pytest.mark.parametrize(("prediction_type", "spacing", "clip_sample", "set_alpha_to_one"), DDIM_CASES)
def test_ode_is_ddim_at_eta_zero(prediction_type, spacing, clip_sample, set_alpha_to_one):
    scheduler = ddim(prediction_type, spacing, clip_sample, set_alpha_to_one)
    steps = [STEPS - 1] if spacing == "linspace" else range(STEPS)  # see test_ddim_equals_diffusers_where_...
    assert_same_as_native(scheduler, Transition("ode"), steps, eta=0.0)


@pytest.mark.skipif(not is_scipy_available(), reason="diffusers builds LMS with scipy only")
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_ode_is_lms_of_order_one(prediction_type, spacing):
    scheduler = diffusers.LMSDiscreteScheduler(**SD15, prediction_type=prediction_type, timestep_spacing=spacing)
    scheduler.set_timesteps(STEPS)
    assert_same_as_native(scheduler, Transition("ode"), order=1)


@pytest.mark.parametrize("options", [{}, {"use_karras_sigmas": True}, {"final_sigmas_type": "sigma_min"}], ids=str)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_first_order_sde_dpm_solver_equals_diffusers(prediction_type, options):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **SD15, prediction_type=prediction_type, solver_order=1, algorithm_type="sde-dpmsolver++", **options
    )
    scheduler.set_timesteps(STEPS)
    assert_same_as_native(scheduler, make_transition(read_grid(scheduler)))


def test_first_order_sde_dpm_solver_on_a_flow_equals_diffusers():
    scheduler = diffusers.DPMSolverMultistepScheduler(**FLOW, solver_order=1, algorithm_type="sde-dpmsolver++")
    scheduler.set_timesteps(STEPS)
    assert_same_as_native(scheduler, Transition("ancestral"))


SOLVERS = [
    diffusers.DPMSolverMultistepScheduler,
    diffusers.DPMSolverSinglestepScheduler,
    diffusers.DEISMultistepScheduler,
    diffusers.UniPCMultistepScheduler,
]
# With flow_shift 3 as Sana has it and 1; on karras sigmas (Cosmos 2.5) UniPC alone makes flow levels.
SOLVER_OPTIONS = {
    "vp": SD15 | {"prediction_type": "epsilon"},
    "vp-v": SD15 | {"prediction_type": "v_prediction"},
    "vp-x0": SD15 | {"prediction_type": "sample"},
    "vp-karras": SD15 | {"use_karras_sigmas": True},
    "vp-exponential": SD15 | {"use_exponential_sigmas": True},
    "flow": FLOW,
    "flow-unshifted": FLOW | {"flow_shift": 1.0},
}


def solvers(scheduler_class, options):
    """A scheduler of order 2, and the oracle: its twin of order 1."""
    pair = [scheduler_class(**options, solver_order=order) for order in (2, 1)]
    if scheduler_class is diffusers.UniPCMultistepScheduler:
        # Its corrector looks back at the step before; its predictor is the first-order solver.
        pair[1].disable_corrector = list(range(STEPS))
    for scheduler in pair:
        scheduler.set_timesteps(STEPS)
    return pair


@pytest.mark.parametrize("options", SOLVER_OPTIONS.values(), ids=SOLVER_OPTIONS)
@pytest.mark.parametrize("scheduler_class", SOLVERS)
def test_solvers_of_order_two_are_forced_to_order_one(scheduler_class, options):
    scheduler, first_order = solvers(scheduler_class, options)
    is_deis_flow = scheduler_class is diffusers.DEISMultistepScheduler and scheduler.config.use_flow_sigmas
    tolerance = DEIS_FLOW_TOLERANCE if is_deis_flow else FLOAT32_TOLERANCE
    assert_same_as_native(scheduler, Transition("ode"), tolerance=tolerance, native=first_order)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("scheduler_class", SOLVERS)
def test_solvers_keep_their_spacing(scheduler_class, spacing):
    options = SD15 | {"timestep_spacing": spacing, "steps_offset": 1}
    if scheduler_class is diffusers.DPMSolverSinglestepScheduler:
        options = SD15  # it knows but one spacing
    scheduler, first_order = solvers(scheduler_class, options)
    assert_same_as_native(scheduler, Transition("ode"), native=first_order)


def test_flow_levels_from_karras_sigmas():
    scheduler, first_order = solvers(diffusers.UniPCMultistepScheduler, FLOW | {"use_karras_sigmas": True})
    assert read_grid(scheduler).is_flow
    assert_same_as_native(scheduler, Transition("ode"), native=first_order)


def test_dynamic_shifting_of_unipc():
    options = FLOW | {"use_dynamic_shifting": True, "shift_terminal": 0.1}
    scheduler, first_order = (
        diffusers.UniPCMultistepScheduler(**options, solver_order=order, disable_corrector=list(range(STEPS)))
        for order in (2, 1)
    )
    for one in (scheduler, first_order):
        one.set_timesteps(STEPS, mu=0.8)
    assert_same_as_native(scheduler, Transition("ode"), native=first_order)


FLOW_MATCH_CASES = [
    ({}, {}),
    ({"shift": 3.0}, {}),
    ({"use_dynamic_shifting": True}, {"mu": 0.8}),
    ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"mu": 0.8}),
    ({"use_dynamic_shifting": True, "shift_terminal": 0.02}, {"mu": 0.8}),
    ({"use_karras_sigmas": True}, {}),
    ({"use_exponential_sigmas": True}, {}),
    pytest.param(
        {"use_beta_sigmas": True},
        {},
        marks=pytest.mark.skipif(not is_scipy_available(), reason="beta sigmas need scipy"),
    ),
    ({}, {"sigmas": [1.0, 0.7, 0.3, 0.1]}),
]


def flow_match(options, arguments, **more):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**options, **more)
    scheduler.set_timesteps(None if "sigmas" in arguments else STEPS, **arguments)
    return scheduler


@pytest.mark.parametrize(("options", "arguments"), FLOW_MATCH_CASES, ids=str)
def test_cps_at_eta_one_equals_stochastic_sampling(options, arguments):
    scheduler = flow_match(options, arguments, stochastic_sampling=True)
    assert make_transition(read_grid(scheduler)) == Transition("cps", eta=1.0)
    assert_same_as_native(scheduler, Transition("cps", eta=1.0))


@pytest.mark.parametrize("kind", ["ancestral", "cps", "flow_sde"])
@pytest.mark.parametrize(("options", "arguments"), FLOW_MATCH_CASES, ids=str)
def test_flow_match_euler_is_the_limit_of_vanishing_noise(options, arguments, kind):
    transition = Transition(kind, eta=VANISHING_NOISE, noise_level=VANISHING_NOISE)
    assert_same_as_native(flow_match(options, arguments), transition, has_std=False)


@pytest.mark.parametrize(("options", "arguments"), FLOW_MATCH_CASES, ids=str)
@pytest.mark.parametrize("invert_sigmas", [False, True])
def test_ode_is_flow_match_euler(options, arguments, invert_sigmas):
    # Inverted (Mochi), the levels count the signal, and the network predicts x0 - eps.
    scheduler = flow_match(options, arguments, invert_sigmas=invert_sigmas)
    assert make_transition(read_grid(scheduler)).kind == "flow_sde"
    assert_same_as_native(scheduler, Transition("ode"))


@pytest.mark.parametrize(("options", "arguments"), FLOW_MATCH_CASES, ids=str)
def test_cps_is_flow_match_lcm(options, arguments):
    scheduler = diffusers.FlowMatchLCMScheduler(**options)
    scheduler.set_timesteps(None if "sigmas" in arguments else STEPS, **arguments)
    assert_same_as_native(scheduler, make_transition(read_grid(scheduler)))


@pytest.mark.parametrize("arguments", [{"num_inference_steps": STEPS}, {"sigmas": [1.0, 0.9, 0.5, 0.0]}], ids=str)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ltx_ancestral_is_ancestral_with_another_eta_at_each_step(eta, arguments):
    scheduler = diffusers.LTXEulerAncestralRFScheduler(eta=eta)
    scheduler.set_timesteps(**arguments)
    grid = read_grid(scheduler)
    for index in range(len(grid)):
        if eta == 0 or index == len(grid) - 1:
            transition = Transition("ode")
        else:
            zeros = torch.zeros(SHAPE)
            std = native_step(scheduler, index, zeros, zeros, 1.0).double().max()
            transition = Transition("ancestral", eta=(std / Transition("ancestral").std(grid.levels(index))).item())
        assert_same_as_native(scheduler, transition, [index], tolerance=LTX_TOLERANCE)


# ------------------------------------------------------------------------------- consistency models, EDM, CogVideoX


@pytest.mark.parametrize("clip_sample", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 4, 10])
def test_cps_is_lcm(steps, prediction_type, clip_sample):
    # A small timestep_scaling, so that the boundary scalings are far from 0 and 1.
    for timestep_scaling in (10.0, 0.001):
        scheduler = diffusers.LCMScheduler(
            **SD15, prediction_type=prediction_type, clip_sample=clip_sample, timestep_scaling=timestep_scaling
        )
        scheduler.set_timesteps(steps)
        assert_same_as_native(scheduler, make_transition(read_grid(scheduler)))


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_tcd_is_cps_with_another_eta_at_each_step(prediction_type, gamma):
    scheduler = diffusers.TCDScheduler(**SD15, prediction_type=prediction_type)
    scheduler.set_timesteps(4)
    grid = read_grid(scheduler)
    assert make_transition(grid).kind == "cps"
    for index in range(len(grid)):
        transition = Transition("ode")
        if gamma > 0 and index < len(grid) - 1:
            zeros = torch.zeros(SHAPE)
            std = native_step(scheduler, index, zeros, zeros, 1.0, eta=gamma).double().max()
            transition = Transition("cps", eta=math.asin(std / grid.sigma[index + 1]) * 2 / math.pi)
        assert_same_as_native(scheduler, transition, [index], eta=gamma)


SCM_CASES = [(1, {"intermediate_timesteps": None}), (2, {}), (4, {"intermediate_timesteps": None})]


@pytest.mark.parametrize(("steps", "arguments"), SCM_CASES)
def test_cps_is_scm(steps, arguments):
    scheduler = diffusers.SCMScheduler()
    scheduler.set_timesteps(steps, **arguments)
    grid = read_grid(scheduler)
    assert len(grid) == steps
    assert_same_as_native(scheduler, make_transition(grid), tolerance=TRIGFLOW_TOLERANCE)


@pytest.mark.parametrize("schedule", ["karras", "exponential"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ode_is_edm_euler(prediction_type, schedule):
    scheduler = diffusers.EDMEulerScheduler(prediction_type=prediction_type, sigma_schedule=schedule)
    scheduler.set_timesteps(STEPS)
    assert_same_as_native(scheduler, Transition("ode"))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("algorithm", "transition"), [("dpmsolver++", Transition("ode")), ("sde-dpmsolver++", Transition("ancestral"))]
)
def test_edm_solvers_of_order_two_are_forced_to_order_one(algorithm, transition, prediction_type):
    # Playground 2.5 has it.
    scheduler, first_order = (
        diffusers.EDMDPMSolverMultistepScheduler(
            prediction_type=prediction_type, solver_order=order, algorithm_type=algorithm
        )
        for order in (2, 1)
    )
    for one in (scheduler, first_order):
        one.set_timesteps(STEPS)
    assert_same_as_native(scheduler, transition, native=first_order)


@pytest.mark.parametrize("rescale_betas_zero_snr", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ode_is_cogvideox(spacing, rescale_betas_zero_snr):
    # Its step does not clamp, whatever clip_sample says (True by default).
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", timestep_spacing=spacing, rescale_betas_zero_snr=rescale_betas_zero_snr
    )
    scheduler.set_timesteps(STEPS)
    assert_same_as_native(scheduler, Transition("ode"))


def test_auto_is_flow_sde_on_flow_grids_and_ancestral_on_others():
    assert make_transition(read_grid(flow_match({}, {}))).kind == "flow_sde"
    grid = read_grid(ddim("epsilon", "leading", False, False))
    assert make_transition(grid).kind == "ancestral"
    with pytest.raises(ValueError, match="flow-matching scheduler"):
        make_transition(grid, kind="flow_sde")
    with pytest.raises(ValueError, match="kind must be 'auto' or one of"):
        make_transition(grid, kind="ode")


# ---------------------------------------------------------------------------------------------- the contract of TRL


SCHEDULERS = {
    "ddim": lambda: ddim("epsilon", "leading", False, False),
    "ddpm": lambda: diffusers.DDPMScheduler(**SD15),
    "euler": lambda: diffusers.EulerDiscreteScheduler(**SD15),
    "dpm_flow": lambda: diffusers.DPMSolverMultistepScheduler(**FLOW, solver_order=1),
    "flow_match": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
}


@pytest.fixture(params=SCHEDULERS, name="scheduler")
def a_scheduler(request):
    scheduler = SCHEDULERS[request.param]()
    scheduler.set_timesteps(STEPS)
    return scheduler


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_scheduler_step_scores_what_it_drew_with_the_same_number(scheduler, dtype, reduction):
    model_output, sample = (x.to(dtype) for x in random_inputs())
    for timestep in scheduler.timesteps[:-1]:
        drawn = scheduler_step(
            scheduler,
            model_output,
            timestep,
            sample,
            generator=torch.Generator().manual_seed(1),
            reduction=reduction,
        )
        assert drawn.latents.dtype == dtype and drawn.log_probs.dtype == torch.float32
        again = scheduler_step(
            scheduler, model_output, timestep, sample, prev_sample=drawn.latents, reduction=reduction
        )
        assert torch.equal(again.log_probs, drawn.log_probs)
        assert again.latents is drawn.latents


def test_scheduler_step_draws_what_the_untouched_scheduler_draws():
    scheduler = ddim("epsilon", "leading", False, False)
    model_output, sample = random_inputs()
    for timestep in scheduler.timesteps[:-1]:
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        ours = scheduler_step(scheduler, model_output, timestep, sample, generator=generators).latents
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        native = scheduler.step(model_output, timestep, sample, eta=1.0, generator=generators).prev_sample
        assert relative_error(ours, native) <= FLOAT32_TOLERANCE


def test_scheduler_step_takes_one_timestep_per_sample(scheduler):
    model_output, sample = random_inputs()
    prev_sample = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    for first, second in [(0, 5), (7, 1)]:
        timesteps = scheduler.timesteps[[first, second]]
        both = scheduler_step(scheduler, model_output, timesteps, sample, prev_sample=prev_sample)
        for row, timestep in enumerate(timesteps):
            one = slice(row, row + 1)
            alone = scheduler_step(scheduler, model_output[one], timestep, sample[one], prev_sample=prev_sample[one])
            assert torch.equal(alone.mean[0], both.mean[row])
            assert torch.equal(alone.std[0], both.std[row])
            assert torch.equal(alone.log_probs[0], both.log_probs[row])


def test_gradient_reaches_the_model_output_and_only_through_the_log_prob(scheduler):
    model_output, sample = random_inputs()
    model_output.requires_grad_()
    drawn = scheduler_step(scheduler, model_output.detach(), scheduler.timesteps[2], sample)
    scored = scheduler_step(scheduler, model_output, scheduler.timesteps[2], sample, prev_sample=drawn.latents)
    (gradient,) = torch.autograd.grad(scored.log_probs.sum(), model_output)
    assert torch.isfinite(gradient).all() and (gradient != 0).any(dim=(1, 2, 3)).all()


def test_a_deterministic_step_is_drawn_without_a_log_prob():
    scheduler = flow_match({}, {})
    model_output, sample = random_inputs()
    last = scheduler.timesteps[-1]
    drawn = scheduler_step(scheduler, model_output, last, sample)
    assert drawn.log_probs is None and (drawn.std == 0).all() and torch.equal(drawn.latents, drawn.mean)
    with pytest.raises(ValueError, match="deterministic step has no density"):
        scheduler_step(scheduler, model_output, last, sample, prev_sample=drawn.latents)


def test_scheduler_step_refuses_in_words():
    scheduler = ddim("epsilon", "leading", False, False)
    model_output, sample = random_inputs()
    timestep = scheduler.timesteps[0]
    with pytest.raises(ValueError, match="eta must be in"):
        scheduler_step(scheduler, model_output, timestep, sample, eta=0.0)
    with pytest.raises(ValueError, match="exactly once"):
        scheduler_step(scheduler, model_output, 7, sample)
    with pytest.raises(ValueError, match="given both"):
        scheduler_step(scheduler, model_output, timestep, sample, prev_sample=sample, generator=torch.Generator())
    with pytest.raises(ValueError, match="predicts its variance"):
        scheduler_step(scheduler, torch.cat([model_output] * 2, dim=1), timestep, sample)
    with pytest.raises(ValueError, match="cannot serve a batch"):
        scheduler_step(scheduler, model_output, scheduler.timesteps[:3], sample)
    with pytest.raises(ValueError, match="exactly the shape"):
        scheduler_step(scheduler, model_output, timestep, sample, prev_sample=sample[:1])
