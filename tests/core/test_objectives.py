"""The losses by hand, against REINFORCE and by finite differences."""

import math

import pytest
import torch

from dpok_trl.core.gaussian import Gaussian
from dpok_trl.core.objectives import OBJECTIVES, dpok_loss, noise_kl, ppo_loss, probability_ratio, ratio_metrics


# float32 against numbers by hand.
FLOAT32_TOLERANCE = 1e-6
CLIP = 0.1


def log_ratios(*ratios):
    """log_prob and old_log_prob whose ratios are these."""
    old = torch.linspace(-1.4, -1.0, len(ratios), dtype=torch.float64)
    return old + torch.tensor(ratios, dtype=torch.float64).log(), old


def evaluate(objective, log_prob, old_log_prob, advantage, clip_range):
    """Loss and metrics, as the trainer puts them together."""
    loss = objective(probability_ratio(log_prob, old_log_prob), advantage, clip_range)
    return loss, ratio_metrics(log_prob, old_log_prob, clip_range)


def gradient(objective, ratios, advantages):
    """The gradient of the loss with respect to each log_prob."""
    log_prob, old = log_ratios(*ratios)
    log_prob.requires_grad_()
    loss, _ = evaluate(objective, log_prob, old, torch.tensor(advantages, dtype=torch.float64), CLIP)
    return torch.autograd.grad(loss, log_prob)[0].tolist()


def test_losses_by_hand():
    # Inside; then clipped above with A > 0 and A < 0, and below with A > 0 and A < 0.
    ratios = [1.05, 1.15, 1.5, 0.5, 0.85]
    log_prob, old = log_ratios(*ratios)
    advantage = torch.tensor([2.0, 1.0, -1.0, 1.0, -1.0])
    loss, metrics = evaluate(dpok_loss, log_prob.float(), old.float(), advantage, CLIP)
    assert loss.item() == pytest.approx((-2.1 - 1.1 + 1.1 - 0.9 + 0.9) / 5, abs=FLOAT32_TOLERANCE)
    loss, _ = evaluate(ppo_loss, log_prob.float(), old.float(), advantage, CLIP)
    assert loss.item() == pytest.approx((-2.1 - 1.1 + 1.5 - 0.5 + 0.9) / 5, abs=FLOAT32_TOLERANCE)
    squares = [math.log(ratio) ** 2 for ratio in ratios]
    expected = {
        "policy/ratio_mean": sum(ratios) / 5,
        "policy/ratio_deviation_max": 0.5,
        "policy/clip_fraction": 4 / 5,
        "policy/approx_kl": 0.5 * sum(squares) / 5,
    }
    assert metrics.keys() == expected.keys()
    for name, value in metrics.items():
        assert value.shape == () and not value.requires_grad and value.dtype == torch.float32
        assert value.item() == pytest.approx(expected[name], abs=FLOAT32_TOLERANCE), name


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_on_policy_ratio_is_exactly_one(objective):
    log_prob = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 100
    advantage = torch.randn(64, generator=torch.Generator().manual_seed(1))
    loss, metrics = evaluate(objective, log_prob, log_prob.clone(), advantage, 1e-4)
    assert torch.equal(loss, -advantage.mean())
    assert metrics["policy/ratio_deviation_max"] == 0 and metrics["policy/clip_fraction"] == 0
    assert metrics["policy/ratio_mean"] == 1 and metrics["policy/approx_kl"] == 0


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_on_policy_gradient_is_that_of_reinforce(objective):
    # Through a real policy: two steps of a Gaussian with a mean that is linear in the parameters.
    generator = torch.Generator().manual_seed(0)
    states, actions = (torch.randn(8, 3, generator=generator) for _ in range(2))
    advantage = torch.randn(8, generator=generator)
    weight = torch.randn(3, 3, generator=generator, requires_grad=True)
    log_prob = Gaussian(states @ weight, torch.full((8,), 0.5)).log_prob(actions, "sum")
    loss, _ = evaluate(objective, log_prob, log_prob.detach(), advantage, 1e-4)
    (actual,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (expected,) = torch.autograd.grad(-(advantage * log_prob).mean(), weight)
    torch.testing.assert_close(actual, expected, rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)
    assert (actual != 0).all()


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_gradient_equals_finite_differences(objective):
    # Away from the corners at 1 - c and 1 + c, on both sides of them and for both signs.
    log_prob, old = log_ratios(0.5, 0.5, 0.95, 0.95, 1.05, 1.05, 1.5, 1.5)
    advantage = torch.tensor([1.0, -2.0] * 4, dtype=torch.float64)
    log_prob.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: evaluate(objective, x, old, advantage, CLIP)[0], log_prob)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_ratio_that_overflows_has_no_gradient_where_it_is_clipped(objective):
    log_prob = torch.tensor([200.0], requires_grad=True)
    loss, _ = evaluate(objective, log_prob, torch.zeros(1), torch.ones(1), CLIP)
    loss.backward()
    assert loss.item() == pytest.approx(-1.1) and log_prob.grad.item() == 0.0


def test_where_the_two_losses_differ():
    # Gradients by hand: d(-A r)/d(log p) = -A r, over the 4 rows.
    # Beyond the range in the direction of the advantage, both stop.
    assert gradient(dpok_loss, [1.5, 0.5], [1.0, -1.0]) == [0.0, 0.0]
    assert gradient(ppo_loss, [1.5, 0.5], [1.0, -1.0]) == [0.0, 0.0]
    # Beyond it against the advantage, PPO brings the ratio back, and the published DPOK does not.
    assert gradient(dpok_loss, [0.5, 1.5], [1.0, -1.0]) == [0.0, 0.0]
    assert gradient(ppo_loss, [0.5, 1.5], [1.0, -1.0]) == pytest.approx([-0.25, 0.75])
    # Within it, they are one.
    inside = [-0.5 * 0.95 * 2.0, 0.5 * 1.05 * 3.0]
    assert gradient(dpok_loss, [0.95, 1.05], [2.0, -3.0]) == pytest.approx(inside)
    assert gradient(ppo_loss, [0.95, 1.05], [2.0, -3.0]) == pytest.approx(inside)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_results_are_float32_and_old_log_prob_and_advantage_get_no_gradient(objective):
    log_prob = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    old = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    advantage = torch.ones(2, dtype=torch.float64, requires_grad=True)
    loss, metrics = evaluate(objective, log_prob, old, advantage, CLIP)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert all(value.dtype == torch.float32 for value in metrics.values())
    loss.backward()
    assert log_prob.grad is not None and old.grad is None and advantage.grad is None


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_shapes_are_never_broadcast(objective):
    column, row = torch.zeros(3, 1), torch.zeros(3)
    for arguments in [(row, row, column), (row, column, row), (column, row, row), (row, row, row[:1])]:
        with pytest.raises(ValueError, match="same shape"):
            evaluate(objective, *arguments, CLIP)
    with pytest.raises(ValueError, match="same shape"):
        evaluate(objective, column, column, column, CLIP)
    for clip_range in (0.0, -1e-4, float("nan")):
        with pytest.raises(ValueError, match="clip_range must be > 0"):
            evaluate(objective, row, row, row, clip_range)


def test_noise_kl_by_hand_and_its_gradient():
    output = torch.tensor([[1.0, 2.0], [0.0, -3.0]], requires_grad=True)
    reference = torch.tensor([[0.0, 4.0], [0.0, -3.0]])
    assert noise_kl(output, reference).tolist() == [2.5, 0.0]
    assert noise_kl(output, reference, "sum").tolist() == [5.0, 0.0]
    (of_mean,) = torch.autograd.grad(noise_kl(output, reference).sum(), output)
    assert of_mean.tolist() == [[1.0, -2.0], [0.0, 0.0]]
    (of_sum,) = torch.autograd.grad(noise_kl(output, reference, "sum").sum(), output)
    assert of_sum.tolist() == [[2.0, -4.0], [0.0, 0.0]]
    assert noise_kl(output.bfloat16(), reference.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match="one shape"):
        noise_kl(output, reference[:1])


def test_exact_kl_is_the_noise_kl_times_the_weight_of_the_step():
    # Departures from the paper in the published code: with mean = c * output + rest, KL = c^2 / (2 std^2) * noise KL.
    generator = torch.Generator().manual_seed(0)
    output, reference, rest = (torch.randn(2, 5, generator=generator) for _ in range(3))
    std = torch.tensor([0.1, 0.4])
    exact = Gaussian(0.3 * output + rest, std).kl(Gaussian(0.3 * reference + rest, std))
    expected = 0.3**2 / (2 * std**2) * noise_kl(output, reference)
    torch.testing.assert_close(exact, expected, rtol=10 * FLOAT32_TOLERANCE, atol=0.0)
