"""Rewards in a run: several of them, those that fail for some images, and those that overlap with sampling."""

import math
import threading

import datasets
import pytest
import torch
from safetensors.torch import load_file

from dpok_trl import RewardError
from dpok_trl.core.advantages import BATCH_EPSILON, GROUP_EPSILON, TRACKER_EPSILON


NAN, INF = float("nan"), float("inf")
ROUNDING = 1e-6  # float32, advantages of about 1
SAME_WEIGHTS = 1e-7  # of weights of about 0.1; advantages differ by rounding


def constant(*values, name="constant"):
    """A reward that says `values` of each batch."""

    def reward(images, prompts, metadata):
        return list(values)

    reward.__name__ = name
    return reward


def trained_advantages(trainer):
    """Records the advantages of the training batches."""
    seen, method = [], trainer.experience.training_batches

    def recorded(batches, advantages):
        cut = method(batches, advantages)
        seen.append(torch.cat([batch.advantages[:, 0] for batch in cut]))
        return cut

    trainer.experience.training_batches = recorded
    return seen


# ---------------------------------------------------------------- images that do not count


PROMPTS = ["a", "a", "b", "a", "b", "b", "a", "b"]
REWARDS = [1.0, 2.0, 7.0, NAN, 9.0, INF, 6.0, -INF]
COUNT = [0, 1, 2, 4, 6]
WAYS = {
    "batch": {},
    "group": {"train_adv_type": "group", "sample_num_images_per_prompt": 2},
    "tracking": {"per_prompt_stat_tracking": True, "per_prompt_stat_tracking_min_count": 2},
}


def by_hand(way):
    """Whitened over the images that count: all five; or 1, 2, 6 of a and 7, 9 of b."""
    if way == "batch":
        return [(r - 5) / (math.sqrt((16 + 9 + 4 + 16 + 1) / 5) + BATCH_EPSILON) for r in (1, 2, 7, 9, 6)]
    epsilon = GROUP_EPSILON if way == "group" else TRACKER_EPSILON
    std_a, std_b = math.sqrt(14 / 3) + epsilon, 1 + epsilon
    return [-2 / std_a, -1 / std_a, -1 / std_b, 1 / std_b, 3 / std_a]


@pytest.mark.parametrize("way", WAYS)
def test_an_image_without_a_reward_has_advantage_0_and_is_in_no_statistic(way, make_trainer):
    trainer = make_trainer(**WAYS[way])
    advantages = trainer.advantages(PROMPTS, torch.tensor(REWARDS))
    assert advantages[[3, 5, 7]].tolist() == [0, 0, 0]
    torch.testing.assert_close(advantages[COUNT], torch.tensor(by_hand(way)), rtol=0, atol=ROUNDING)

    alone = make_trainer(**WAYS[way])
    without = alone.advantages([PROMPTS[i] for i in COUNT], torch.tensor([REWARDS[i] for i in COUNT]))
    assert torch.equal(advantages[COUNT], without)
    if way == "tracking":
        assert trainer.stat_tracker.state_dict() == alone.stat_tracker.state_dict()


def test_an_image_whose_companions_are_left_out_has_nothing_to_be_compared_with(make_trainer):
    trainer = make_trainer(**WAYS["group"])
    advantages = trainer.advantages(["a", "a", "b", "b"], torch.tensor([1.0, NAN, 2.0, 4.0]))
    unit = 1 / (1 + GROUP_EPSILON)
    torch.testing.assert_close(advantages, torch.tensor([0, 0, -unit, unit]), rtol=0, atol=ROUNDING)
    assert trainer.advantages(["a", "a"], torch.tensor([1.0, NAN])).tolist() == [0, 0]


def test_clipping_comes_after(make_trainer):
    trainer = make_trainer(train_adv_clip_max=0.5)
    assert trainer.advantages(["a"] * 4, torch.tensor([0.0, NAN, 1.0, 2.0])).tolist() == [-0.5, 0, 0, 0.5]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("in_threads", [False, True])
def test_a_run_goes_on_without_the_images_that_a_reward_failed_for(bad, in_threads, make_trainer, lines):
    trainer = make_trainer(
        constant(1, bad, 3, 5, name="judge"),
        num_epochs=2,
        sample_num_batches_per_epoch=2,
        sample_grid_freq=1,
        async_reward_computation=in_threads,
    )
    seen = trained_advantages(trainer)
    trainer.train()
    std = math.sqrt(8 / 3)  # of 1, 3, 5, twice
    expected = torch.tensor([-2 / std, 0, 0, 2 / std] * 2)
    for advantages in seen:
        torch.testing.assert_close(advantages, expected, rtol=0, atol=ROUNDING)
        assert advantages[[1, 5]].tolist() == [0, 0]  # to the last bit
    assert len(seen) == 2 and trainer.global_step == 4
    for line in lines(trainer, "reward"):
        assert line["images_left_out"] == line["rewards/judge/nonfinite"] == 2
        assert line["reward"] == line["rewards/judge/mean"] == 3
        assert line["reward_std"] == line["rewards/judge/std"] == pytest.approx(std, rel=1e-6)
    assert (trainer.output_dir / "samples" / "epoch-0001.png").exists()


def test_an_image_that_does_not_count_moves_nothing(make_trainer, adapter, tmp_path):
    """Without the KL term the weights are those of a run in which the image is there and has advantage 0."""

    def trained(reward, folder, change=None):
        trainer = make_trainer(reward, prompts=["a"], kl_weight=0.0, output_dir=str(tmp_path / folder))
        if change is not None:
            trainer.advantages = lambda prompts, rewards, values: change
        trainer.train()
        return adapter(trainer)

    std = math.sqrt(2 / 3)
    masked = trained(constant(1, NAN, 2, 3), "masked")
    told = trained(constant(1, 50, 2, 3), "told", torch.tensor([-1 / std, 0.0, 0.0, 1 / std]))
    for name, weight in told.items():
        torch.testing.assert_close(masked[name], weight, rtol=0, atol=SAME_WEIGHTS)


def test_a_round_in_which_no_image_counts(make_trainer):
    """Each reward has something finite, and together they leave nothing."""
    rewards = {"first": constant(1, NAN, 1, INF), "second": constant(NAN, 1, -INF, 1)}
    with pytest.raises(
        RewardError,
        match="none of the 4 images of the round has a reward that counts: first applies to 4 and failed for 2; second applies to 4 and failed for 2",
    ):
        make_trainer(rewards).train()
    with pytest.raises(RewardError, match="none of the 4 images of the round has a reward"):
        make_trainer(constant(None, None, None, None)).train()


# ---------------------------------------------------------------- several rewards


def test_several_rewards_end_to_end(make_trainer, lines):
    def edges(images, prompts, log_metric, trainer_state):
        log_metric("largest", trainer_state.epoch + len(images))
        return [10, 20, None, 40], "edges"

    hooked = []
    trainer = make_trainer(
        {"light": constant(1, 2, 3, 4), "edges": edges, "third": constant(NAN, 0, 0, 0)},
        reward_weights=[2.0, 0.1, 1.0],
        num_epochs=2,
        hook=lambda data, step, tracker: hooked.append(data),
    )
    seen = trained_advantages(trainer)
    trainer.train()
    totals = torch.tensor([6.0, 6.0, 12.0])  # 4 + 2, 6, 8 + 4; the first image does not count
    whitened = (totals - 8) / math.sqrt(8)
    for epoch, line in enumerate(lines(trainer, "reward")):
        assert line["images_left_out"] == 1
        assert line["reward"] == pytest.approx(8, rel=1e-6)
        assert line["reward_std"] == pytest.approx(math.sqrt(8), rel=1e-6)
        assert (line["rewards/light/mean"], line["rewards/light/nonfinite"]) == (2.5, 0)
        assert line["rewards/edges/mean"] == pytest.approx(70 / 3)
        assert (line["rewards/edges/nonfinite"], line["rewards/third/nonfinite"]) == (0, 1)
        assert line["rewards/edges/largest"] == epoch + 4
    for advantages in seen:
        assert advantages[0] == 0
        torch.testing.assert_close(advantages[1:], whitened, rtol=0, atol=ROUNDING)
    (_, _, _, rewards, info) = hooked[0][0]
    assert rewards[0].isnan() and rewards[1:].tolist() == pytest.approx([6, 6, 12])
    assert info == {"light": {}, "edges": "edges", "third": {}}


def test_rewards_of_very_different_scale_count_alike(make_trainer, lines):
    """One of 1000 and one of 0.001, which disagree: the sum would not see the second one."""
    trainer = make_trainer(
        [constant(1000, 3000, 2000, 4000), constant(0.003, 0.001, 0.001, 0.003)],
        prompts=["a", "b"],
        sample_num_images_per_prompt=2,
        reward_aggregation="normalize_then_sum",
    )
    seen = trained_advantages(trainer)
    trainer.train()
    torch.testing.assert_close(seen[0], torch.tensor([0.0, 0.0, -2.0, 2.0]) / math.sqrt(2), rtol=0, atol=1e-4)
    (line,) = lines(trainer, "reward")
    assert line["reward"] == pytest.approx(0, abs=ROUNDING)
    assert (line["rewards/constant/mean"], line["rewards/constant_2/mean"]) == (2500, pytest.approx(0.002))


def test_the_hook_gets_the_rewards_that_are_trained_on(make_trainer):
    """Normalised over all images of a prompt in the round, of which each batch has half: 0, 2 and 4, 10."""
    values = iter([[0.0, 2.0], [4.0, 10.0]])
    hooked = []
    trainer = make_trainer(
        lambda images, prompts, metadata: next(values),
        prompts=["a"],
        hook=lambda data, step, tracker: hooked.extend(rewards for *_, rewards, _ in data),
        sample_batch_size=2,
        train_batch_size=2,
        sample_num_batches_per_epoch=2,
        sample_num_images_per_prompt=2,
        reward_aggregation="normalize_then_sum",
    )
    seen = trained_advantages(trainer)
    trainer.train()
    expected = torch.tensor([-4.0, -2.0, 0.0, 6.0]) / math.sqrt(14)
    torch.testing.assert_close(torch.cat(hooked), expected, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(
        seen[0], expected, rtol=0, atol=ROUNDING
    )  # of mean 0 and standard deviation 1 as they are


def test_weights_that_do_not_fit_are_told_at_once(make_trainer):
    with pytest.raises(ValueError, match=r"reward_weights has 2 numbers for 1 rewards \(constant\)"):
        make_trainer(constant(1), reward_weights=[1.0, 2.0])


def test_rewards_of_somebody_elses_images(make_trainer):
    trainer = make_trainer([constant(1, 2), constant(10, NAN)], reward_weights=[1.0, 0.5])
    pair = [torch.zeros(2, 3, 4, 4), ("a", "b"), ({}, {})]
    for is_async in (False, True):
        rewards, info = trainer.compute_rewards([pair, pair], is_async=is_async)
        assert [one[0].item() for one in rewards] == [6, 6] and all(one[1].isnan() for one in rewards)
        assert info == ({"constant": {}, "constant_2": {}},) * 2


def test_a_column_of_the_dataset_reaches_the_reward(make_trainer):
    seen = []

    def counts(images, target):
        seen.extend(zip([image.size for image in images], target, strict=True))
        return [float(n) for n in target]

    prompts = datasets.Dataset.from_dict({"prompt": ["a", "bb", "ccc", "dddd"], "target": [1, 2, 3, 4]})
    trainer = make_trainer(counts, prompts=prompts)
    trainer.train()
    assert sorted(seen) == [((16, 16), n) for n in (1, 2, 3, 4)]


def test_a_column_that_there_is_not_is_told_with_those_that_there_are(make_trainer):
    def counts(images, targets):
        return [0.0] * len(images)

    trainer = make_trainer(counts, prompts=[("a", {"target": 1}), ("b", {"target": 2})])
    with pytest.raises(RewardError, match="the reward counts asks for targets, and the prompts come with target."):
        trainer.train()


# ---------------------------------------------------------------- rewards by name


def test_a_reward_by_name(make_trainer, lines, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "rewards_of_mine.py").write_text("def redness(images, prompts):\n    return [1.0] * len(images)\n")
    trainer = make_trainer(["jpeg-compressibility", "rewards_of_mine:redness"])
    trainer.train()
    (line,) = lines(trainer, "reward")
    assert line["rewards/redness/mean"] == 1.0 and line["rewards/jpeg-compressibility/mean"] < 0
    assert line["reward"] == pytest.approx(1.0 + line["rewards/jpeg-compressibility/mean"], rel=1e-6)
    assert trainer.reward_fn == ["jpeg-compressibility", "rewards_of_mine:redness"]


def test_a_name_that_there_is_not(make_trainer):
    with pytest.raises(ValueError, match="there is no reward named 'imagereward'. Did you mean 'image-reward'"):
        make_trainer("imagereward")


# ---------------------------------------------------------------- beside the sampling


def test_a_reward_that_overlaps_runs_in_a_thread_while_sampling_goes_on(make_trainer, adapter, tmp_path):
    events = []
    both = threading.Event()

    class Waits:
        """As a server would: its answer to the first batch comes only when the second is being sampled."""

        overlaps = True

        def __call__(self, images, prompts, metadata):
            events.append(("overlapping", threading.current_thread() is threading.main_thread()))
            assert both.wait(30)
            return images.mean((1, 2, 3))

    def afterwards(images, prompts, metadata):
        events.append(("late", threading.current_thread() is threading.main_thread()))
        return images[:, 0].mean((1, 2))

    def trained(rewards, folder, watch):
        trainer = make_trainer(rewards, sample_num_batches_per_epoch=2, output_dir=str(tmp_path / folder))
        if watch:
            rollout, begun = trainer.policy.rollout, iter(range(9))

            def watched(*args):
                batch = next(begun)
                trajectory = rollout(*args)
                events.append(("sampled", batch))
                if batch == 1:
                    both.set()
                return trajectory

            trainer.policy.rollout = watched
        trainer.train()
        return trainer

    trainer = trained([afterwards, Waits()], "overlapping", True)
    assert (trainer.scoring.late, trainer.scoring.early) == ([0], [1])
    assert events.count(("overlapping", False)) == 2 and events.count(("late", True)) == 2
    assert ("overlapping", True) not in events and ("late", False) not in events
    assert events.index(("sampled", 1)) < events.index(("late", True))  # after all sampling

    def plain(images, prompts, metadata):
        return images.mean((1, 2, 3))

    other = trained([afterwards, plain], "plain", False)
    weights = adapter(other)
    assert all(torch.equal(weight, weights[name]) for name, weight in adapter(trainer).items())


def test_a_reward_that_overlaps_and_fails_stops_the_run(make_trainer):
    def server(images, prompts, metadata):
        raise ConnectionError("no route to host")

    server.overlaps = True
    with pytest.raises(RewardError, match="the reward function server raised ConnectionError: no route to host"):
        make_trainer([constant(1, 2, 3, 4), server]).train()


def test_without_rewards_that_overlap_there_are_no_threads(make_trainer):
    assert make_trainer(constant(1)).scoring.executor is None


def test_offload_leaves_what_overlaps_where_it_is(make_trainer, record_to):
    class Judge(torch.nn.Module):
        def forward(self, images, prompts, metadata):
            return images.mean((1, 2, 3))

    judge, server = Judge(), Judge()
    server.overlaps = True
    journeys = [record_to(judge), record_to(server)]
    make_trainer([judge, server], reward_offload=True).train()
    assert [len(sent) for sent in journeys] == [3, 0]


def test_what_is_saved_does_not_depend_on_the_rewards(make_trainer):
    trainer = make_trainer([constant(1, 2, 3, NAN), constant(1, 1, None, 1)], save_freq=1)
    trainer.train()
    file = trainer.output_dir / "checkpoint-1" / "pytorch_lora_weights.safetensors"
    assert all(weight.isfinite().all() for weight in load_file(file).values())
