"""The trainer optimises what the paper says: on a Gaussian chain where gradient and optimum are known in closed form.

What is compared is `J = reward_weight E[reward] - kl_weight sum_t E[KL_t]` of tests/gaussian_toy.py. The trainer descends the mean of its loss over the transitions of an update, so with
`train_log_prob_reduction = "sum"` its gradient is that of `-J / S` (`S` denoising steps), and with `"mean"` that of `-J / (S D)` (`D` coordinates).
"""

import pytest
import torch
from gaussian_toy import STEPS, Chain, D, pretrained


STANDARD_ERRORS = 4.0  # 16 parameters of a comparison are all within them but once in a thousand seeds

WORLD = Chain(linear=(1.0, -0.7), curvature=(0.8, 0.5), reward_weight=0.5, kl_weight=1.0)
# Away from the pretrained parameters: slopes too, so that a KL depends on where its state is.
NUDGED = pretrained() + 0.3 * torch.randn(2, STEPS, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def standard_error(values: torch.Tensor) -> torch.Tensor:
    return values.std(dim=0) / len(values) ** 0.5


# ---------------------------------------------------------------- the formulas themselves


def test_the_formulas_are_those_of_simulated_paths():
    path = WORLD.simulate(NUDGED, 200_000, seed=3)
    mean, variance = WORLD.moments(NUDGED)
    slope, shift = NUDGED - pretrained()
    _, gain, s = WORLD.steps()
    apart = (gain[:, None, None] * (slope[:, None] * path[:-1] + shift[:, None]) / s[:, None, None]).square().sum(
        -1
    ) / 2
    rewards = WORLD.reward(path[-1])
    scale, offset, constant = (table[:, None] for table in WORLD.value(NUDGED))
    values = (scale * path[:-1] - 0.5 * offset * path[:-1].square() + constant).sum(-1)
    for sampled, expected in [
        (path.transpose(0, 1), mean),
        ((path - mean[:, None]).square().transpose(0, 1), variance),
        (apart.T, WORLD.kl(NUDGED)),
        (rewards, WORLD.mean_reward(NUDGED)),
        (((rewards - values) * values).T, torch.zeros(STEPS)),  # what V leaves over has nothing to do with the state
        ((rewards - values).T, torch.zeros(STEPS)),
    ]:
        assert ((sampled.mean(0) - expected).abs() < STANDARD_ERRORS * standard_error(sampled)).all()


@pytest.mark.parametrize("kl_gradient", ["paper", "exact", "reward"])
def test_the_estimators_average_to_the_gradient_in_closed_form(kl_gradient):
    path = WORLD.simulate(NUDGED, 200_000, seed=4)
    sampled = WORLD.sample_gradients(NUDGED, path, kl_gradient)
    error = standard_error(sampled)
    assert ((sampled.mean(0) - WORLD.gradient(NUDGED, kl_gradient)).abs() < STANDARD_ERRORS * error).all()
    other = WORLD.gradient(NUDGED, "exact" if kl_gradient == "paper" else "paper")
    assert ((sampled.mean(0) - other).abs() > 10 * STANDARD_ERRORS * error).any()


def test_the_optimum_of_a_linear_reward_is_the_tilted_chain():
    """The best policy is the pretrained one times `exp(reward_weight reward / kl_weight)`, which moves each mean by what is known here and leaves the slopes."""
    world = Chain(linear=(1.0, -0.7), reward_weight=0.5, kl_weight=0.25)
    scale, _ = world.affine(pretrained())
    _, gain, s = world.steps()
    afterwards = torch.stack([scale[step + 1 :].prod(dim=0) for step in range(STEPS)])
    moves = (0.5 / 0.25) * s.square()[:, None] * world.coefficients()[0] * afterwards
    expected = pretrained() + torch.stack([torch.zeros_like(moves), moves / gain[:, None]])
    torch.testing.assert_close(world.optimum(), expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(world.stationary_point("paper", world.optimum()), expected, atol=1e-9, rtol=0)
