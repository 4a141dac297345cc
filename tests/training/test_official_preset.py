"""The preset "official-code", run by the trainer on a real pipeline, has the loss of the official code (google-research/dpok, train_online_pg.py).

Its formulas are written out below in float64 on what the run recorded, and the UNet is called here by hand. tests/core/test_official_code.py does the same for
the mathematics alone.
"""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from dpok_trl import DPOKConfig, DPOKTrainer


REWARD_WEIGHT, KL_WEIGHT, RATIO_CLIP, GUIDANCE = 10.0, 0.01, 1e-4, 7.5  # of the README
TIMESTEPS = torch.tensor([801, 601, 401, 201, 1])  # DDIM's 5 steps ("leading", steps_offset 1)
PASSES = 3  # of an update: 2 images at 3 steps
LOSS_TOLERANCE = 1e-6  # relative: float32 against float64
LOG_PROB_TOLERANCE = (
    1e-5  # absolute, of a mean over dimensions; residuals are divided by a std of 0.02 at the last step
)
GRADIENT_TOLERANCE = 1e-4  # of the norm: the residual is (x - mean) / std, with x of about 1 in float32


def official_guided_noise(trainer, transitions):
    """eps_u + 7.5 (eps_c - eps_u) at each row's latents and timestep."""
    pipe, trajectory = trainer.pipeline, transitions.trajectory
    pairs = list(zip(transitions.samples, transitions.steps, strict=True))
    prompts = [trajectory.prompts[sample] for sample, _ in pairs]
    with torch.no_grad():
        positive, negative = pipe.encode_prompt(prompts, "cpu", 1, True, [""] * len(prompts))
    latents = torch.stack([trajectory.latents[step][sample] for sample, step in pairs])
    timesteps = TIMESTEPS[list(transitions.steps)]
    noise = pipe.unet(torch.cat([latents] * 2), torch.cat([timesteps] * 2), torch.cat([negative, positive])).sample
    unconditional, conditional = noise.chunk(2)
    return unconditional + GUIDANCE * (conditional - unconditional)


def official_log_prob(trainer, transitions, noise):
    """DDIM at eta 1: the mean over all but the first dimension of log N(x_{t-1}; mu, sigma)."""
    trajectory = transitions.trajectory
    pairs = list(zip(transitions.samples, transitions.steps, strict=True))
    latents = torch.stack([trajectory.latents[step][sample] for sample, step in pairs]).double()
    next_latents = torch.stack([trajectory.next_latents[step][sample] for sample, step in pairs]).double()
    timesteps = TIMESTEPS[list(transitions.steps)]
    before = timesteps - 1000 // len(TIMESTEPS)
    alphas = trainer.pipeline.scheduler.alphas_cumprod.double()
    alpha_t = alphas[timesteps][:, None, None, None]
    alpha_prev = torch.where(before >= 0, alphas[before.clamp(min=0)], alphas[0])[:, None, None, None]
    variance = (1 - alpha_prev) / (1 - alpha_t) * (1 - alpha_t / alpha_prev)
    x_0 = (latents - (1 - alpha_t).sqrt() * noise) / alpha_t.sqrt()
    mu = alpha_prev.sqrt() * x_0 + (1 - alpha_prev - variance).sqrt() * noise
    log_prob = -((next_latents - mu) ** 2) / (2 * variance) - variance.sqrt().log() - math.log(math.sqrt(2 * math.pi))
    return log_prob.mean(dim=(1, 2, 3))


def official_loss(trainer, transitions, rewards, values):
    """`_train_policy_func`, before the division by the accumulation, and the ratio."""
    noise = official_guided_noise(trainer, transitions).double()
    with torch.no_grad(), trainer.policy.pretrained():
        pretrained_noise = official_guided_noise(trainer, transitions).double()
    ratio = torch.exp(official_log_prob(trainer, transitions, noise) - transitions.old_log_prob.double())
    clipped = torch.clamp(ratio, 1.0 - RATIO_CLIP, 1.0 + RATIO_CLIP)
    loss = (-REWARD_WEIGHT * (rewards - values) * clipped).mean()
    return loss + KL_WEIGHT * ((noise - pretrained_noise) ** 2).mean(), ratio.detach()


def value_inputs(trainer, trajectory, step):
    """x_t flattened, and the mean over the tokens of the prompt's embedding."""
    with torch.no_grad():
        embedding, _ = trainer.pipeline.encode_prompt(list(trajectory.prompts), "cpu", 1, False)
    return torch.cat([trajectory.latents[step].flatten(1), embedding.mean(1)], dim=1)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Two rounds of the preset, smaller. Each forward pass with our loss and gradient and the official ones, and what they were made of."""
    from tiny import stable_diffusion

    config = DPOKConfig.preset(
        "official-code",
        output_dir=str(tmp_path_factory.mktemp("official")),
        num_epochs=2,
        save_freq=0,
        sample_grid_freq=0,
        sample_num_steps=len(TIMESTEPS),
        sample_batch_size=6,
        train_timestep_fraction=0.6,
        value_batch_size=24,
        value_learning_rate=1e-2,  # a V that can be seen after one step
        train_learning_rate=2e-4,  # and a policy that leaves the clip
    )
    pipe = stable_diffusion()
    trainer = DPOKTrainer(
        config, lambda images, prompts, metadata: images[:, 0].mean((1, 2)), ["a cat", "two dogs"], pipe
    )
    torch.manual_seed(1)
    for parameter in trainer.trainable_layers:
        parameter.data.add_(0.02 * torch.randn_like(parameter))  # away from the pretrained model
    ours, rounds, passes = trainer.calculate_loss, {}, []

    def flat_gradient(loss):
        gradients = torch.autograd.grad(loss, trainer.trainable_layers, retain_graph=True)
        return torch.cat([gradient.flatten() for gradient in gradients])

    def recording(transitions):
        trajectory = transitions.trajectory
        of_round = rounds[tuple(trajectory.seeds)]
        rewards = of_round.rewards[list(transitions.samples)].double()
        values = torch.stack(
            [of_round.values[step][row] for row, step in zip(transitions.samples, transitions.steps, strict=True)]
        )
        expected, ratio = official_loss(trainer, transitions, rewards, values.double())
        loss, metrics = ours(transitions)
        gradient, expected_gradient = flat_gradient(loss), flat_gradient(expected)
        error = (gradient - expected_gradient).norm() / expected_gradient.norm()
        passes.append(
            SimpleNamespace(
                epoch=of_round.epoch,
                loss=loss.item(),
                expected=expected.item(),
                ratio=ratio,
                values=values,
                steps=transitions.steps,
                gradient_error=error.item(),
            )
        )
        return loss, metrics

    def remembering(batches, rewards):
        """V of the new round is asked for before it is fitted on it."""
        network = copy.deepcopy(trainer.critic.function.network)  # there is none in the first round, which begins at 0
        for batch in batches:
            values = {}
            for step in batch.trajectory.steps:
                inputs = value_inputs(trainer, batch.trajectory, step)
                steps = torch.full((len(inputs),), step)
                with torch.no_grad():
                    values[step] = torch.zeros(len(inputs)) if network is None else network(inputs, steps)
            rounds[tuple(batch.trajectory.seeds)] = SimpleNamespace(
                epoch=len(rounds), rewards=batch.rewards, values=values
            )
        return asked(batches, rewards)

    asked, trainer.critic.values = trainer.critic.values, remembering
    trainer.calculate_loss = recording
    trainer.train()
    return SimpleNamespace(trainer=trainer, passes=passes)


def test_the_loss_is_the_official_one(recorded):
    assert len(recorded.passes) == 2 * 3 * PASSES  # rounds, updates, forward passes
    for one in recorded.passes:
        assert one.loss == pytest.approx(one.expected, rel=LOSS_TOLERANCE, abs=LOSS_TOLERANCE)


def test_the_gradient_is_the_official_one(recorded):
    assert max(one.gradient_error for one in recorded.passes) < GRADIENT_TOLERANCE


def test_an_update_has_the_mean_of_its_passes(recorded):
    from dpok_trl.results.runlog import read_metrics

    logged = [line["loss"] for line in read_metrics(recorded.trainer.output_dir) if "loss" in line]
    expected = torch.tensor([one.expected for one in recorded.passes]).reshape(-1, PASSES).mean(1).tolist()
    assert logged == pytest.approx(expected, rel=LOSS_TOLERANCE, abs=LOSS_TOLERANCE)


def test_the_old_log_probability_is_the_official_one(recorded):
    """Before the first update the ratio is 1, with the official log-probability of the policy that sampled."""
    for one in recorded.passes[:PASSES]:
        assert (one.ratio - 1).abs().max() < LOG_PROB_TOLERANCE


def test_the_run_met_what_the_formulas_are_about(recorded):
    """Without these the tests above would see less than they say."""
    later = [one for one in recorded.passes[PASSES:]]
    outside = torch.cat([(one.ratio - 1).abs() > RATIO_CLIP for one in later])
    assert outside.any() and not outside.all()
    assert any(len(set(one.steps)) > 1 for one in later)  # several timesteps in one forward pass
    second = recorded.passes[3 * PASSES :]
    assert {one.epoch for one in second} == {0, 1}  # the buffer has both rounds
    assert all(one.values.abs().max() > 1e-3 for one in second if one.epoch == 1)
    assert all((one.values == 0).all() for one in recorded.passes if one.epoch == 0)
