"""The losses by hand, against REINFORCE and by finite differences."""

import math

import pytest
import torch

from dpok_trl.core.gaussian import Gaussian
from dpok_trl.core.objectives import (
    OBJECTIVES,
    dpok_loss,
    kl_mask_loss,
    kl_mask_metrics,
    noise_kl,
    ppo_loss,
    probability_ratio,
    ratio_metrics,
    reinforce_loss,
)


# float32 against numbers by hand.
FLOAT32_TOLERANCE = 1e-6
# Finite differences of a function that is computed in float32: 1e-7 of its value, up to 10, over a step of 4e-3; and the
# truncation, 3e-6 of the third derivative.
FLOAT32_STEP, FLOAT32_DIFFERENCE_TOLERANCE = 4e-3, 3e-4
CLIP = 0.1
THRESHOLD = 0.01


def log_ratios(*ratios):
    """log_prob and old_log_prob whose ratios are these."""
    old = torch.linspace(-1.4, -1.0, len(ratios), dtype=torch.float64)
    return old + torch.tensor(ratios, dtype=torch.float64).log(), old


def evaluate(objective, log_prob, old_log_prob, advantage, clip_range):
    """Loss and metrics, as the trainer puts them together."""
    loss = objective(probability_ratio(log_prob, old_log_prob), advantage, clip_range)
    return loss, ratio_metrics(log_prob, old_log_prob, clip_range)


def divergence_of(log_prob, old_log_prob):
    """Some divergence that grows with the ratio's distance from 1: beyond the threshold where the clip is."""
    return THRESHOLD / CLIP**2 * (log_prob - old_log_prob).detach().square()


LOSSES = {
    "dpok": lambda log_prob, old, advantage: dpok_loss(probability_ratio(log_prob, old), advantage, CLIP),
    "ppo": lambda log_prob, old, advantage: ppo_loss(probability_ratio(log_prob, old), advantage, CLIP),
    "kl_mask": lambda log_prob, old, advantage: kl_mask_loss(
        probability_ratio(log_prob, old), advantage, divergence_of(log_prob, old), THRESHOLD
    ),
    "reinforce": lambda log_prob, old, advantage: reinforce_loss(log_prob, advantage),
}
EVERY_LOSS = pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES)


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


@EVERY_LOSS
def test_on_policy_gradient_is_the_policy_gradient(loss_of):
    # Through a real policy: two steps of a Gaussian with a mean that is linear in the parameters.
    generator = torch.Generator().manual_seed(0)
    states, actions = (torch.randn(8, 3, generator=generator) for _ in range(2))
    advantage = torch.randn(8, generator=generator)
    weight = torch.randn(3, 3, generator=generator, requires_grad=True)
    log_prob = Gaussian(states @ weight, torch.full((8,), 0.5)).log_prob(actions, "sum")
    loss = loss_of(log_prob, log_prob.detach(), advantage)
    (actual,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (expected,) = torch.autograd.grad(-(advantage * log_prob).mean(), weight)
    torch.testing.assert_close(actual, expected, rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)
    assert (actual != 0).all()


@EVERY_LOSS
def test_gradient_equals_finite_differences(loss_of):
    # Away from the corners at 1 - c and 1 + c, on both sides of them and for both signs.
    log_prob, old = log_ratios(0.5, 0.5, 0.95, 0.95, 1.05, 1.05, 1.5, 1.5)
    advantage = torch.tensor([1.0, -2.0] * 4, dtype=torch.float64)
    log_prob.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss_of(x, old, advantage), log_prob)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_ratio_that_overflows_has_no_gradient_where_it_is_clipped(objective):
    log_prob = torch.tensor([200.0], requires_grad=True)
    loss, _ = evaluate(objective, log_prob, torch.zeros(1), torch.ones(1), CLIP)
    loss.backward()
    assert loss.item() == pytest.approx(-1.1) and log_prob.grad.item() == 0.0


def test_kl_mask_by_hand():
    # Inside; then beyond the threshold going further up and down, and back up and down; exactly at the threshold.
    ratio = torch.tensor([1.2, 1.5, 0.5, 0.5, 1.5, 1.5])
    advantage = torch.tensor([2.0, 1.0, -1.0, 1.0, -1.0, 3.0])
    divergence = torch.tensor([0.0, 0.2, 0.2, 0.2, 0.2, 0.1])
    loss = kl_mask_loss(ratio, advantage, divergence, 0.1)
    # A dropped transition counts as -A: the second, the third and the last.
    assert loss.item() == pytest.approx((-2.4 - 1.0 + 1.0 - 0.5 + 1.5 - 3.0) / 6, abs=FLOAT32_TOLERANCE)
    metrics = kl_mask_metrics(ratio.requires_grad_(), advantage, divergence, 0.1)
    assert metrics.keys() == {"policy/mask_fraction"}
    assert metrics["policy/mask_fraction"].item() == 0.5 and not metrics["policy/mask_fraction"].requires_grad
    # Without divergence nothing is dropped, and the loss is the ratio's.
    assert torch.equal(kl_mask_loss(ratio, advantage, torch.zeros(6), 0.1), (-advantage * ratio).mean())


@pytest.mark.parametrize("beyond", [False, True])
@pytest.mark.parametrize("ratio", [0.5, 1.5])
@pytest.mark.parametrize("advantage", [-2.0, 2.0])
def test_kl_mask_drops_what_goes_further_beyond_the_threshold_and_nothing_else(advantage, ratio, beyond):
    log_prob, old = log_ratios(ratio)
    log_prob.requires_grad_()
    divergence = torch.tensor([0.2 if beyond else 0.05], dtype=torch.float64, requires_grad=True)
    kl_mask_loss(
        probability_ratio(log_prob, old), torch.tensor([advantage], dtype=torch.float64), divergence, 0.1
    ).backward()
    goes_further = (ratio > 1) == (advantage > 0)
    assert log_prob.grad.item() == (0.0 if beyond and goes_further else pytest.approx(-advantage * ratio))
    assert divergence.grad is None


def test_kl_mask_never_drops_at_ratio_1_or_without_an_advantage():
    ratio = torch.tensor([1.0, 1.0, 0.5, 1.5], requires_grad=True)
    advantage, far = torch.tensor([1.0, -1.0, 0.0, 0.0]), torch.full((4,), 9.0)
    assert kl_mask_metrics(ratio, advantage, far, 0.1)["policy/mask_fraction"] == 0
    kl_mask_loss(ratio, advantage, far, 0.1).backward()
    assert ratio.grad.tolist() == [-0.25, 0.25, 0.0, 0.0]


def test_kl_mask_refuses_shapes_and_thresholds():
    row = torch.ones(3)
    for arguments in [(row, row[:, None], row), (row, row, row[:, None]), (row, row, row[:2]), (row[:, None],) * 3]:
        with pytest.raises(ValueError, match="same shape"):
            kl_mask_loss(*arguments, 0.1)
    for threshold in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="threshold must be > 0"):
            kl_mask_loss(row, row, row, threshold)


def test_reinforce_by_hand():
    log_prob = torch.tensor([-1.0, -2.0, 0.5], requires_grad=True)
    loss = reinforce_loss(log_prob, torch.tensor([1.0, -3.0, 2.0]))
    assert loss.item() == pytest.approx((1.0 - 6.0 - 1.0) / 3, abs=FLOAT32_TOLERANCE)
    loss.backward()
    assert log_prob.grad.tolist() == pytest.approx([-1 / 3, 1.0, -2 / 3], abs=FLOAT32_TOLERANCE)
    with pytest.raises(ValueError, match="same shape"):
        reinforce_loss(log_prob, torch.ones(3, 1))


def test_without_a_clip_range_there_is_no_clip_fraction():
    log_prob, old = log_ratios(1.05, 1.5)
    with_clip, without = ratio_metrics(log_prob, old, CLIP), ratio_metrics(log_prob, old, None)
    assert with_clip.pop("policy/clip_fraction") == 0.5
    assert with_clip == without


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


@EVERY_LOSS
def test_results_are_float32_and_old_log_prob_and_advantage_get_no_gradient(loss_of):
    log_prob = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    old = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    advantage = torch.ones(2, dtype=torch.float64, requires_grad=True)
    loss = loss_of(log_prob, old, advantage)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert all(value.dtype == torch.float32 for value in ratio_metrics(log_prob, old, CLIP).values())
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


# --------------------------------------------------------------------------- through a network, by finite differences


def network(seed=0):
    """A network of 3 inputs and 4 outputs as a function of its parameters, and those parameters, in float64."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    parameters = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in [(3, 4), (4,)]]
    return lambda weight, bias: torch.tanh(inputs @ weight + bias), [one.requires_grad_() for one in parameters]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_of_noise_kl_through_a_network(reduction):
    output_of, parameters = network()
    reference = torch.linspace(-1.0, 1.0, 8, dtype=torch.float64).reshape(2, 4)
    squares = (output_of(*parameters) - reference).square()
    expected = squares.mean(1) if reduction == "mean" else squares.sum(1)
    assert torch.equal(noise_kl(output_of(*parameters), reference, reduction), expected)  # in float64 too
    assert torch.autograd.gradcheck(lambda *theta: noise_kl(output_of(*theta), reference, reduction), parameters)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_of_the_exact_kl_through_a_network(reduction):
    output_of, parameters = network()
    std = torch.tensor([0.8, 1.3])
    reference = Gaussian(torch.linspace(-1.0, 1.0, 8).reshape(2, 4), std)

    def kl(*theta):
        return Gaussian(output_of(*theta).float(), std).kl(reference, reduction).double()

    def in_float64(*theta):
        squares = (output_of(*theta) - reference.mean.double()).square() / (2 * std.double()[:, None] ** 2)
        return squares.mean(1) if reduction == "mean" else squares.sum(1)

    assert torch.autograd.gradcheck(in_float64, parameters)
    for row in range(2):
        expected = torch.autograd.grad(in_float64(*parameters)[row], parameters)
        actual = torch.autograd.grad(kl(*parameters)[row], parameters)
        for one, other in zip(actual, expected, strict=True):
            assert (one - other).norm() <= FLOAT32_TOLERANCE * other.norm()
    # And against differences of itself, as far as float32 sees them.
    assert torch.autograd.gradcheck(
        kl, parameters, eps=FLOAT32_STEP, atol=FLOAT32_DIFFERENCE_TOLERANCE, rtol=FLOAT32_DIFFERENCE_TOLERANCE
    )


@EVERY_LOSS
def test_gradient_of_a_loss_with_the_kl_through_a_network(loss_of):
    # As the trainer adds them up, here in float64 throughout, near the network that drew and away from the reference.
    output_of, parameters = network()
    step, noise, reference = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    old_output = output_of(*parameters).detach() + 0.01 * step
    actions, advantage = old_output + 0.5 * noise, torch.tensor([1.5, -0.5], dtype=torch.float64)

    def log_prob(mean):
        return -(actions - mean).square().sum(1) / (2 * 0.5**2)

    def kl(*theta):
        return 0.3 * noise_kl(output_of(*theta), reference).mean()

    def loss(*theta):
        return loss_of(log_prob(output_of(*theta)), log_prob(old_output), advantage) + kl(*theta)

    assert torch.autograd.gradcheck(loss, parameters)
    for with_reward, without in zip(
        torch.autograd.grad(loss(*parameters), parameters),
        torch.autograd.grad(kl(*parameters), parameters),
        strict=True,
    ):
        assert (with_reward - without).norm() > 0.1 * without.norm() > 0
