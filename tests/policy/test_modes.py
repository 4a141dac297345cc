"""Precision, the stochastic window, and pipelines that start from a picture: where a walk is not the plain one."""

import pytest
import torch
from walks import PROMPTS, SEEDS, call_arguments, log_probs, pipeline, policy_of
from zoo.inputs import STEPS, picture

from dpok_trl import check_pipeline
from dpok_trl.policy.hooks import PipelineHooks


SAME_NOISE = 2e-5  # images in [0, 1]: our mean is written in another (stabler) form than diffusers'
SAME_STEP = 5e-6  # latents, relative to their size, after steps of the ODE
OTHER_BATCH_SHAPE = 1e-5  # mean-reduced log-probability, fp32: kernels round differently at another batch shape

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def generators():
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def untouched(pipe, **arguments) -> torch.Tensor:
    """What the pipeline itself draws for the prompts and seeds."""
    call = {**call_arguments(pipe), "output_type": "pt", "return_dict": False, **arguments}
    return pipe(prompt=list(PROMPTS), generator=generators(), **call)[0]


# ---------------------------------------------------------------- precision


FAMILIES = [
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "QwenImagePipeline",
    "SanaPipeline",
    "Lumina2Pipeline",
]


def dtypes_of_arguments(denoiser, walk) -> list[dict]:
    """The dtypes of all tensors that a denoiser is called with."""
    calls = []

    def note(module, args, kwargs):
        named = {**dict(enumerate(args)), **kwargs}
        calls.append({name: value.dtype for name, value in named.items() if isinstance(value, torch.Tensor)})

    handle = denoiser.register_forward_pre_hook(note, with_kwargs=True)
    try:
        walk()
    finally:
        handle.remove()
    return calls


@HALVES
@pytest.mark.parametrize("name", FAMILIES)
def test_fp32_latents_on_a_half_precision_pipeline(name, dtype):
    pipe = pipeline(name, dtype)
    policy = policy_of(pipe, policy={"fp32_latents": True})
    (denoiser,) = policy.tuned.denoisers.values()
    expected = dtypes_of_arguments(denoiser, lambda: untouched(pipe))
    seen = dtypes_of_arguments(denoiser, lambda: policy.rollout(PROMPTS, SEEDS))
    assert seen == expected and dtype in seen[-1].values()

    trajectory = policy.rollout(PROMPTS, SEEDS)
    assert {latents.dtype for latents in trajectory.next_latents} == {torch.float32}
    assert not torch.equal(trajectory.latents[1], trajectory.latents[1].to(dtype).float())
    assert trajectory.images.dtype == torch.float32 and trajectory.images.isfinite().all()
    replayed = []
    seen = dtypes_of_arguments(denoiser, lambda: replayed.extend(policy(trajectory, verify=True)))
    assert seen == expected[: len(seen)]
    assert torch.equal(log_probs(replayed), trajectory.log_probs)
    for column, step in enumerate(trajectory.steps):
        assert torch.equal(policy(trajectory, steps=[step], verify=True)[0].log_prob, trajectory.log_probs[:, column])


def test_fp32_latents_change_nothing_of_a_pipeline_in_fp32():
    policy = policy_of(pipeline("StableDiffusionPipeline"))
    images = policy.rollout(PROMPTS, SEEDS).images
    policy.fp32_latents = True
    assert torch.equal(policy.rollout(PROMPTS, SEEDS).images, images)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusion3Pipeline"])
def test_under_the_same_autocast_the_ratio_is_exactly_1(name):
    policy = policy_of(pipeline(name))
    with torch.autocast("cpu", torch.bfloat16):
        trajectory = policy.rollout(PROMPTS, SEEDS)
        replayed = log_probs(policy(trajectory, verify=True))
    assert torch.equal(replayed, trajectory.log_probs)
    # and only then: without it the embeddings are others too, and so are those that are remembered
    plain = policy.rollout(PROMPTS, SEEDS)
    assert torch.equal(log_probs(policy(plain)), plain.log_probs)
    assert not torch.equal(plain.images, trajectory.images)


# ---------------------------------------------------------------- the stochastic window


def latents_of_the_ode(pipe) -> list[torch.Tensor]:
    """After each step of the untouched pipeline, which is deterministic."""
    walked = []

    def note(pipe, index, timestep, kwargs):
        walked.append(kwargs["latents"].clone())
        return {}

    untouched(pipe, callback_on_step_end=note)
    return walked


IN_ORDER = ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"]
every_scheduler = pytest.mark.parametrize("name", IN_ORDER)


@every_scheduler
def test_before_the_window_the_walk_is_the_pipeline_s_own_ode(name):
    """DDIM at eta 0, Euler, and the Euler step of a flow with a static and a dynamic shift."""
    pipe = pipeline(name)
    policy = policy_of(pipe)
    expected = latents_of_the_ode(pipe)
    trajectory = policy.rollout(PROMPTS, SEEDS, window=[2])
    assert trajectory.steps == (2,)
    for step in (0, 1):
        error = (trajectory.next_latents[step] - expected[step]).abs().max() / expected[step].abs().max()
        assert error <= SAME_STEP
    assert (trajectory.next_latents[2] - expected[2]).abs().max() > 0.01


@every_scheduler
def test_after_the_window_the_walk_goes_on_as_the_pipeline_s_own_ode(name):
    """The untouched pipeline, put once on the latents that the window drew, ends at the same image."""
    pipe = pipeline(name)
    policy = policy_of(pipe)
    trajectory = policy.rollout(PROMPTS, SEEDS, window=[1])
    own_step, steps = pipe.scheduler.step, []

    def step(*args, **kwargs):
        steps.append(1)
        output = own_step(*args, **kwargs)
        return (trajectory.next_latents[1].clone(),) if len(steps) == 2 else output

    pipe.scheduler.step = step
    try:
        assert (untouched(pipe) - trajectory.images).abs().max() <= SAME_NOISE
    finally:
        del pipe.scheduler.step
    assert len(steps) == STEPS
    assert (untouched(pipe) - trajectory.images).abs().max() > 100 * SAME_NOISE


@every_scheduler
def test_the_steps_of_the_window_replay_exactly(name):
    policy = policy_of(pipeline(name))
    trajectory = policy.rollout(PROMPTS, SEEDS, window=[1, 2])
    assert trajectory.steps == (1, 2) and trajectory.log_probs.shape == (2, 2)
    assert torch.equal(log_probs(policy(trajectory, verify=True)), trajectory.log_probs)
    with pytest.raises(ValueError, match=r"steps \[0\] are not all actions of this trajectory, which are \[1, 2\]"):
        policy(trajectory, steps=[0])


@every_scheduler
def test_a_window_of_all_steps_is_none(name):
    policy = policy_of(pipeline(name))
    plain, windowed = policy.rollout(PROMPTS, SEEDS), policy.rollout(PROMPTS, SEEDS, window=range(STEPS))
    assert windowed.steps == plain.steps
    assert torch.equal(windowed.images, plain.images) and torch.equal(windowed.log_probs, plain.log_probs)


def test_a_window_beside_the_steps_is_refused():
    policy = policy_of(pipeline("StableDiffusionPipeline"))
    with pytest.raises(ValueError, match=r"window \(\[4, 5\]\) holds none of the 4 steps that can be actions"):
        policy.rollout(PROMPTS, SEEDS, window=[5, 4])


# ---------------------------------------------------------------- from a picture


PICTURES = [picture(0), picture(1)]
FROM_PICTURES = [
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusion3Img2ImgPipeline",
    "FluxImg2ImgPipeline",
]


@pytest.mark.parametrize("name", FROM_PICTURES)
def test_a_picture_of_its_own_for_each_sample(name):
    policy = policy_of(pipeline(name))
    trajectory = policy.rollout(PROMPTS, SEEDS, arguments={"image": PICTURES})
    assert len(trajectory.next_latents) == 3  # strength 0.75 of 4 steps
    assert torch.equal(log_probs(policy(trajectory, verify=True)), trajectory.log_probs)
    with torch.no_grad():
        for samples in ([1, 0], [1], [0, 0, 1]):
            replayed = log_probs(policy(trajectory, samples=samples))
            assert (replayed - trajectory.log_probs[samples]).abs().max() <= OTHER_BATCH_SHAPE
    # each sample starts from its own picture, with its own noise
    alone = policy.rollout(PROMPTS[1:], SEEDS[1:], arguments={"image": PICTURES[1:]})
    torch.testing.assert_close(alone.latents[0][0], trajectory.latents[0][1], rtol=0, atol=1e-5)
    swapped = policy.rollout(PROMPTS, SEEDS, arguments={"image": PICTURES[::-1]})
    assert (swapped.latents[0] - trajectory.latents[0]).abs().amax(dim=(1, 2)).min() > 1e-3


def test_the_arguments_of_samples_are_counted_and_known():
    policy = policy_of(pipeline("StableDiffusionImg2ImgPipeline"))
    with pytest.raises(ValueError, match="'image' has 1 values for 2 prompts; one for each is needed"):
        policy.rollout(PROMPTS, SEEDS, arguments={"image": PICTURES[:1]})
    with pytest.raises(ValueError, match="takes no 'imag'. Did you mean 'image'"):
        policy.rollout(PROMPTS, SEEDS, arguments={"imag": PICTURES})


@pytest.mark.parametrize("name", FROM_PICTURES)
def test_one_picture_given_for_all_is_repeated(name):
    """Once, it would be encoded with the first sample's generator for all of them."""
    policy = policy_of(pipeline(name), call={"image": PICTURES[0]})
    once = policy.rollout(PROMPTS, SEEDS)
    each = policy.rollout(PROMPTS, SEEDS, arguments={"image": [PICTURES[0]] * 2})
    assert torch.equal(once.latents[0], each.latents[0]) and torch.equal(once.images, each.images)


def test_image_to_image_equals_the_untouched_pipeline():
    pipe = pipeline("StableDiffusionImg2ImgPipeline")
    images = policy_of(pipe).rollout(PROMPTS, SEEDS, arguments={"image": PICTURES}).images
    assert (images - untouched(pipe, image=PICTURES, eta=1.0)).abs().max() <= SAME_NOISE


@pytest.mark.parametrize("name", FROM_PICTURES)
def test_the_timesteps_of_the_report_are_those_that_are_walked(name):
    pipe = pipeline(name)
    walked = []

    def note(pipe, index, timestep, kwargs):
        walked.append(float(timestep))
        return {}

    untouched(pipe, image=PICTURES, callback_on_step_end=note)
    report = check_pipeline(pipe, **call_arguments(pipe))
    assert report.ok and [step.step_index for step in report.steps] == list(range(len(report.steps)))
    reported = [step.timestep for step in report.steps]
    assert len(walked) == 3 and reported == pytest.approx(walked[: len(reported)], rel=1e-6)


INPAINTING = [
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLInpaintPipeline",
    "QwenImageInpaintPipeline",
    "FluxInpaintPipeline",
]


@pytest.mark.parametrize("name", INPAINTING)
def test_inpainting_changes_the_latents_between_the_steps(name):
    policy = policy_of(pipeline(name), call={"strength": 0.75})
    trajectory = policy.rollout(PROMPTS, SEEDS)
    inner = range(len(trajectory.next_latents) - 1)
    assert len(inner) == 2
    assert all(not torch.equal(trajectory.latents[k + 1], trajectory.next_latents[k]) for k in inner)
    assert torch.equal(log_probs(policy(trajectory, verify=True)), trajectory.log_probs)
    for column, step in enumerate(trajectory.steps):
        (replayed,) = policy(trajectory, steps=[step], verify=True)
        assert torch.equal(replayed.log_prob, trajectory.log_probs[:, column])
    with torch.no_grad():
        replayed = log_probs(policy(trajectory, samples=[1], verify=True))
    assert (replayed - trajectory.log_probs[[1]]).abs().max() <= OTHER_BATCH_SHAPE


def test_the_action_is_what_the_network_chose_and_not_what_was_painted_over():
    """Its density is that of a draw, 1 nat at most from the expected one; of the painted latents it would be far below."""
    policy = policy_of(pipeline("StableDiffusionInpaintPipeline"))
    trajectory = policy.rollout(PROMPTS, SEEDS)
    (first,) = policy(trajectory, steps=[0])
    expected = -0.5 - first.distribution.std.log() - 0.5 * torch.log(torch.tensor(2 * torch.pi))
    assert (first.log_prob - expected).abs().max() < 0.25
    painted = first.distribution.log_prob(trajectory.latents[1], "mean")
    assert (painted < first.log_prob - 0.25).all()


def test_inpainting_equals_the_untouched_pipeline():
    pipe = pipeline("StableDiffusionInpaintPipeline")
    arguments = {"image": PICTURES, "mask_image": [picture(1, mode="L"), picture(2, mode="L")]}
    images = policy_of(pipe).rollout(PROMPTS, SEEDS, arguments=arguments).images
    assert (images - untouched(pipe, eta=1.0, **arguments)).abs().max() <= SAME_NOISE


# ---------------------------------------------------------------- noise beside that of x_T and of the steps


class Drawing(PipelineHooks):
    """Changes the embeddings after each step by a number that is drawn, from torch's global generator or from the samples' own."""

    def __init__(self, own: bool):
        self.own = own

    def call(self, pipe, arguments):
        generators = arguments["generator"] if self.own else [None] * len(arguments["generator"])

        def draw(pipe, index, timestep, kwargs):
            size = len(kwargs["prompt_embeds"]) // len(generators)
            numbers = torch.stack([torch.randn(1, generator=generator) for generator in generators])
            return {"prompt_embeds": kwargs["prompt_embeds"] + numbers.repeat(size, 1)[..., None]}

        return super().call(
            pipe,
            {
                **arguments,
                "callback_on_step_end": draw,
                "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
            },
        )


@pytest.mark.parametrize("own", [False, True], ids=["global generator", "generators of the samples"])
def test_what_is_drawn_between_the_steps_is_drawn_again(own):
    pipe = pipeline("StableDiffusionPipeline")
    policy = policy_of(pipe, policy={"hooks": Drawing(own)})
    trajectory = policy.rollout(PROMPTS, SEEDS)
    plain = policy_of(pipe, nudged=False).rollout(PROMPTS, SEEDS)
    assert torch.equal(plain.latents[1], trajectory.latents[1])
    assert not torch.equal(plain.latents[2], trajectory.latents[2])
    for column, step in enumerate(trajectory.steps):
        (replayed,) = policy(trajectory, steps=[step], verify=True)
        assert torch.equal(replayed.log_prob, trajectory.log_probs[:, column])
    assert torch.equal(log_probs(policy(trajectory)), trajectory.log_probs)


def test_samples_take_their_own_draws_with_them():
    policy = policy_of(pipeline("StableDiffusionPipeline"), policy={"hooks": Drawing(own=True)})
    trajectory = policy.rollout(PROMPTS, SEEDS)
    with torch.no_grad():
        for samples in ([1, 0], [1]):
            replayed = log_probs(policy(trajectory, samples=samples, verify=True))
            assert (replayed - trajectory.log_probs[samples]).abs().max() <= OTHER_BATCH_SHAPE


def test_the_callers_stream_of_random_numbers_goes_on():
    policy = policy_of(pipeline("StableDiffusionPipeline"), policy={"hooks": Drawing(own=False)})
    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    first = torch.randn(1)
    trajectory = policy.rollout(PROMPTS, SEEDS)
    second = torch.randn(1)
    policy(trajectory)
    assert torch.equal(torch.cat([first, second, torch.randn(1)]), expected)
    # and has no part in what is drawn
    torch.manual_seed(8)
    assert torch.equal(policy.rollout(PROMPTS, SEEDS).images, trajectory.images)
