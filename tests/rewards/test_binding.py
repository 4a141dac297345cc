"""How a reward is called: every shape of function that somebody may have, and what it is handed."""

import asyncio
import functools
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from dpok_trl import RewardError
from dpok_trl.rewards.base import score, score_batch
from dpok_trl.rewards.binding import BoundReward, RewardInputs, TrainerState


PIXELS = torch.linspace(0, 1, 3 * 3 * 2 * 4).reshape(3, 3, 2, 4)
PROMPTS = ("a cat", "two dogs", "3 birds")
METADATA = ({"target": 1, "colour": "red"}, {"target": 2, "colour": "blue"}, {"target": 3, "colour": "green"})
STATE = TrainerState(epoch=4, global_step=9)
TARGETS = [1, 2, 3]
COLOURS = ["red", "blue", "green"]


def inputs(metadata=METADATA, images=PIXELS, prompts=PROMPTS, **kwargs) -> RewardInputs:
    return RewardInputs(images, prompts, metadata, STATE, **kwargs)


def is_tensor(images):
    return images is PIXELS


def is_pictures(images):
    pixels = (PIXELS * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return isinstance(images, list) and all(
        isinstance(image, Image.Image) and image.mode == "RGB" and np.array_equal(np.asarray(image), pixel)
        for image, pixel in zip(images, pixels, strict=True)
    )


# ---------------------------------------------------------------- what each shape is handed


def ddpo(images, prompts, metadata):
    assert is_tensor(images) and prompts == PROMPTS and metadata == METADATA


def ddpo_with_other_names_for_the_same(image, captions, prompt_metadata):
    assert is_tensor(image) and captions == PROMPTS and prompt_metadata == METADATA


def ddpo_with_metadata_that_may_be_left_out(images, prompts, metadata=None):
    assert is_tensor(images) and prompts == PROMPTS and metadata == METADATA


def ddpo_with_a_setting(images, prompts, metadata, scale=2.0):
    assert is_tensor(images) and metadata == METADATA and scale == 2.0


def three_unknown_names(x, y, z):
    assert is_tensor(x) and y == PROMPTS and z == METADATA


def two_unknown_names(x, y):
    assert is_pictures(x) and y == PROMPTS


def one_unknown_name(x):
    assert is_pictures(x)


def any_arguments(*args):
    images, prompts, metadata = args
    assert is_tensor(images) and prompts == PROMPTS and metadata == METADATA


def by_name(images, prompts):
    assert is_pictures(images) and prompts == PROMPTS


def the_other_way_round(prompts, images):
    assert is_pictures(images) and prompts == PROMPTS


def images_alone(images):
    assert is_pictures(images)


def texts(images, texts):
    assert is_pictures(images) and texts == PROMPTS


def a_column(images, prompts, target):
    assert is_pictures(images) and prompts == PROMPTS and target == TARGETS


def columns_first(colour, target, images):
    assert is_pictures(images) and (colour, target) == (COLOURS, TARGETS)


def metadata_and_a_column(images, prompts, metadata, target):
    assert is_pictures(images) and metadata == METADATA and target == TARGETS


def optional_columns(images, target=None, size="small"):
    assert is_pictures(images) and target == TARGETS and size == "small"  # there is no size


def everything(**kwargs):
    assert is_pictures(kwargs.pop("images"))
    assert kwargs == {"prompts": PROMPTS, "metadata": METADATA, "target": TARGETS, "colour": COLOURS}


def the_rest(images, colour, **kwargs):
    assert is_pictures(images) and colour == COLOURS
    assert kwargs == {"prompts": PROMPTS, "metadata": METADATA, "target": TARGETS}


def keyword_only(*, images, prompts, metadata):
    assert is_pictures(images) and prompts == PROMPTS and metadata == METADATA


def keyword_only_column(images, *, target):
    assert is_pictures(images) and target == TARGETS


def the_state(images, trainer_state):
    assert is_pictures(images) and trainer_state is STATE


def the_state_if_there_is_one(images, prompts, metadata, trainer_state=None):
    assert is_pictures(images) and metadata == METADATA and trainer_state is STATE


def with_settings(threshold, images, prompts, metadata, target="of the function"):
    assert threshold == 0.5 and is_tensor(images) and target == "of the partial"


def with_a_column_set(images, target, colour):
    assert target == "of the partial" and colour == COLOURS


def with_all_columns(images, target, **kwargs):
    assert target == "of the partial" and kwargs["colour"] == COLOURS


class Judge:
    def __call__(self, images, prompts):
        by_name(images, prompts)

    def verdict(self, images, prompts, metadata):
        ddpo(images, prompts, metadata)


class Network(torch.nn.Module):
    def forward(self, prompts, images, target):
        a_column(images, prompts, target)


class AsTensor(Judge):
    image_type = "pt"

    def __call__(self, images, prompts):
        assert is_tensor(images) and prompts == PROMPTS


def ddpo_with_pictures(images, prompts, metadata):
    assert is_pictures(images) and metadata == METADATA


ddpo_with_pictures.image_type = "pil"


async def in_a_coroutine(images, prompts):
    await asyncio.sleep(0)
    by_name(images, prompts)
    assert not torch.is_grad_enabled()


class Asked:
    async def __call__(self, images, prompts, metadata):
        await asyncio.sleep(0)
        ddpo(images, prompts, metadata)


@functools.wraps(a_column)
def decorated(*args, **kwargs):
    return a_column(*args, **kwargs)


SHAPES = [
    ddpo, ddpo_with_other_names_for_the_same, ddpo_with_metadata_that_may_be_left_out, ddpo_with_a_setting, three_unknown_names,
    two_unknown_names, one_unknown_name, any_arguments, by_name, the_other_way_round, images_alone, texts, a_column, columns_first,
    metadata_and_a_column, optional_columns, everything, the_rest, keyword_only, keyword_only_column, the_state,
    the_state_if_there_is_one, functools.partial(with_settings, 0.5, target="of the partial"),
    functools.partial(functools.partial(with_a_column_set, target="of the partial")),
    functools.partial(with_all_columns, target="of the partial"),
    functools.partial(AsTensor()), lambda images, prompts: by_name(images, prompts), lambda a, b, c: ddpo(a, b, c),
    Judge(), Judge().verdict, Network(), AsTensor(), ddpo_with_pictures, in_a_coroutine, Asked(), decorated,
]  # fmt: skip


@pytest.mark.parametrize("function", SHAPES, ids=lambda f: BoundReward(f).name)
def test_every_shape_gets_what_it_asks_for(function):
    called = []
    reward = BoundReward(function)
    with torch.no_grad():
        assert reward(inputs(log_metric=lambda *a: called.append(a))) is None
    assert called == []


@pytest.mark.parametrize("function", SHAPES, ids=lambda f: BoundReward(f).name)
def test_every_shape_is_scored(function):
    """The same shapes by way of the contract: an assertion inside would be a `RewardError` that names it."""
    with pytest.raises(RewardError, match="returned None: it must return one number per image"):
        score_batch(BoundReward(function), inputs())


def test_numbers_are_logged():
    logged = []

    def sharpness(images, log_metric):
        log_metric("sharpness", 0.25)
        return [1.0] * len(images)

    score_batch(BoundReward(sharpness), inputs(log_metric=lambda *pair: logged.append(pair)))
    assert logged == [("sharpness", 0.25)]
    score(sharpness, PIXELS, PROMPTS, METADATA)  # without a run there is nobody to tell


def test_a_coroutine_in_a_notebook():
    """Where a loop runs already, as in IPython."""
    threads = []

    async def reward(images, prompts):
        await asyncio.sleep(0)
        threads.append(threading.current_thread())
        return torch.ones(3, requires_grad=True) * 2

    async def cell():
        return score(reward, PIXELS, PROMPTS, METADATA)[0]

    assert asyncio.run(cell()).tolist() == [2, 2, 2]
    assert threads[0] is not threading.main_thread()
    assert score(reward, PIXELS, PROMPTS, METADATA)[0].tolist() == [2, 2, 2]
    assert threads[1] is threading.main_thread()


def test_coroutines_wait_together():
    """What a coroutine asks for at once is answered at once: the barrier would break otherwise."""

    async def reward(images, prompts):
        arrived, all_there = [], asyncio.Event()

        async def ask(prompt):
            arrived.append(prompt)
            if len(arrived) == len(prompts):
                all_there.set()
            await asyncio.wait_for(all_there.wait(), 10)
            return float(len(prompt))

        return await asyncio.gather(*map(ask, prompts))

    assert score(reward, PIXELS, PROMPTS, METADATA)[0].tolist() == [5, 8, 7]


# ---------------------------------------------------------------- pictures


def test_pictures_are_made_once_whoever_asks():
    seen = []

    def reward(images):
        seen.append(images)
        images.append("a list of its own")
        return [0.0] * 3

    batch = inputs()
    for _ in range(2):
        score_batch(BoundReward(reward), batch)
    (first, second) = seen
    assert first is not second and all(a is b for a, b in zip(first[:3], second[:3], strict=True))
    assert len(batch.pictures) == 3


def test_pixels_are_rounded_and_clamped():
    values = torch.tensor([-0.1, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 1.1])
    (picture,) = inputs(images=values.expand(1, 3, 1, 6), prompts=("a",), metadata=({},)).pictures
    assert np.asarray(picture)[0, :, 0].tolist() == [0, 0, 0, 1, 255, 255]
    half = inputs(images=values.to(torch.bfloat16).expand(1, 3, 1, 6), prompts=("a",), metadata=({},)).pictures
    assert half[0].size == (6, 1)


def test_a_video_is_the_list_of_its_frames():
    videos = torch.rand(2, 5, 3, 4, 6)
    (first, second) = inputs(images=videos, prompts=("a", "b"), metadata=({}, {})).pictures
    assert len(first) == len(second) == 5 and first[0].size == (6, 4)
    alone = inputs(images=videos[1], prompts=("a",) * 5, metadata=({},) * 5).pictures
    assert all(np.array_equal(a, b) for a, b in zip(second, alone, strict=True))


# ---------------------------------------------------------------- groups


def test_a_reward_that_wants_groups_gets_all_images_of_a_prompt():
    calls = []

    def rank(images, prompts, target):
        calls.append((images, prompts, target))
        return [value / len(images) for value in target], {"of": prompts[0]}

    rank.wants_groups = True
    rank.image_type = "pt"
    prompts = ("a", "b", "a", "c", "b", "a")
    images = torch.arange(6.0).reshape(6, 1, 1, 1).expand(6, 3, 2, 2) / 6
    scored = score_batch(
        BoundReward(rank), inputs(images=images, prompts=prompts, metadata=tuple({"target": n} for n in range(6)))
    )
    assert [(prompts, target) for _, prompts, target in calls] == [
        (("a",) * 3, [0, 2, 5]),
        (("b",) * 2, [1, 4]),
        (("c",), [3]),
    ]
    assert all(
        torch.equal(seen, images[rows]) for (seen, *_), rows in zip(calls, ([0, 2, 5], [1, 4], [3]), strict=True)
    )
    expected = torch.tensor([0, 1 / 2, 2 / 3, 3, 4 / 2, 5 / 3])  # each in the place of its image
    torch.testing.assert_close(scored.values, expected, rtol=0, atol=0)
    assert scored.info == [{"of": "a"}, {"of": "b"}, {"of": "c"}]


def test_a_group_of_the_wrong_length_is_named():
    def rank(images, prompts):
        return [1.0, 2.0]

    rank.wants_groups = True
    with pytest.raises(RewardError, match="the reward function rank returned 2 rewards for 1 images"):
        score_batch(BoundReward(rank), inputs())


# ---------------------------------------------------------------- what cannot be called


def test_a_parameter_that_nobody_has_is_named_with_the_columns():
    def reward(images, prompts, colours, weight):
        return [1.0] * 3

    message = "the reward reward asks for colours, weight, and the prompts come with target, colour. A parameter is images, prompts, metadata"
    with pytest.raises(TypeError) as error:
        BoundReward(reward)(inputs())
    assert str(error.value).startswith(message)
    with pytest.raises(RewardError) as error:
        score(reward, PIXELS, PROMPTS, METADATA)
    assert message in str(error.value) and isinstance(error.value.__cause__, TypeError)


def test_a_column_must_come_with_every_prompt():
    def reward(images, target):
        return target

    some = ({"target": 1}, {"target": 2}, {})
    for metadata in (some, (None, 1, "x"), ({}, {}, {})):
        with pytest.raises(TypeError, match="asks for target, and the prompts come with no such columns"):
            BoundReward(reward)(inputs(metadata))

    def optional(images, target=None):
        assert target is None

    BoundReward(optional)(inputs(some))


def test_metadata_whose_names_can_be_no_parameters():
    def reward(images, **kwargs):
        assert set(kwargs) == {"prompts", "metadata", "target"}

    BoundReward(reward)(inputs(tuple({7: "seven", "target": n} for n in range(3))))


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (lambda prompts: 0, "prompts"),
        (lambda prompts, x: 0, "prompts, x"),
        (lambda a, b, c, d: 0, "a, b, c, d"),
        (lambda: 0, "none"),
        (lambda *, a: 0, "a"),
        (lambda scale=1.0: 0, "scale"),
    ],
)
def test_what_takes_no_images(function, parameters):
    with pytest.raises(
        TypeError,
        match=f"the reward <lambda> has the parameters {parameters}, and none of them takes the images. Name it `images`",
    ):
        BoundReward(function)


def test_an_image_type_that_there_is_not():
    def reward(images, prompts):
        return [0.0] * 3

    reward.image_type = "np"
    with pytest.raises(TypeError, match="image_type of reward is 'np', but it must be 'pil' or 'pt'"):
        BoundReward(reward)


@pytest.mark.parametrize("given", ["image-reward", 3, None])
def test_what_cannot_be_called(given):
    with pytest.raises(TypeError, match=r"a reward must be a function of .* got .* of type (str|int|NoneType)"):
        BoundReward(given)


def test_a_column_of_the_name_of_a_parameter_is_refused():
    """A dataset with a column of captions would never reach the reward."""
    given = RewardInputs(torch.zeros(1, 3, 2, 2), ("a cat",), ({"captions": "HELLO"},))
    with pytest.raises(TypeError, match="captions of the reward about is also a column.*stands for the prompts"):
        BoundReward(_about)(given)


def _about(images, captions):
    return [0.0]


_about.__name__ = "about"


def test_a_partial_of_a_module_is_called_as_the_module():
    class Head(torch.nn.Module):
        def forward(self, images, scale=1.0):
            return torch.full((len(images),), scale)

    head = BoundReward(functools.partial(Head(), scale=3.0))
    given = RewardInputs(torch.zeros(2, 3, 2, 2), ("a", "b"), ({}, {}))
    assert head(given).tolist() == [3.0, 3.0]


def test_ddpos_three_arguments_with_columns_beside_them():
    given = RewardInputs(torch.zeros(1, 3, 2, 2), ("a cat",), ({"style": "ink", "size": 3},))
    seen = {}

    def optional(images, prompts, metadata, style=None):
        seen["optional"] = (type(images), style)
        return [0.0]

    def everything(images, prompts, metadata, **columns):
        seen["everything"] = (type(images), columns)
        return [0.0]

    BoundReward(optional)(given)
    BoundReward(everything)(given)
    assert seen["optional"] == (torch.Tensor, ["ink"])
    assert seen["everything"] == (torch.Tensor, {"style": ["ink"], "size": [3]})
