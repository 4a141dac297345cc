"""Ctrl-C and SIGTERM, with real signals: the epoch is finished and saved, on all processes; and a process that is simply gone."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from dpok_trl.policy.saved import what_is_missing
from dpok_trl.results.runlog import read_metrics


SCRIPT = Path(__file__).with_name("interrupted.py")
FOUR = {"num_epochs": 4, "sample_num_steps": 2, "sample_batch_size": 2, "train_batch_size": 2}


class Sending(TrainerCallback):
    """Sends signals to this process, in the middle of the second epoch."""

    def __init__(self, *signals):
        self.signals = signals

    def on_step_begin(self, args, state, control, **kwargs):
        if int(state.epoch) == 1:
            for number in self.signals:
                os.kill(os.getpid(), number)
                time.sleep(0)  # Python calls the handler between two instructions


# --- in this process --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "signals", [(signal.SIGINT,), (signal.SIGTERM,), (signal.SIGINT, signal.SIGTERM), (signal.SIGTERM,) * 2]
)
def test_the_epoch_is_finished_and_saved(signals, make_trainer, lines, capfd):
    trainer = make_trainer(callbacks=[Sending(*signals)], **FOUR)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt) as stopped:
        trainer.train()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert (trainer.first_epoch, trainer.global_step) == (2, 2)
    checkpoint = trainer.output_dir / "checkpoint-2"
    assert what_is_missing(checkpoint) is None
    assert len(lines(trainer, "loss")) == 2
    assert str(stopped.value) == (
        f"stopped after epoch 2 of 4, which is saved. To go on: trainer.train(resume_from_checkpoint=True), or resume_from = '{trainer.output_dir}' in the "
        f"configuration (dpok-trl train --resume_from {trainer.output_dir})"
    )  # fmt: skip
    assert f"{signals[0].name}: the running epoch is finished and saved first" in capfd.readouterr().err


@pytest.mark.parametrize("when", ["before", "within"])
def test_a_signal_around_an_evaluation_stops_after_this_epoch(when, make_trainer, lines):
    def judge(images, prompts, metadata):
        if when == "within":
            os.kill(os.getpid(), signal.SIGTERM)
        return images[:, 0].mean((1, 2))

    trainer = make_trainer(
        callbacks=[Sending(signal.SIGTERM)] if when == "before" else [],
        eval_prompts=["a dog"],
        eval_reward_function=judge,
        eval_freq=2,
        save_freq=0,
        **FOUR,
    )
    with pytest.raises(KeyboardInterrupt, match="stopped after epoch 2 of 4"):
        trainer.train()
    assert what_is_missing(trainer.output_dir / "checkpoint-2") is None
    assert len(lines(trainer, "eval/prompts/kl")) == (when == "within")  # there is no time for one that has not begun


def test_an_interrupted_run_that_is_resumed_is_the_uninterrupted_one(make_trainer, adapter, tmp_path):
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **FOUR)
    whole.train()
    first = make_trainer(callbacks=[Sending(signal.SIGINT)], **FOUR)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    resumed = make_trainer(**FOUR)
    resumed.train(resume_from_checkpoint=True)
    assert all(map(torch.equal, adapter(whole).values(), adapter(resumed).values()))
    timeless = [
        [{k: v for k, v in line.items() if not k.startswith("time/") and not k.endswith("/seconds")} for line in read_metrics(one.output_dir)]
        for one in (whole, resumed)
    ]  # fmt: skip
    assert timeless[0] == timeless[1]


def test_a_second_ctrl_c_stops_at_once(make_trainer):
    trainer = make_trainer(callbacks=[Sending(signal.SIGTERM, signal.SIGINT)], save_freq=1, **FOUR)
    with pytest.raises(KeyboardInterrupt, match="in the middle of an epoch"):
        trainer.train()
    assert (trainer.first_epoch, trainer.global_step) == (1, 1)
    assert [path.name for path in trainer.output_dir.glob("*checkpoint*")] == ["checkpoint-1"]
    assert what_is_missing(trainer.output_dir / "checkpoint-1") is None


def test_callbacks_hear_of_the_end(make_trainer):
    ended = []

    class Ending(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            ended.append(state.epoch)

    with pytest.raises(KeyboardInterrupt):
        make_trainer(callbacks=[Sending(signal.SIGINT), Ending], **FOUR).train()
    assert ended == [2.0]


def test_a_signal_that_is_ignored_stays_ignored(make_trainer):
    """As under nohup."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        trainer = make_trainer(callbacks=[Sending(signal.SIGINT, signal.SIGINT)], **FOUR)
        trainer.train()
    finally:
        signal.signal(signal.SIGINT, before)
    assert trainer.first_epoch == 4


def test_in_another_thread_a_run_leaves_signals_alone(make_trainer):
    before, during = signal.getsignal(signal.SIGTERM), []

    class Looking(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            during.append(signal.getsignal(signal.SIGTERM))

    trainer = make_trainer(callbacks=[Looking], **{**FOUR, "num_epochs": 1})
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert during == [before] and trainer.first_epoch == 1


# --- processes of their own -------------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path):
    """`start(mode, processes=1)`: a process that runs interrupted.py, killed if it is left."""
    started = []

    def begin(mode, processes=1) -> subprocess.Popen:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        started.append(
            subprocess.Popen(
                [sys.executable, *(launcher if processes > 1 else ()), str(SCRIPT), str(tmp_path), mode],
                env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
        return started[-1]

    yield begin
    for process in started:
        process.kill()


def signal_in_the_middle(process: subprocess.Popen, number: signal.Signals) -> str:
    """Sends it in the second epoch; returns stderr."""
    for line in process.stdout:
        if "in epoch 1" in line:
            process.send_signal(number)
            break
    return process.communicate(timeout=120)[1]


def test_a_script_ends_by_sigterm_as_by_ctrl_c(start, tmp_path):
    process = start("alone")
    told = signal_in_the_middle(process, signal.SIGTERM)
    assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT), told[-3000:]  # a shell reports 130 for both
    assert "SIGTERM: the running epoch is finished and saved first" in told
    (checkpoint,) = (tmp_path / "alone").glob("*checkpoint*")
    epochs = json.loads((checkpoint / "trainer_state.json").read_text())["epoch"]
    assert what_is_missing(checkpoint) is None and epochs >= 2
    assert f"KeyboardInterrupt: stopped after epoch {epochs} of 10000, which is saved" in told


@pytest.mark.slow
def test_all_processes_do_what_one_is_told(start, tmp_path):
    process = start("signalled", processes=2)
    told = signal_in_the_middle(process, signal.SIGTERM)

    def said(name):
        return [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]

    # what a callback asks for on one, and what it fails with
    assert said("asked") == [{"epochs": 3, "steps": 4}] * 2
    failure = "KeyError: 'no such row'"
    assert [one["error"] for one in said("failed")] == [f"RuntimeError: process 1 failed with {failure}", failure]
    for name in ("by rank 1", "by the launcher"):
        first, second = said(name)
        assert first == second, told[-3000:]
        (checkpoint,) = (tmp_path / name).glob("*checkpoint*")
        assert what_is_missing(checkpoint) is None
        assert json.loads((checkpoint / "trainer_state.json").read_text())["epoch"] == first["epochs"]
        assert first["epochs"] == 2 if name == "by rank 1" else first["epochs"] >= 2
    assert told.count("SIGTERM: the running epoch") == 1  # the main process alone says so, if it was told itself


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_and_leaves_whole_checkpoints(start, tmp_path):
    process = start("dies", processes=2)
    # and not when a collective runs into its time limit, which is half an hour
    told = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert "exitcode  : 3" in told and "rank      : 1" in told  # torchrun says which one, and how
    assert [path.name for path in (tmp_path / "dies").glob("*checkpoint*")] == ["checkpoint-2"]  # of the first epoch
    assert what_is_missing(tmp_path / "dies" / "checkpoint-2") is None
