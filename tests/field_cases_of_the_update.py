"""Cases of the fields that say how rewards become an update: baselines, curation, objectives, the KL and the value function."""

import pytest
import torch
from field_cases import case

from dpok_trl.training.batches import TrainingBatch


PROMPTS = ["a", "a", "b", "b"]
REWARDS = torch.tensor([0.0, 1.0, 2.0, 7.0])
GROUPS = {"sample_num_images_per_prompt": 2}
VALUE = {"train_adv_type": "value", "value_batch_size": 4}


def learning(run, **kwargs):
    """The metric lines of a run whose policy moves."""
    trainer = run.train(**{"train_num_inner_epochs": 2, "train_learning_rate": 0.01, **kwargs})
    return [line for line in run.get("lines")(trainer, "epoch")]


def of(lines, name):
    return [line[name] for line in lines if name in line]


def loss_of_one_transition(trainer):
    """Where the advantage is -1 and the ratio 1."""
    (batch, *_), _ = trainer.sample(0)
    trajectory = batch.trajectory
    (transitions,) = [TrainingBatch(trajectory, (0,), -torch.ones(1, len(trajectory.steps))).transitions([1])]
    return trainer.calculate_loss(transitions)[0].item()


@case("reward_weight")
def _reward_weight(run, monkeypatch):
    one, ten = (loss_of_one_transition(run.make(kl_weight=0.0, reward_weight=weight)) for weight in (1.0, 10.0))
    assert (one, ten) == (1.0, 10.0)


@case("train_adv_scale")
def _scale(run, monkeypatch):
    assert run.make(train_adv_scale=False).advantages(PROMPTS, REWARDS).tolist() == [-2.5, -1.5, -0.5, 4.5]
    scaled = run.make().advantages(PROMPTS, REWARDS)
    torch.testing.assert_close(scaled, (REWARDS - 2.5) / REWARDS.std(correction=0), rtol=1e-5, atol=0)


@case("train_keep_best", "train_keep_worst")
def _curation(run, monkeypatch):
    def kept(best, worst):
        values = [3.0, 1.0, 2.0, 0.0]
        trainer = run.make(
            reward=lambda images, prompts, metadata: values,
            prompts=["a"],
            sample_batch_size=4,
            sample_num_images_per_prompt=4,
            train_batch_size=1,
            train_keep_best=best,
            train_keep_worst=worst,
        )
        batches, _ = trainer.sample(0)
        trainer.scoring.gather(batches)
        return [batch.samples for batch in trainer.experience.training_batches(batches, torch.zeros(4))]

    assert kept(None, None) == [(0,), (1,), (2,), (3,)]
    assert kept(2, None) == [(0,), (2,)]
    assert kept(1, 1) == [(0,), (3,)]
    assert kept(0, 1) == [(3,)]


@case("train_kl_threshold")
def _threshold(run, monkeypatch):
    def masked(threshold):
        return of(learning(run, train_objective="kl_mask", train_kl_threshold=threshold), "policy/mask_fraction")

    assert masked(1e-9)[1] > 0 and masked(10.0) == [0.0, 0.0]


@case("train_buffer_rounds")
def _buffer(run, monkeypatch):
    """Ratios of older rounds are not 1; the number of updates is the same."""

    def deviations(rounds):
        lines = learning(run, num_epochs=4, train_buffer_rounds=rounds, train_num_inner_epochs=1)
        return of(lines, "policy/ratio_deviation_max")

    assert deviations(1) == [0.0] * 4
    assert len(deviations(4)) == 4 and max(deviations(4)) > 0


@case("kl_gradient")
def _kl_gradient(run, monkeypatch):
    def trained(kl_gradient):
        lines = learning(run, kl_gradient=kl_gradient, kl_weight=0.5, num_epochs=3, sample_num_steps=3)
        return of(lines, "kl")

    paper, exact, reward = (trained(kind) for kind in ("paper", "exact", "reward"))
    assert paper[0] == exact[0] == reward[0] == 0.0
    assert len({paper[-1], exact[-1], reward[-1]}) == 3


@case("kl_warmup_epochs")
def _kl_warmup(run, monkeypatch):
    weights = of(learning(run, kl_weight=0.5, kl_warmup_epochs=2, num_epochs=4), "kl_weight")
    assert weights == [0.0, 0.0, 0.5, 0.5]


@case("target_kl")
def _target_kl(run, monkeypatch):
    def weights(target):
        return of(learning(run, kl_weight=0.5, target_kl=target, num_epochs=3), "kl_weight")

    assert weights(1e-9) == pytest.approx([0.5, 0.6, 0.72])  # far above the target: a fifth more each time
    assert weights(1e9) == pytest.approx([0.5, 0.4, 0.32])


@case("reference_update_epochs")
def _moving_reference(run, monkeypatch):
    def first_kl_of_each_epoch(**kwargs):
        return of(learning(run, num_epochs=3, **kwargs), "kl")[::2]

    stays = first_kl_of_each_epoch()
    moves = first_kl_of_each_epoch(reference_update_epochs=1)
    assert stays[0] == 0.0 and stays[1] > 0 and stays[2] > 0
    assert moves == [0.0, 0.0, 0.0]  # the reference is the policy that has just sampled


def value_function(run, **kwargs):
    return run.train(**{**VALUE, **kwargs}).critic.function


@case("value_input")
def _value_input(run, monkeypatch):
    sizes = {
        kind: value_function(run, value_input=kind).state_dict()["input_size"] for kind in ("latents", "features")
    }
    pipe = run.make().pipeline
    latents = 4 * (pipe.unet.config.sample_size**2)
    assert sizes["latents"] == latents + pipe.text_encoder.config.hidden_size
    assert sizes["features"] == pipe.unet.config.block_out_channels[-1]


def moved(function):
    """How far the last layer, which starts at 0, has come."""
    return function.network.last.weight.abs().max().item()


@case("value_learning_rate", "value_num_updates")
def _value_learning(run, monkeypatch):
    # AdamW's first step is as long as the learning rate
    assert moved(value_function(run, value_num_updates=1, value_learning_rate=1e-2)) == pytest.approx(1e-2, rel=1e-3)
    assert moved(value_function(run, value_num_updates=1, value_learning_rate=1e-4)) == pytest.approx(1e-4, rel=1e-3)
    assert moved(value_function(run, value_num_updates=9, value_learning_rate=1e-2)) > 2e-2


@case("value_batch_size", "value_gradient_accumulation_steps")
def _value_batches(run, monkeypatch):
    def drawn(**kwargs):
        from dpok_trl.core.value import ValueFunction

        sizes, fit = [], ValueFunction.fit

        def watched(self, draw, **settings):
            return fit(self, lambda count: sizes.append(count) or draw(count), **settings)

        monkeypatch.setattr(ValueFunction, "fit", watched)
        value_function(run, value_num_updates=2, **kwargs)
        monkeypatch.undo()
        return sizes

    assert drawn() == [4, 4]
    assert drawn(value_batch_size=3) == [3, 3]
    assert drawn(value_gradient_accumulation_steps=3) == [4] * 6


@case("value_scale_targets")
def _value_targets(run, monkeypatch):
    scaled, raw = (value_function(run, value_scale_targets=scale) for scale in (True, False))
    assert scaled.target_mean > 0 and (raw.target_mean, raw.target_std) == (0.0, 1.0)


@case("value_warmup_epochs")
def _value_warmup(run, monkeypatch):
    lines = learning(run, **VALUE, value_warmup_epochs=2, num_epochs=3)
    assert [line["epoch"] for line in lines if "loss" in line] == [2, 2]
    assert len(of(lines, "value/loss")) == 3
