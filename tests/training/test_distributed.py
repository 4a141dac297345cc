"""Two real processes (gloo): one policy, two noises, one set of files. All that they do is in two_processes.py."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpok_trl.results.runlog import read_metrics
from dpok_trl.training.setup import let_gloo_threads_finish


HERE = Path(__file__).parent
GRADIENT_TOLERANCE = 1e-5  # of the largest entry: float32 sums in another order


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two processes saw, and the folder with their files."""
    folder = tmp_path_factory.mktemp("gloo")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [*command, str(HERE / "two_processes.py"), str(folder)], env=environment, capture_output=True, text=True, timeout=240
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-6000:]
    both = [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1)]
    assert [out["processes"] for out in both] == [2, 2]
    return both, folder


def same(first, second) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def test_both_processes_have_one_policy(ranks):
    (zero, one), _ = ranks
    assert same(zero["start"], one["start"])
    assert same(zero["end"], one["end"])
    assert not same(zero["start"], zero["end"])


def test_the_gradient_is_the_mean_of_both(ranks):
    (zero, one), _ = ranks
    assert len(zero["gradient errors"]) == 12  # 3 epochs, 2 inner epochs, 2 updates
    assert max(zero["gradient errors"] + one["gradient errors"]) < GRADIENT_TOLERANCE
    assert all(zero["local gradients differ"])


def test_each_process_draws_its_own_noise_and_prompts(ranks):
    (zero, one), _ = ranks
    for mine, other in zip(zero["sampled"], one["sampled"], strict=True):
        seeds = [seed for batches in (mine, other) for batch in batches for seed in batch["seeds"]]
        assert len(set(seeds)) == 16
        noises = torch.cat([batch["noise"] for batches in (mine, other) for batch in batches])
        assert len(torch.unique(noises, dim=0)) == 16
        prompts = [prompt for batches in (mine, other) for batch in batches for prompt in batch["prompts"]]
        assert sorted(prompts) == sorted([f"number {i}" for i in range(8)] * 2)  # every prompt, equally often


def test_advantages_are_those_of_one_process(ranks, make_trainer):
    (zero, one), _ = ranks
    assert same(zero["advantages"], one["advantages"])
    alone = make_trainer(per_prompt_stat_tracking=True, per_prompt_stat_tracking_min_count=2)
    for epoch, (prompts, rewards, advantages) in enumerate(zero["advantages"]):
        assert torch.equal(alone.advantages(prompts, rewards), advantages)
        for rank, out in enumerate((zero, one)):
            part = slice(8 * rank, 8 * rank + 8)
            assert torch.equal(torch.cat([batch["rewards"] for batch in out["sampled"][epoch]]), rewards[part])
            assert torch.equal(torch.cat(out["trained on"][epoch]), advantages[part])


def test_one_process_alone_ends_elsewhere(ranks, make_trainer, adapter):
    (zero, _), _ = ranks
    alone = make_trainer(prompts=zero["prompts"], **zero["settings"])
    assert same(adapter(alone), zero["start"])
    alone.train()
    assert not same(adapter(alone), zero["end"])


def test_one_set_of_files(ranks):
    (zero, one), folder = ranks
    assert zero["has a log"] and not one["has a log"]
    assert zero["hooked"] == [0, 4, 8] and one["hooked"] == []
    names = {path.name for path in (folder / "whole").iterdir()}
    assert names == {
        "checkpoint-4",
        "checkpoint-8",
        "checkpoint-12",
        "metrics.jsonl",
        "samples",
        "samples.parquet",
        "config.yaml",
        "report.html",
        "report.json",
    }
    states = {path.name for path in (folder / "whole" / "checkpoint-12").glob("random_states_*")}
    assert states == {"random_states_0.pkl", "random_states_1.pkl"}
    assert (folder / "model" / "pytorch_lora_weights.safetensors").exists()


def test_metrics_are_of_both_processes(ranks):
    (zero, _), folder = ranks
    lines = read_metrics(folder / "whole")
    rounds = [line for line in lines if "reward" in line]
    assert [line["images"] for line in rounds] == [16, 32, 48]
    for line, (_, rewards, _) in zip(rounds, zero["advantages"], strict=True):
        assert line["reward"] == rewards.mean().item()
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert rates == pytest.approx([0.01 * (1 - i / 12) for i in range(12)])  # not twice as fast


def test_a_resumed_run_is_the_uninterrupted_one(ranks):
    (zero, one), _ = ranks
    for out in (zero, one):
        assert same(out["uninterrupted"], out["interrupted"])  # adapter, optimizer, statistics, random state
    assert same(zero["interrupted"][0], one["interrupted"][0])
    assert zero["interrupted"][3] != one["interrupted"][3]  # each process has a random state of its own


@pytest.mark.parametrize("name", ["value", "statistics"])
def test_whatever_a_run_remembers_is_resumed_bit_for_bit(ranks, name):
    (zero, one), _ = ranks
    for out in (zero, one):
        whole, parts = out[f"{name} whole"], out[f"{name} parts"]
        assert same(whole, parts)
        assert len(whole["buffer"]) == 4  # training batches of one round, which the next one would draw from as well
    first, second = zero[f"{name} whole"], one[f"{name} whole"]
    assert same(first["adapter"], second["adapter"]) and same(first["remembered"], second["remembered"])
    assert not same(first["buffer"], second["buffer"])  # each process has its own samples
    value, kl_weight, statistics = first["remembered"]
    assert (value is None) == (name == "statistics") and (statistics is None) == (name == "value")
    assert name == "statistics" or kl_weight != 0.1


def test_a_reward_that_fails_in_one_process_stops_both(ranks):
    (zero, one), _ = ranks
    message = "the reward function fails_on_1 raised ConnectionError: no route to host"
    for name in ("fails", "fails in threads", "one of two fails"):
        assert one[name] == message
        assert zero[name] == f"process 1 failed with RewardError: {message}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing finite on 1", "none of the 8 rewards that nan_on_1 gave in this round on process 1 is finite: there is nothing to learn from"),
        ("not finite on 1", "4 of the 4 rewards that nan_on_1 returned are not finite in float32 (4 NaN, 0 infinite); the first is nan"),
    ],
)  # fmt: skip
def test_rewards_that_are_not_finite_in_one_process_stop_both(ranks, name, message):
    (zero, one), _ = ranks
    assert one[name].startswith(message)
    # what a single process could see reaches the other by name; what only the gathered rewards show is seen by both
    assert zero[name] in (one[name], f"process 1 failed with RewardError: {one[name]}")


def test_no_image_that_counts_in_any_process_stops_both(ranks):
    (zero, one), _ = ranks
    assert zero["no image counts"] == one["no image counts"]
    assert zero["no image counts"].startswith("none of the 16 images of the round has a reward")


def test_both_stop_at_once(ranks):
    """And not when a collective runs into its time limit, which is minutes."""
    for out in ranks[0]:
        assert len(out["seconds to stop"]) == 6 and max(out["seconds to stop"]) < 30


def test_a_process_whose_images_no_reward_applies_to_goes_on(ranks):
    (zero, one), _ = ranks
    metrics = zero["does not apply on 1"]
    assert metrics["images_left_out"] == 8 and metrics["reward"] == 1.0
    assert metrics["rewards/none_on_1/nonfinite"] == 0
    assert one["does not apply on 1"]["images_left_out"] == 8  # the same, whichever process you ask


def test_an_image_that_does_not_count_is_in_no_statistic_of_any_process(ranks, make_trainer):
    (zero, one), _ = ranks
    assert all(same(zero["masked advantages"][i], one["masked advantages"][i]) for i in (0, 2))
    prompts, rewards, advantages = zero["masked advantages"]
    left_out = [10, 14]  # image 2 of both batches of process 1
    counts = [row for row in range(16) if row not in left_out]
    assert rewards.isnan().nonzero().flatten().tolist() == left_out
    assert advantages[left_out].tolist() == [0, 0]
    alone = make_trainer(per_prompt_stat_tracking=True, per_prompt_stat_tracking_min_count=2)
    assert torch.equal(alone.advantages([prompts[row] for row in counts], rewards[counts]), advantages[counts])
    metrics = zero["masked"]["metrics"]
    assert (metrics["images_left_out"], metrics["rewards/fails_for_one/nonfinite"]) == (2, 2)
    assert metrics["rewards/index/process"] == 0.5  # two calls of each process
    assert metrics["reward"] == rewards[counts].mean().item()
    assert same(zero["masked"]["end"], one["masked"]["end"])
    assert not same(zero["masked"]["end"], zero["masked"]["start"])


def test_a_prompt_function_that_fails_in_one_process_stops_both(ranks):
    (zero, one), _ = ranks
    assert one["fails in the prompts"] == "KeyError: 'no such prompt'"
    assert zero["fails in the prompts"] == "RuntimeError: process 1 failed with KeyError: 'no such prompt'"


@pytest.mark.parametrize("name", ["full", "text"])
def test_both_processes_have_the_same_weights_whatever_is_trained(ranks, name):
    """Full fine-tuning, and adapters on the text encoder too, resumed half-way."""
    (zero, one), folder = ranks
    assert same(zero[name], one[name])
    start, end = zero[name]["start"], zero[name]["end"]
    assert all(not torch.equal(value, end[key]) for key, value in start.items() if "lora_A" not in key)
    if name == "text":
        assert any(key.startswith("networks.text_encoder.") for key in end)
        names = list(load_file(folder / name / "checkpoint-4" / "pytorch_lora_weights.safetensors"))
        assert {key.split(".")[0] for key in names} == {"unet", "text_encoder"}
    else:
        assert all(torch.equal(value, start[f"networks.unet.{key}"]) for key, value in zero[name]["frozen"].items())
        assert (folder / name / "checkpoint-4" / "unet" / "diffusion_pytorch_model.safetensors").exists()


@pytest.mark.parametrize("name", ["full", "text"])
def test_two_processes_train_more_than_the_denoisers_adapter(ranks, name):
    _, folder = ranks
    lines = [line for line in read_metrics(folder / name) if "loss" in line]
    assert lines[0]["policy/ratio_deviation_max"] == lines[0]["kl"] == 0.0 < lines[-1]["kl"]


def test_a_thread_that_waits_for_the_interpreter_gets_it_before_the_end():
    distributed = torch.distributed
    may_go, released = [], []

    def wait():
        while not may_go:
            time.sleep(1e-3)
        released.append(True)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    before = sys.getswitchinterval()
    sys.setswitchinterval(60)  # the main thread keeps the interpreter unless it lets go of it
    try:
        may_go.append(True)
        held_back = not released
        let_gloo_threads_finish()
        assert held_back and released
    finally:
        sys.setswitchinterval(before)
        distributed.destroy_process_group()
