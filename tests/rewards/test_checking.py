"""`check_reward`: each breach of the contract is found and told, and nothing is raised for it."""

import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from dpok_trl.demo.world import check
from dpok_trl.rewards.checking import SAMPLE_PROMPTS, check_reward, sample_pictures
from dpok_trl.rewards.remote import RemoteReward


IMAGES = torch.linspace(0, 1, 4 * 3 * 8 * 8).reshape(4, 3, 8, 8)
PROMPTS = ["a cat", "a dog", "a cat", "a dog"]


def brightness(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3))


def only_problem(reward, **kwargs):
    report = check_reward(reward, **kwargs)
    assert not report.ok
    [problem] = report.problems
    assert f"problem: {problem}" in str(report)
    return problem


# --- rewards that hold to it ------------------------------------------------------------------------------------------


def test_a_good_reward():
    report = check_reward(brightness, IMAGES, PROMPTS)
    assert report.ok and report.problems == report.notes == []
    assert report.name == "brightness"
    assert report.values == pytest.approx(IMAGES.mean(dim=(1, 2, 3)).tolist())
    assert report.repeat_difference == 0.0
    assert report.order_difference < 1e-6 and report.batch_difference < 1e-6
    assert report.returned == "tensor of shape (4,), float32, on cpu"
    assert report.call == "with 4 images as a tensor"
    assert report.first_seconds > 0 and report.seconds_per_image > 0
    printed = str(report)
    assert printed.startswith("brightness: ok\n")
    for row in ("returned", "rewards", "the same call again", "in another order", "one image at a time", "time"):
        assert re.search(rf"^  {row} ", printed, re.M), row


@pytest.mark.parametrize("name", ["demo-exact", "demo-soft", "demo-greenness"])
def test_shipped_rewards_by_name(name):
    report = check_reward(name)
    assert report.ok, report
    assert report.name == name and len(report.values) == len(SAMPLE_PROMPTS)


@pytest.mark.parametrize("spread", [1.0, 0.1])
def test_noise_is_found_whatever_it_is_added_to(spread):
    generator = torch.Generator().manual_seed(0)
    assert "it is random" in only_problem(lambda images: 1000 + spread * torch.rand(len(images), generator=generator))


@pytest.mark.parametrize(("relative", "ok"), [(4 * 2**-23, True), (64 * 2**-23, False)])
def test_equal_rewards_may_differ_by_rounding(relative, ok):
    calls = iter([0.0] + [relative] * 20)
    report = check_reward(lambda images: [1000 * (1 + shift) for shift in [next(calls)] for _ in images])
    assert report.ok == ok, report


def test_a_reward_of_groups_is_not_judged_one_at_a_time():
    report = check_reward("diversity")
    assert report.ok and report.batch_difference is None and report.order_difference == 0.0
    assert report.call == "with 6 images as PIL pictures, once for each prompt"
    alone = check_reward("diversity", prompts=["a cat", "a dog"])
    assert "None for every image" in alone.problems[0]


def test_the_first_three_samples_are_what_their_prompts_say():
    verdicts = [check(*sample).exact for sample in zip(sample_pictures(), SAMPLE_PROMPTS, strict=True)]
    assert verdicts == [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (lambda images: [0.5, 1, None, 2.0], "list of 4: float, int, NoneType"),
        (lambda images: np.arange(4.0), "numpy array of shape (4,), float64"),
        (lambda images: (torch.arange(4).half(), {"a": 1}), "tensor of shape (4,), float16, on cpu, and info (dict)"),
    ],
)
def test_what_was_returned(value, words):
    def reward(images, prompts, target):
        whole = value(images)
        rewards, *info = whole if isinstance(whole, tuple) else (whole,)
        rewards = [rewards[index] for index in target] if isinstance(rewards, list) else rewards[target]
        return (rewards, *info) if info else rewards

    report = check_reward(reward, IMAGES, PROMPTS, [{"target": index} for index in range(4)])
    assert report.ok, report
    assert report.returned == words.replace("NoneType", "None")
    assert report.values[0] in (0.0, 0.5) and (report.values[2] is None) == ("None" in words)


def test_pictures_of_the_user():
    seen = []

    def reward(images, prompts):
        seen.extend(zip(images, prompts, strict=True))
        return [image.getpixel((0, 0))[0] for image in images]

    report = check_reward(reward, [Image.new("RGB", (4, 6), (level, 0, 0)) for level in (3, 200)])
    assert report.ok and report.values == [3.0, 200.0]
    assert seen[0][0].size == (4, 6) and seen[0][1] == "a picture"


# --- rewards that do not ----------------------------------------------------------------------------------------------


def test_random():
    generator = torch.Generator().manual_seed(0)

    def reward(images, prompts):
        return torch.rand(len(images), generator=generator)

    assert "the same call gave other rewards" in only_problem(reward)
    report = check_reward(reward)
    assert report.repeat_difference > 0.01 and report.order_difference is report.batch_difference is None


def test_depends_on_the_batch():
    def reward(images, prompts, metadata):
        rewards = images.mean(dim=(1, 2, 3))
        return rewards - rewards.mean()

    assert "it depends on the other images of the call" in only_problem(reward)
    assert check_reward(reward, IMAGES, PROMPTS).batch_difference == pytest.approx(
        (IMAGES.mean(dim=(1, 2, 3)) - IMAGES.mean()).abs().max().item()
    )


def test_depends_on_the_place():
    problems = check_reward(lambda images, prompts: [float(place) for place in range(len(images))]).problems
    assert "with the images in another order, an image got another reward, by up to 5" in problems[0]


def test_fails_on_one_image():
    def reward(images, prompts, metadata):
        return images.mean(dim=(1, 2, 3)).reshape(-1, 2).flatten()

    assert "with one image at a time it fails: the reward function reward raised RuntimeError" in only_problem(reward)


@pytest.mark.parametrize("image_type", ["pt", "pil"])
def test_writes_into_the_images(image_type):
    def reward(images, prompts):
        for image in images:
            image.zero_() if image_type == "pt" else image.paste((0, 0, 0), (0, 0, 8, 8))
        return [len(prompt) for prompt in prompts]

    reward.image_type = image_type
    before = IMAGES.clone()
    assert "it writes into the images" in only_problem(reward, images=IMAGES, prompts=["a", "bb", "ccc", "d"])
    assert torch.equal(IMAGES, before)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([math.nan, math.inf, 1.0, 2.0], "2 of 4 rewards are not finite (1 NaN, 1 infinite)"),
        ([None] * 4, "None for every image"),
    ],
)
def test_not_finite_or_none(values, words):
    def reward(images, target):
        return [values[index] for index in target]

    problem = only_problem(reward, images=IMAGES, prompts=PROMPTS, metadata=[{"target": index} for index in range(4)])
    assert words in problem


def test_becomes_nan_in_a_batch_of_one():
    def reward(images, prompts, metadata):
        rewards = images.mean(dim=(1, 2, 3))
        return rewards + 0 * rewards.var(correction=min(1, len(images) - 1)) / (len(images) - 1)  # of one: 0 / 0

    report = check_reward(reward, IMAGES, PROMPTS)
    assert report.batch_difference == math.inf and "by up to inf" in report.problems[0]


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (lambda images: [1.0, 2.0], "returned 2 rewards for 6 images"),
        (lambda images, prompts: 0.5, "one number for the whole batch"),
        (lambda images: {}, "must return one number per image"),
        (lambda images, prompts: 1 / 0, "raised ZeroDivisionError: division by zero"),
        (lambda images, caption_length: caption_length, "asks for caption_length, and the prompts come with no such"),
        (lambda: [], "none of them takes the images"),
    ],
)
def test_what_the_contract_refuses_is_reported(reward, words):
    assert words in only_problem(reward)


def test_a_server_that_is_not_there_is_reported_and_asked_once(caplog):
    problem = only_problem(RemoteReward("http://127.0.0.1:9", retries=0))
    assert problem.startswith("6 of 6 rewards are not finite (6 NaN, 0 infinite).")
    assert problem.endswith("Where a server failed, the log says why.")
    [record] = caplog.records
    assert "the reward server http://127.0.0.1:9 gave no usable answer in 1 attempt." in record.getMessage()


def test_what_was_returned_is_told_as_it_is_read():
    class Output:
        def __init__(self, **values):
            vars(self).update(values)

    def returned(make):
        return check_reward(lambda images, prompts: make([float(i.getpixel((30, 30))[0]) for i in images])).returned

    assert returned(lambda values: (values, {"a": 1})) == "list of 6: float, and info (dict)"
    assert returned(lambda values: (values, ["words"])) == "list of 6: float, and info (list)"
    assert returned(lambda values: Output(rewards=values)) == "an object of type Output with rewards: list of 6: float"
    assert (
        returned(lambda values: (Output(logits=torch.tensor(values)[:, None]), None))
        == "an object of type Output with logits: tensor of shape (6, 1), float32, on cpu, and info (NoneType)"
    )
    # two columns of numbers are rewards and no pair
    pair = check_reward(lambda images, prompts: ([1.0], [2.0]), IMAGES[:2], ["a", "b"])
    assert pair.returned == "tuple of 2: list"


def test_equal_rewards_are_a_note():
    report = check_reward(lambda images, prompts: [0.5] * len(images))
    assert report.ok and report.notes == [
        "all sample images got 0.5. From equal rewards nothing is learned; try images of yours."
    ]
    assert "note: all sample images got 0.5" in str(report)


# --- the call itself --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((3,), TypeError, "reward must be a function, or the name of one; got 3"),
        (("demo-sotf",), ValueError, "Did you mean 'demo-soft'"),
        ((brightness, ["a.png"]), TypeError, "images must be a tensor or PIL pictures; got a str"),
        ((brightness, IMAGES, "a cat"), TypeError, "prompts must be a list of strings"),
        ((brightness, IMAGES, ["a cat"]), ValueError, "equally many; got 4, 1 and 4"),
        ((brightness, IMAGES * 255), ValueError, r"must be in \[0, 1\]; got 0 to 255"),
        ((brightness, IMAGES[0]), ValueError, r"of shape \(3, 8, 8\)"),
        ((brightness, []), ValueError, "at least one image is needed"),
    ],
)
def test_wrong_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        check_reward(*arguments)
