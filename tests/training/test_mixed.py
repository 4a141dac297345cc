"""Mixed timesteps: each sample of a training batch at a step of its own."""

import logging
import re
from collections import Counter

import pytest
import torch
from tiny import FAMILIES, stable_diffusion, with_adapter


# Gradients of the same transitions in forward passes of other composition, relative to the largest entry.
GRADIENT_TOLERANCE = 1e-5


def gradients(trainer) -> list[torch.Tensor]:
    """Of the one update of an epoch, before it is clipped."""
    captured = []
    clip = trainer.accelerator.clip_grad_norm_

    def capture(parameters, limit):
        captured.append([parameter.grad.clone() for parameter in parameters])
        return clip(parameters, limit)

    trainer.accelerator.clip_grad_norm_ = capture
    trainer.train()
    (single,) = captured
    return single


def trained_pairs(trainer) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(samples, steps) of each forward pass to come."""
    passes = []
    update = trainer._update
    trainer._update = lambda transitions: (
        passes.extend((t.samples, t.steps) for t in transitions) or update(transitions)
    )
    return passes


@pytest.mark.parametrize("family", FAMILIES)
def test_every_sample_is_at_every_step_once_in_a_pass_and_the_ratio_is_1(family, make_trainer, lines, watch):
    pipe = with_adapter(FAMILIES[family](), nudged=True)
    trainer = make_trainer(pipe=pipe, train_mixed_timesteps=True, train_reanchor=True, train_num_inner_epochs=2)
    passes = trained_pairs(trainer)
    trainer.train()
    actions = 4 if family == "sd" else 3  # Euler's last step, and that of a flow, end without noise
    assert len(passes) == 2 * actions
    pairs = Counter(pair for samples, steps in passes for pair in zip(samples, steps, strict=True))
    assert set(pairs.values()) == {2} and len(pairs) == 4 * actions
    assert any(len(set(steps)) > 1 for _, steps in passes)
    first, _ = lines(trainer, "loss")
    assert first["policy/ratio_deviation_max"] < trainer.config.train_clip_range / 10


@pytest.mark.parametrize("kl_type", ["gaussian", "noise"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_of_an_epoch_is_the_unmixed_one(family, kl_type, make_trainer, tmp_path):
    def gradient(mixed):
        trainer = make_trainer(
            pipe=with_adapter(FAMILIES[family](), nudged=True),
            output_dir=str(tmp_path / str(mixed)),
            train_mixed_timesteps=mixed,
            train_reanchor=True,
            sample_min_std=0.1,
            kl_weight=0.5,
            kl_type=kl_type,
        )
        result = gradients(trainer)
        assert set(trainer.experience.mixes.values()) == ({True} if mixed else set())
        return result

    plain, mixed = gradient(False), gradient(True)
    scale = max(tensor.abs().max().item() for tensor in plain)
    assert max((a - b).abs().max().item() for a, b in zip(plain, mixed, strict=True)) < GRADIENT_TOLERANCE * scale


def one_timestep_only(module, args, kwargs):
    if torch.as_tensor(args[1]).unique().numel() > 1:
        raise TypeError("one timestep, please")


def first_timestep_for_all(module, args, kwargs):
    return (args[0], torch.as_tensor(args[1]).flatten()[0], *args[2:]), kwargs


REFUSALS = {
    "fails": (one_timestep_only, "fails"),
    "gives another answer": (
        first_timestep_for_all,
        r"gives log-probabilities that are off by \d[\d.e-]* \(allowed: 1e-05\)",
    ),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_pipeline_that_cannot_goes_on_unmixed_with_a_warning(kind, make_trainer, caplog, lines):
    hook, message = REFUSALS[kind]
    pipe = stable_diffusion()
    pipe.unet.register_forward_pre_hook(hook, with_kwargs=True)
    trainer = make_trainer(pipe=pipe, train_mixed_timesteps=True, num_epochs=2)
    passes = trained_pairs(trainer)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert all(len(set(steps)) == 1 for _, steps in passes) and len(passes) == 2 * 4
    warned = [record.message for record in caplog.records if "train_mixed_timesteps" in record.message]
    assert len(warned) == 1
    assert re.search(f"the call of StableDiffusionPipeline {message} for samples at different timesteps", warned[0])
    assert [line["policy/ratio_deviation_max"] for line in lines(trainer, "loss")] == [0.0, 0.0]


def test_the_reference_is_asked_at_each_samples_steps(make_trainer, watch):
    """Half of the steps, drawn for each sample: the reference answers for the steps that any sample of the batch is at."""
    pipe = with_adapter(stable_diffusion(), nudged=True)
    calls = watch(pipe.unet)
    trainer = make_trainer(
        pipe=pipe, train_mixed_timesteps=True, train_timestep_fraction=0.25, train_reanchor=True, seed=3
    )
    passes = trained_pairs(trainer)
    trainer.train()
    ((_, steps),) = passes
    assert len(set(steps)) > 1
    assert len(calls.rows_where(grad=False, reference=True)) == len(set(steps))
