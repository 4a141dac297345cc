"""Which transitions are trained on together, and in which order."""

import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dpok_trl.core.gaussian import Gaussian
from dpok_trl.training.batches import TrainingBatch, cut_batches, plan_updates


class Samples(list):
    """As much of a trajectory as is cut."""

    log_probs = torch.zeros(1)
    steps = (0, 1, 2)


def batches(count: int, steps: tuple[int, ...] = (0, 1, 2, 3)) -> list[TrainingBatch]:
    return [TrainingBatch(SimpleNamespace(steps=steps, number=i), (0,), torch.zeros(1)) for i in range(count)]


def plan(count=6, steps=(0, 1, 2, 3), *, fraction=1.0, accumulation=1, per_update=None, seed=0):
    """The plan as (batch number, step) pairs; the batches have one sample each."""
    updates = plan_updates(
        batches(count, steps),
        count=count,
        timestep_fraction=fraction,
        accumulation=accumulation,
        timesteps_per_update=per_update,
        random=np.random.default_rng(seed),
    )
    return [[(batch.trajectory.number, step) for batch, (step,) in update] for update in updates]


def test_sampling_batches_are_cut_with_their_advantages():
    sampled = [SimpleNamespace(trajectory=Samples(range(n))) for n in (4, 6)]
    cut = cut_batches(sampled, torch.arange(10.0), torch.ones(10, dtype=torch.bool), 2)
    assert [batch.samples for batch in cut] == [(0, 1), (2, 3), (0, 1), (2, 3), (4, 5)]
    own = [batch.advantages.tolist() for batch in cut]
    assert own == [[[row] * 3, [row + 1] * 3] for row in (0, 2, 4, 6, 8)]  # the same at all three steps


def test_advantages_of_single_steps_are_cut_as_they_are():
    sampled = [SimpleNamespace(trajectory=Samples(range(4)))]
    advantages = torch.arange(12.0).reshape(4, 3)
    first, second = cut_batches(sampled, advantages, torch.ones(4, dtype=torch.bool), 2)
    assert torch.equal(torch.cat([first.advantages, second.advantages]), advantages)


def test_only_what_is_kept_is_cut():
    sampled = [SimpleNamespace(trajectory=Samples(range(n))) for n in (4, 6)]
    kept = torch.tensor([0, 1, 1, 0, 1, 0, 1, 0, 1, 1]).bool()
    cut = cut_batches(sampled, torch.arange(10.0), kept, 2)
    assert [batch.samples for batch in cut] == [(1, 2), (0, 2), (4, 5)]
    assert [batch.advantages[:, 0].tolist() for batch in cut] == [[1, 2], [4, 6], [8, 9]]


def test_a_pass_draws_as_many_batches_as_it_is_told():
    many = batches(9)
    drawn = [
        {batch.trajectory.number for update in plan_updates(
            many, count=3, timestep_fraction=1.0, accumulation=1, timesteps_per_update=None, random=np.random.default_rng(seed)
        ) for batch, _ in update}
        for seed in range(50)
    ]  # fmt: skip
    assert all(len(one) == 3 for one in drawn)  # without replacement
    assert set().union(*drawn) == set(range(9))


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("per_update", [None, 1, 2, 3, 9])
def test_every_transition_comes_once(accumulation, per_update):
    updates = plan(accumulation=accumulation, per_update=per_update)
    parts = {None: 1, 1: 4, 2: 2, 3: 2, 9: 1}[per_update]
    assert len(updates) == 6 // accumulation * parts
    assert Counter(pair for update in updates for pair in update) == {(b, s): 1 for b in range(6) for s in range(4)}
    for update in updates:  # evenly over the batches that are accumulated
        steps = Counter(batch for batch, _ in update)
        assert len(steps) == accumulation and len(set(steps.values())) == 1


def test_batches_steps_and_optimizer_steps_are_in_random_order():
    updates = plan(count=32, per_update=2)
    assert [update[0][0] for update in updates] != sorted(update[0][0] for update in updates)
    together = [update[0][0] == following[0][0] for update, following in itertools.pairwise(updates)]
    assert sum(together) < 16  # the halves of a batch stand side by side only by chance (always, if not shuffled)
    orders = Counter(tuple(step for _, step in update) for update in plan(count=32))
    assert len(orders) > 12  # of 24
    assert plan(seed=1) == plan(seed=1) != plan(seed=2)


def test_a_fraction_takes_each_step_equally_often():
    updates = plan(count=400, fraction=0.5)
    taken = Counter(step for update in updates for _, step in update)
    assert sum(taken.values()) == 800
    for step in range(4):  # 200 expected, standard deviation 10
        assert 150 < taken[step] < 250
    assert all(len({step for _, step in update}) == 2 for update in updates)


def test_all_samples_of_a_batch_are_at_one_step():
    (batch,) = batches(1)
    batch.samples = (4, 5, 6)
    (update,) = plan_updates(
        [batch],
        count=1,
        timestep_fraction=1.0,
        accumulation=1,
        timesteps_per_update=None,
        random=np.random.default_rng(0),
    )
    assert sorted(steps for _, steps in update) == [(step,) * 3 for step in range(4)]


@pytest.mark.parametrize("per_update", [None, 1, 3])
def test_mixed_every_sample_is_at_every_step_once_and_at_a_step_of_its_own(per_update):
    both = batches(2, steps=(0, 2, 3, 5, 6))
    both[0].samples, both[1].samples = (0, 1, 2), (3, 4, 5)
    updates = plan_updates(
        both,
        count=2,
        timestep_fraction=1.0,
        accumulation=2,
        timesteps_per_update=per_update,
        random=np.random.default_rng(0),
        mixed=True,
    )
    passes = [(batch, steps) for update in updates for batch, steps in update]
    assert len(passes) == 2 * 5  # as many forward passes as without mixing
    pairs = Counter(pair for batch, steps in passes for pair in zip(batch.samples, steps, strict=True))
    assert pairs == {(sample, step): 1 for sample in range(6) for step in (0, 2, 3, 5, 6)}
    assert sum(len(set(steps)) > 1 for _, steps in passes) >= 8


def test_mixed_a_fraction_is_drawn_for_each_sample():
    many = batches(1, steps=tuple(range(8)))
    many[0].samples = tuple(range(50))
    (update,) = plan_updates(
        many, count=len(many), timestep_fraction=0.5, accumulation=1, timesteps_per_update=None, random=np.random.default_rng(0), mixed=True
    )  # fmt: skip
    assert len(update) == 4
    of_each = list(zip(*(steps for _, steps in update), strict=True))
    assert all(len(set(steps)) == 4 for steps in of_each)
    assert len({frozenset(steps) for steps in of_each}) > 25  # of 70


def test_transitions_take_each_samples_reference_at_its_own_step():
    trajectory = SimpleNamespace(steps=(0, 1, 2), log_probs=torch.arange(9.0).reshape(3, 3))
    means = {step: torch.arange(6.0).reshape(3, 2) + 10 * step for step in (0, 1, 2)}
    references = {step: Gaussian(mean, torch.full((3,), 1.0 + step)) for step, mean in means.items()}
    batch = TrainingBatch(trajectory, (0, 1, 2), 10 + torch.arange(9.0).reshape(3, 3), references=references)
    assert batch.transitions((1, 1, 1)).reference is references[1]
    transitions = batch.transitions((2, 0, 1))
    own = transitions.reference
    assert transitions.old_log_prob.tolist() == [2, 3, 7] and transitions.advantage.tolist() == [12, 13, 17]
    assert own.mean.tolist() == [[20, 21], [2, 3], [14, 15]]
    assert own.std.tolist() == [3, 1, 2]
    batch.references = means  # the model's outputs, with kl_type = "noise"
    assert batch.transitions((2, 0, 1)).reference.tolist() == [[20, 21], [2, 3], [14, 15]]
    batch.references = {}
    assert batch.transitions((2, 0, 1)).reference is None
    batch.charges = torch.full((3, 3), 0.5)
    assert batch.transitions((2, 0, 1), charge_weight=2.0).advantage.tolist() == [11, 12, 16]
    batch.old = references
    assert batch.transitions((2, 0, 1)).old.mean.tolist() == own.mean.tolist()


def test_only_actions_are_taken():
    assert {step for update in plan(steps=(1, 3, 7)) for _, step in update} == {1, 3, 7}
    assert all(len(update) == 3 for update in plan(steps=(1, 3, 7), per_update=4))


def test_a_fraction_that_takes_none_of_the_actions_is_refused():
    with pytest.raises(
        ValueError, match=r"train_timestep_fraction = 0.25 of the 3 stochastic steps selects none. Give at least 0.334"
    ):
        plan(steps=(0, 1, 2), fraction=0.25)
    assert len(plan(steps=(0, 1, 2), fraction=0.334)[0]) == 1
