"""What a value function sees: features of the denoiser's middle, latents and the prompt's embedding, on families that guide, pack and frame differently."""

import pytest
import torch
from painter import Painter, network
from pipelines.families import FAMILIES, Family
from tiny import ddim, stable_diffusion, stable_diffusion_3
from torch import nn
from walks import policy_of

from dpok_trl.policy.errors import UnsupportedPipelineError
from dpok_trl.policy.features import MiddleFeatures, mean_of_positions, middle_of, prompt_embeddings, value_inputs
from dpok_trl.policy.memo import LIST, NOTHING, Encoded
from dpok_trl.policy.policy import Policy


PROMPTS = ["a cat", "a dog", "a man"]  # of one length: what a family pads to the longest prompt depends on the others
SEEDS = [3, 1, 4]
OTHER_BATCH_SHAPE = 1e-5  # relative to the largest value: kernels round differently

# One of each way to guide and to lay out the hidden state: both halves in one call, one after the other, none; space, tokens, two streams, lists, frames.
CHOSEN = {
    name: FAMILIES[name]
    for name in (
        "sd",
        "sdxl",
        "sd3",
        "flux",
        "flux_true_cfg",
        "pixart_sigma",
        "sana",
        "z_image",
        "wan",
        "wan_two_experts",
    )
} | {"animatediff": Family("AnimateDiffPipeline")}

GUIDED = {"both halves": {}, "no guidance": {"guidance_scale": 1.0}}


def middles(policy: Policy) -> list[nn.Module]:
    return [middle_of(name, module) for name, module in policy.tuned.denoisers.items()]


def hooks_of(policy: Policy) -> int:
    return sum(len(part._forward_hooks) for module in policy.tuned.denoisers.values() for part in module.modules())


@pytest.fixture
def sd() -> Policy:
    return policy_of(stable_diffusion(), call={"height": 16, "width": 16})


# ---------------------------------------------------------------- every family


@pytest.mark.parametrize("guidance", GUIDED)
@pytest.mark.parametrize("name", CHOSEN)
def test_inputs_belong_to_the_sample_and_the_rollout_does_not_notice(name, guidance):
    family = CHOSEN[name]
    pipe = family.pipe()
    policy = Policy(pipe, call_kwargs={**family.call(pipe), **GUIDED[guidance]})
    plain = policy.rollout(PROMPTS, SEEDS)
    assert plain.features is None and plain.prompt_embeddings is None
    hooks = hooks_of(policy)
    for value_input in ("features", "latents"):
        trajectory = policy.rollout(PROMPTS, SEEDS, value_input=value_input)
        assert torch.equal(trajectory.images, plain.images) and torch.equal(trajectory.log_probs, plain.log_probs)
        assert hooks_of(policy) == hooks
        steps = list(trajectory.steps)
        inputs = [value_inputs(trajectory, [sample] * len(steps), steps) for sample in range(len(PROMPTS))]
        alone = policy.rollout(PROMPTS[1:2], SEEDS[1:2], value_input=value_input)
        expected = value_inputs(alone, [0] * len(steps), steps)
        assert expected.dtype == torch.float32
        tolerance = OTHER_BATCH_SHAPE * expected.abs().max().item()
        torch.testing.assert_close(inputs[1], expected, rtol=0, atol=tolerance)
        for one, other in ((0, 1), (1, 2)):  # of other samples and other steps they are others
            assert ((inputs[one] - inputs[other]).abs().amax(dim=1) > 100 * tolerance).all()
        assert (inputs[0].diff(dim=0).abs().amax(dim=1) > 100 * tolerance).all()


# ---------------------------------------------------------------- features


def test_features_are_the_middle_s_output_pooled_by_hand(sd):
    """Both halves of the guidance run at once: rows 0-2 without the prompt, rows 3-5 with it."""
    outputs = []
    (middle,) = middles(sd)
    assert middle is sd.pipe.unet.mid_block
    handle = middle.register_forward_hook(lambda module, args, output: outputs.append(output))
    trajectory = sd.rollout(PROMPTS, SEEDS, value_input="features")
    handle.remove()
    assert outputs[0].shape == (6, 32, 4, 4)
    expected = torch.stack([(output[:3] + output[3:]).mean(dim=(2, 3)) / 2 for output in outputs], dim=1)
    torch.testing.assert_close(trajectory.features, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(value_inputs(trajectory, [2, 0], [1, 0]), trajectory.features[[2, 0], [1, 0]])


def test_only_actions_have_features(sd):
    everything = sd.rollout(PROMPTS, SEEDS, value_input="features")
    assert everything.steps[0] == 0
    some = sd.rollout(PROMPTS, SEEDS, window=[0, 2], value_input="features")
    assert some.steps == (0, 2) and some.features.shape[:2] == (3, 2)
    assert torch.equal(some.features[:, 0], everything.features[:, 0])  # before the paths part
    assert torch.equal(value_inputs(some, [1], [2])[0], some.features[1, 1])
    with pytest.raises(ValueError, match="not in tuple"):
        value_inputs(some, [1], [1])


def test_a_block_of_two_streams_gives_both_and_two_calls_their_mean():
    family = FAMILIES["flux_true_cfg"]
    pipe = family.pipe()
    policy = Policy(pipe, call_kwargs=family.call(pipe))
    outputs = []
    (middle,) = middles(policy)
    handle = middle.register_forward_hook(lambda module, args, output: outputs.append(output))
    trajectory = policy.rollout(PROMPTS, SEEDS, value_input="features")
    handle.remove()
    calls = [torch.cat([stream.mean(dim=1) for stream in output], dim=1) for output in outputs]
    assert len(calls) == 2 * len(trajectory.next_latents)
    expected = torch.stack([(a + b) / 2 for a, b in zip(calls[::2], calls[1::2], strict=True)], dim=1)
    torch.testing.assert_close(trajectory.features, expected[:, list(trajectory.steps)], rtol=1e-5, atol=1e-6)


def test_frames_of_a_row_follow_each_other_and_repeats_of_guidance_go_round_all_samples():
    """Two samples of three frames, run twice: value 100 * repeat + 10 * sample + frame."""
    values = torch.tensor(
        [100.0 * k + 10 * sample + frame for k in (0, 1) for sample in (1, 2) for frame in (0, 1, 2)]
    )
    features = MiddleFeatures({"unet": network()}, 2)
    with features.listening():
        features._hear(network(), (), values[:, None, None, None].expand(-1, 1, 2, 2))
    features.end_call("unet", (torch.zeros(4, 1),))
    torch.testing.assert_close(features.end_step(), torch.tensor([[61.0], [71.0]]))


@pytest.mark.parametrize("shape", [(2, 5), (2, 4, 5), (2, 5, 2, 2), (2, 5, 3, 2, 2)])
def test_every_layout_is_pooled_to_channels(shape):
    channels = torch.arange(5.0)
    where = 1 if len(shape) != 3 else 2
    output = channels.reshape([5 if axis == where else 1 for axis in range(len(shape))]).expand(shape)
    pooled = mean_of_positions(output.to(torch.bfloat16))
    assert pooled.dtype == torch.float32
    assert torch.equal(pooled, channels.expand(2, 5))


def test_the_middle_of_a_transformer_is_the_middle_block_of_its_largest_list():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.captions = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))  # the longest
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(8, 8), nn.ModuleList([nn.Linear(9, 9)])) for _ in range(5)
            )
            self.empty = nn.ModuleList()
            self.mid_block = None

    whole = Network()
    assert middle_of("transformer", whole) is whole.blocks[2]
    for name, position in (("flux", 0), ("wan", 0)):
        denoiser = FAMILIES[name].pipe().transformer
        blocks = denoiser.transformer_blocks if name == "flux" else denoiser.blocks
        assert middle_of("transformer", denoiser) is blocks[position]
    with pytest.raises(UnsupportedPipelineError, match="no `mid_block` and no list of blocks"):
        middle_of("net", nn.Linear(2, 2))


def test_what_later_layers_write_into_the_hidden_state_does_not_count(sd):
    expected = sd.rollout(PROMPTS, SEEDS, value_input="features").features[:, 0]

    def spoil(module, args, kwargs):
        kwargs["hidden_states"].mul_(0)

    handle = sd.pipe.unet.up_blocks[0].register_forward_pre_hook(spoil, with_kwargs=True)
    spoiled = sd.rollout(PROMPTS, SEEDS, value_input="features").features[:, 0]
    handle.remove()
    assert torch.equal(spoiled, expected)


def test_the_hook_is_taken_out_after_an_exception(sd):
    before = hooks_of(sd)
    handle = sd.pipe.vae.decoder.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sd.rollout(PROMPTS, SEEDS, value_input="features")
    handle.remove()
    assert hooks_of(sd) == before
    assert sd.rollout(PROMPTS, SEEDS).features is None


def test_under_the_reference_they_are_those_of_the_network_that_answers(sd):
    with sd.reference():
        pretrained = sd.rollout(PROMPTS, SEEDS, value_input="features").features
    assert (sd.rollout(PROMPTS, SEEDS, value_input="features").features - pretrained).abs().max() > 1e-3
    full = policy_of(stable_diffusion(), call={"height": 16, "width": 16}, full=True)
    with full.reference():
        assert torch.equal(full.rollout(PROMPTS, SEEDS, value_input="features").features, pretrained)


def test_a_replay_of_a_trajectory_with_features_is_the_same(sd):
    trajectory = sd.rollout(PROMPTS, SEEDS, value_input="features")
    replayed = torch.stack([step.log_prob for step in sd(trajectory)], dim=1)
    assert torch.equal(replayed, trajectory.log_probs)
    assert not trajectory.features.requires_grad


# ---------------------------------------------------------------- latents


def test_latents_are_x_t_and_the_mean_of_the_prompt_s_tokens(sd):
    trajectory = sd.rollout(["a cat", "a dog", "a cat"], SEEDS, value_input="latents")
    tokens = sd.pipe.encode_prompt(["a cat", "a dog"], "cpu", 1, False)[0]
    embeddings = tokens.mean(dim=1)[[0, 1, 0]]
    torch.testing.assert_close(trajectory.prompt_embeddings, embeddings, rtol=0, atol=1e-5)
    inputs = value_inputs(trajectory, [2, 0, 1], [1, 0, 2])
    for row, (sample, step) in enumerate(((2, 1), (0, 0), (1, 2))):
        assert torch.equal(
            inputs[row], torch.cat([trajectory.latents[step][sample].flatten(), trajectory.prompt_embeddings[sample]])
        )


def test_the_embedding_is_the_first_floating_part_that_has_rows():
    mask = torch.ones(2, 3, dtype=torch.int64)
    shared = torch.ones(3, 4)  # of no sample
    layers = torch.stack([torch.full((2, 3, 4), 1.0), torch.full((2, 3, 4), 3.0)])  # layers first, then the batch
    layers[:, 1] *= 10
    nested = Encoded((None, mask, shared, [layers]), (NOTHING, 0, None, [1]), (0, 1, 1))
    assert torch.equal(prompt_embeddings([nested, None]), torch.tensor([[2.0] * 4, [20.0] * 4, [20.0] * 4]))
    lists = Encoded(([torch.ones(5, 4), 2 * torch.ones(3, 4)],), (LIST,), (1, 0))
    assert torch.equal(prompt_embeddings([lists]), torch.tensor([[2.0] * 4, [1.0] * 4]))


# ---------------------------------------------------------------- refusals


def test_what_is_not_there_is_refused_with_the_way_out(sd):
    with pytest.raises(ValueError, match="latents, features or None, but is 'middle'"):
        sd.rollout(PROMPTS, SEEDS, value_input="middle")
    with pytest.raises(ValueError, match=r"value_input='latents'\)"):
        value_inputs(sd.rollout(PROMPTS, SEEDS), [0], [0])
    painter = Policy(Painter(network(), ddim()), call_kwargs={"num_inference_steps": 3})
    with pytest.raises(UnsupportedPipelineError, match="Take value_input='features'"):
        painter.rollout(PROMPTS, SEEDS, value_input="latents")
    assert painter.rollout(PROMPTS, SEEDS, value_input="features").features.shape == (3, 3, 16)
    for encoded in ([], [None], [Encoded((torch.ones(2, 3, dtype=torch.int64),), (0,), (0, 1))]):
        with pytest.raises(UnsupportedPipelineError, match="none was recorded"):
            prompt_embeddings(encoded)


def test_text_encoders_that_train_leave_no_embedding_to_record():
    policy = policy_of(stable_diffusion(), call={"height": 16, "width": 16}, text_encoders=True)
    with pytest.raises(UnsupportedPipelineError, match="its text encoders train"):
        policy.rollout(PROMPTS, SEEDS, value_input="latents")
    assert policy.rollout(PROMPTS, SEEDS, value_input="features").features is not None


@pytest.mark.parametrize(
    "output, words",
    [
        (torch.ones(7, 2), "gives 7 rows where the network has 6 for 3 samples"),
        ({"sample": torch.ones(6, 2)}, "returns no tensor"),
        (torch.ones(6, 2, dtype=torch.int64), "returns no tensor"),
    ],
)
def test_a_middle_that_cannot_be_read_is_refused(sd, output, words):
    features = MiddleFeatures({"unet": sd.pipe.unet}, 3)
    features._hear(sd.pipe.unet.mid_block, (), output)
    with pytest.raises(UnsupportedPipelineError, match=f"{words}.*Take value_input='latents'"):
        features.end_call("unet", (torch.ones(6, 2),))


def test_a_middle_that_does_not_run_or_changes_its_width_is_refused(sd, monkeypatch):
    features = MiddleFeatures({"unet": sd.pipe.unet}, 3)
    for width in (2, 5):
        features._hear(sd.pipe.unet.mid_block, (), torch.ones(3, width))
    features.end_call("unet", (torch.ones(3, 2),))
    with pytest.raises(UnsupportedPipelineError, match=r"gives \[2, 5\] channels"):
        features.end_step()
    monkeypatch.setattr("dpok_trl.policy.features.middle_of", lambda name, denoiser: nn.Identity())
    with pytest.raises(UnsupportedPipelineError, match="Identity of `unet`.* did not run"):
        sd.rollout(PROMPTS, SEEDS, value_input="features")


@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_a_compiled_denoiser_is_refused_for_features(how):
    """A hook that comes after the compilation is not run, and one that was there goes on running when it has been taken out."""
    pipe = stable_diffusion_3()
    policy = Policy(pipe)
    (pipe.transformer if how == "whole" else pipe.transformer.transformer_blocks[0]).compile(backend="eager")
    with pytest.raises(UnsupportedPipelineError, match="`transformer` is compiled.*value_input='latents'"):
        policy.rollout(PROMPTS, SEEDS, value_input="features")
