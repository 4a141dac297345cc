"""What a run leaves in its folder and in its trackers, also one that was killed, resumed, started twice, or could not start."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trl import TrlParser

from dpok_trl import DPOKConfig, DPOKSFTConfig
from dpok_trl.results.samples import read_samples, sampled_epochs
from dpok_trl.training.tracking import begin_report


class Killed(BaseException):
    """As a signal comes: no `except Exception` holds it."""


def scalar_counts(folder: Path) -> dict[str, int]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: len(events.Scalars(tag)) for tag in events.Tags()["scalars"]}


# --- the folder -------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_folder_whole(make_trainer):
    trainer = make_trainer(num_epochs=2, sample_grid_freq=1)
    trainer.train()
    left = {path.name for path in trainer.output_dir.iterdir()}
    assert left == {
        "metrics.jsonl", "samples", "samples.parquet", "config.yaml", "report.json", "report.html", "checkpoint-2"
    }  # fmt: skip
    page = (trainer.output_dir / "report.html").read_text()
    for words in (
        "run: red",
        "StableDiffusionPipeline",
        "2 epochs, 2 optimizer steps, 8 images",
        "Reward while training",
    ):
        assert words in page


def test_samples_are_those_of_the_round(make_trainer):
    rounds, asked = [], []

    def rewards_of_each(images, prompts, metadata):
        rounds.append(images.clone())
        asked.extend(prompts)
        return images[:, 0].mean((1, 2)), {}

    def only_cats(images, prompts, metadata):
        return [1.0 if prompt == "a cat" else None for prompt in prompts]

    trainer = make_trainer(
        {"red": rewards_of_each, "cats": only_cats},
        prompts=[("a cat", {"kind": "animals"}), ("a car", {"kind": None})],
        sample_num_batches_per_epoch=5,
        sample_grid_freq=1,
        sample_category_column="kind",
    )
    trainer.train()
    rows = read_samples(trainer.output_dir, 0)
    assert len(rows) == 16  # the first of the round's 20
    images = torch.cat(rounds)[:16]
    cats = [prompt == "a cat" for prompt in asked[:16]]
    assert [row["prompt"] for row in rows] == asked[:16] and 0 < sum(cats) < 16
    assert [row["category"] for row in rows] == ["animals" if cat else None for cat in cats]
    assert [row["rewards/cats"] for row in rows] == [1.0 if cat else None for cat in cats]
    reds = [row["rewards/red"] for row in rows]
    assert reds == images[:, 0].mean((1, 2)).tolist()
    assert [row["reward"] for row in rows] == pytest.approx([red + cat for red, cat in zip(reds, cats, strict=True)])
    assert [row["seed"] for row in rows] == [seed for batch in range(4) for seed in trainer._seeds(0, batch)]
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert all(row["image"].tobytes() == picture.tobytes() for row, picture in zip(rows, pixels, strict=True))
    grid = Image.open(trainer.output_dir / "samples" / "epoch-0000.png")
    assert grid.width == 10 + 8 * 138


def test_an_epoch_that_was_not_asked_for_has_no_samples(make_trainer):
    trainer = make_trainer(num_epochs=5, sample_grid_freq=2)
    trainer.train()
    assert sampled_epochs(trainer.output_dir) == [0, 2, 4]


def test_killed_and_resumed_has_each_epoch_once(make_trainer, lines, tmp_path):
    settings = {"num_epochs": 4, "sample_grid_freq": 1, "save_freq": 2, "log_with": "tensorboard"}
    trainer = make_trainer(**settings)
    update, calls = trainer._update, []

    def killed(items):
        calls.append(items)
        if len(calls) == 4:  # in epoch 3, whose samples are written, and whose checkpoint is two epochs old
            raise Killed
        return update(items)

    trainer._update = killed
    with pytest.raises(Killed):
        trainer.train()
    assert sampled_epochs(trainer.output_dir) == [0, 1, 2, 3]
    before = read_samples(trainer.output_dir, 3)
    assert not (trainer.output_dir / "report.html").exists()

    make_trainer(**settings).train(resume_from_checkpoint=True)
    folder = trainer.output_dir
    assert sampled_epochs(folder) == [0, 1, 2, 3] == sorted(line["epoch"] for line in lines(trainer, "reward"))
    assert [path.name for path in sorted((folder / "samples").iterdir())] == [f"epoch-000{e}.png" for e in range(4)]
    dataset = load_dataset(
        "parquet", data_dir=str(folder / "samples.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert dataset["epoch"] == [epoch for epoch in range(4) for _ in range(4)]
    again = read_samples(folder, 3)  # bit for bit, as the run is
    assert [(row["seed"], row["reward"]) for row in before] == [(row["seed"], row["reward"]) for row in again]
    assert "4 epochs, 4 optimizer steps, 16 images" in (folder / "report.html").read_text()


# --- config.yaml ------------------------------------------------------------------------------------------------------


def test_config_yaml_gives_the_same_config(make_trainer):
    trainer = make_trainer(
        train_learning_rate=3e-5,
        kl_weight=0.0,
        log_with="tensorboard",
        tracker_kwargs={"tensorboard": {"flush_secs": 60}, "wandb": {"entity": "me"}},
        sample_call_kwargs={"clip_skip": None, "cross_attention_kwargs": {"note: “rabbit” #1": 1.5}},
        sample_call_columns=None,
        reward_weights=[0.5],
        run_name="",
        mixed_precision="no",
    )
    begin_report(trainer)
    path = str(trainer.output_dir / "config.yaml")
    [read] = TrlParser((DPOKConfig,)).parse_args_and_config(args=["--config", path])
    assert read == trainer.config
    [other] = TrlParser((DPOKConfig,)).parse_args_and_config(args=["--config", path, "--seed", "7"])
    assert other == dataclasses.replace(trainer.config, seed=7)


def test_config_yaml_of_the_supervised_arm(tmp_path):
    from dpok_trl.results.runlog import RunLog

    config = DPOKSFTConfig(sft_kl="kl_o", sft_gamma=0.3, output_dir="somewhere", save_freq=3)
    RunLog(tmp_path).write_config(dataclasses.asdict(config))
    [read] = TrlParser((DPOKSFTConfig,)).parse_args_and_config(args=["--config", str(tmp_path / "config.yaml")])
    assert read == config


def test_secrets_are_written_nowhere(make_trainer):
    trainer = make_trainer(
        log_with="tensorboard", tracker_kwargs={"wandb": {"api_key": "sesame-1"}, "swanlab": {"token": "sesame-2"}}
    )
    trainer.train()
    files = [path for path in trainer.output_dir.rglob("*") if path.is_file() and "checkpoint" not in str(path)]
    assert len(files) > 5
    assert [path for path in files if b"sesame" in path.read_bytes()] == []


# --- trackers ---------------------------------------------------------------------------------------------------------


def test_trained_in_two_parts_is_logged_once(make_trainer, lines):
    trainer = make_trainer(num_epochs=2, sample_grid_freq=1, log_with="tensorboard")
    trainer.train(1)
    trainer.train(2)
    counts = scalar_counts(trainer.output_dir / "dpok")
    assert counts["reward"] == counts["time/update"] == 2 and counts["loss"] == len(lines(trainer, "loss")) == 2


def test_wandb_without_a_login_says_what_to_do(make_trainer, monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    wandb.teardown()  # what an earlier test has set up would be taken
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    trainer = make_trainer(log_with="wandb", tracker_kwargs={"wandb": {"dir": str(tmp_path)}})
    with pytest.raises(
        RuntimeError, match=r"\(log_with = 'wandb'\): UsageError: .*`wandb login`.*WANDB_MODE=offline.*metrics\.jsonl"
    ):
        trainer.train()


def test_a_tracker_that_fails_among_all_is_named(make_trainer, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["tensorboard"])
    trainer = make_trainer(log_with="all")

    def fail(self):
        raise ConnectionError("no route")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.start", fail)
    with pytest.raises(
        RuntimeError, match=r"ConnectionError: no route\. log_with = 'all' takes every tracker.*\(tensorboard\): name"
    ):
        trainer.train()


def test_all_without_any_tracker_is_refused(make_trainer, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(ImportError, match="log_with = 'all', and no tracker is installed: `pip install trackio`"):
        make_trainer(log_with="all")


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_write_one_set(tmp_path):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }
    script = Path(__file__).with_name("two_trackers.py")
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script), str(tmp_path / "run")],
        env=environment, capture_output=True, text=True, timeout=170,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    folder = tmp_path / "run"
    counts = scalar_counts(folder / "dpok")
    assert counts["reward"] == 2 and counts["epoch"] == len((folder / "metrics.jsonl").read_text().splitlines())
    assert sampled_epochs(folder) == [0, 1]
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["epoch-0000.png", "epoch-0001.png"]
    assert "2 epochs, 4 optimizer steps, 16 images" in (folder / "report.html").read_text()
    assert not list(folder.rglob("*.tmp")) and not list(folder.rglob(".*.unfinished"))
    # the tracker of the second process is never started
    assert len([path for path in (folder / "dpok").iterdir() if path.name.startswith("events")]) == 1


def test_a_nan_goes_through_all_that_is_written(make_trainer):
    def sometimes(images, prompts, metadata):
        return [float("nan"), 1.0, 2.0, 3.0]

    trainer = make_trainer(sometimes, sample_grid_freq=1, reward_on_error="mask", log_with="tensorboard")
    trainer.train()
    rows = read_samples(trainer.output_dir, 0)
    assert [str(row["reward"]) for row in rows] == ["nan", "1.0", "2.0", "3.0"]
    assert "<b>nan</b>" in (trainer.output_dir / "report.html").read_text()
