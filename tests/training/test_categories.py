"""`sample_category_column`: rewards by category, over all processes."""

import math
from types import SimpleNamespace

import datasets
import pytest
import torch
from accelerate import Accelerator, debug_launcher

from dpok_trl import DPOKConfig
from dpok_trl.rewards.binding import TrainerState
from dpok_trl.training.batches import SampledBatch
from dpok_trl.training.scoring import Scoring


def worth(images, prompts, metadata):
    return [entry["worth"] for entry in metadata]


ENTRIES = [
    {"kind": "color", "worth": 1.0},
    {"kind": "color", "worth": 2.0},
    {"kind": "count", "worth": math.nan},  # left out: its reward failed
    {"kind": 4, "worth": 8.0},
    {"kind": None, "worth": 13.0},  # of no category
    {"kind": "color", "worth": 6.0},
]


def metrics_of(config, batches, reward=worth):
    """What one process gets from scoring these batches of metadata."""
    scoring = Scoring(reward, config, Accelerator(cpu=True))
    sampled = []
    for entries in batches:
        images = torch.zeros(len(entries), 3, 2, 2)
        trajectory = SimpleNamespace(images=images, prompts=tuple(f"p{row}" for row in range(len(entries))))
        sampled.append(SampledBatch(trajectory, tuple(entries)))
        scoring.begin(sampled[-1], TrainerState(0, 0))
    scoring.finish(sampled)
    _, _, metrics = scoring.gather(sampled)
    return metrics


def of_categories(metrics):
    return {name: value for name, value in metrics.items() if name.startswith("reward/")}


def test_the_mean_of_each_category(make_config):
    config = make_config(sample_category_column="kind")
    metrics = metrics_of(config, [ENTRIES[:2], ENTRIES[2:]])
    assert of_categories(metrics) == {"reward/color": 3.0, "reward/4": 8.0}
    assert metrics["reward"] == 30 / 5  # those of no category count too
    assert of_categories(metrics_of(make_config(), [ENTRIES])) == {}


def test_the_total_is_what_is_averaged(make_config):
    config = make_config(sample_category_column="kind", reward_weights=[2.0, 1.0])
    both = {"worth": worth, "ten": lambda images, prompts, metadata: [10.0] * len(images)}
    assert of_categories(metrics_of(config, [ENTRIES], both)) == {"reward/color": 16.0, "reward/4": 26.0}


def two_categories(process):
    """Process 0 has one category, process 1 another as well, and a reward that failed."""
    last = [{"kind": "b", "worth": 5.0}, {"kind": "b", "worth": math.nan}]
    return [[{"kind": "a", "worth": float(process)}] * 2, [{"kind": "a", "worth": 7.0}] * 2 if process == 0 else last]


def in_one_of_two_processes(folder):
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    config = DPOKConfig(output_dir=str(folder), sample_category_column="kind", sample_batch_size=2)
    metrics = of_categories(metrics_of(config, two_categories(accelerator.process_index)))
    torch.save(metrics, folder / f"{accelerator.process_index}.pt")


def test_over_two_processes(tmp_path):
    debug_launcher(in_one_of_two_processes, args=(tmp_path,), num_processes=2)
    expected = {"reward/a": (0 + 0 + 7 + 7 + 1 + 1) / 6, "reward/b": 5.0}
    for process in (0, 1):
        assert torch.load(tmp_path / f"{process}.pt") == pytest.approx(expected, rel=1e-6)


def test_a_run_with_a_dataset_writes_them(make_trainer, lines):
    rows = [
        {"prompt": "a cat", "category": "one", "worth": 3.0},
        {"prompt": "two cats", "category": "two", "worth": 5.0},
    ]
    trainer = make_trainer(worth, datasets.Dataset.from_list(rows), sample_category_column="category")
    trainer.train()
    (line,) = lines(trainer, "reward")
    assert of_categories(line) == {"reward/one": 3.0, "reward/two": 5.0}


@pytest.mark.parametrize(
    ("prompts", "has"),
    [([("a cat", {"kind": "one"})], "kind"), ([("a cat", "one")], "no dict: 'one'"), (["a cat"], "nothing")],
)
def test_a_column_that_is_not_there_is_named_before_a_reward_is_asked(make_trainer, prompts, has):
    asked = []
    trainer = make_trainer(lambda images: asked.append(images), prompts, sample_category_column="category")
    with pytest.raises(ValueError) as error:
        trainer.train()
    assert f"sample_category_column = 'category', which the metadata of a prompt does not have (it has {has})" in str(
        error.value
    )
    assert asked == []
