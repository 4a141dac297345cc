"""A replay with every sample at a step of its own: the numbers and gradients of one replay for each step, or the answer that a pipeline cannot."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from pipelines.families import FAMILIES, Family
from walks import log_probs, policy_of, trained


PROMPTS = ["a cat", "two dogs", "a bird"]
SEEDS = [3, 4, 9]
SAMPLES = [2, 0, 1, 0]
TOGETHER = 1e-5  # mean-reduced log-probability, fp32
GRADIENT = 1e-4  # relative to the largest entry of all


def euler():
    """With levels of noise by which the network's input is scaled, for each sample its own."""
    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )


MIXABLE = {
    "sd_euler": Family("StableDiffusionPipeline", {"scheduler": euler}),
    **{
        name: FAMILIES[name]
        for name in [
            "sd",
            "sd_v_prediction",
            "sd_zero_snr",
            "sdxl",
            "sdxl_guidance_rescale",
            "kolors",
            "sd3",
            "sd3_without_t5",
            "flux",
            "flux_true_cfg",
            "flux2",
            "flux2_klein",
            "chroma",
            "sana",
            "pixart_sigma",
            "qwenimage",
            "lumina2",
            "hidream",
            "cogview4",
            "wan",
        ]
    },
}
# What they do with a timestep that is a vector
UNMIXABLE = {
    "sd3_skip_layer_guidance": "expands the timestep to the latents before they are doubled",
    "z_image": "expands the timestep to the latents before they are doubled",
    "auraflow": "makes a Python number of the timestep",
    "wan_two_experts": "compares the timestep with a boundary",
    "sd_img2img": "adds noise for the first timestep",
    "sd_inpaint": "adds noise for the first timestep",
    "sdxl_img2img": "adds noise for the first timestep",
    "flux_img2img": "adds noise for the first timestep",
    "flux_inpaint": "adds noise for the first timestep",
    "flux_fill": "adds noise for the first timestep",
}


def policy_and_trajectory(family: Family):
    pipe = family.pipe()
    policy = policy_of(pipe, call=family.call(pipe))
    return policy, policy.rollout(PROMPTS, SEEDS)


def steps_of_samples(trajectory) -> list[int]:
    """Each action at least once, and the last sample's second one differs from its first."""
    first, *_, last = trajectory.steps
    return [last, first, trajectory.steps[1], last]


@pytest.mark.parametrize("name", MIXABLE)
def test_mixed_steps_are_those_of_a_replay_each(name):
    policy, trajectory = policy_and_trajectory(MIXABLE[name])
    each = steps_of_samples(trajectory)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0])

    (mixed,) = policy(trajectory, SAMPLES, each=each)
    (weights * mixed.log_prob).sum().backward()
    gradients = [parameter.grad.clone() for parameter in trained(policy).values()]
    policy.zero_grad()
    rows = [policy(trajectory, [sample], [step])[0].log_prob[0] for sample, step in zip(SAMPLES, each, strict=True)]
    (weights * torch.stack(rows)).sum().backward()

    assert (mixed.log_prob - torch.stack(rows)).abs().max() <= TOGETHER
    expected = [parameter.grad for parameter in trained(policy).values()]
    largest = max(gradient.abs().max() for gradient in expected)
    for gradient, other in zip(gradients, expected, strict=True):
        assert (gradient - other).abs().max() <= GRADIENT * largest

    error = policy.mixing_error(trajectory, SAMPLES)
    assert error is not None and error <= TOGETHER


@pytest.mark.parametrize("name", UNMIXABLE)
def test_a_pipeline_that_cannot_says_so_and_replays_as_ever(name):
    policy, trajectory = policy_and_trajectory(FAMILIES[name])
    assert policy.mixing_error(trajectory, SAMPLES) is None
    assert torch.equal(log_probs(policy(trajectory, verify=True)), trajectory.log_probs)


def test_the_same_step_for_all_is_the_plain_replay():
    policy, trajectory = policy_and_trajectory(FAMILIES["sd"])
    (mixed,) = policy(trajectory, [0, 1, 2], each=[1, 1, 1])
    assert torch.equal(mixed.log_prob, trajectory.log_probs[:, 1])


def test_mixed_steps_of_the_reference_are_the_pretrained_model_s():
    policy, trajectory = policy_and_trajectory(FAMILIES["sd"])
    each = steps_of_samples(trajectory)
    with policy.reference(), torch.no_grad():
        (mixed,) = policy(trajectory, SAMPLES, each=each)
        rows = [policy(trajectory, [s], [k])[0].distribution.mean[0] for s, k in zip(SAMPLES, each, strict=True)]
    torch.testing.assert_close(mixed.distribution.mean, torch.stack(rows), rtol=0, atol=1e-5)


def test_steps_that_are_no_actions_are_refused():
    policy, trajectory = policy_and_trajectory(FAMILIES["sd3"])
    with pytest.raises(
        ValueError, match=r"steps \[1, 3\] are not all actions of this trajectory, which are \[0, 1, 2\]"
    ):
        policy(trajectory, [0, 1], each=[1, 3])


def test_a_call_of_a_single_step_has_nothing_to_mix():
    family = FAMILIES["sd"]
    pipe = family.pipe()
    policy = policy_of(pipe, call={**family.call(pipe), "num_inference_steps": 1})
    trajectory = policy.rollout(PROMPTS, SEEDS)
    assert policy.mixing_error(trajectory, [0, 1, 2]) is None
