"""Pipelines and calls that are no policy, or that leave the recorded path: each is refused in a sentence that says what to do."""

import re

import pytest
import torch
from accelerate import cpu_offload_with_hook, dispatch_model
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, StableDiffusionPipeline
from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from painter import painter
from walks import PROMPTS, SEEDS, call_arguments, image, log_probs, pipeline, policy_of, trained

from dpok_trl import check_pipeline
from dpok_trl.policy.errors import ReplayError, UnsupportedPipelineError
from dpok_trl.policy.policy import Policy


# ---------------------------------------------------------------- pipelines that are no policy


def refused_by_the_check(pipe, message: str, **call) -> None:
    """The check's reason is the sentence that a policy raises, and the pipeline is as it was."""
    before = {name: parameter.clone() for name, parameter in pipe.unet.named_parameters()}
    report = check_pipeline(pipe, **call)
    assert not report.ok and re.search(message, report.reason, re.DOTALL), report.reason
    assert str(report).startswith(f"{type(pipe).__name__} with {type(pipe.scheduler).__name__}: not usable. ")
    after = dict(pipe.unet.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_a_pipeline_of_one_s_own_that_is_one():
    report = check_pipeline(painter())
    assert report.ok and [step.timestep for step in report.steps] == [751.0, 501.0, 251.0, 1.0]


def test_a_pipeline_of_pipelines():
    pipe = painter()
    vars(pipe)["prior"] = painter()
    refused_by_the_check(pipe, r"Painter is made of other pipelines \(prior\). Tune the inner one and put it back")


def test_a_pipeline_without_a_scheduler():
    pipe = painter()
    vars(pipe)["scheduler"] = None
    refused_by_the_check(pipe, "Painter has no component `scheduler`, whose steps would be the actions of a policy")


def test_a_pipeline_that_takes_no_step():
    refused_by_the_check(painter(walk=lambda timesteps: []), "Painter never called `scheduler.step`")


WALKS = {
    "a step twice": (
        lambda t: torch.cat([t, t[-1:]]),
        r"calls `scheduler.step` more often than its scheduler has timesteps \(4\).*diffusion forcing.*use the family's plain",
    ),
    "every step twice": (
        lambda t: t.repeat_interleave(2),
        r"calls `scheduler.step` more often than its scheduler has timesteps \(4\)",
    ),
    "backwards": (lambda t: t.flip(0), r"calls `scheduler.step` more often than its scheduler has timesteps \(1\)"),
    "out of order": (
        lambda t: t[[0, 2, 1, 3]],
        r"the timesteps 751, 251, 501, 1, and those of its scheduler are 751, 501, 251, 1\. .*each once and in order",
    ),
    "every other": (lambda t: t[::2], r"the timesteps 751, 251, and those of its scheduler are 751, 501, 251, 1"),
    "a grid of its own": (
        lambda t: torch.tensor([751, 700, 650, 640]),
        r"the timesteps 751, 700, 650, 640, and those of its scheduler are 751, 501, 251, 1",
    ),
}


@pytest.mark.parametrize("walk", WALKS)
def test_steps_that_are_not_those_of_the_scheduler(walk):
    make, message = WALKS[walk]
    refused_by_the_check(painter(walk=make), message)


def test_a_walk_that_begins_later_and_one_that_rounds_its_timesteps_are_policies():
    assert check_pipeline(painter(walk=lambda t: t[1:])).ok
    assert check_pipeline(painter(walk=lambda t: t + 0.4)).ok


def test_a_cache_hook():
    pipe = pipeline("StableDiffusionPipeline")
    pyramid = PyramidAttentionBroadcastConfig(
        cross_attention_block_skip_range=2,
        cross_attention_block_identifiers=["down_blocks"],
        current_timestep_callback=lambda: 500,
    )
    apply_pyramid_attention_broadcast(pipe.unet, pyramid)
    report = check_pipeline(pipe, **call_arguments(pipe))
    assert not report.ok and re.match(
        r"`unet` has the cache hook PyramidAttentionBroadcastHook, .*Take the hook out first \(`disable_cache\(\)`\)",
        report.reason,
    )


def test_a_key_value_cache_beside_the_prediction():
    """Flux2KleinKV fills it in the first step."""
    pipe = pipeline("Flux2KleinKVPipeline")
    report = check_pipeline(pipe, **call_arguments(pipe))
    assert not report.ok and re.match(
        r"`transformer` returns a \w+ beside its prediction: a state .*use the family's pipeline without the cache",
        report.reason,
    )


# ---------------------------------------------------------------- offloading


REMEDY = (
    r"and a network that is trained has to stay there. Call `pipe.remove_all_hooks\(\)` and then `pipe.to\(device\)`. What saves memory instead: "
    r"sample_offload_encoders, sample_vae_slicing, train_gradient_checkpointing, and the pipeline in bf16."
)
OFFLOADED = {
    "model": (
        lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
        r"StableDiffusionPipeline moves each network off the device after its use \(`enable_model_cpu_offload`\), "
        + REMEDY,
    ),
    "sequential": (
        lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu"),
        r"StableDiffusionPipeline moves each layer off the device after its use \(`enable_sequential_cpu_offload`, or a `device_map` with layers on "
        r"the CPU or the disk\), " + REMEDY,
    ),
}


@pytest.mark.parametrize("kind", OFFLOADED)
def test_offloading_is_refused_and_without_it_the_pipeline_is_as_before(kind):
    offload, message = OFFLOADED[kind]
    untouched = Policy(
        pipeline("StableDiffusionPipeline"), call_kwargs=call_arguments(pipeline("StableDiffusionPipeline"))
    )
    pipe = pipeline("StableDiffusionPipeline")
    offload(pipe)
    with pytest.raises(UnsupportedPipelineError, match=message):
        Policy(pipe, call_kwargs=call_arguments(pipe))
    report = check_pipeline(pipe, **call_arguments(pipe))  # adds an adapter first, and takes it out
    assert not report.ok and re.fullmatch(message, report.reason)

    pipe.remove_all_hooks()
    drawn, expected = (
        policy.rollout(PROMPTS, SEEDS) for policy in (Policy(pipe, call_kwargs=call_arguments(pipe)), untouched)
    )
    assert torch.equal(drawn.images, expected.images) and torch.equal(drawn.log_probs, expected.log_probs)
    assert check_pipeline(pipe, **call_arguments(pipe)).ok


def test_offloading_that_is_switched_on_later_is_refused_at_the_rollout():
    policy = policy_of(pipeline("StableDiffusionPipeline"))
    policy.pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(UnsupportedPipelineError, match=OFFLOADED["model"][1]):
        policy.rollout(PROMPTS, SEEDS)


def test_a_pipeline_of_the_components_of_an_offloaded_one():
    """It has no `_all_hooks`, but each network has its hook."""
    offloaded = pipeline("StableDiffusionPipeline")
    offloaded.enable_model_cpu_offload(device="cpu")
    pipe = StableDiffusionPipeline(**offloaded.components)
    assert not hasattr(pipe, "_all_hooks")
    with pytest.raises(UnsupportedPipelineError, match=OFFLOADED["model"][1]):
        Policy(pipe)


LET_BE = {
    "groups of layers": lambda pipe: pipe.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="leaf_level"
    ),
    "groups of blocks": lambda pipe: pipe.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    ),
    "a device map": lambda pipe: dispatch_model(pipe.unet, {"": "cpu"}, force_hooks=True),
    "an encoder that does not train": lambda pipe: cpu_offload_with_hook(pipe.text_encoder, "cpu"),
}


@pytest.mark.parametrize("how", LET_BE)
def test_hooks_that_leave_the_trained_network_on_the_device_are_let_be(how):
    plain = policy_of(pipeline("StableDiffusionPipeline")).rollout(PROMPTS, SEEDS)
    pipe = pipeline("StableDiffusionPipeline")
    LET_BE[how](pipe)
    policy = policy_of(pipe)
    drawn = policy.rollout(PROMPTS, SEEDS)
    assert torch.equal(drawn.images, plain.images) and torch.equal(drawn.log_probs, plain.log_probs)
    replayed = log_probs(policy(drawn, verify=True))
    assert torch.equal(replayed, plain.log_probs)
    replayed.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained(policy).values())


# ---------------------------------------------------------------- the gradient


CUTS = {
    "detach": {"behind": lambda output: output.detach()},
    "numpy": {"behind": lambda output: torch.from_numpy(output.detach().numpy())},
    "clone of the data": {"behind": lambda output: output.data.clone()},
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_pipeline_that_cuts_the_gradient_off(cut):
    refused_by_the_check(
        painter(**CUTS[cut]),
        r"the model output of step 0 carries no gradient.*cuts it off \(a `.detach\(\)` or `torch.inference_mode\(\)`.*take that out",
    )


def test_a_no_grad_of_its_own_around_the_network_does_no_harm():
    """Gradients are switched on inside of it, and the step that follows is ours."""
    gradients = []
    for pipe in (painter(), painter(around=torch.no_grad)):
        torch.manual_seed(0)  # of the check's adapter
        report = check_pipeline(pipe)
        assert report.ok, report
        gradients.append([step.gradient_norm for step in report.steps])
    assert gradients[0] == gradients[1]


def test_guidance_under_a_no_grad_of_its_own_is_refused():
    def guided(output):
        with torch.no_grad():
            return 2 * output

    refused_by_the_check(painter(behind=guided), "the model output of step 0 carries no gradient")


def test_an_inference_mode_around_the_network():
    refused_by_the_check(painter(around=torch.inference_mode), "carries no gradient.*`torch.inference_mode\\(\\)`")


def test_no_gradient_is_no_matter_where_none_is_asked_for():
    policy = policy_of(painter(behind=lambda output: output.detach()))
    trajectory = policy.rollout(PROMPTS, SEEDS)
    with torch.no_grad():
        assert torch.equal(log_probs(policy(trajectory, verify=True)), trajectory.log_probs)


# ---------------------------------------------------------------- arguments of `scheduler.step`


@pytest.mark.parametrize(
    "beside",
    [{"use_clipped_model_output": True}, {"per_token_timesteps": torch.arange(4)}, {"step": torch.zeros(3)}],
    ids=["a switch", "a tensor", "a tensor of zeros"],
)
def test_arguments_that_make_it_another_step(beside):
    message = (
        rf"Painter hands `scheduler.step` more than .* latents \({next(iter(beside))}\), so its steps are not those"
    )
    refused_by_the_check(painter(beside=beside), message)


@pytest.mark.parametrize(
    "beside",
    [
        {"eta": 0.3},
        {"s_churn": 0.0, "s_noise": 1.0},
        {"variance_noise": torch.zeros(3)},
        {"use_clipped_model_output": False},
    ],
    ids=str,
)
def test_arguments_about_noise_and_those_that_are_off_are_let_be(beside):
    plain = policy_of(painter()).rollout(PROMPTS, SEEDS)
    assert torch.equal(policy_of(painter(beside=beside)).rollout(PROMPTS, SEEDS).images, plain.images)


# ---------------------------------------------------------------- between rollout and replay


def test_another_scheduler_than_in_the_rollout():
    policy = policy_of(pipeline("StableDiffusionPipeline"))
    trajectory, scheduler = policy.rollout(PROMPTS, SEEDS), policy.pipe.scheduler
    policy.pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(scheduler.config)
    with pytest.raises(
        ReplayError,
        match=r"was changed between rollout and replay: it was DDIMScheduler\(.* and is EulerAncestral.*put",
    ):
        policy(trajectory)
    policy.pipe.scheduler = DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
    with pytest.raises(ReplayError, match="timestep_spacing=leading.* and is .*timestep_spacing=trailing"):
        policy(trajectory)
    policy.pipe.scheduler = DDIMScheduler.from_config(scheduler.config)  # equal settings are the same scheduler
    assert torch.equal(log_probs(policy(trajectory)), trajectory.log_probs)


def test_a_pipeline_that_keeps_a_state_between_its_calls():
    calls = []

    def drift(timesteps):
        calls.append(1)
        return timesteps

    pipe = painter(walk=drift)
    policy = policy_of(pipe)
    trajectory = policy.rollout(PROMPTS, SEEDS)
    vars(pipe)["behind"] = lambda output: output + 0.01 * len(calls)
    assert not torch.equal(log_probs(policy(trajectory, verify=True)), trajectory.log_probs)
    refused_by_the_check(pipe, r"step 0 replays with another log-probability \(off by .*keeps a state between calls")


def test_a_network_that_is_called_more_often_than_in_the_rollout():
    pipe = painter()
    policy = policy_of(pipe)
    trajectory = policy.rollout(PROMPTS, SEEDS)
    vars(pipe)["walk"] = lambda timesteps: [pipe.unet(torch.zeros(2, 3, 8, 8), 1) and t for t in timesteps]
    with pytest.raises(ReplayError, match=r"step 0 calls the denoiser more often in the replay .* \(1 times\)"):
        policy(trajectory, steps=[1])


def test_text_encoders_that_are_off_the_device():
    class Restless(StableDiffusionPipeline):
        """Asks its text encoder in every call, beside `encode_prompt`."""

        asks = True

        def prepare_latents(self, *args, **kwargs):
            if self.asks:
                self.text_encoder(torch.zeros(1, 4, dtype=torch.long))
            return super().prepare_latents(*args, **kwargs)

    pipe = Restless(**pipeline("StableDiffusionPipeline").components)
    policy = policy_of(pipe)
    trajectory = policy.rollout(PROMPTS, SEEDS)
    policy.offloaded = {"text_encoder": torch.device("cpu")}
    with pytest.raises(
        ReplayError,
        match="calls `text_encoder` in a replay, and it is off the device.*Set sample_offload_encoders = False",
    ):
        policy(trajectory)
    pipe.asks = False  # embeddings are remembered
    assert torch.equal(log_probs(policy(trajectory, verify=True)), trajectory.log_probs)


# ---------------------------------------------------------------- the safety checker


class Blackening(torch.nn.Module):
    """Finds something in every image."""

    dtype, device = torch.float32, torch.device("cpu")

    def forward(self, images, clip_input):
        return images * 0, [True] * len(images)


class Extractor:
    def __call__(self, images, return_tensors):
        return self

    def to(self, device):
        self.pixel_values = torch.zeros(1)
        return self


def test_a_safety_checker_is_off_and_this_is_said_once(caplog):
    pipe = pipeline("StableDiffusionPipeline")
    expected = policy_of(pipe).rollout(PROMPTS, SEEDS)
    vars(pipe).update(safety_checker=Blackening(), feature_extractor=Extractor())
    assert image(pipe).max() == 0.0
    policy = Policy(pipe, call_kwargs=call_arguments(pipe))
    trajectory = policy.rollout(PROMPTS, SEEDS)
    policy(trajectory)
    policy.rollout(PROMPTS, SEEDS)
    assert torch.equal(trajectory.images, expected.images)
    said = [record.getMessage() for record in caplog.records if "safety checker" in record.getMessage()]
    assert [message.split(":")[0] for message in said] == [
        "the safety checker of StableDiffusionPipeline is off while the policy samples"
    ]
    assert isinstance(pipe.safety_checker, Blackening) and image(pipe).max() == 0.0  # only while it samples


# ---------------------------------------------------------------- arguments of a rollout


def test_nothing_to_draw_and_seeds_that_do_not_fit():
    policy = policy_of(painter())
    for prompts, seeds in ([], []), (PROMPTS, [1]):
        with pytest.raises(ValueError, match=f"got {len(prompts)} prompts and {len(seeds)} seeds"):
            policy.rollout(prompts, seeds)


def test_rows_of_several_per_prompt_are_refused():
    """Two pictures for each prompt: which is which sample's is not known."""
    policy = policy_of(painter())

    class Twice(type(policy.hooks)):
        def call(self, pipe, arguments):
            generators = [g for g in arguments["generator"] for _ in range(2)]
            prompts = [p for p in arguments["prompt"] for _ in range(2)]
            return super().call(pipe, {**arguments, "prompt": prompts, "generator": generators})

    policy.hooks = Twice()
    with pytest.raises(UnsupportedPipelineError, match="the latents have 4 rows for 2 prompts: .*several rows of one"):
        policy.rollout(PROMPTS, SEEDS)
