"""`Gaussian` against `torch.distributions`, and its draws against diffusers'."""

import math

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch.distributions import Normal, kl_divergence

from dpok_trl.core.gaussian import Gaussian


# float32 against float64, relative to the largest value.
FLOAT32_TOLERANCE = 1e-6
# Kolmogorov-Smirnov statistic times sqrt(n): above this for one in 10,000 true samples (the seed is fixed).
KS_LIMIT = 2.23
SHAPE = (3, 4, 8, 8)


def gaussian(seed=0, std=(0.03, 0.7, 14.6), shape=SHAPE, requires_grad=False):
    mean = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return Gaussian(mean.requires_grad_(requires_grad), torch.tensor(std))


def normal(distribution):
    """The same in float64, from torch."""
    std = distribution.std.double().reshape(-1, *[1] * (distribution.mean.dim() - 1))
    return Normal(distribution.mean.double(), std.expand(distribution.mean.shape))


def reduced(x, reduction):
    return x.flatten(1).mean(1) if reduction == "mean" else x.flatten(1).sum(1)


def assert_close(actual, expected):
    assert actual.dtype == torch.float32 and actual.shape == expected.shape
    assert (actual.double() - expected).abs().max() <= FLOAT32_TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [SHAPE, (3, 16, 12), (3, 1)])
def test_log_prob_equals_torch(reduction, shape):
    distribution = gaussian(shape=shape)
    x = distribution.sample(torch.Generator().manual_seed(1))
    assert_close(distribution.log_prob(x, reduction), reduced(normal(distribution).log_prob(x.double()), reduction))


def test_log_prob_by_hand():
    distribution = Gaussian(torch.tensor([[1.0, -1.0]]), torch.tensor([2.0]))
    x = torch.tensor([[3.0, -5.0]])  # 1 and 2 standard deviations away
    total = -0.5 * (1 + 4) - 2 * math.log(2.0) - math.log(2 * math.pi)
    torch.testing.assert_close(distribution.log_prob(x, "sum"), torch.tensor([total]))
    torch.testing.assert_close(distribution.log_prob(x, "mean"), torch.tensor([total / 2]))
    torch.testing.assert_close(distribution.log_prob(x), torch.tensor([total / 2]))


def test_log_prob_of_half_precision_is_that_of_its_values():
    distribution = gaussian()
    for dtype in (torch.bfloat16, torch.float16):
        x = distribution.sample(torch.Generator().manual_seed(1), dtype=dtype)
        assert x.dtype == dtype
        assert torch.equal(distribution.log_prob(x), distribution.log_prob(x.float()))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_log_prob_gradient_is_the_score(reduction):
    distribution = gaussian(requires_grad=True)
    x = distribution.sample(torch.Generator().manual_seed(1)).detach()
    (gradient,) = torch.autograd.grad(distribution.log_prob(x, reduction).sum(), distribution.mean)
    residual = (x - distribution.mean).double() / distribution.std.double().reshape(-1, 1, 1, 1).square()
    assert_close(gradient, residual / (1 if reduction == "sum" else x[0].numel()))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kl_equals_torch(reduction):
    here, there = gaussian(0), gaussian(1, std=(0.04, 0.5, 14.6))
    expected = reduced(kl_divergence(normal(here), normal(there)), reduction)
    assert_close(here.kl(there, reduction), expected)
    assert (here.kl(there, reduction) > 0).all()


def test_kl_at_equal_std_is_the_squared_distance_of_the_means():
    here, there = gaussian(0), gaussian(1)
    squares = (here.mean - there.mean).square().flatten(1).sum(1)
    assert_close(here.kl(there, "sum"), squares.double() / (2 * here.std.double().square()))
    # No constant is left over by rounding: of a distribution with itself it is exactly 0.
    assert torch.equal(here.kl(here, "sum"), torch.zeros(3))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kl_gradient_is_the_distance_over_the_variance(reduction):
    here, there = gaussian(0, requires_grad=True), gaussian(1)
    (gradient,) = torch.autograd.grad(here.kl(there, reduction).sum(), here.mean)
    expected = (here.mean - there.mean).double() / here.std.double().reshape(-1, 1, 1, 1).square()
    assert_close(gradient, expected / (1 if reduction == "sum" else here.mean[0].numel()))
    assert (gradient != 0).all()


def test_sample_residuals_are_standard_normal():
    distribution = gaussian(shape=(3, 10_000))
    residuals = (distribution.sample(torch.Generator().manual_seed(7)) - distribution.mean) / distribution.std[:, None]
    for row in residuals.double():
        uniform = Normal(0.0, 1.0).cdf(row).sort().values
        steps = torch.arange(len(row) + 1) / len(row)
        statistic = torch.maximum((uniform - steps[:-1]).max(), (steps[1:] - uniform).max())
        assert statistic * math.sqrt(len(row)) < KS_LIMIT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("as_list", [False, True])
def test_noise_is_that_of_diffusers(dtype, as_list):
    def generators():
        seeded = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
        return seeded if as_list else seeded[0]

    ours = Gaussian(torch.zeros(SHAPE), torch.ones(3)).sample(generators(), dtype=dtype)
    assert torch.equal(ours, randn_tensor(SHAPE, generator=generators(), dtype=dtype))


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    distribution = gaussian()
    together = distribution.sample([torch.Generator().manual_seed(seed) for seed in (5, 6, 7)])
    alone = Gaussian(distribution.mean[1:2], distribution.std[1:2]).sample([torch.Generator().manual_seed(6)])
    assert torch.equal(alone[0], together[1])


def test_global_generator_is_the_default():
    torch.manual_seed(3)
    first = gaussian().sample()
    torch.manual_seed(3)
    assert torch.equal(first, gaussian().sample())
    assert not torch.equal(first, gaussian().sample())


def test_zero_std_draws_the_mean_and_has_no_density():
    distribution = gaussian(std=(0.0, 0.5, 0.0))
    generator = torch.Generator().manual_seed(1)
    x = distribution.sample(generator)
    assert torch.equal(x[0], distribution.mean[0]) and torch.equal(x[2], distribution.mean[2])
    # The noise is consumed all the same, as by diffusers' own steps.
    expected = torch.Generator().manual_seed(1)
    torch.randn(SHAPE, generator=expected)
    assert torch.equal(generator.get_state(), expected.get_state())
    with pytest.raises(ValueError, match=r"log_prob needs std > 0, but std is 0 for the samples \[0, 2\]"):
        distribution.log_prob(x)
    with pytest.raises(ValueError, match="kl needs std > 0"):
        distribution.kl(gaussian())
    with pytest.raises(ValueError, match="kl needs std > 0"):
        gaussian().kl(distribution)


def test_shapes_are_never_broadcast():
    distribution = gaussian(shape=(3, 1))
    for wrong in (torch.zeros(3), torch.zeros(1, 1), torch.zeros(3, 3)):
        with pytest.raises(ValueError, match="exactly the shape"):
            distribution.log_prob(wrong)
    with pytest.raises(ValueError, match="exactly the shape"):
        distribution.kl(gaussian(shape=(3, 2)))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (torch.zeros(3, 2), torch.ones(3, 1), "shape"),
        (torch.zeros(3, 2), torch.ones(()), "shape"),
        (torch.zeros(3, 2), torch.ones(2), "shape"),
        (torch.zeros(3), torch.ones(3), "shape"),
        (torch.zeros(3, 2).bfloat16(), torch.ones(3), "float32"),
        (torch.zeros(3, 2), torch.ones(3).double(), "float32"),
        (torch.zeros(3, 2), torch.ones(3, device="meta"), "cpu"),
        (torch.zeros(1, 2), torch.tensor([-1.0]), ">= 0"),
        (torch.zeros(1, 2), torch.tensor([float("nan")]), "finite"),
        (torch.zeros(1, 2), torch.tensor([float("inf")]), "finite"),
    ],
)
def test_what_is_no_gaussian_is_refused(mean, std, message):
    with pytest.raises(ValueError, match=message):
        Gaussian(mean, std)


def test_wrong_arguments_are_refused_in_words():
    distribution = gaussian()
    with pytest.raises(ValueError, match='reduction must be "mean" or "sum"'):
        distribution.log_prob(distribution.mean, "max")
    for count in (1, 2, 4):
        with pytest.raises(ValueError, match=f"3 samples, {count} generators"):
            distribution.sample([torch.Generator()] * count)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_log_ratio_is_the_difference_of_the_log_probs_and_averages_to_the_kl(reduction):
    here, there = gaussian(0), gaussian(1)
    x = here.sample(torch.Generator().manual_seed(2))
    expected = reduced(normal(here).log_prob(x.double()) - normal(there).log_prob(x.double()), reduction)
    assert_close(here.log_ratio(there, x, reduction), expected)
    assert torch.equal(here.log_ratio(here, x, reduction), torch.zeros(3))
    # x = mean + std z: the ratio is the KL plus a term that is odd in z, so that a draw and its mirror image average to the KL
    mirrored = 2 * here.mean - x
    pair = (here.log_ratio(there, x, "sum") + here.log_ratio(there, mirrored, "sum")) / 2
    torch.testing.assert_close(pair, here.kl(there, "sum"), rtol=1e-4, atol=0)


def test_log_ratio_refuses_other_standard_deviations():
    with pytest.raises(ValueError, match="one std"):
        gaussian(0).log_ratio(gaussian(1, std=(0.04, 0.5, 14.6)), gaussian(0).mean)
