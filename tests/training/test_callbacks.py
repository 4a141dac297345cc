"""Callbacks of transformers in a run: which events come and when, what they see, and that what they ask for is done."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from test_docs import tables
from tiny import stable_diffusion
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy
from trl import RichProgressCallback

from dpok_trl import DPOKSFTConfig, DPOKSFTTrainer
from dpok_trl.results.evaluation import Evaluation
from dpok_trl.results.runlog import read_metrics


DOCS = Path(__file__).parents[2] / "docs"
# Two epochs of two optimizer steps
TWO = {"num_epochs": 2, "sample_num_steps": 2, "train_batch_size": 2}
EVALUATED = {"eval_prompts": {"held-out": ["a fox"]}, "eval_freq": 1, "eval_num_images_per_prompt": 1}
METRIC = "eval/held-out/red/tuned"
METRICS = Evaluation.metrics
EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]


def red(images, prompts, metadata):
    return images[:, 0].mean((1, 2)), {}


def recorder(record):
    """A callback class that has every event, and calls `record(event, args, state, control, given)` in it."""

    def of(event):
        def method(self, args, state, control, **given):
            return record(event, args, state, control, given)

        return method

    return type("Recorder", (TrainerCallback,), {event: of(event) for event in EVENTS})


def asking(event, when=lambda state: True, **flags):
    """A callback that sets flags of `control` in an event."""

    def record(happened, args, state, control, given):
        if happened == event and when(state):
            for name, value in flags.items():
                setattr(control, name, value)

    return recorder(record)()


# --- the events -------------------------------------------------------------------------------------------------------


def test_the_events_come_in_transformers_order(make_trainer):
    seen = []

    def record(event, args, state, control, given):
        what = "round" if "reward" in given.get("logs", {}) else "update" if "loss" in given.get("logs", {}) else ""
        seen.append((event, what, state.global_step, state.epoch))

    trainer = make_trainer(callbacks=[recorder(record)], save_freq=2, **{**EVALUATED, "eval_freq": 2}, **TWO)
    assert seen == [("on_init_end", "", 0, 0)]
    trainer.train()

    def step(number, epoch):
        return [
            ("on_step_begin", "", number - 1, epoch - 0.5),
            ("on_pre_optimizer_step", "", number - 1, epoch - 0.5),
            ("on_optimizer_step", "", number - 1, epoch - 0.5),
            ("on_step_end", "", number, epoch),
            ("on_log", "update", number, epoch),
        ]

    assert seen[1:] == [
        ("on_train_begin", "", 0, 0.0),
        ("on_epoch_begin", "", 0, 0.0),
        ("on_log", "round", 0, 0.0),
        *step(1, 0.5),
        *step(2, 1.0),
        ("on_log", "", 2, 1.0),  # of the whole round
        ("on_epoch_end", "", 2, 1.0),
        ("on_epoch_begin", "", 2, 1.0),
        ("on_log", "round", 2, 1.0),
        *step(3, 1.5),
        *step(4, 2.0),
        ("on_log", "", 4, 2.0),
        ("on_epoch_end", "", 4, 2.0),
        ("on_log", "", 4, 2.0),  # of the evaluation
        ("on_evaluate", "", 4, 2.0),
        ("on_save", "", 4, 2.0),
        ("on_train_end", "", 4, 2.0),
    ]


def test_the_supervised_trainer_has_the_same_events(tmp_path, make_trainer, make_config):
    def events(trainer_of):
        seen = []
        trainer_of(recorder(lambda event, *_: seen.append(event))).train()
        return seen

    def supervised(callback):
        config = DPOKSFTConfig(**{**dataclasses.asdict(make_config(**TWO)), "output_dir": str(tmp_path / "sft")})
        return DPOKSFTTrainer(config, red, ["a cat"], stable_diffusion(), callbacks=[callback])  # fmt: skip

    by_reward = events(lambda callback: make_trainer(callbacks=[callback], **TWO))
    drawn_once = events(supervised)
    assert by_reward.count("on_log") == 2 * 4 and drawn_once.count("on_log") == 2 * 3 + 1  # one round of sampling
    assert [event for event in by_reward if event != "on_log"] == [event for event in drawn_once if event != "on_log"]


def test_what_a_callback_sees(make_trainer):
    seen = {}

    def record(event, args, state, control, given):
        seen[event] = (args, state, control, given)
        if event == "on_optimizer_step":
            seen["gradient"] = max(p.grad.abs().max().item() for p in given["model"].parameters() if p.requires_grad)
        if event == "on_save":
            seen["checkpoint"] = Path(args.output_dir) / f"checkpoint-{state.global_step}"

    trainer = make_trainer(callbacks=[recorder(record)], train_learning_rate=1e-2, **EVALUATED, **TWO)
    trainer.train()
    _, state, control, given = seen["on_train_end"]
    assert type(state) is TrainerState and type(control) is TrainerControl
    assert given["model"] is trainer.policy and given["optimizer"] is trainer.optimizer
    assert given["lr_scheduler"] is trainer.lr_scheduler
    assert (state.max_steps, state.global_step, state.num_train_epochs, state.epoch) == (4, 4, 2, 2.0)
    assert (state.is_world_process_zero, state.is_local_process_zero) == (True, True)
    assert state.log_history == read_metrics(trainer.output_dir)
    assert seen["gradient"] > 0  # still there
    assert (seen["checkpoint"] / "trainer_state.json").exists()
    assert seen["on_evaluate"][3]["metrics"].items() >= {"epoch": 1}.items()
    assert METRIC in seen["on_evaluate"][3]["metrics"]


def test_no_callback_can_change_what_is_logged(make_trainer, lines):
    class Greedy(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logs.clear()

    trainer = make_trainer(callbacks=[Greedy], **TWO)
    trainer.train()
    assert len(lines(trainer, "loss")) == 4
    assert [line for line in trainer.callbacks.state.log_history if "loss" in line] == lines(trainer, "loss")


def test_training_does_not_notice_callbacks(make_trainer, adapter, tmp_path):
    without = make_trainer(output_dir=str(tmp_path / "without"), **TWO)
    without.train()
    watched = make_trainer(output_dir=str(tmp_path / "with"), callbacks=[recorder(lambda *_: None)], **TWO)
    watched.train()
    assert all(map(torch.equal, adapter(without).values(), adapter(watched).values()))


def test_the_number_of_steps_leaves_out_epochs_of_the_value_function_alone(make_trainer):
    value = {"train_adv_type": "value", "value_batch_size": 4, "value_num_updates": 1, "value_warmup_epochs": 1}
    trainer = make_trainer(callbacks=[TrainerCallback], **TWO, **value)
    trainer.train()
    assert trainer.callbacks.state.max_steps == trainer.global_step == 2


# --- what they ask for ------------------------------------------------------------------------------------------------


def test_a_run_that_is_told_to_stop_stops_after_its_step_and_is_saved(make_trainer):
    trainer = make_trainer(
        callbacks=[asking("on_step_end", lambda state: state.global_step == 3, should_training_stop=True)],
        **{**TWO, "num_epochs": 5},
    )
    trainer.train()
    assert (trainer.global_step, trainer.first_epoch) == (3, 2)
    assert [path.name for path in trainer.output_dir.glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_run_that_was_stopped_goes_on_when_asked_to(make_trainer):
    trainer = make_trainer(
        callbacks=[asking("on_epoch_end", lambda s: s.epoch == 1, should_training_stop=True)], **TWO
    )
    trainer.train()
    assert trainer.first_epoch == 1
    trainer.train()
    assert trainer.first_epoch == 2 and trainer.global_step == 4


def test_an_epoch_can_be_cut_short(make_trainer):
    trainer = make_trainer(callbacks=[asking("on_step_end", lambda state: state.epoch <= 1, should_epoch_stop=True)], **TWO)  # fmt: skip
    trainer.train()
    assert (trainer.global_step, trainer.first_epoch) == (1 + 2, 2)


def test_a_checkpoint_that_is_asked_for_is_written_at_the_end_of_the_epoch(make_trainer):
    trainer = make_trainer(callbacks=[asking("on_step_end", lambda state: state.global_step == 1, should_save=True)], **TWO)  # fmt: skip
    trainer.train()
    assert sorted(path.name for path in trainer.output_dir.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_an_evaluation_that_is_asked_for_is_made(make_trainer, lines):
    trainer = make_trainer(
        callbacks=[asking("on_step_end", lambda state: state.global_step == 1, should_evaluate=True)],
        **{**EVALUATED, "eval_freq": 0},
        **TWO,
    )
    trainer.train()
    assert [line["epoch"] for line in lines(trainer, METRIC)] == [0]


def test_a_control_that_is_returned_takes_the_place_of_the_old_one(make_trainer):
    class Replacing(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            return TrainerControl(should_training_stop=True)

    trainer = make_trainer(callbacks=[Replacing()], **TWO)
    trainer.train()
    assert trainer.first_epoch == 1


def test_an_error_in_a_callback_ends_the_run(make_trainer):
    class Failing(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyError("no such row")

    with pytest.raises(KeyError, match="no such row"):
        make_trainer(callbacks=[Failing], **TWO).train()


# --- callbacks that are shipped ---------------------------------------------------------------------------------------


def evaluations_of(values, monkeypatch):
    """Evaluations give these values, one after the other."""
    left = list(values)
    monkeypatch.setattr(Evaluation, "metrics", lambda self: {**METRICS(self), METRIC: left.pop(0)})


@pytest.mark.parametrize(
    ("values", "settings", "epochs", "best"),
    [
        ([0.1, 0.3, 0.2, 0.25, 9.0], {}, 4, 0.3),  # two without a better one
        ([0.1, 0.3, 0.2, 0.4, 0.5], {}, 5, 0.5),
        ([0.3, 0.2, 0.4, 0.25, 0.1], {"greater_is_better": False}, 4, 0.2),
    ],
)
def test_early_stopping(values, settings, epochs, best, make_trainer, monkeypatch):
    evaluations_of(values, monkeypatch)
    trainer = make_trainer(
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        metric_for_best_model=METRIC,
        **EVALUATED,
        **{**TWO, "num_epochs": 5, "save_freq": 1, "num_checkpoint_limit": 1, **settings},
    )
    trainer.train()
    state = trainer.callbacks.state
    best_step = 2 * (1 + values.index(best))
    assert trainer.first_epoch == epochs
    assert (state.best_metric, state.best_global_step) == (best, best_step)
    # the best one outlives the limit, and the last one is there
    assert {path.name for path in trainer.output_dir.glob("checkpoint-*")} == {f"checkpoint-{best_step}", f"checkpoint-{2 * epochs}"}  # fmt: skip
    assert state.best_model_checkpoint == str(trainer.output_dir / f"checkpoint-{best_step}")


def test_early_stopping_says_what_it_needs(make_trainer):
    with pytest.raises(AssertionError, match="requires metric_for_best_model"):
        make_trainer(callbacks=[EarlyStoppingCallback], **EVALUATED, **TWO).train()


@pytest.mark.parametrize("callback", [ProgressCallback, RichProgressCallback])
def test_progress_bars_take_the_place_of_ours(callback, make_trainer, capfd):
    trainer = make_trainer(callbacks=[callback], **TWO)
    trainer.train()
    shown = "".join(capfd.readouterr())
    assert "epochs:" not in shown and "rollout:" not in shown
    assert ("4/4" if callback is ProgressCallback else "100%") in shown
    make_trainer(output_dir=str(trainer.output_dir) + "-ours", **TWO).train()
    assert "epochs:" in capfd.readouterr().err


def test_the_printer_prints_every_line(make_trainer, capfd, lines):
    trainer = make_trainer(callbacks=[PrinterCallback], **TWO)
    trainer.train()
    printed = [line for line in capfd.readouterr().out.splitlines() if line.startswith("{")]
    assert len(printed) == len(lines(trainer)) == 8


# --- checkpoints ------------------------------------------------------------------------------------------------------


class Counter(TrainerCallback, ExportableState):
    def __init__(self, name="", start=0):
        self.name, self.count = name, start

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1

    def state(self):
        return {"args": {"name": self.name}, "attributes": {"count": self.count}}


def test_the_state_of_callbacks_is_resumed(make_trainer, monkeypatch, tmp_path):
    def state_of(*parts):
        evaluations_of([0.1, 0.3, 0.2, 0.25, 9.0], monkeypatch)
        for epochs in parts:
            first, second = Counter("first"), Counter("second", start=10)
            stopping = EarlyStoppingCallback(early_stopping_patience=2)
            trainer = make_trainer(
                callbacks=[first, stopping, second],
                metric_for_best_model=METRIC,
                output_dir=str(tmp_path / str(len(parts))),
                **EVALUATED,
                **{**TWO, "num_epochs": 5},
            )
            trainer.train(epochs, resume_from_checkpoint=epochs != parts[0])
        state = trainer.callbacks.state
        return {
            "counts": (first.count, second.count),
            "stopped after": trainer.first_epoch,
            "patience": stopping.early_stopping_patience_counter,
            "best": (state.best_metric, state.best_global_step, Path(state.best_model_checkpoint or "-").name),
            "epochs": [(line["epoch"], line["step"]) for line in state.log_history],
        }

    whole, resumed = state_of(5), state_of(3, 5)
    assert whole["counts"] == (8, 18) and whole["stopped after"] == 4
    # save_freq = 0: the only difference is that the part's end is saved
    assert {**resumed, "best": resumed["best"][:2]} == {**whole, "best": whole["best"][:2]}


def test_callbacks_that_are_gone_are_named(make_trainer, caplog):
    trainer = make_trainer(callbacks=[Counter()], **{**TWO, "num_epochs": 1})
    trainer.train()
    state = json.loads((trainer.output_dir / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["callbacks"]["stateful_callbacks"] == {"Counter": {"args": {"name": ""}, "attributes": {"count": 2}}}
    make_trainer(**TWO).train(resume_from_checkpoint=True)
    assert "the checkpoint holds the state of callbacks that this run does not have: Counter" in caplog.text


def test_a_state_that_is_no_json_is_refused_in_words(make_trainer):
    counter = Counter()
    trainer = make_trainer(callbacks=[counter], **{**TWO, "num_epochs": 1})
    counter.name = torch.zeros(2)
    with pytest.raises(TypeError, match="the state of the callback Counter goes into a checkpoint as JSON, and it cannot"):  # fmt: skip
        trainer.train()
    assert not list(trainer.output_dir.glob("*checkpoint*"))


# --- what is refused, and args ----------------------------------------------------------------------------------------


def test_what_is_no_callback_is_refused(make_trainer):
    with pytest.raises(TypeError, match="callbacks are transformers.TrainerCallback classes or instances, given: <function"):  # fmt: skip
        make_trainer(callbacks=[lambda: None])


def test_a_metric_that_no_evaluation_logs_is_refused(make_trainer):
    with pytest.raises(ValueError, match=re.escape(f"is logged by no evaluation of this run. Did you mean '{METRIC}'?")):  # fmt: skip
        make_trainer(metric_for_best_model="eval/held_out/red/tuned", **EVALUATED)


def test_args_hold_the_settings_under_both_names(make_trainer):
    trainer = make_trainer(callbacks=[TrainerCallback], train_learning_rate=0.5, **EVALUATED, **TWO)
    args = trainer.callbacks.args
    assert args.learning_rate == args.train_learning_rate == 0.5
    assert args.output_dir == str(trainer.output_dir) and args.seed == 0
    assert args.eval_strategy == IntervalStrategy.EPOCH and args.save_strategy == IntervalStrategy.NO
    assert args.to_dict() == trainer.config.to_dict()
    with pytest.raises(AttributeError, match="args.label_names, a field of transformers.TrainingArguments that a run of DPOKConfig has nothing for"):  # fmt: skip
        args.label_names  # noqa: B018
    with pytest.raises(AttributeError, match="args.beta, which is neither a setting of DPOKConfig"):
        args.beta  # noqa: B018
    assert getattr(args, "deepspeed", None) is None  # as callbacks ask for what may be missing


def test_every_name_in_args_is_transformers_and_documented(make_trainer):
    args = make_trainer().callbacks.args
    own = {name for name in vars(args) if not name.startswith("_")}
    text = (DOCS / "callbacks.md").read_text()
    assert own <= {*dir(TrainingArguments), *TrainingArguments.__dataclass_fields__}
    assert own == set(tables(text, "args"))


def test_every_event_is_documented():
    text = (DOCS / "callbacks.md").read_text()
    assert {event for event in EVENTS if f"`{event}`" not in text} == set()
