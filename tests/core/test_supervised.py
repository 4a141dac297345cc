"""The supervised losses by hand; the regression target against the prediction that it inverts."""

import itertools

import pytest
import torch

from dpok_trl.core.grid import SchedulerGrid, predict_on_grid
from dpok_trl.core.supervised import (
    noisy_latents,
    regression_target,
    reward_weights,
    shifted_reward_weights,
    squared_errors,
    target_on_grid,
    weighted_loss,
)
from dpok_trl.core.transitions import NoiseLevels, predict_x0_eps


# Of the largest value, in float32; x0 from eps divides by alpha, c_out >= 0.1 and so loses as much.
FLOAT32_TOLERANCE = 1e-5

ALPHA_SIGMA = {
    "vp": ([0.1, 0.6, 0.8, 0.96], [0.99**0.5, 0.8, 0.6, 0.28]),
    "ve": ([1.0, 1.0, 1.0, 1.0], [9.0, 5.0, 3.0, 0.5]),
    "flow": ([0.1, 0.25, 0.5, 0.9], [0.9, 0.75, 0.5, 0.1]),
}
KINDS = [*itertools.product(["vp", "ve", "flow"], ["epsilon", "sample", "v_prediction"]), ("flow", "flow_prediction")]


def grid_of(name, prediction_type, scalings=None):
    alpha, sigma = (torch.tensor(values, dtype=torch.float64) for values in ALPHA_SIGMA[name])
    timesteps = torch.tensor([900.0, 500.0, 100.0], dtype=torch.float64)
    return SchedulerGrid(timesteps, alpha, sigma, prediction_type, is_flow=name == "flow", x0_scalings=scalings)


def parts():
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(3, 2, 4, 4, generator=generator) for _ in range(2))


def assert_close(actual, expected):
    assert (actual - expected).abs().max() <= FLOAT32_TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("steps", [1, torch.tensor([2, 0, 1])], ids=["one step", "a step each"])
@pytest.mark.parametrize(("name", "prediction_type"), KINDS)
def test_target_is_the_inverse_of_the_prediction(name, prediction_type, steps):
    grid, (x0, eps) = grid_of(name, prediction_type), parts()
    levels = grid.levels(steps)
    x = noisy_latents(x0, eps, levels)
    target = regression_target(prediction_type, x0, eps, levels)
    assert target.dtype == torch.float32
    for actual, expected in zip(predict_x0_eps(target, x, levels, prediction_type), (x0, eps), strict=True):
        assert_close(actual, expected)
    assert torch.equal(target_on_grid(grid, x0, eps, steps), target)


def test_targets_by_hand():
    levels = NoiseLevels(*(torch.tensor(value, dtype=torch.float64) for value in (0.6, 0.8, 0.8, 0.6)))
    x0, eps = torch.full((1, 1), 2.0), torch.full((1, 1), 3.0)
    assert noisy_latents(x0, eps, levels).item() == pytest.approx(0.6 * 2 + 0.8 * 3)
    expected = {"epsilon": 3.0, "sample": 2.0, "v_prediction": 0.6 * 3 - 0.8 * 2, "flow_prediction": 1.0}
    for prediction_type, value in expected.items():
        assert regression_target(prediction_type, x0, eps, levels).item() == pytest.approx(value)
    with pytest.raises(ValueError, match="prediction_type must be one of"):
        regression_target("noise", x0, eps, levels)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_target_undoes_the_scalings_of_x0(prediction_type):
    """Those of consistency models: x0 = c_out * (what the network says of it) + c_skip * x."""
    scalings = tuple(torch.tensor(values, dtype=torch.float64) for values in ([0.9, -0.5, 0.2], [0.1, 0.5, 0.9]))
    grid, (x0, eps) = grid_of("vp", prediction_type, scalings), parts()
    steps = torch.tensor([2, 0, 1])
    target = target_on_grid(grid, x0, eps, steps)
    x = noisy_latents(x0, eps, grid.levels(steps))
    for actual, expected in zip(predict_on_grid(grid, target, x, steps), (x0, eps), strict=True):
        assert_close(actual, expected)
    assert not torch.equal(target, target_on_grid(grid_of("vp", prediction_type), x0, eps, steps))


def test_a_step_at_which_the_network_is_not_asked_has_no_target():
    scalings = tuple(torch.tensor(values, dtype=torch.float64) for values in ([0.9, 0.5, 0.0], [0.1, 0.5, 1.0]))
    x0, eps = parts()
    with pytest.raises(ValueError, match="c_out = 0"):
        target_on_grid(grid_of("vp", "sample", scalings), x0, eps, 2)


def test_the_loss_by_hand():
    output = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 1.0]], requires_grad=True)
    target = torch.tensor([[1.0, 0.0], [3.0, 1.0], [3.0, 1.0]])
    errors = squared_errors(output, target)
    assert errors.tolist() == [2.0, 5.0, 0.0]  # means over the two dimensions
    loss = weighted_loss(errors, torch.tensor([1.0, 0.5, 7.0]))
    assert loss.item() == pytest.approx((2.0 + 2.5) / 3)
    loss.backward()
    # w * 2 * (out - target) / (dimensions * samples)
    assert torch.allclose(output.grad, torch.tensor([[0.0, 2.0], [-1.5, -0.5], [0.0, 0.0]]) * 2 / 6)


def test_weights_are_the_rewards():
    assert reward_weights(torch.tensor([0.0, 0.5, 2.0])).tolist() == [0.0, 0.5, 2.0]
    assert reward_weights(torch.tensor([0.25, float("nan"), float("-inf")])).tolist() == [0.25, 0.0, 0.0]


def test_negative_rewards_are_no_weights():
    with pytest.raises(
        ValueError, match=r'^2 of 5 rewards are negative, the smallest is -1\.5: .*"kl_d" with sft_gamma >= 1\.5'
    ):
        reward_weights(torch.tensor([0.5, -1.5, float("nan"), -0.25, 0.0]))


def test_kl_d_shifts_the_weights_and_clips_them_at_zero():
    rewards = torch.tensor([-2.0, -1.0, -0.5, 1.0, float("nan")])
    weights, clipped = shifted_reward_weights(rewards, 1.0)
    assert weights.tolist() == [0.0, 0.0, 0.5, 2.0, 0.0]
    assert clipped.item() == 0.25  # -2 alone: -1 + 1 is 0 without a clip, and the NaN does not count
    assert shifted_reward_weights(rewards, 2.0)[1].item() == 0.0


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(3,\) and \(3, 1\)"):
        weighted_loss(torch.ones(3), torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"output and target must have one shape .*\(3, 2\) and \(3, 1\)"):
        squared_errors(torch.ones(3, 2), torch.ones(3, 1))
    with pytest.raises(ValueError, match="eps and x0"):
        noisy_latents(torch.ones(3, 2), torch.ones(3, 1), grid_of("vp", "epsilon").levels(0))
