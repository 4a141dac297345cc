"""What a run writes down: metrics.jsonl, sample grids, trackers, and DDPO's image hook."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


ROUND = {
    "step", "epoch", "images", "reward", "reward_std", "images_left_out", "rewards/red/mean", "rewards/red/std",
    "rewards/red/nonfinite", "rewards/red/seconds", "time/rollout", "time/reward",
}  # fmt: skip
UPDATE = {
    "step", "epoch", "inner_epoch", "loss", "policy/ratio_mean", "policy/ratio_deviation_max", "policy/clip_fraction",
    "policy/approx_kl", "kl", "grad_norm", "learning_rate",
}  # fmt: skip
END = {"step", "epoch", "time/update", "kl_weight", "kl_path"}


def test_metrics_hold_the_documented_keys(make_trainer, lines):
    trainer = make_trainer(num_epochs=2, sample_num_batches_per_epoch=2)
    trainer.train()
    assert [set(line) for line in lines(trainer)] == [ROUND, UPDATE, UPDATE, END] * 2
    assert [line["step"] for line in lines(trainer)] == [0, 1, 2, 2, 2, 3, 4, 4]
    assert [line["epoch"] for line in lines(trainer)] == [0] * 4 + [1] * 4
    assert [line["images"] for line in lines(trainer, "images")] == [8, 16]
    assert all(math.isfinite(value) for line in lines(trainer) for value in line.values())


def test_reward_statistics_are_of_all_images(make_trainer, lines):
    values = iter([[0, 1, 2, 3], [4, 5, 6, 7]])
    trainer = make_trainer(lambda i, p, m: next(values), sample_num_batches_per_epoch=2)
    trainer.train()
    (line,) = lines(trainer, "reward")
    assert line["reward"] == 3.5
    assert line["reward_std"] == pytest.approx(np.std(np.arange(8)), rel=1e-6)  # the population's


def test_metrics_of_an_update_are_means_and_the_largest_deviation(make_trainer):
    trainer = make_trainer()
    column = [torch.tensor(1.0), torch.tensor(3.0)]
    assert trainer._reduce({"loss": column, "policy/ratio_deviation_max": column}) == {
        "loss": 2.0,
        "policy/ratio_deviation_max": 3.0,
    }


def test_tensorboard_receives_rewards_and_images(make_trainer, lines):
    trainer = make_trainer(
        num_epochs=2,
        log_with="tensorboard",
        sample_grid_freq=1,
        accelerator_kwargs={"kwargs_handlers": []},  # nothing that a table of settings could hold
    )
    trainer.train()
    events = EventAccumulator(str(trainer.output_dir / "dpok")).Reload()
    scalars = set(events.Tags()["scalars"])
    assert (ROUND | UPDATE | END) - {"step"} <= scalars
    logged = [(event.step, event.value) for event in events.Scalars("reward")]
    written = [(line["step"], line["reward"]) for line in lines(trainer, "reward")]
    assert [step for step, _ in logged] == [step for step, _ in written]
    assert [value for _, value in logged] == pytest.approx([value for _, value in written], rel=1e-6)
    assert [event.step for event in events.Images("samples")] == [0, 1]
    assert (trainer.output_dir / "samples" / "epoch-0001.png").exists()


def log_images(samples, global_step, tracker):
    """What image hooks written for DDPO do: the last batch's images by prompt and reward."""
    images, prompts, _, rewards, _ = samples[-1]
    captions = [f"{prompt} | {reward.item():.2f}" for prompt, reward in zip(prompts, rewards, strict=True)]
    tracker.log_images({c: image[None].float() for c, image in zip(captions, images, strict=True)}, step=global_step)


def test_the_image_hook_gets_ddpos_structure(make_trainer):
    def reward(images, prompts, metadata):
        return images.mean((1, 2, 3)), {"of": prompts}

    calls = []
    trainer = make_trainer(
        reward,
        prompts=lambda: ("a cat", {"id": 7}),
        hook=lambda *args: calls.append(args),
        num_epochs=2,
        sample_num_batches_per_epoch=3,
    )
    trainer.train()
    assert [step for _, step, _ in calls] == [0, 3]  # optimizer steps before the round
    for data, _, tracker in calls:
        assert len(data) == 3
        for images, prompts, metadata, rewards, reward_metadata in data:
            assert images.shape == (4, 3, 16, 16) and images.min() >= 0 and images.max() <= 1
            assert prompts == ("a cat",) * 4 and metadata == ({"id": 7},) * 4
            assert torch.equal(rewards, images.mean((1, 2, 3))) and reward_metadata == {"of": prompts}
        assert tracker is trainer.run_log


def test_the_image_hook_writes_files_without_a_tracker(make_trainer):
    trainer = make_trainer(hook=log_images, prompts=["a cat", "two dogs", "3 birds", "4"])
    trainer.train()
    files = sorted((trainer.output_dir / "samples" / "hook").iterdir())
    assert len(files) == 4 and all(Image.open(file).size == (16, 16) for file in files)
    assert any("a-cat" in file.name for file in files)


def test_the_image_hook_gets_the_tracker(make_trainer):
    trainer = make_trainer(hook=log_images, log_with="tensorboard", prompts=["a cat", "two dogs", "3 birds", "4"])
    trainer.train()
    events = EventAccumulator(str(trainer.output_dir / "dpok")).Reload()
    assert len(events.Tags()["images"]) == 4


def test_metadata_of_prompts_and_rewards_may_be_anything(make_trainer):
    data = []
    trainer = make_trainer(
        lambda images, prompts, metadata: ([1.0, 2.0, 3.0, 4.0], None),
        prompts=[("a cat", None), ("two dogs", object)],
        hook=lambda samples, step, tracker: data.extend(samples),
    )
    trainer.train()
    (_, _, metadata, rewards, reward_metadata) = data[0]
    assert set(metadata) == {None, object} and rewards.tolist() == [1, 2, 3, 4] and reward_metadata is None
