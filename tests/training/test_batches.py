"""Which transitions are trained on together, and in which order."""

import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dpok_trl.training.batches import TrainingBatch, cut_batches, plan_updates


class Samples(list):
    """As much of a trajectory as is cut."""

    log_probs = torch.zeros(1)


def batches(count: int, steps: tuple[int, ...] = (0, 1, 2, 3)) -> list[TrainingBatch]:
    return [TrainingBatch(SimpleNamespace(steps=steps, number=i), (0,), torch.zeros(1)) for i in range(count)]


def plan(count=6, steps=(0, 1, 2, 3), *, fraction=1.0, accumulation=1, per_update=None, seed=0):
    """The plan as (batch number, step) pairs."""
    updates = plan_updates(
        batches(count, steps),
        timestep_fraction=fraction,
        accumulation=accumulation,
        timesteps_per_update=per_update,
        random=np.random.default_rng(seed),
    )
    return [[(batch.trajectory.number, step) for batch, step in update] for update in updates]


def test_sampling_batches_are_cut_with_their_advantages():
    sampled = [SimpleNamespace(trajectory=Samples(range(n))) for n in (4, 6)]
    cut = cut_batches(sampled, torch.arange(10.0), 2)
    assert [batch.samples for batch in cut] == [(0, 1), (2, 3), (0, 1), (2, 3), (4, 5)]
    own = [batch.advantages[list(batch.samples)].tolist() for batch in cut]
    assert own == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


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


def test_only_actions_are_taken():
    assert {step for update in plan(steps=(1, 3, 7)) for _, step in update} == {1, 3, 7}
    assert all(len(update) == 3 for update in plan(steps=(1, 3, 7), per_update=4))


def test_a_fraction_that_takes_none_of_the_actions_is_refused():
    with pytest.raises(
        ValueError, match=r"train_timestep_fraction = 0.25 of the 3 stochastic steps selects none. Give at least 0.334"
    ):
        plan(steps=(0, 1, 2), fraction=0.25)
    assert len(plan(steps=(0, 1, 2), fraction=0.334)[0]) == 1
