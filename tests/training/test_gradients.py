"""The cosine between the policy gradients of prompts: known angles, and a trainer that does not notice."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from dpok_trl.core.trajectory import Transitions
from dpok_trl.training.batches import TrainingBatch
from dpok_trl.training.gradients import gradient_cosines, prompt_gradient_cosines, transitions_by_prompt


ROUNDING = 1e-6  # of float32 in a handful of products
SHARED = "gradient/prompts", "gradient/cosine_mean", "gradient/cosine_min", "gradient/norm_ratio"


def rows(gradients) -> Transitions:
    """Transitions that stand for the rows of a linear model: its input, one row each, is the gradient of the row."""
    gradients = torch.tensor(gradients, dtype=torch.float32)
    count = len(gradients)
    return Transitions(gradients, tuple(range(count)), (0,) * count, torch.zeros(count), torch.ones(count))


@pytest.fixture
def linear():
    return torch.nn.Linear(2, 1, bias=False)


def measure(linear, **prompts):
    def loss_of(transitions):
        return linear(transitions.trajectory).mean()

    return gradient_cosines(loss_of, prompts, list(linear.parameters()))


@pytest.mark.parametrize(
    ("first", "second", "cosine", "ratio"),
    [
        ([3.0, 4.0], [6.0, 8.0], 1.0, 2.0),
        ([3.0, 4.0], [-4.0, 3.0], 0.0, 1.0),
        ([3.0, 4.0], [-9.0, -12.0], -1.0, 3.0),
        ([1.0, 0.0], [1.0, 1.0], math.sqrt(0.5), math.sqrt(2)),
    ],
)
def test_known_angles(linear, first, second, cosine, ratio):
    metrics = measure(linear, cat=[rows([first])], dog=[rows([second])])
    assert tuple(metrics) == SHARED
    assert metrics["gradient/prompts"] == 2
    assert metrics["gradient/cosine_mean"] == pytest.approx(cosine, abs=ROUNDING)
    assert metrics["gradient/cosine_min"] == pytest.approx(cosine, abs=ROUNDING)
    assert metrics["gradient/norm_ratio"] == pytest.approx(ratio, abs=ROUNDING)


def test_mean_and_minimum_are_over_pairs(linear):
    metrics = measure(linear, a=[rows([[1.0, 0.0]])], b=[rows([[0.0, 2.0]])], c=[rows([[-5.0, 0.0]])])
    assert metrics["gradient/cosine_mean"] == pytest.approx((0 - 1 + 0) / 3, abs=ROUNDING)
    assert metrics["gradient/cosine_min"] == pytest.approx(-1, abs=ROUNDING)
    assert metrics["gradient/norm_ratio"] == pytest.approx(5, abs=ROUNDING)


def test_a_prompt_in_parts_counts_by_rows(linear):
    """(2, 0) alone and the mean of (0, 1), (0, 1), (0, 1): together (0.5, 0.75), and not the mean of two means."""
    parts = [rows([[2.0, 0.0]]), rows([[0.0, 1.0]] * 3)]
    metrics = measure(linear, cat=parts, dog=[rows([[1.0, 0.0]])])
    assert metrics["gradient/cosine_mean"] == pytest.approx(0.5 / math.hypot(0.5, 0.75), abs=ROUNDING)


def test_a_prompt_without_a_gradient_has_no_direction(linear):
    nothing, up, right = [rows([[0.0, 0.0]])], [rows([[0.0, 1.0]])], [rows([[2.0, 0.0]])]
    metrics = measure(linear, a=up, b=nothing, c=right)
    assert metrics == {name: value for name, value in zip(SHARED, (2, 0, 0, 2), strict=True)}
    alone = measure(linear, a=up, b=nothing)
    assert alone["gradient/prompts"] == 1
    assert all(math.isnan(alone[name]) for name in SHARED[1:])


def test_a_gradient_that_is_not_finite_shows(linear):
    metrics = measure(linear, a=[rows([[0.0, 1.0]])], b=[rows([[math.nan, 0.0]])])
    assert metrics["gradient/prompts"] == 2
    assert all(math.isnan(metrics[name]) for name in SHARED[1:])


def test_one_prompt_has_nothing_to_be_compared_with(linear):
    assert measure(linear, cat=[rows([[1.0, 0.0]])]) == {}


def test_weights_that_a_loss_does_not_depend_on_count_as_0(linear):
    other = torch.nn.Parameter(torch.ones(3))
    gradients = {"cat": [rows([[1.0, 0.0]])], "dog": [rows([[1.0, 1.0]])]}
    of_both = gradient_cosines(lambda t: linear(t.trajectory).mean(), gradients, [other, linear.weight])
    assert of_both == measure(linear, **gradients)


def test_the_gradients_of_the_trainer_stay(linear):
    linear.weight.grad = torch.tensor([[7.0, 8.0]])
    before = torch.get_rng_state()
    measure(linear, cat=[rows([[1.0, 0.0]])], dog=[rows([[0.0, 1.0]])])
    assert linear.weight.grad.tolist() == [[7.0, 8.0]]
    assert torch.equal(torch.get_rng_state(), before)


def test_transitions_are_taken_apart_by_prompt():
    trajectory = SimpleNamespace(
        prompts=["cat", "dog", "cat", "cat"], steps=(0, 2), log_probs=torch.arange(8.0).reshape(4, 2)
    )
    batches = [
        TrainingBatch(trajectory, (2, 1), torch.tensor([[20.0, 22.0], [10.0, 12.0]])),
        TrainingBatch(trajectory, (0, 3), torch.tensor([[0.0, 2.0], [30.0, 32.0]])),
    ]
    found = transitions_by_prompt(batches, [2, 0])
    seen = {
        prompt: [(one.samples, one.steps, one.advantage.tolist(), one.old_log_prob.tolist()) for one in of_prompt]
        for prompt, of_prompt in found.items()
    }
    assert seen == {
        "cat": [
            ((2,), (2,), [22.0], [5.0]),
            ((2,), (0,), [20.0], [4.0]),
            ((0, 3), (2, 2), [2.0, 32.0], [1.0, 7.0]),
            ((0, 3), (0, 0), [0.0, 30.0], [0.0, 6.0]),
        ],
        "dog": [((1,), (2,), [12.0], [3.0]), ((1,), (0,), [10.0], [2.0])],
    }


# ---------------------------------------------------------------- on the policy


@pytest.fixture
def sampled(make_trainer):
    """A trainer and the training batches of its first round: two prompts, two images each, an adapter away from its start."""
    trainer = make_trainer(
        prompts=["a cat", "two dogs"],
        sample_num_images_per_prompt=2,
        train_batch_size=2,
        train_objective="ppo",
        train_clip_range=0.2,
    )
    torch.manual_seed(1)
    for parameter in trainer.trainable_layers:
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    batches, _ = trainer.sample(0)
    prompts, rewards, _ = trainer.scoring.gather(batches)
    return trainer, trainer.experience.training_batches(batches, trainer.advantages(prompts, rewards))


def measured(trainer, batches, **kwargs):
    arguments = {"timestep_fraction": 1.0, "random": np.random.default_rng(0), **kwargs}
    return prompt_gradient_cosines(trainer.prepared_policy, batches, trainer.trainable_layers, **arguments)


def test_they_are_the_gradients_of_the_objective_before_the_first_update(sampled):
    """Against `backward` of the trainer's own loss at every transition of a prompt."""
    trainer, batches = sampled
    gradients = []
    for batch in batches:  # one for each prompt
        trainer.optimizer.zero_grad()
        steps = batch.trajectory.steps
        for step in steps:
            transitions = batch.transitions([step] * 2)
            (trainer.calculate_loss(transitions)[0] / len(steps)).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in trainer.trainable_layers]))
    trainer.optimizer.zero_grad()
    first, second = gradients
    metrics = measured(trainer, batches)
    cosine = torch.cosine_similarity(first, second, dim=0).item()
    assert 1e-3 < abs(cosine) < 0.999  # or the test would not see much
    assert metrics["gradient/cosine_mean"] == pytest.approx(cosine, abs=1e-4)  # another batch shape
    norms = sorted([first.norm().item(), second.norm().item()])
    assert metrics["gradient/norm_ratio"] == pytest.approx(norms[1] / norms[0], rel=1e-4)
    scaled = measured(trainer, batches, loss_scale=1024.0)
    assert scaled == pytest.approx(metrics, abs=1e-5)


def test_a_fraction_takes_the_same_steps_for_all_prompts(sampled, watch):
    trainer, batches = sampled
    calls = watch(trainer.pipeline.unet)
    measured(trainer, batches, timestep_fraction=0.5)
    assert calls.rows_where(grad=True) == [4, 4, 4, 4]  # 2 prompts at 2 of 4 steps; 2 samples each, guided
    assert len(calls) == 4  # and no reference
    measured(trainer, batches, timestep_fraction=0.01)
    assert len(calls) == 4 + 2  # at least one step


def test_the_trainer_does_not_notice(sampled):
    trainer, batches = sampled
    state = torch.get_rng_state()
    weights = [parameter.detach().clone() for parameter in trainer.trainable_layers]
    measured(trainer, batches)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in trainer.trainable_layers)
    assert all(map(torch.equal, weights, trainer.trainable_layers))
    assert trainer.optimizer.state == {}


def test_ddp_goes_on_as_if_nothing_had_been():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(torch.nn.Linear(2, 1, bias=False), find_unused_parameters=True)
        prompts = {"cat": [rows([[1.0, 0.0]])] * 2, "dog": [rows([[0.0, 1.0]])]}
        with model.no_sync():
            metrics = gradient_cosines(lambda t: model(t.trajectory).mean(), prompts, list(model.parameters()))
        assert metrics["gradient/cosine_mean"] == 0
        assert model.module.weight.grad is None
        for _ in range(2):
            model(torch.ones(1, 2)).sum().backward()
        assert model.module.weight.grad.tolist() == [[2.0, 2.0]]
    finally:
        torch.distributed.destroy_process_group()
