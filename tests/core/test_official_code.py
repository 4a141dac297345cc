"""Our pieces, put together, are the update of DPOK's published code (google-research/dpok, train_online_pg.py).

Its formulas are written out below in float64, as one function of the noise prediction, with nothing of ours in it.
"""

import math

import pytest
import torch

from dpok_trl.core.advantages import value_advantages
from dpok_trl.core.grid import SchedulerGrid, next_distribution
from dpok_trl.core.objectives import dpok_loss, noise_kl, probability_ratio, ratio_metrics
from dpok_trl.core.transitions import Transition


REWARD_WEIGHT, KL_WEIGHT, RATIO_CLIP, ACCUMULATION = 10.0, 0.01, 1e-4, 12
ROWS, SHAPE = 6, (4, 16, 16)
# float32 against float64, relative. The gradient of a log-probability has (x - mean) / std in it, where x is about 1: it
# is exact to this tolerance over std, which is 0.45 at the first step and 0.02 at the last.
FLOAT32_TOLERANCE = 1e-6

# Stable Diffusion's noise schedule, and DDIM's 50 steps in it ("leading" spacing, steps_offset 1, set_alpha_to_one
# False): 981, 961 ... 21, 1.
ALPHAS_CUMPROD = (1.0 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
TIMESTEPS = [981 - 20 * step for step in range(50)]
GRID = SchedulerGrid(
    timesteps=torch.tensor(TIMESTEPS, dtype=torch.float64),
    alpha=ALPHAS_CUMPROD[[*TIMESTEPS, 0]].sqrt(),
    sigma=(1 - ALPHAS_CUMPROD[[*TIMESTEPS, 0]]).sqrt(),
    prediction_type="epsilon",
)
# The first, some between, the one of largest weight (21) and the last.
STEPS = [TIMESTEPS.index(timestep) for timestep in (981, 501, 101, 41, 21, 1)]


def official_variance(timestep):
    """Of DDIM at eta 1, and the levels before and after the step."""
    alpha_prod_t, alpha_prod_t_prev = ALPHAS_CUMPROD[timestep], ALPHAS_CUMPROD[max(timestep - 20, 0)]
    variance = (1 - alpha_prod_t_prev) / (1 - alpha_prod_t) * (1 - alpha_prod_t / alpha_prod_t_prev)
    return variance, alpha_prod_t, alpha_prod_t_prev


def official_loss(timestep, noise, transitions):
    """The loss of one accumulated micro-batch, and the ratios."""
    x, next_x, old_noise, pretrained_noise, rewards, values = (one.double() for one in transitions)
    variance, alpha_prod_t, alpha_prod_t_prev = official_variance(timestep)
    std = variance.sqrt()

    def mean_log_prob(noise):
        pred_x0 = (x - (1 - alpha_prod_t).sqrt() * noise) / alpha_prod_t.sqrt()
        mu = alpha_prod_t_prev.sqrt() * pred_x0 + (1 - alpha_prod_t_prev - variance).sqrt() * noise
        log_prob = -((next_x - mu) ** 2) / (2 * variance) - std.log() - math.log(math.sqrt(2 * math.pi))
        return log_prob.mean(dim=(1, 2, 3))

    ratio = torch.exp(mean_log_prob(noise) - mean_log_prob(old_noise))
    advantage = rewards - values
    policy_loss = (-REWARD_WEIGHT * advantage * torch.clamp(ratio, 1.0 - RATIO_CLIP, 1.0 + RATIO_CLIP)).mean()
    kl = ((noise - pretrained_noise) ** 2).mean()
    return (policy_loss + KL_WEIGHT * kl) / ACCUMULATION, ratio


def our_loss(step, noise, transitions):
    """The same of the package's pieces, and their metrics."""
    x, next_x, old_noise, pretrained_noise, rewards, values = transitions

    def log_prob(noise):
        return next_distribution(GRID, Transition("ancestral", eta=1.0), noise, x, step).log_prob(next_x, "mean")

    new, old = log_prob(noise), log_prob(old_noise)
    advantage = value_advantages(rewards, values[:, None], scale=False)[:, 0]
    policy_loss = REWARD_WEIGHT * dpok_loss(probability_ratio(new, old), advantage, RATIO_CLIP)
    kl = noise_kl(noise, pretrained_noise, "mean").mean()
    return (policy_loss + KL_WEIGHT * kl) / ACCUMULATION, ratio_metrics(new, old, RATIO_CLIP)


def fixed_transitions(step):
    """The noise prediction of the policy and its transitions at one step; the first half moved little, the others far."""
    generator = torch.Generator().manual_seed(step)
    x, noise, direction, pretrained = torch.randn(4, ROWS, *SHAPE, generator=generator)
    variance, alpha_prod_t, alpha_prod_t_prev = official_variance(TIMESTEPS[step])
    # d mean / d noise in units of std: how far the policy moves with its noise prediction.
    slope = (1 - alpha_prod_t_prev - variance).sqrt() - (alpha_prod_t_prev * (1 - alpha_prod_t) / alpha_prod_t).sqrt()
    moved = torch.tensor([1e-3] * (ROWS // 2) + [5e-2] * (ROWS - ROWS // 2)) / (slope.abs() / variance.sqrt()).float()
    old = noise + moved[:, None, None, None] * direction
    next_x = next_distribution(GRID, Transition("ancestral", eta=1.0), old, x, step).sample(generator)
    rewards, values = torch.randn(2, ROWS, generator=generator)
    return noise, (x, next_x, old, noise + 0.03 * pretrained, rewards, values)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: f"t={TIMESTEPS[step]}")
def test_loss_and_gradient_are_those_of_the_official_code(step):
    noise, transitions = fixed_transitions(step)
    ours, theirs = noise.clone().requires_grad_(), noise.double().requires_grad_()
    loss, metrics = our_loss(step, ours, transitions)
    expected_loss, ratio = official_loss(TIMESTEPS[step], theirs, transitions)

    # Half of the transitions are clipped, and none is so near the end of the range that rounding decides.
    deviation = (ratio - 1).abs()
    assert (deviation > RATIO_CLIP).tolist() == [False] * (ROWS // 2) + [True] * (ROWS // 2)
    assert (deviation - RATIO_CLIP).abs().min() > 10 * FLOAT32_TOLERANCE
    assert metrics["policy/clip_fraction"] == 0.5
    assert metrics["policy/ratio_deviation_max"].item() == pytest.approx(deviation.max().item(), abs=FLOAT32_TOLERANCE)

    *_, rewards, values = transitions
    size_of_terms = REWARD_WEIGHT * (rewards - values).abs().mean().item() / ACCUMULATION  # of both signs: they cancel
    assert abs(loss.item() - expected_loss.item()) <= FLOAT32_TOLERANCE * size_of_terms

    (gradient,) = torch.autograd.grad(loss, ours)
    (expected,) = torch.autograd.grad(expected_loss, theirs)
    tolerance = FLOAT32_TOLERANCE / official_variance(TIMESTEPS[step])[0].sqrt()
    for row in range(ROWS):  # in the clipped ones nothing is left but the KL term
        assert (gradient[row] - expected[row]).norm() <= tolerance * expected[row].norm()
        assert expected[row].norm() > 0


def test_before_the_first_update_the_loss_is_minus_the_mean_advantage():
    _, (x, next_x, old, _, rewards, values) = fixed_transitions(10)
    loss, metrics = our_loss(10, old.clone(), (x, next_x, old, old, rewards, values))
    assert metrics["policy/ratio_deviation_max"] == 0
    expected = -REWARD_WEIGHT * (rewards - values).mean().item() / ACCUMULATION
    assert loss.item() == pytest.approx(expected, rel=FLOAT32_TOLERANCE)


def test_the_weight_that_the_official_kl_leaves_out():
    # Exact KL of a step over squared difference of the noise: (d mean / d noise)^2 / (2 std^2).
    generator = torch.Generator().manual_seed(0)
    x, noise, reference = torch.randn(3, 1, *SHAPE, generator=generator)
    weights = {}
    for step, timestep in enumerate(TIMESTEPS):
        new, old = (next_distribution(GRID, Transition("ancestral"), one, x, step) for one in (noise, reference))
        weights[timestep] = (new.kl(old, "mean") / noise_kl(noise, reference, "mean")).item()
    by_hand = {981: 0.131, 501: 0.071, 101: 0.163, 41: 0.517, 21: 5.36, 1: 0.503}
    assert {timestep: weights[timestep] for timestep in by_hand} == pytest.approx(by_hand, rel=5e-3)
    assert max(weights.values()) / min(weights.values()) == pytest.approx(77, abs=0.5)  # as docs/algorithms.md says
    assert max(weights, key=weights.get) == 21
