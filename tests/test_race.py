"""The race against TRL: what it counts, by hand; our side runs; TRL's side, where DPOK_TRL_ENV names an environment of its own."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch


RACE = Path(__file__).parent.parent / "benchmarks" / "experiments" / "race"
sys.path.insert(0, str(RACE))  # as for a script that lies there

import cost  # noqa: E402
import ours  # noqa: E402
import result as measures  # noqa: E402
from evaluation import evaluate  # noqa: E402

from dpok_trl.demo import load_demo_pipeline  # noqa: E402
from dpok_trl.demo.world import exact_reward  # noqa: E402


TRL_ENV = os.environ.get("DPOK_TRL_ENV")
SMALL = {"epochs": 2, "eval_images": 2}
OURS = {"sample_num_steps": 2, "sample_batch_size": 4, "train_batch_size": 2, "train_timesteps_per_update": None}


def check_curve(found, optimizer_steps):
    """Two epochs of 4 images, in 2 updates each."""
    first, second = found["curve"]
    assert (first["images"], second["images"]) == (4, 8)
    assert (first["optimizer_steps"], second["optimizer_steps"]) == optimizer_steps
    assert first["cpu_s"] == first["sample_cpu_s"] > 0
    assert second["cpu_s"] == pytest.approx(first["cpu_s"] + first["update_cpu_s"] + second["sample_cpu_s"])
    assert second["exact_window"] is None  # of 128 images
    assert found["seconds_to_090"] is None and found["images_to_090"] is None
    assert found["trainable_parameters"] == 121_728
    assert found["peak_rss_mb"] > 100  # Python and torch alone take more
    assert found["final"]["images"] == 2 and 0 <= found["final"]["fidelity"] <= 1


class Steps:
    """A trainer of 64 images an epoch: sampling takes 2 s and the update 3 s, by a clock that only it moves."""

    def __init__(self, shares):
        self.now, self.shares = 10.0, shares
        self.race = measures.Race(self.reward, lambda: self.now)

    def reward(self, images, prompts, metadata):
        right = round(64 * images)
        return torch.full((64,), 0.25), {"exact": [True] * right + [False] * (64 - right)}

    def step(self, epoch, optimizer_steps):
        self.now += 2.0
        self.race.judge(self.shares[epoch], (), ())
        self.race.sampled()
        self.now += 3.0
        return optimizer_steps + 4


def test_the_finish_is_counted_by_hand():
    trainer = Steps([0.5, 0.75, 1.0, 1.0, 0.0])
    trainer.race.run(trainer.step, epochs=5, stop_at=None)
    curve = trainer.race.curve
    assert [point["images"] for point in curve] == [64, 128, 192, 256, 320]
    assert [point["cpu_s"] for point in curve] == [2, 7, 12, 17, 22]
    assert [point["exact_window"] for point in curve] == [None, 0.625, 0.875, 1, 0.5]  # of two epochs each
    assert [point["optimizer_steps"] for point in curve] == [4, 8, 12, 16, 20]
    assert [point["reward_mean"] for point in curve] == [0.25] * 5
    assert [point["exact_mean"] for point in curve] == trainer.shares
    assert measures.finish(curve) == {"seconds_to_090": 17, "images_to_090": 256}
    assert measures.finish(curve[:3]) == {"seconds_to_090": None, "images_to_090": None}
    assert measures.first_reaching(curve, 0.875) is curve[2]


def test_a_run_ends_with_the_epoch_that_gets_there():
    trainer = Steps([0.5, 0.75, 1.0, 1.0])
    trainer.race.run(trainer.step, epochs=4, stop_at=0.875)
    assert len(trainer.race.curve) == 3
    assert trainer.race.curve[-1]["update_cpu_s"] == 3  # the epoch's update is made


def test_the_cost_of_an_image_leaves_the_start_out():
    times = [(5, 20), (1, 3), (2, 3), (1, 4), (1, 3)]
    curve = [{"images": 10 * (i + 1), "sample_cpu_s": a, "update_cpu_s": b} for i, (a, b) in enumerate(times)]
    found = measures.seconds_per_image(curve, skip=1)
    # medians of 1 2 1 1, of 3 3 4 3 and of 4 5 5 4, for 10 images; the first epoch took 25, and 4.5 would have been due
    assert found == {"sample": 0.1, "update": 0.3, "total": 0.45, "start_up": 20.5}
    with pytest.raises(ValueError, match="5 epochs are to be skipped, and the curve has 5"):
        measures.seconds_per_image(curve, skip=5)


def test_cpu_time_counts_a_compiler():
    before = measures.cpu_seconds()
    code = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert measures.cpu_seconds() - before >= 0.3


def test_evaluation_is_of_the_pictures_of_its_seeds():
    pipe = load_demo_pipeline()
    found = evaluate(pipe, "a green triangle", images=65, num_steps=2)  # two batches
    verdicts = []
    for seeds in (range(10_000, 10_064), [10_064]):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        options = {"num_inference_steps": 2, "guidance_scale": 1.0, "eta": 1.0, "output_type": "pt"}
        images = pipe(["a green triangle"] * len(seeds), generator=generators, **options).images
        verdicts += exact_reward(images, ["a green triangle"] * len(seeds))[0].tolist()
    assert found["exact"] == sum(verdicts) / 65
    assert evaluate(pipe, "a green triangle", images=0, num_steps=2) is None


def test_ours(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # which it sets
    config = {**OURS, "train_lr_scheduler": "constant"}
    found = ours.run(ours.Settings(**SMALL, threads=torch.get_num_threads(), config=config))
    check_curve(found, (2, 4))
    assert found["settings"]["config"]["train_lr_scheduler"] == "constant"
    assert "output_dir" not in found["settings"]["config"]


@pytest.mark.skipif(TRL_ENV is None, reason="DPOK_TRL_ENV names no environment of TRL v0.23")
def test_trl():
    sizes = {"sample_batch_size": 4, "train_batch_size": 2, "num_steps": 2}
    command = [f"{TRL_ENV}/bin/python", RACE / "trl_ddpo.py", json.dumps({**SMALL, **sizes})]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    check_curve(json.loads(done.stdout.splitlines()[-1]), (2, 4))


def test_both_sides_are_asked_for_the_same_work():
    arguments = Namespace(epochs=2, threads=1, steps=10)
    theirs = cost.settings_of("trl", 16, arguments, "kernels")
    own = cost.settings_of("compiled-kl", 16, arguments, "kernels")
    assert own["config"]["kl_weight"] == 0.02 and own["config"]["torch_compile"]
    assert cost.settings_of("ours", 16, arguments, "")["config"]["kl_weight"] == 0
    for name, of_trl in [
        ("sample_num_steps", "num_steps"),
        ("sample_batch_size", "sample_batch_size"),
        ("sample_num_batches_per_epoch", "num_batches"),
        ("train_batch_size", "train_batch_size"),
        ("train_learning_rate", "learning_rate"),
    ]:
        assert own["config"][name] == theirs[of_trl]
    runs = [{"variant": "trl", "optimizer_steps": 8}, {"variant": "ours", "optimizer_steps": 10}]
    with pytest.raises(RuntimeError, match="'trl': 8, 'ours': 10"):
        cost.refuse_other_work(runs)


def test_ratios_are_taken_within_a_round():
    def figures(name, total):
        numbers = {"sample": total / 4, "update": total * 3 / 4, "total": total, "start_up": total, "peak_rss_mb": 500}
        return {"variant": name, "batch": 16, "optimizer_steps": 12, **numbers}

    rounds = [[figures("trl", a), figures("ours", b)] for a, b in [(0.04, 0.04), (0.08, 0.06), (0.04, 0.02)]]
    theirs, own = cost.table(rounds, epochs=3)
    assert theirs == "| 16 | trl | 4 | 10.0 | 30.0 | 40.0 | 1.000 | 1.000 to 1.000 | 0.0 | 500 |"
    assert own == "| 16 | ours | 4 | 10.0 | 30.0 | 40.0 | 0.750 | 0.625 to 0.875 | 0.0 | 500 |"


def test_cost_runs():
    command = [sys.executable, RACE / "cost.py", "--quick", "--variants", "ours-kl"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    header, line, row = done.stdout.splitlines()
    assert header.count("|") == line.count("|") == row.count("|")
    batch, variant, steps, sample, update, total, ratio, *_ = [cell.strip() for cell in row.strip("|").split("|")]
    assert (batch, variant, steps, ratio) == ("64", "ours-kl", "1", "1.000")  # one optimizer step an epoch
    assert float(sample) > 0 and float(update) > 0
    assert float(total) == pytest.approx(float(sample) + float(update), abs=0.11)  # of rounding
