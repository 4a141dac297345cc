"""The value function: its network by hand, its regression on known functions, its statistics, its state."""

import io
import math

import pytest
import torch

from dpok_trl.core.value import StepConditionedMLP, ValueFunction, explained_variance


EXACT = {"rtol": 0, "atol": 0}
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}  # fp32, sums in another order
# Both runs see the same numbers but for the rounding of (reward - mean) / std in fp32, and AdamW's steps do not let it grow.
SAME_CURVE = 1e-4
LEARNED = 0.9  # explained variance

SIZE, STEPS = 6, 4


def value_function(**kwargs) -> ValueFunction:
    return ValueFunction(**{"learning_rate": 3e-3, "scale_targets": True, "seed": 0, "device": "cpu", **kwargs})


def rows(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, SIZE, generator=generator), torch.randint(STEPS, (count,), generator=generator)


def rewards_of(inputs: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Linear in the inputs, another map at every step."""
    return (inputs * torch.linspace(-1, 1, SIZE)).sum(dim=1) * (1 + steps) + steps


def drawing(inputs, steps, rewards, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def draw(count):
        chosen = torch.randint(len(rewards), (count,), generator=generator)
        return inputs[chosen], steps[chosen], rewards[chosen]

    return draw


def fitted(updates: int = 5, **kwargs) -> ValueFunction:
    value = value_function(**kwargs)
    inputs, steps = rows(64)
    rewards = rewards_of(inputs, steps)
    value.observe(rewards)
    value.build(SIZE, STEPS)
    value.fit(drawing(inputs, steps, rewards), batch_size=16, updates=updates)
    return value


# ---------------------------------------------------------------- the network


def test_the_network_is_the_one_written_by_hand():
    torch.manual_seed(0)
    network = StepConditionedMLP(SIZE, STEPS, hidden_size=5)
    torch.nn.init.normal_(network.last.weight)
    inputs, steps = rows(7)
    hidden = inputs
    for layer in network.hidden:
        scale = layer.embedding.weight[steps]
        hidden = torch.clamp(scale * (hidden @ layer.linear.weight.T + layer.linear.bias), min=0)
    expected = (hidden * network.last.weight).sum(dim=1) + network.last.bias
    torch.testing.assert_close(network(inputs, steps), expected, **ROUNDING)
    assert network(inputs, steps).shape == (7,)


def test_it_has_the_parameters_of_the_official_one():
    """4.56 million for latents of 4 x 64 x 64, CLIP's 768 dimensions and 50 steps."""
    network = StepConditionedMLP(4 * 64 * 64 + 768, 50)
    sizes = [(4 * 64 * 64 + 768 + 1) * 256 + 50 * 256] + 2 * [(256 + 1) * 256 + 50 * 256] + [256 + 1]
    assert sum(parameter.numel() for parameter in network.parameters()) == sum(sizes) == 4_561_409
    for layer in network.hidden:
        assert layer.embedding.weight.min() >= 0 and 0.9 < layer.embedding.weight.max() < 1


def test_all_processes_build_the_same_network_and_leave_torch_s_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    networks = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        value = value_function(seed=7)
        value.build(SIZE, STEPS)
        networks.append(value.network.state_dict())
    assert all(torch.equal(networks[0][name], networks[1][name]) for name in networks[0])
    torch.manual_seed(5)
    value_function().build(SIZE, STEPS)
    assert torch.equal(torch.rand(3), expected)
    other = value_function(seed=8)
    other.build(SIZE, STEPS)
    assert not torch.equal(other.network.hidden[0].linear.weight, networks[0]["hidden.0.linear.weight"])


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize("parts", [[100], [1, 99], [30, 0, 50, 20]])
def test_the_statistics_are_those_of_all_rewards(parts):
    rewards = 1e6 + torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    value = value_function()
    for part in rewards.split(parts):
        value.observe(part)
    assert value.target_mean == pytest.approx(rewards.mean().item(), rel=1e-14)
    assert value.target_std == pytest.approx(rewards.std(correction=0).item(), rel=1e-9)


def test_a_reward_that_is_not_finite_is_refused_and_changes_nothing():
    value = value_function()
    value.observe(torch.tensor([1.0, 3.0]))
    with pytest.raises(ValueError, match="1 of 2 rewards are not finite"):
        value.observe(torch.tensor([math.nan, 7.0]))
    assert (value.target_mean, value.target_std) == (2.0, 1.0)


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize(("scale_targets", "expected"), [(True, 4.0), (False, 0.0)])
def test_it_starts_at_the_mean(built, scale_targets, expected):
    value = value_function(scale_targets=scale_targets)
    inputs, steps = rows(5)
    assert torch.equal(value.predict(inputs, steps), torch.zeros(5))
    value.observe(torch.tensor([1.0, 2.0, 9.0]))
    if built:
        value.build(SIZE, STEPS)
    predicted = value.predict(inputs, steps)
    assert predicted.dtype == torch.float32 and torch.equal(predicted, torch.full((5,), expected))


def test_rewards_that_are_all_equal_are_their_own_value():
    value = value_function()
    inputs, steps = rows(8)
    rewards = torch.full((8,), 3.0)
    value.observe(rewards)
    value.build(SIZE, STEPS)
    assert value.fit(drawing(inputs, steps, rewards), batch_size=8, updates=3) == 0.0
    assert torch.equal(value.predict(inputs, steps), rewards)


# ---------------------------------------------------------------- regression


@pytest.mark.parametrize("scale_targets", [True, False])
def test_it_learns_a_function_that_differs_from_step_to_step(scale_targets):
    inputs, steps = rows(1000)
    rewards = rewards_of(inputs, steps)
    value = value_function(scale_targets=scale_targets)
    value.observe(rewards)
    value.build(SIZE, STEPS)
    value.fit(drawing(inputs, steps, rewards), batch_size=128, updates=150)
    unseen, unseen_steps = rows(500, seed=1)
    expected = rewards_of(unseen, unseen_steps)
    assert explained_variance(value.predict(unseen, unseen_steps), expected) > LEARNED
    wrong_steps = (unseen_steps + 1) % STEPS
    assert explained_variance(value.predict(unseen, wrong_steps), expected) < LEARNED


def test_with_scaled_targets_the_unit_of_the_reward_does_not_matter():
    inputs, steps = rows(64)
    rewards = rewards_of(inputs, steps)
    curves = {}
    for factor, shift in ((1.0, 0.0), (100.0, 5.0)):
        value = value_function()
        value.observe(rewards * factor + shift)
        value.build(SIZE, STEPS)
        draw = drawing(inputs, steps, rewards * factor + shift)
        losses = [value.fit(draw, batch_size=16, updates=1) / factor**2 for _ in range(20)]
        curves[factor] = losses, (value.predict(inputs, steps) - shift) / factor
    (losses, values), (scaled_losses, scaled_values) = curves.values()
    assert losses[-1] < 0.9 * losses[0]
    assert scaled_losses == pytest.approx(losses, rel=SAME_CURVE)
    torch.testing.assert_close(scaled_values, values, rtol=SAME_CURVE, atol=SAME_CURVE)


def test_the_loss_is_in_units_of_the_reward_squared():
    inputs, steps = rows(64)
    rewards = 3 + 10 * rewards_of(inputs, steps)
    for scale_targets, expected in ((True, rewards.var(correction=0)), (False, rewards.square().mean())):
        value = value_function(scale_targets=scale_targets)
        value.observe(rewards)
        value.build(SIZE, STEPS)
        loss = value.fit(lambda count: (inputs, steps, rewards), batch_size=64, updates=1)
        assert loss == pytest.approx(expected.item(), rel=1e-5)


INPUTS, STEPS_OF_ROWS = rows(32, seed=3)
REWARDS = rewards_of(INPUTS, STEPS_OF_ROWS)
ALL, FIRST, SECOND = slice(None), slice(0, 16), slice(16, 32)


def fit_to(value: ValueFunction, *parts: slice, average=lambda gradient: gradient) -> torch.Tensor:
    """One update with a batch for each part; returns the gradient before it was averaged."""
    gradients, left = [], iter(parts)

    def draw(count):
        part = next(left)
        return INPUTS[part], STEPS_OF_ROWS[part], REWARDS[part]

    def averaged(gradient):
        gradients.append(gradient)
        return average(gradient)

    value.fit(draw, batch_size=32 // len(parts), updates=1, accumulation=len(parts), average=averaged)
    assert next(left, None) is None and len(gradients) == 1
    return gradients[0]


def test_accumulated_batches_are_one_large_batch():
    # Of gradients, since AdamW makes a whole step of a gradient that is rounding alone.
    expected = fit_to(fitted(), ALL)
    assert expected.abs().max() > 0
    torch.testing.assert_close(fit_to(fitted(), FIRST, SECOND), expected, **ROUNDING)


def test_two_processes_that_average_their_gradients_are_one_with_both_batches():
    together, first, second = fitted(), fitted(), fitted()
    expected = fit_to(together, ALL)
    gradients = [fit_to(fitted(), part) for part in (FIRST, SECOND)]
    average = (gradients[0] + gradients[1]) / 2
    torch.testing.assert_close(average, expected, **ROUNDING)
    assert (gradients[0] - expected).abs().max() > 0.01  # each alone is another one
    # Whatever batch was drawn, the averaged gradient is what counts.
    for value, part in ((first, FIRST), (second, SECOND)):
        fit_to(value, part, average=lambda gradient: expected)
        assert torch.equal(value.predict(INPUTS, STEPS_OF_ROWS), together.predict(INPUTS, STEPS_OF_ROWS))
    assert not torch.equal(together.predict(INPUTS, STEPS_OF_ROWS), fitted().predict(INPUTS, STEPS_OF_ROWS))


def test_a_large_prediction_is_that_of_its_rows_and_half_precision_is_widened():
    value = fitted()
    inputs, steps = rows(5000)
    predicted = value.predict(inputs, steps)
    assert predicted.shape == (5000,)
    torch.testing.assert_close(predicted[4090:4100], value.predict(inputs[4090:4100], steps[4090:4100]), **ROUNDING)
    half = inputs[:10].to(torch.bfloat16)
    assert torch.equal(value.predict(half, steps[:10]), value.predict(half.float(), steps[:10]))


def test_what_cannot_be_fitted_is_refused():
    value = value_function()
    inputs, steps = rows(4)
    with pytest.raises(RuntimeError, match="call build"):
        value.fit(lambda count: (inputs, steps, inputs[:, 0]), batch_size=4, updates=1)
    value.build(SIZE, STEPS)
    with pytest.raises(FloatingPointError, match="value_learning_rate = 0.003"):
        value.fit(lambda count: (inputs * math.nan, steps, inputs[:, 0]), batch_size=4, updates=1)


# ---------------------------------------------------------------- state


def reloaded(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("built", [False, True])
def test_a_restored_one_goes_on_bit_for_bit(built):
    value = fitted()
    state = reloaded(value.state_dict())
    restored = value_function(seed=99)
    if built:
        restored.build(SIZE, STEPS)
    restored.load_state_dict(state)
    more, steps = rows(64, seed=2)
    rewards = 2 + rewards_of(more, steps)
    results = []
    for one in (value, restored):
        one.observe(rewards)
        loss = one.fit(drawing(more, steps, rewards), batch_size=16, updates=3)
        results.append((loss, one.predict(more, steps)))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[1][1], results[0][1], **EXACT)


def test_a_state_from_before_the_first_data_is_one_too():
    value = value_function()
    value.observe(torch.tensor([1.0, 2.0, 6.0]))
    restored = fitted()
    restored.load_state_dict(reloaded(value.state_dict()))
    assert restored.target_mean == 3.0
    assert torch.equal(restored.predict(*rows(2)), torch.full((2,), 3.0))


def test_a_restored_one_shares_nothing_with_the_other():
    value, restored = fitted(), value_function()
    restored.load_state_dict(value.state_dict())
    fit_to(restored, ALL)
    expected = fitted()
    assert torch.equal(fit_to(value, FIRST), fit_to(expected, FIRST))
    assert torch.equal(value.predict(INPUTS, STEPS_OF_ROWS), expected.predict(INPUTS, STEPS_OF_ROWS))


@pytest.mark.parametrize(("size", "steps"), [(SIZE + 1, STEPS), (SIZE, STEPS + 1)])
def test_other_sizes_are_refused_with_both_numbers(size, steps):
    words = f"built for {SIZE} inputs and {STEPS} denoising steps, and is given {size} inputs and {steps} steps"
    value = fitted()
    value.build(SIZE, STEPS)
    with pytest.raises(ValueError, match=words):
        value.build(size, steps)
    other = value_function()
    other.build(size, steps)
    with pytest.raises(ValueError, match=f"built for {size} inputs and {steps} denoising steps"):
        other.load_state_dict(value.state_dict())


# ---------------------------------------------------------------- explained variance


def test_explained_variance():
    rewards = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert explained_variance(rewards, rewards) == 1.0
    assert explained_variance(rewards + 7, rewards) == 1.0  # a constant error is no variance
    assert explained_variance(torch.full((4,), 3.0), rewards) == 0.0
    assert explained_variance(-rewards, rewards) == pytest.approx(-3.0)
    assert explained_variance(torch.tensor([1.0, 2.0, 3.0, 4.0]), rewards) == pytest.approx(1 - 0.75 / 3.5)
    assert math.isnan(explained_variance(rewards, torch.full((4,), 0.1)))
    assert math.isnan(explained_variance(rewards[:0], rewards[:0]))
    with pytest.raises(ValueError, match=r"\(4,\) and \(3,\)"):
        explained_variance(rewards, rewards[:3])
