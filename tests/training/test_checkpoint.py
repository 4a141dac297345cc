"""Checkpoints: interrupted and resumed equals uninterrupted bit for bit; half-written ones are passed over; rotation."""

import itertools
import json
import logging
import random
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from accelerate.utils import InitProcessGroupKwargs
from safetensors.torch import load_file
from tiny import stable_diffusion


EPOCHS = 4
FULL = {
    "num_epochs": EPOCHS,
    "save_freq": 1,
    "sample_num_steps": 3,
    "sample_batch_size": 4,
    "train_batch_size": 2,
    "train_learning_rate": 1e-2,
    "train_lr_scheduler": "cosine",
    "train_lr_warmup_steps": 2,
    "train_num_inner_epochs": 2,
    "train_timestep_fraction": 0.7,
    "per_prompt_stat_tracking": True,
    "per_prompt_stat_tracking_buffer_size": 8,
    "per_prompt_stat_tracking_min_count": 2,
}
UPDATES_PER_EPOCH = 4


def random_prompt():
    """As DDPO users write it: drawn from the global generator."""
    return random.choice(["a cat", "two dogs", "3 birds", "a house"]), {"weight": random.random()}


def weighted_red(images, prompts, metadata):
    weights = torch.tensor([entry.get("weight", 1.0) for entry in metadata])
    return images[:, 0].mean((1, 2)) * weights, {}


PROMPT_KINDS = {"list": [f"number {i}" for i in range(5)], "callable that draws": random_prompt}


def flatten(tree, prefix=""):
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in flatten(value, f"{prefix}{key}.").items()}
    if isinstance(tree, (list, tuple)):
        return flatten(dict(enumerate(tree)), prefix)
    return {prefix: tree}


def assert_equal_bit_for_bit(first, second, lines):
    for name, tensor in load_file(first / "pytorch_lora_weights.safetensors").items():
        assert torch.equal(tensor, load_file(second / "pytorch_lora_weights.safetensors")[name]), name
    for file in ("optimizer.bin", "scheduler.bin"):
        one, two = (flatten(torch.load(folder / file, weights_only=True)) for folder in (first, second))
        assert one.keys() == two.keys() and len(one) > 0
        for name, value in one.items():
            assert torch.equal(value, two[name]) if isinstance(value, torch.Tensor) else value == two[name], name
    one, two = (json.loads((folder / "trainer_state.json").read_text()) for folder in (first, second))
    for name in ("epoch", "global_step", "prompts", "stat_tracker", "reanchor"):
        assert one[name] == two[name], name
    assert one["stat_tracker"]["rewards"]
    one, two = ([timeless(line) for line in lines(folder.parent)] for folder in (first, second))
    assert one == two and len(one) == EPOCHS * (UPDATES_PER_EPOCH + 2)


def timeless(line):
    return {key: value for key, value in line.items() if not key.startswith("time/") and not key.endswith("/seconds")}


@pytest.fixture
def metrics():
    def read(folder):
        return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]

    return read


class Interrupted(Exception):
    pass


def interrupt(trainer, where: str):
    """Raises in the third epoch (index 2), at a chosen place of it."""
    if where == "rollout":
        owner, name, call = trainer.policy, "rollout", 2
    elif where == "update":
        owner, name, call = trainer, "_update", 2 * UPDATES_PER_EPOCH + 3
    elif where == "save":
        owner, name, call = trainer.checkpoints, "_state", 2
    function, calls = getattr(owner, name), itertools.count()

    def interrupted(*args, **kwargs):
        if next(calls) == call:
            raise Interrupted
        return function(*args, **kwargs)

    setattr(owner, name, interrupted)


@pytest.mark.parametrize("prompts", PROMPT_KINDS)
def test_interrupted_and_resumed_is_uninterrupted(prompts, make_trainer, metrics, tmp_path):
    def trainer(name):
        return make_trainer(weighted_red, PROMPT_KINDS[prompts], output_dir=str(tmp_path / name), **FULL)

    trainer("whole").train()
    for where in ("rollout", "update", "save"):
        first = trainer(where)
        interrupt(first, where)
        with pytest.raises(Interrupted):
            first.train()
        random.seed(99)  # a new process starts with other random states
        torch.manual_seed(99)
        trainer(where).train(resume_from_checkpoint=True)
        last = f"checkpoint-{EPOCHS * UPDATES_PER_EPOCH}"
        assert_equal_bit_for_bit(tmp_path / "whole" / last, tmp_path / where / last, metrics)
        names = {path.name for path in (tmp_path / where).iterdir()}
        assert names == {path.name for path in (tmp_path / "whole").iterdir()}  # nothing half-written is left


@pytest.fixture
def saved(make_trainer):
    """A run of three epochs with a checkpoint of each."""
    trainer = make_trainer(num_epochs=3, save_freq=1, sample_num_steps=2)
    trainer.train()
    return trainer.output_dir


def start_of(trainer) -> int:
    """Where `train()` begins, without training."""
    trainer.step = lambda epoch, global_step: global_step
    trainer.checkpoints.save = lambda: None
    resumed = []
    resume = trainer.checkpoints.resume
    trainer.checkpoints.resume = lambda path: (
        resume(path),
        resumed.append((trainer.first_epoch, trainer.global_step)),
    )
    trainer.train()
    return resumed[0]


@pytest.mark.parametrize(
    ("path", "begins"), [("", 3), ("checkpoint-2", 2), ("checkpoint-1", 1)], ids=["folder", "checkpoint", "the oldest"]
)
def test_resume_from_of_the_config(path, begins, saved, make_trainer):
    trainer = make_trainer(resume_from=str(saved / path), sample_num_steps=2)
    assert start_of(trainer) == (begins, begins)


@pytest.mark.parametrize("given", ["string", "path", "folder"])
def test_resume_from_checkpoint_takes_a_path(given, saved, make_trainer):
    path = {"string": str(saved / "checkpoint-2"), "path": saved / "checkpoint-2", "folder": saved}[given]
    trainer = make_trainer(num_epochs=3, sample_num_steps=2)
    trainer.train(resume_from_checkpoint=path)
    assert (trainer.first_epoch, trainer.global_step) == (3, 3)


def test_a_checkpoint_may_be_resumed_into_another_folder(saved, make_trainer, metrics, tmp_path):
    trainer = make_trainer(num_epochs=3, sample_num_steps=2, output_dir=str(tmp_path / "other"))
    trainer.train(resume_from_checkpoint=saved / "checkpoint-1")
    assert [line["epoch"] for line in metrics(tmp_path / "other") if "reward" in line] == [1, 2]
    assert len(metrics(saved)) == 9  # what it came from is left alone


def test_a_checkpoint_holds_the_adapter_and_not_the_base(saved):
    files = {path.name: path.stat().st_size for path in (saved / "checkpoint-3").iterdir()}
    assert set(files) == {
        "pytorch_lora_weights.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "trainer_state.json"
    }  # fmt: skip


def test_the_decision_to_reanchor_is_the_first_batchs(saved, make_trainer):
    """Another batch might replay exactly by luck, and then the run would not go on as it was."""
    state_file = saved / "checkpoint-3" / "trainer_state.json"
    state = json.loads(state_file.read_text())
    assert state["reanchor"] is False
    state_file.write_text(json.dumps({**state, "reanchor": True}))
    trainer = make_trainer(num_epochs=4, sample_num_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.experience.reanchor is True


# Everything that a run may remember beside the adapter: `expected` are the files that a checkpoint then has more of.
REMEMBERING = {
    "value function, buffer, adapted weight, moved reference": (
        {
            "train_adv_type": "value",
            "value_batch_size": 8,
            "value_num_updates": 2,
            "value_warmup_epochs": 1,
            "train_objective": "kl_mask",
            "train_buffer_rounds": 3,
            "kl_weight": 0.1,
            "target_kl": 1e-3,
            "reference_update_epochs": 2,
        },
        {"value_function.pt", "buffer-0.safetensors", "reference.safetensors"},
    ),
    "statistics of prompts, charges of the buffer": (
        {
            "per_prompt_stat_tracking": True,
            "per_prompt_stat_tracking_buffer_size": 8,
            "per_prompt_stat_tracking_min_count": 2,
            "kl_gradient": "exact",
            "train_buffer_rounds": 2,
            "kl_warmup_epochs": 1,
        },
        {"buffer-0.safetensors"},
    ),
    "critic on features, curated groups": (
        {
            "train_adv_type": "value",
            "value_input": "features",
            "value_batch_size": 8,
            "train_buffer_rounds": 2,
            "sample_num_images_per_prompt": 4,
            "train_keep_best": 1,
            "train_keep_worst": 1,
        },
        {"value_function.pt", "buffer-0.safetensors"},
    ),
}


@pytest.mark.parametrize("name", REMEMBERING)
def test_whatever_a_run_remembers_is_resumed_bit_for_bit(name, make_trainer, metrics, tmp_path):
    settings, expected = REMEMBERING[name]
    plain = {key: value for key, value in FULL.items() if not key.startswith("per_prompt_")}

    def trainer(folder):
        return make_trainer(prompts=PROMPT_KINDS["list"], output_dir=str(tmp_path / folder), **{**plain, **settings})

    whole = trainer("whole")
    whole.train()
    for epochs in (1, 2, EPOCHS):  # through the warm-up, and with the buffer half full
        torch.manual_seed(99)
        trainer("parts").train(epochs=epochs, resume_from_checkpoint=epochs > 1)
    last = max((tmp_path / "whole").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])).name
    one, two = tmp_path / "whole" / last, tmp_path / "parts" / last
    assert expected <= {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    for file in one.glob("*.safetensors"):
        first, second = load_file(file), load_file(two / file.name)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first), file
    for file in ("optimizer.bin", *(["value_function.pt"] if "value_function.pt" in expected else [])):
        first, second = (flatten(torch.load(folder / file, weights_only=True)) for folder in (one, two))
        for key, value in first.items():
            assert torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key], key
    first, second = (json.loads((folder / "trainer_state.json").read_text()) for folder in (one, two))
    assert all(first[key] == second[key] for key in ("epoch", "prompts", "stat_tracker", "kl_weight"))
    lines = [[timeless(line) for line in metrics(folder.parent)] for folder in (one, two)]
    assert lines[0] == lines[1]
    if "target_kl" in settings:
        assert first["kl_weight"] != settings["kl_weight"]


def test_a_checkpoint_without_a_value_function_is_told(saved, make_trainer):
    trainer = make_trainer(sample_num_steps=2, train_adv_type="value", value_batch_size=4)
    with pytest.raises(ValueError, match="holds no value function: it was written with train_adv_type = 'batch'"):
        trainer.train(resume_from_checkpoint=True)


def test_a_value_function_of_another_size_is_told(make_trainer):
    settings = {"train_adv_type": "value", "value_batch_size": 4}
    make_trainer(save_freq=1, sample_num_steps=2, **settings).train()
    trainer = make_trainer(num_epochs=2, sample_num_steps=3, **settings)
    with pytest.raises(ValueError, match=r"2 denoising steps, and is given \d+ inputs and 3"):
        trainer.train(resume_from_checkpoint=True)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


BREAK = {
    "a truncated file": lambda c: truncate(c / "optimizer.bin"),
    "a truncated adapter": lambda c: truncate(c / "pytorch_lora_weights.safetensors"),
    "a missing file": lambda c: (c / "random_states_0.pkl").unlink(),
    "no state": lambda c: (c / "trainer_state.json").unlink(),
    "a truncated state": lambda c: truncate(c / "trainer_state.json"),
    "an empty state": lambda c: (c / "trainer_state.json").write_text(""),
    "a state that is no object": lambda c: (c / "trainer_state.json").write_text("[]"),
}


@pytest.mark.parametrize("kind", BREAK)
def test_a_half_written_checkpoint_is_passed_over(kind, saved, make_trainer, caplog):
    BREAK[kind](saved / "checkpoint-3")
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(sample_num_steps=2, num_epochs=2)
        trainer.train(resume_from_checkpoint=True)
    assert trainer.global_step == 2
    message, *_ = [r.getMessage() for r in caplog.records if r.name.startswith("dpok_trl")]
    assert "checkpoint-3 is not whole (" in message and message.endswith(
        f"resuming from {saved / 'checkpoint-2'} instead"
    )


@pytest.mark.parametrize("kind", BREAK)
def test_a_half_written_checkpoint_that_is_named_gives_way_to_a_whole_one(kind, saved, make_trainer, caplog):
    BREAK[kind](saved / "checkpoint-3")
    with caplog.at_level(logging.WARNING):
        make_trainer(sample_num_steps=2, num_epochs=2).train(resume_from_checkpoint=saved / "checkpoint-3")
    assert any("checkpoint-3 is not whole" in record.getMessage() for record in caplog.records)


def test_a_checkpoint_that_does_not_exist_gives_way_to_a_whole_one(saved, make_trainer, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(sample_num_steps=2, num_epochs=3)
        trainer.train(resume_from_checkpoint=saved / "checkpoint-7")
    assert trainer.global_step == 3
    assert any("checkpoint-7 does not exist; resuming from" in record.getMessage() for record in caplog.records)


def test_without_a_whole_checkpoint_nothing_is_resumed(saved, make_trainer, tmp_path):
    for checkpoint in saved.glob("checkpoint-*"):
        (checkpoint / "optimizer.bin").unlink()
    with pytest.raises(
        ValueError, match=r"nothing to resume from.*checkpoint-3 is not whole \(optimizer.bin is missing\)"
    ):
        make_trainer(sample_num_steps=2).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="nothing to resume from at .*there is no checkpoint-<step> in it"):
        make_trainer(output_dir=str(tmp_path / "empty")).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="nothing to resume from at .*nowhere"):
        make_trainer(resume_from="nowhere", output_dir=str(tmp_path / "empty")).train()


def test_a_run_that_died_while_saving_leaves_no_checkpoint(make_trainer, monkeypatch):
    trainer = make_trainer(save_freq=1)
    monkeypatch.setattr(trainer.checkpoints, "_state", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert list(trainer.output_dir.glob("checkpoint-*")) == []


def test_the_oldest_checkpoints_go(make_trainer):
    trainer = make_trainer(num_epochs=12, save_freq=1, num_checkpoint_limit=3, sample_num_steps=1)
    trainer.train()
    kept = {path.name for path in trainer.output_dir.glob("*checkpoint*")}
    assert kept == {"checkpoint-10", "checkpoint-11", "checkpoint-12"}  # by number, not by name


def test_going_back_sets_the_later_checkpoints_aside(saved, make_trainer, metrics, caplog):
    """They are of another future: kept, but they neither push out the new ones nor are resumed from."""
    options = {"save_freq": 1, "sample_num_steps": 2, "num_checkpoint_limit": 1}
    trainer = make_trainer(**options, num_epochs=2, train_learning_rate=1e-2)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=saved / "checkpoint-1")
    names = {path.name for path in saved.glob("*checkpoint*")}
    assert names == {"checkpoint-2", "superseded-checkpoint-2", "superseded-checkpoint-3"}
    text = caplog.text
    assert "settings differ" in text and "train_learning_rate (0.0003 -> 0.01)" in text and "num_epochs" not in text
    last = make_trainer(**options, num_epochs=2)
    last.train(resume_from_checkpoint=True)
    assert last.global_step == 2
    assert [line["epoch"] for line in metrics(saved) if "reward" in line] == [0, 1]


@pytest.mark.parametrize(("schedule", "said"), [("constant", False), ("linear", True)])
def test_more_epochs_change_a_schedule_that_ends_and_that_is_said(schedule, said, make_trainer, metrics, caplog):
    options = {"sample_num_steps": 1, "train_learning_rate": 0.8, "train_lr_scheduler": schedule}
    make_trainer(num_epochs=4, **options).train(epochs=2)
    longer = make_trainer(num_epochs=8, **options)
    with caplog.at_level(logging.WARNING):
        longer.train(epochs=4, resume_from_checkpoint=True)
    assert ("num_epochs (4 -> 8)" in caplog.text) is said
    rates = [line["learning_rate"] for line in metrics(longer.output_dir) if "learning_rate" in line]
    assert rates == pytest.approx([0.8, 0.6, 0.4, 0.5] if said else [0.8] * 4)


def test_a_run_is_not_resumed_into_the_folder_of_another(saved, make_trainer, tmp_path):
    make_trainer(output_dir=str(tmp_path / "other"), sample_num_steps=2).train()
    with pytest.raises(ValueError, match="other' holds another run"):
        make_trainer(output_dir=str(tmp_path / "other"), resume_from=str(saved)).train()


@pytest.mark.parametrize("save_freq", [0, 2, 100])
def test_the_last_epoch_is_saved(save_freq, make_trainer):
    trainer = make_trainer(num_epochs=3, save_freq=save_freq, sample_num_steps=1)
    trainer.train()
    assert (trainer.output_dir / "checkpoint-3").is_dir()
    trainer = make_trainer(
        num_epochs=9, save_freq=save_freq, sample_num_steps=1, output_dir=str(trainer.output_dir / "x")
    )
    trainer.train(epochs=1)
    assert (trainer.output_dir / "checkpoint-1").is_dir()


def test_another_number_of_processes_is_refused(saved, make_trainer):
    for checkpoint in saved.glob("checkpoint-*"):
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        (checkpoint / "trainer_state.json").write_text(json.dumps({**state, "num_processes": 4}))
    with pytest.raises(ValueError, match="was written by 4 processes and this run has 1.*Launch 4 processes"):
        make_trainer(sample_num_steps=2).train(resume_from_checkpoint=True)


def test_another_list_of_prompts_is_refused(saved, make_trainer):
    with pytest.raises(ValueError, match="made with num_prompts=3, this run has num_prompts=2"):
        make_trainer(prompts=["a", "b"], sample_num_steps=2).train(resume_from_checkpoint=True)


def test_another_rank_is_refused(saved, make_trainer):
    with pytest.raises(
        ValueError,
        match="the saved adapter does not fit.*the first is .* of shape .4, 32. in the file and .2, 32. here",
    ):
        make_trainer(train_lora_rank=2, sample_num_steps=2).train(resume_from_checkpoint=True)


def test_a_checkpoint_loads_into_a_stock_pipeline(make_trainer):
    trainer = make_trainer(train_learning_rate=1e-2, num_epochs=2, train_lora_rank=2, train_lora_alpha=6)
    trainer.train()
    stock = stable_diffusion()
    stock.load_lora_weights(str(trainer.output_dir / "checkpoint-2"))
    images = []
    for pipe in (trainer.pipeline, stock, stable_diffusion()):
        generator = torch.Generator().manual_seed(0)
        images.append(
            torch.from_numpy(pipe("a cat", num_inference_steps=3, generator=generator, output_type="np").images)
        )
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


def test_settings_that_json_does_not_know_are_saved_as_text(make_trainer):
    handlers = [InitProcessGroupKwargs(timeout=timedelta(seconds=5))]
    trainer = make_trainer(accelerator_kwargs={"kwargs_handlers": handlers})
    trainer.train()
    state = json.loads((trainer.output_dir / "checkpoint-1" / "trainer_state.json").read_text())
    assert "0:00:05" in str(state["config"]["accelerator_kwargs/kwargs_handlers"])


@pytest.mark.parametrize(
    ("name", "default"), [("train_use_lora", True), ("train_text_encoder", False)], ids=["all weights", "text encoder"]
)
@pytest.mark.parametrize("begins_with_the_default", [True, False])
def test_a_run_that_trains_other_weights_cannot_be_resumed(name, default, begins_with_the_default, make_trainer):
    first = default if begins_with_the_default else not default
    make_trainer(**{name: first}, sample_num_steps=2).train()
    with pytest.raises(
        ValueError,
        match=f"checkpoint-1 was written with {name} = {first}, and this run has {not first}: other weights are trained. Set it to {first}, or start",
    ):
        make_trainer(**{name: not first}, sample_num_steps=2, num_epochs=2).train(resume_from_checkpoint=True)
