import dataclasses
import functools
import pickle
import types

import numpy as np
import pytest
import torch
from transformers.modeling_outputs import SequenceClassifierOutput

from dpok_trl.rewards import RewardError, reward_name, score
from dpok_trl.rewards.base import score_batch
from dpok_trl.rewards.binding import BoundReward, RewardInputs


IMAGES = torch.linspace(0, 1, 3 * 3 * 2 * 2).reshape(3, 3, 2, 2)
PROMPTS = ("a cat", "a dog", "a bird")
METADATA = ({"n": 0}, {"n": 1}, {"n": 2})


def constant(value):
    """A reward function that returns `value` whatever it is shown."""

    def my_reward(images, prompts, metadata):
        return value

    return my_reward


def score_three(reward_function):
    return score(reward_function, IMAGES, PROMPTS, METADATA)


def message_of(value):
    with pytest.raises(RewardError) as error:
        score_three(constant(value))
    assert "my_reward" in str(error.value)
    return str(error.value)


# --- what is accepted -------------------------------------------------------------------------------------------------


def test_called_as_ddpo_does():
    seen = {}

    def my_reward(images, prompts, prompt_metadata):
        seen.update(images=images, prompts=prompts, metadata=prompt_metadata, grad=torch.is_grad_enabled())
        return images.mean(dim=(1, 2, 3)), {"extra": 1}

    rewards, info = score(my_reward, IMAGES, list(PROMPTS), list(METADATA))
    assert seen["images"] is IMAGES
    assert seen["prompts"] == PROMPTS and seen["metadata"] == METADATA  # tuples, though lists were given
    assert seen["grad"] is False
    torch.testing.assert_close(rewards, IMAGES.mean(dim=(1, 2, 3)), rtol=0, atol=0)
    assert info == {"extra": 1}


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([1.0, 0.0, 1.0]),
        torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64),
        torch.tensor([1.0, 0.0, 1.0], dtype=torch.bfloat16),
        torch.tensor([1.0, 0.0, 1.0], dtype=torch.float16),
        torch.tensor([1, 0, 1]),
        torch.tensor([True, False, True]),
        torch.tensor([1, 0, 1], dtype=torch.uint8),
        [1, 0, 1],
        [True, False, True],
        (1.0, 0.0, 1.0),
        [torch.tensor(1.0), torch.tensor(0.0), torch.tensor(1.0)],
        [np.float32(1), np.float64(0), np.int64(1)],
        np.array([1.0, 0.0, 1.0]),
        np.array([1, 0, 1], dtype=np.int32),
        np.array([True, False, True]),
        np.array([1, 0, 1], dtype=np.uint16),
    ],
    ids=lambda value: f"{type(value).__name__}-{getattr(value, 'dtype', type(value[0]).__name__)}",
)
@pytest.mark.parametrize("pair", [True, False])
def test_any_real_numbers(value, pair):
    rewards, info = score_three(constant((value, ["info"]) if pair else value))
    assert rewards.dtype == torch.float32 and rewards.device.type == "cpu"
    assert rewards.tolist() == [1.0, 0.0, 1.0]
    assert info == (["info"] if pair else {})


def test_two_numbers_are_two_rewards_and_not_a_pair():
    def two(value):
        return score(constant(value), IMAGES[:2], PROMPTS[:2], METADATA[:2])

    assert two((0.25, 0.5))[0].tolist() == [0.25, 0.5]
    assert two((torch.tensor(0.25), torch.tensor(0.5)))[0].tolist() == [0.25, 0.5]
    rewards, info = two(([0.25, 0.5], None))
    assert rewards.tolist() == [0.25, 0.5] and info is None


def test_detached_and_a_copy():
    buffer = torch.ones(3, requires_grad=True)
    rewards, _ = score_three(constant(buffer))
    assert not rewards.requires_grad
    with torch.no_grad():
        buffer.zero_()
    assert rewards.tolist() == [1.0, 1.0, 1.0]

    array = np.ones(3, dtype=np.float32)
    rewards, _ = score_three(constant(array))
    array[:] = 0
    assert rewards.tolist() == [1.0, 1.0, 1.0]


def test_batch_of_one():
    rewards, _ = score(constant([2.0]), IMAGES[:1], PROMPTS[:1], METADATA[:1])
    assert rewards.tolist() == [2.0]
    for value in (2.0, [[2.0]], torch.tensor(2.0)):
        assert score(constant(value), IMAGES[:1], PROMPTS[:1], METADATA[:1])[0].tolist() == [2.0]


# --- names ------------------------------------------------------------------------------------------------------------


class Judge:
    def __call__(self, images, prompts, metadata):
        return None

    def verdict(self, images, prompts, metadata):
        return None


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (constant(1), "my_reward"),
        (functools.partial(functools.partial(constant(1))), "my_reward"),
        (lambda images, prompts, metadata: 0, "<lambda>"),
        (Judge(), "Judge"),
        (Judge().verdict, "verdict"),
        (torch.nn.Identity(), "Identity"),
    ],
)
def test_reward_name(function, name):
    assert reward_name(function) == name


def test_name_of_an_object_in_messages():
    with pytest.raises(RewardError, match="the reward function Judge returned None"):
        score_three(Judge())


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [[1.0, 2.0], torch.ones(2), (np.ones(2), {})])
def test_wrong_length(value):
    assert message_of(value) == "the reward function my_reward returned 2 rewards for 3 images."


@pytest.mark.parametrize(
    ("value", "shape", "hint"),
    [
        (torch.tensor(0.5), "()", "one number for the whole batch, often a mean"),
        (0.5, "()", "one number for the whole batch, often a mean"),
        ((0.5, {}), "()", "one number for the whole batch, often a mean"),
        (torch.zeros(3, 3), "(3, 3)", "broadcasting a (B, 1) tensor against a (B,) one"),
        (torch.zeros(3, 3), "(3, 3)", "CLIP similarity matrix (its diagonal is wanted)"),
        (np.zeros((1, 3)), "(1, 3)", "reduce the other dimensions"),
        (torch.zeros(3, 4), "(3, 4)", "reduce the other dimensions"),
        (torch.zeros(3, 3, 2, 2), "(3, 3, 2, 2)", "reduce the other dimensions"),
    ],
)
def test_wrong_shape(value, shape, hint):
    message = message_of(value)
    assert (
        f"returned rewards of shape {shape} for 3 images, but a reward is one number per image, shape (3,)" in message
    )
    assert hint in message


def test_the_broadcasting_mistake_itself():
    def my_reward(images, prompts, metadata):
        scores = images.mean(dim=(1, 2, 3))
        return scores[:, None] - scores

    with pytest.raises(RewardError, match=r"shape \(3, 3\).*broadcasting"):
        score_three(my_reward)


@pytest.mark.parametrize("value", [None, (None, {})])
def test_none(value):
    assert "returned None: it must return one number per image" in message_of(value)


@pytest.mark.parametrize(
    ("value", "given"),
    [
        ("good", "'good' of type str"),
        ({"reward": [1, 2, 3]}, "{'reward': [1, 2, 3]} of type dict"),
        (["1", "2", "3"], "['1', '2', '3'] of type list"),
        ([[1], [2, 3], [4]], "[[1], [2, 3], [4]] of type list"),
        (np.array([1, 2, None]), "of type ndarray"),
    ],
)
def test_not_numeric(value, given):
    message = message_of(value)
    assert given in message and "cannot be read as numbers" in message


@pytest.mark.parametrize("value", [torch.ones(3, dtype=torch.complex64), np.ones(3, dtype=np.complex64), [1j, 0, 0]])
def test_complex(value):
    assert "complex numbers (torch.complex64): rewards are real" in message_of(value)


@pytest.mark.parametrize(
    ("value", "counts", "first"),
    [
        ([1.0, float("nan"), 2.0], "1 of the 3 rewards that my_reward returned are not finite", "nan for image 1"),
        ([1.0, float("nan"), float("inf")], "(1 NaN, 1 infinite)", "nan for image 1, prompt 'a dog'"),
        ([-float("inf")] * 3, "3 of the 3 rewards that my_reward returned", "-inf for image 0, prompt 'a cat'"),
        ([0.0, 0.0, 1e300], "not finite in float32 (0 NaN, 1 infinite)", "inf for image 2, prompt 'a bird'"),
    ],
)
def test_not_finite(value, counts, first):
    message = message_of(value)
    assert counts in message and f"the first is {first}" in message


def test_exception_inside_is_named_and_chained():
    def my_reward(images, prompts, metadata):
        return {}["missing"]

    with pytest.raises(RewardError, match="the reward function my_reward raised KeyError: 'missing'") as error:
        score_three(my_reward)
    assert isinstance(error.value.__cause__, KeyError)


def test_reward_error_inside_passes_unchanged():
    original = RewardError("the server at http://localhost:1 does not answer")

    def my_reward(images, prompts, metadata):
        raise original

    with pytest.raises(RewardError) as error:
        score_three(my_reward)
    assert error.value is original


def test_interrupt_is_not_an_error_of_the_reward():
    def my_reward(images, prompts, metadata):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_three(my_reward)


def test_not_callable():
    with pytest.raises(TypeError, match="must be a function of .* got 'image-reward' of type str"):
        score_three("image-reward")


def test_unequal_inputs():
    with pytest.raises(ValueError, match="got 3 images, 2 prompts and 3 metadata entries"):
        score(constant([1, 2, 3]), IMAGES, PROMPTS[:2], METADATA)


def test_reward_error_can_travel_between_processes():
    error = pickle.loads(pickle.dumps(RewardError("what went wrong")))
    assert isinstance(error, RewardError) and str(error) == "what went wrong"


# --- what models and helpers return -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Output:
    """As reward models and their helpers return it."""

    logits: object = None
    other: str = "not looked at"


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([[1.0], [0.0], [1.0]]),
        np.array([[1.0], [0.0], [1.0]]),
        [[1.0], [0.0], [1.0]],
        Output(torch.tensor([[1.0], [0.0], [1.0]])),
        Output([1, 0, 1]),
        types.SimpleNamespace(rewards=torch.tensor([1.0, 0.0, 1.0])),
        types.SimpleNamespace(rewards=[1.0, 0.0, 1.0], logits=None),
        SequenceClassifierOutput(logits=torch.tensor([[1.0], [0.0], [1.0]])),
    ],
)
def test_what_a_model_with_one_output_returns(value):
    for returned, info in ((value, {}), ((value, {"from": "a model"}), {"from": "a model"})):
        rewards, got = score_three(constant(returned))
        assert rewards.tolist() == [1.0, 0.0, 1.0] and got == info


def test_the_info_of_a_pair_may_be_one_for_each_image():
    infos = [{"words": 1}, {"words": 2}, {"words": 3}]
    rewards, info = score_three(constant(([1, 2, 3], infos)))
    assert rewards.tolist() == [1, 2, 3] and info is infos


def score_parts(value):
    return score_batch(BoundReward(constant(value)), RewardInputs(IMAGES, PROMPTS, METADATA))


@pytest.mark.parametrize(
    "value", [[0.5, None, 1], (0.5, None, 1), ([0.5, None, 1], {}), [torch.tensor(0.5), None, np.float32(1)]]
)
def test_none_is_kept_apart_from_nan(value):
    scored = score_parts(value)
    assert scored.applies.tolist() == [True, False, True]
    assert scored.values[[0, 2]].tolist() == [0.5, 1.0] and scored.values[1].isnan()
    assert "returned None for some images: it must return one number per image" in message_of(value)


def test_what_is_not_finite_is_kept():
    scored = score_parts([float("nan"), float("-inf"), None])
    assert scored.applies.tolist() == [True, True, False]
    assert scored.values[0].isnan() and scored.values[1].item() == -float("inf")
    assert score_parts([None] * 3).applies.tolist() == [False] * 3


def test_a_list_with_none_of_the_wrong_length():
    with pytest.raises(RewardError, match="returned 2 rewards for 3 images"):
        score_parts([None, 1.0])
