"""The transition's formulas against identities, float64 and the exact marginals of a Gaussian toy.

That they equal diffusers' own steps is in tests/policy/test_schedulers.py.
"""

import itertools

import pytest
import torch

from dpok_trl.core.transitions import NoiseLevels, Transition, predict_x0_eps


# float32 against float64, relative to the largest value; x0 from eps divides by alpha and loses as much.
FLOAT32_TOLERANCE = 1e-6
# Against float64 within float64.
FLOAT64_TOLERANCE = 1e-12
# The flow SDE with this much noise is the ODE.
VANISHING_NOISE = 1e-4
# On the toy, of a std of 0.5 at 640 steps; a rule with other marginals ("cps" at eta 0.5) is off by 0.04 there.
MARGINAL_TOLERANCE = 3e-3


def levels(alpha, sigma, next_alpha, next_sigma):
    return NoiseLevels(*(torch.tensor(value, dtype=torch.float64) for value in (alpha, sigma, next_alpha, next_sigma)))


def flow(sigma, next_sigma):
    return levels(1 - sigma, sigma, 1 - next_sigma, next_sigma)


VP = levels(0.6, 0.8, 0.8, 0.6)
VE = levels(1.0, 5.0, 1.0, 3.0)
FLOW = flow(0.75, 0.5)
GRIDS = pytest.mark.parametrize("grid", [VP, VE, FLOW], ids=["vp", "ve", "flow"])


def x0_eps_sample(grid):
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    return x0, eps, grid.alpha * x0 + grid.sigma * eps


def assert_close(actual, expected, tolerance=FLOAT32_TOLERANCE):
    assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(
    ("grid", "prediction_type"),
    [*itertools.product([VP, VE, FLOW], ["epsilon", "sample", "v_prediction"]), (FLOW, "flow_prediction")],
)
def test_prediction_recovers_x0_and_eps(grid, prediction_type):
    x0, eps, sample = x0_eps_sample(grid)
    norm = (grid.alpha**2 + grid.sigma**2).sqrt()
    output = {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": (grid.alpha * eps - grid.sigma * x0) / norm,
        "flow_prediction": eps - x0,
    }[prediction_type]
    predicted = predict_x0_eps(output.float(), sample.float(), grid, prediction_type)
    assert all(x.dtype == torch.float32 for x in predicted)
    # x0 = (x - sigma * eps) / alpha: rounding errors of x come out sigma / alpha times as large.
    tolerance = FLOAT32_TOLERANCE * max(1.0, float(grid.sigma / grid.alpha))
    assert_close(predicted[0], x0, tolerance)
    assert_close(predicted[1], eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    _, eps, sample = x0_eps_sample(VP)
    half = predict_x0_eps(eps.to(dtype), sample.to(dtype), VP, "epsilon")
    full = predict_x0_eps(eps.to(dtype).float(), sample.to(dtype).float(), VP, "epsilon")
    assert torch.equal(half[0], full[0]) and torch.equal(half[1], full[1])


@GRIDS
@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("kind", ["ancestral", "cps"])
def test_noise_of_a_true_sample_has_the_next_level(grid, kind, eta):
    # If x0 and eps are true, the next latents are alpha' x0 + sigma' (new noise): the coefficient of eps and the std
    # must add up to sigma'. For "ancestral" this is the closed form of DDIM; it holds for both.
    ones = torch.ones(1, 1)
    step = Transition(kind, eta=eta)(ones, 0 * ones, ones, grid)
    noise = step.mean.double().square() + step.std.double().square()
    assert_close(noise, grid.next_sigma.square().reshape(1, 1))
    signal = Transition(kind, eta=eta)(ones, ones, 0 * ones, grid).mean
    assert_close(signal, grid.next_alpha.reshape(1, 1))


@GRIDS
def test_ancestral_at_eta_one_is_the_posterior(grid):
    # q(x' | x, x0) of a Markov chain with the levels' marginals, from Gaussian conditioning in float64.
    x0, eps, sample = x0_eps_sample(grid)
    step = Transition("ancestral")(sample, x0, eps, grid)
    # x = (alpha / alpha') x' + noise of variance sigma^2 - (alpha / alpha')^2 sigma'^2
    ratio = grid.alpha / grid.next_alpha
    fresh = grid.sigma**2 - ratio**2 * grid.next_sigma**2
    variance = 1 / (1 / grid.next_sigma**2 + ratio**2 / fresh)
    mean = variance * (grid.next_alpha * x0 / grid.next_sigma**2 + ratio * sample / fresh)
    assert_close(step.mean, mean)
    assert_close(step.std, variance.sqrt().expand(2))
    assert Transition("ancestral").std(grid).item() == pytest.approx(variance.sqrt().item(), rel=FLOAT64_TOLERANCE)


def test_zero_snr_does_not_cancel():
    # From pure noise the best guess of x' is alpha' x0, and all of sigma' is fresh noise.
    start = levels(0.0, 1.0, 0.2, 0.96**0.5)
    generator = torch.Generator().manual_seed(0)
    velocity, sample = (torch.randn(2, 64, generator=generator) for _ in range(2))
    x0, eps = predict_x0_eps(velocity, sample, start, "v_prediction")
    assert torch.equal(x0, -velocity) and torch.equal(eps, sample)
    step = Transition("ancestral")(sample, x0, eps, start)
    assert torch.equal(step.mean, x0 * 0.2)
    assert torch.equal(step.std, start.next_sigma.float().expand(2))
    with pytest.raises(ValueError, match="zero terminal SNR"):
        predict_x0_eps(velocity, sample, start, "epsilon")


def test_cps_at_eta_one_forgets_eps_exactly():
    sample, x0, eps = torch.ones(1, 4), torch.ones(1, 4), torch.full((1, 4), 1e30)
    assert torch.equal(Transition("cps")(sample, x0, eps, FLOW).mean, torch.full((1, 4), 0.5))


@pytest.mark.parametrize(
    ("kind", "grid"),
    [("ancestral", levels(0.6, 0.8, 1.0, 0.0)), ("cps", flow(0.1, 0.0)), ("flow_sde", flow(0.1, 0.0))],
)
def test_a_step_to_no_noise_is_deterministic_and_ends_at_x0(kind, grid):
    x0, eps, sample = x0_eps_sample(grid)
    step = Transition(kind)(sample.float(), x0.float(), eps.float(), grid)
    assert torch.equal(step.std, torch.zeros(2))
    assert_close(step.mean, x0)


def test_a_step_to_the_same_level_stays():
    # DDIM with set_alpha_to_one=False and a last timestep of 0 has such a step.
    same = levels(0.8, 0.6, 0.8, 0.6)
    x0, eps, sample = x0_eps_sample(same)
    step = Transition("ancestral")(sample, x0, eps, same)
    assert torch.equal(step.std, torch.zeros(2))
    assert_close(step.mean, sample)


@GRIDS
def test_ode_is_ddim_without_noise(grid):
    x0, eps, sample = x0_eps_sample(grid)
    step = Transition("ode")(sample, x0, eps, grid)
    assert torch.equal(step.std, torch.zeros(2)) and Transition("ode").std(grid) == 0
    assert_close(step.mean, grid.next_alpha * x0 + grid.next_sigma * eps)
    # Noise of this size moves a mean by its square.
    for kind in ("ancestral", "cps"):
        assert_close(Transition(kind, eta=VANISHING_NOISE)(sample, x0, eps, grid).mean, step.mean.double())


def test_ode_on_a_flow_is_eulers_step():
    x0, eps, sample = x0_eps_sample(FLOW)
    step = Transition("ode")(sample, x0, eps, FLOW)
    assert_close(step.mean, sample + (FLOW.next_sigma - FLOW.sigma) * (eps - x0))


def test_ode_takes_no_notice_of_the_amounts_of_noise():
    x0, eps, sample = x0_eps_sample(FLOW)
    one, other = (Transition("ode", eta=eta, noise_level=a)(sample, x0, eps, FLOW) for eta, a in ((1, 0.7), (0, -1)))
    assert torch.equal(one.mean, other.mean) and torch.equal(one.std, other.std)


def test_levels_per_sample_equal_one_by_one():
    grids = [FLOW, flow(0.5, 0.25), flow(1.0, 0.9)]
    batch = NoiseLevels(
        *(torch.stack([getattr(g, name) for g in grids]) for name in ("alpha", "sigma", "next_alpha", "next_sigma"))
    )
    generator = torch.Generator().manual_seed(0)
    output, sample = (torch.randn(3, 2, 5, generator=generator) for _ in range(2))
    for kind in ("ancestral", "cps", "flow_sde", "ode"):
        transition = Transition(kind, eta=0.6)
        together = transition(sample, *predict_x0_eps(output, sample, batch, "flow_prediction"), batch)
        for row, grid in enumerate(grids):
            one = slice(row, row + 1)
            x0, eps = predict_x0_eps(output[one], sample[one], grid, "flow_prediction")
            alone = transition(sample[one], x0, eps, grid)
            assert torch.equal(alone.mean[0], together.mean[row]) and torch.equal(alone.std[0], together.std[row])


# ------------------------------------------------------------------------------------------------ the flow SDE


def flow_grpo(sample, velocity, sigma, next_sigma, noise_level, first_sigma_below_one):
    """As in Flow-GRPO's code (yifan123/flow_grpo, sd3_sde_with_logprob.py), in float64."""
    dt = next_sigma - sigma
    g = (sigma / (1 - (first_sigma_below_one if sigma == 1 else sigma))) ** 0.5 * noise_level
    mean = sample * (1 + g**2 / (2 * sigma) * dt) + velocity * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, g * (-dt) ** 0.5


@pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.0])
def test_flow_sde_equals_flow_grpo_except_on_the_last_step(noise_level):
    sigmas = torch.linspace(1.0, 0.0, 11, dtype=torch.float64)
    sigmas = (3 * sigmas / (1 + 2 * sigmas)).tolist()
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(1, 64, generator=generator, dtype=torch.float64) for _ in range(2))
    for sigma, next_sigma in itertools.pairwise(sigmas):
        if next_sigma == 0:
            continue
        sample = (1 - sigma) * x0 + sigma * eps
        step = Transition("flow_sde", noise_level=noise_level)(sample, x0, eps, flow(sigma, next_sigma))
        mean, std = flow_grpo(sample, eps - x0, sigma, next_sigma, noise_level, sigmas[1])
        assert_close(step.mean, mean)
        assert step.std.item() == pytest.approx(std, rel=FLOAT32_TOLERANCE)


def marginal(transition, steps, first_sigma=1.0, mean=0.3, std=0.5):
    """Mean and std at the end of the chain when the data are N(mean, std^2) and the velocity is exact.

    Everything is affine, so the moments are propagated without sampling: a step is `x -> slope * x + offset + noise`.
    """
    sigmas = [*torch.linspace(first_sigma, 0.0, steps + 1, dtype=torch.float64).tolist()]
    location = (1 - first_sigma) * mean
    variance = (1 - first_sigma) ** 2 * std**2 + first_sigma**2
    for sigma, next_sigma in itertools.pairwise(sigmas):
        x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        residual = (x - (1 - sigma) * mean) / ((1 - sigma) ** 2 * std**2 + sigma**2)
        x0, eps = mean + (1 - sigma) * std**2 * residual, sigma * residual
        step = transition(x, x0, eps, flow(sigma, next_sigma))
        offset = step.mean[0].item()
        slope = step.mean[1].item() - offset
        location = slope * location + offset
        variance = slope**2 * variance + step.std[0].item() ** 2
    return location, variance**0.5


@pytest.mark.parametrize(
    "transition",
    [
        Transition("flow_sde", noise_level=VANISHING_NOISE),
        Transition("flow_sde", noise_level=0.3),
        Transition("flow_sde", noise_level=0.7),
        Transition("flow_sde", noise_level=1.0),
        Transition("ancestral", eta=1.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("first_sigma", [1.0, 0.9997])
def test_marginals_of_a_gaussian_are_kept(transition, first_sigma):
    location, std = marginal(transition, 640, first_sigma)
    assert abs(location - 0.3) <= MARGINAL_TOLERANCE
    assert abs(std - 0.5) <= MARGINAL_TOLERANCE


def test_the_toy_tells_other_marginals_apart():
    _, std = marginal(Transition("cps", eta=0.5), 640)
    assert abs(std - 0.5) > 10 * MARGINAL_TOLERANCE


@pytest.mark.parametrize("steps", [10, 20, 40])
def test_with_few_steps_the_flow_sde_is_nearer_to_the_data_than_the_ode(steps):
    _, sde = marginal(Transition("flow_sde", noise_level=0.7), steps)
    _, ode = marginal(Transition("flow_sde", noise_level=VANISHING_NOISE), steps)
    assert abs(sde - 0.5) < 0.5 * abs(ode - 0.5)


def test_a_grid_that_begins_just_below_one_does_not_overshoot():
    # A shifted 0.999: Flow-GRPO's g^2 there is 1600, which would give a std of 7 and reverse the sign of x.
    step = flow(0.9997, 0.9639)
    transition = Transition("flow_sde", noise_level=0.7)
    assert transition.std(step).item() == pytest.approx(0.7, rel=1e-2)
    one = torch.ones(1, 1)
    slope = transition(one, one, one, step).mean.item()  # x0 = eps: no velocity
    assert 0.5 < slope < 1.0
    # It is the limit of the published rule at exactly 1.
    assert transition.std(flow(1.0, 0.9639)).item() == pytest.approx(0.7, rel=FLOAT64_TOLERANCE)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "ddim"}, "kind must be one of"),
        ({"kind": "ancestral", "eta": 0.0}, "eta must be in .* deterministic"),
        ({"kind": "cps", "eta": 1.5}, "eta must be in"),
        ({"kind": "ancestral", "eta": float("nan")}, "eta must be in"),
        ({"kind": "flow_sde", "noise_level": 0.0}, "noise_level must be > 0"),
        ({"kind": "flow_sde", "noise_level": float("inf")}, "noise_level must be > 0"),
    ],
)
def test_transitions_without_noise_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Transition(**arguments)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.8, 0.6, 0.6, 0.8), "must not add noise"),
        ((1.0, 0.0, 1.0, 0.0), "sigma > 0"),
        ((0.1, 1.0, 0.0, 0.5), "next_alpha > 0"),
        ((float("nan"), 1.0, 1.0, 0.5), "alpha >= 0"),
        (([0.6, 0.6], [0.8, 0.8], 0.8, 0.6), "all have shape"),
    ],
)
def test_levels_that_do_not_denoise_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        levels(*values)


def test_float32_levels_are_refused():
    with pytest.raises(ValueError, match="float64 on the cpu"):
        NoiseLevels(*(torch.tensor(value) for value in (0.6, 0.8, 0.8, 0.6)))


@pytest.mark.parametrize("grid", [VP, VE], ids=["vp", "ve"])
def test_flow_rules_off_the_flow_path_are_refused(grid):
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="needs a flow grid"):
        predict_x0_eps(x, x, grid, "flow_prediction")
    with pytest.raises(ValueError, match="needs a flow grid"):
        Transition("flow_sde")(x, x, x, grid)


def test_shapes_are_never_broadcast():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="twice the channels"):
        predict_x0_eps(torch.ones(2, 6), x, VP, "epsilon")
    with pytest.raises(ValueError, match="must have one shape"):
        Transition("ancestral")(x, x, torch.ones(2, 1), VP)
    batch = NoiseLevels(*(level.expand(3) for level in (VP.alpha, VP.sigma, VP.next_alpha, VP.next_sigma)))
    with pytest.raises(ValueError, match="noise levels for 3 samples cannot serve a batch of 2"):
        predict_x0_eps(x, x, batch, "epsilon")
