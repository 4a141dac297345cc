"""The stochastic window (MixGRPO): where it is in each epoch, and what happens outside of it."""

from collections import Counter

import pytest
import torch
from accelerate.utils import set_seed
from tiny import nudge, stable_diffusion, stable_diffusion_3

from dpok_trl import DPOKConfig
from dpok_trl.training.window import sde_window


def window(epoch, *, steps=10, size=3, start=0, interval=25, schedule="progressive", seed=0) -> range | None:
    config = DPOKConfig(
        seed=seed,
        sample_num_steps=steps,
        sample_sde_window_size=size,
        sample_sde_window_start=start,
        sample_sde_window_interval=interval,
        sample_sde_window_schedule=schedule,
    )
    return sde_window(config, epoch)(steps)


def test_without_a_size_all_steps_are_stochastic():
    assert sde_window(DPOKConfig(), 0) is None and sde_window(DPOKConfig(), 7) is None


def test_a_moving_window_stays_in_the_steps_that_can_be_actions():
    """Image-to-image walks the last steps only, and a step without noise is none."""
    config = DPOKConfig(sample_num_steps=8, sample_sde_window_size=2, sample_sde_window_interval=1)
    assert [sde_window(config, epoch)(4) for epoch in (0, 1, 2, 100)] == [
        range(0, 2),
        range(1, 3),
        range(2, 4),
        range(2, 4),
    ]
    assert sde_window(config, 100)(1) == range(0, 2)  # fewer than the window: all of them


@pytest.mark.parametrize("start", [0, 2])
def test_a_progressive_window_moves_one_step_every_interval_until_the_last(start):
    for epoch in range(200):
        first = min(start + epoch // 7, 10 - 3)
        assert window(epoch, start=start, interval=7) == range(first, first + 3)


def test_a_progressive_window_that_starts_at_the_end_stays_there():
    assert [window(epoch, start=7, interval=1) for epoch in (0, 1, 50)] == [range(7, 10)] * 3


def test_a_window_of_all_steps():
    for schedule in ("progressive", "random", "fixed"):
        assert window(100, size=10, schedule=schedule, interval=1) == range(10)


def test_a_fixed_window_stays():
    assert {window(epoch, start=4, schedule="fixed", interval=1) for epoch in range(50)} == {range(4, 7)}


def test_a_random_window_is_drawn_for_each_epoch_from_the_seed_alone():
    set_seed(1)
    drawn = [window(epoch, schedule="random") for epoch in range(700)]
    set_seed(2)
    assert drawn == [window(epoch, schedule="random") for epoch in range(700)]
    assert drawn != [window(epoch, schedule="random", seed=1) for epoch in range(700)]
    counts = Counter(drawn)
    assert set(counts) == {range(first, first + 3) for first in range(8)}
    assert all(50 < count < 130 for count in counts.values())  # 87.5 expected, standard deviation 9


# ---------------------------------------------------------------- in a run


def test_outside_the_window_a_step_is_deterministic_and_never_trained_on(make_trainer, watch):
    pipe = stable_diffusion()
    calls = watch(pipe.unet)
    trainer = make_trainer(
        pipe=pipe,
        sample_num_steps=5,
        sample_sde_window_size=2,
        sample_sde_window_start=1,
        sample_sde_window_schedule="fixed",
    )
    trained = []
    update = trainer._update
    trainer._update = lambda transitions: trained.extend(t.steps for t in transitions) or update(transitions)
    trainer.train()
    assert Counter(trained) == {(1,) * 4: 1, (2,) * 4: 1}
    assert len(calls.rows_where(grad=True)) == 2

    trajectory = trainer.sample(1)[0][0].trajectory
    assert trajectory.steps == (1, 2)
    with pytest.raises(ValueError, match=r"steps \[0\] are not all actions of this trajectory, which are \[1, 2\]"):
        trainer.policy(trajectory, None, [0])


@pytest.mark.parametrize("family", [stable_diffusion, stable_diffusion_3])
def test_before_the_window_the_path_is_that_of_the_untouched_ode(family, make_trainer):
    """DDIM with eta 0, or Euler on a flow: what the stock pipeline does, up to rounding."""
    trainer = make_trainer(
        pipe=family(), sample_num_steps=5, sample_batch_size=1, train_batch_size=1,
        sample_sde_window_size=1, sample_sde_window_start=3, sample_sde_window_schedule="fixed",
    )  # fmt: skip
    nudge(trainer.policy.networks)
    trajectory = trainer.sample(0)[0][0].trajectory
    path = []
    trainer.pipeline(
        trajectory.prompts[0],
        num_inference_steps=5,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(trajectory.seeds[0]),
        output_type="latent",
        callback_on_step_end=lambda pipe, step, timestep, values: path.append(values["latents"].clone()) or values,
    )
    for step in range(3):
        torch.testing.assert_close(trajectory.next_latents[step], path[step], rtol=0, atol=ODE_TOLERANCE)
    assert (trajectory.next_latents[3] - path[3]).abs().max() > 0.1  # noise was drawn


ODE_TOLERANCE = 2e-5  # of latents of unit size in float32: diffusers writes the same step in another form


def test_the_ratio_is_1_and_a_random_window_is_resumed(make_trainer, adapter, lines, tmp_path):
    settings = {
        "num_epochs": 4,
        "sample_num_steps": 5,
        "sample_sde_window_size": 2,
        "sample_sde_window_schedule": "random",
        "train_learning_rate": 1e-2,
        "train_batch_size": 2,
        "train_gradient_accumulation_steps": 2,
    }
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **settings)
    whole.train()
    assert [line["policy/ratio_deviation_max"] for line in lines(whole, "loss")] == [0.0] * 4
    make_trainer(output_dir=str(tmp_path / "parts"), **settings).train(epochs=2)
    second = make_trainer(output_dir=str(tmp_path / "parts"), **settings)
    second.train(resume_from_checkpoint=True)
    end = adapter(whole)
    assert all(torch.equal(value, end[name]) for name, value in adapter(second).items())


def test_the_learning_rate_falls_to_the_end_of_the_run(make_trainer, lines):
    """The schedule is as long as the run: the optimizer steps of a window of 2 are counted, not those of 5 steps."""
    trainer = make_trainer(
        num_epochs=2,
        sample_num_steps=5,
        sample_sde_window_size=2,
        train_timesteps_per_update=1,
        train_learning_rate=0.1,
        train_lr_scheduler="linear",
    )
    trainer.train()
    rates = [line["learning_rate"] for line in lines(trainer, "learning_rate")]
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_a_window_of_deterministic_steps_is_told_so(make_trainer):
    """The last step of a flow ends without noise: nothing can be trained there."""
    trainer = make_trainer(
        pipe=stable_diffusion_3(),
        sample_sde_window_size=1,
        sample_sde_window_start=3,
        sample_sde_window_schedule="fixed",
    )
    with pytest.raises(
        ValueError,
        match=r"the stochastic window \(beyond the last step\) holds none of the 3 steps that can be actions: \[0, 1, 2\]",
    ):
        trainer.train()
