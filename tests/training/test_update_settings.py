"""Settings of the update in a whole run: the unit of the path KL, the end of the learning-rate schedule, what a resume keeps and refuses."""

import json

import pytest
import torch

from dpok_trl.results.drawing import path_kl


SINGLE_PRECISION = 1e-4  # sums over all dimensions, in another order


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_path_kl_that_is_held_is_that_of_an_evaluation(reduction, make_trainer, lines, monkeypatch):
    """Where the policy does not move, the KL of the round's updates is that of its paths."""
    trainer = make_trainer(
        train_log_prob_reduction=reduction, kl_weight=0.02, train_learning_rate=1e-12, sample_min_std=0.1
    )
    with torch.no_grad():
        for weight in trainer.trainable_layers:
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 0.05)
    sampled, sample = [], trainer.sample
    monkeypatch.setattr(trainer, "sample", lambda epoch: sampled.append(sample(epoch)) or sampled[-1])
    trainer.train()
    (batch,) = sampled[0][0]
    expected = path_kl(trainer.policy, batch.trajectory).mean().item()
    [line] = lines(trainer, "kl_path")
    assert expected > 1  # nats
    assert line["kl_path"] == pytest.approx(expected, rel=SINGLE_PRECISION)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sample_num_images_per_prompt": 4, "train_keep_best": 1, "train_keep_worst": 1, "train_batch_size": 2},
        {"train_adv_type": "value", "value_num_updates": 1, "value_warmup_epochs": 2},
        {"train_timesteps_per_update": 1, "train_num_inner_epochs": 2},
    ],
    ids=["plain", "curated", "value warm-up", "split timesteps"],
)
def test_the_learning_rate_ends_where_its_schedule_does(settings, make_trainer, lines):
    trainer = make_trainer(num_epochs=4, train_lr_scheduler="linear", train_learning_rate=1e-2, **settings)
    trainer.train()
    rates = [line["learning_rate"] for line in lines(trainer, "learning_rate")]
    assert rates[0] == 1e-2
    assert rates[-1] == pytest.approx(1e-2 / len(rates))  # one step before 0


def test_a_fraction_is_not_cut_short_by_its_binary_form(make_trainer):
    from dpok_trl.training.config_checks import selected_steps

    for steps in range(1, 200):
        for selected in range(1, steps + 1):
            assert selected_steps(steps, round(selected / steps, 6) + 1e-6) == selected
    assert (selected_steps(50, 0.58), selected_steps(100, 0.29)) == (29, 29)


# ---------------------------------------------------------------- resume with other settings


def resumed(make_trainer, folder, first, then):
    make_trainer(output_dir=str(folder), num_epochs=2, save_freq=1, sample_num_steps=3, **first).train()
    trainer = make_trainer(**{"output_dir": str(folder), "num_epochs": 3, "sample_num_steps": 3, **then})
    trainer.train(resume_from_checkpoint=True)
    return trainer


def test_a_changed_kl_weight_counts_after_a_resume(make_trainer, tmp_path, lines):
    trainer = resumed(make_trainer, tmp_path / "a", {"kl_weight": 0.02}, {"kl_weight": 0.5})
    assert [line["kl_weight"] for line in lines(trainer, "kl_weight")] == [0.02, 0.02, 0.5]
    trainer = resumed(make_trainer, tmp_path / "b", {"kl_warmup_epochs": 1}, {})
    assert lines(trainer, "kl_weight")[-1]["kl_weight"] == 0.02
    trainer = resumed(make_trainer, tmp_path / "c", {"target_kl": 1e9}, {})
    assert lines(trainer, "kl_weight")[-1]["kl_weight"] == 0.02
    trainer = resumed(make_trainer, tmp_path / "d", {"target_kl": 1e9}, {"target_kl": 1e9})
    assert lines(trainer, "kl_weight")[-1]["kl_weight"] == pytest.approx(0.02 * 0.8**2)


def test_a_reference_that_stays_from_now_on_is_the_pretrained_model(make_trainer, tmp_path):
    trainer = resumed(make_trainer, tmp_path, {"reference_update_epochs": 1}, {})
    assert trainer.tuned.moved_reference is None


@pytest.mark.parametrize(
    "changed",
    [
        {"train_log_prob_reduction": "sum"},
        {"train_objective": "kl_mask"},
        {"sample_num_steps": 4},
        {"kl_gradient": "exact"},
    ],
    ids=str,
)
def test_rounds_of_a_buffer_are_refused_where_they_do_not_fit(changed, make_trainer, tmp_path):
    (name,) = changed
    with pytest.raises(ValueError, match=rf"holds rounds that were sampled with {name} = .*, and this run has "):
        resumed(make_trainer, tmp_path, {"train_buffer_rounds": 2}, {"train_buffer_rounds": 2, **changed})


def test_a_checkpoint_knows_which_steps_go_together(make_trainer, tmp_path):
    settings = {
        "train_mixed_timesteps": True,
        "train_buffer_rounds": 2,
        "sample_sde_window_size": 1,
        "sample_sde_window_interval": 1,
    }
    trainer = resumed(make_trainer, tmp_path, settings, settings)
    steps = {batch.trajectory.steps for batch in trainer.experience.buffer.training}
    assert all(steps_of_round in trainer.experience.mixes for steps_of_round in steps)
    last = max(tmp_path.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    assert len(json.loads((last / "trainer_state.json").read_text())["mixes"]) == 3  # one for each window


def test_a_run_that_is_done_says_so(make_trainer, tmp_path, caplog):
    make_trainer(save_freq=1).train()
    make_trainer().train(resume_from_checkpoint=True)
    assert "nothing is left to train: 1 of 1 epochs are done. Raise num_epochs to go on." in caplog.text


def test_the_config_of_a_resumed_run_is_that_of_the_run(make_trainer, tmp_path):
    make_trainer(save_freq=1, num_epochs=2).train(epochs=1)
    trainer = make_trainer(num_epochs=2, resume_from=str(tmp_path / "run"))
    trainer.train()
    assert "resume_from" not in (trainer.output_dir / "config.yaml").read_text()
