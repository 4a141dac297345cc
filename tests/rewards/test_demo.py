"""The demo world's rewards by name equal its functions, and hold to the contract."""

import numpy as np
import pytest
import torch

from dpok_trl.demo.world import REWARDS, parse_prompt, render
from dpok_trl.rewards.base import score
from dpok_trl.rewards.demo import DemoExact, DemoGreenness, DemoSoft
from dpok_trl.rewards.registry import load_reward


PROMPTS = ("a green triangle", "four circles", "a green triangle")
SHOWN = ("a green triangle", "a red square", "a red triangle")


@pytest.fixture(scope="module")
def images():
    pictures = [render(parse_prompt(prompt), np.random.default_rng(seed)) for seed, prompt in enumerate(SHOWN)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize(("name", "kind"), [("exact", DemoExact), ("soft", DemoSoft), ("greenness", DemoGreenness)])
def test_equal_to_the_function(images, name, kind):
    reward = load_reward(f"demo-{name}")
    assert type(reward) is kind
    expected, expected_info = REWARDS[name](images, PROMPTS, None)
    rewards, info = score(reward, images, PROMPTS, [{}] * 3)
    assert torch.equal(rewards, expected) and info == expected_info


def test_known_answers(images):
    exact, _ = score(DemoExact(), images, PROMPTS, [{}] * 3)
    assert exact.tolist() == [1.0, 0.0, 0.0]
    soft, _ = score(DemoSoft(), images, PROMPTS, [{}] * 3)
    assert soft[0] == 1.0 and soft[2] == 0.5  # the shape is right, the colour is not
    green = torch.zeros(1, 3, 4, 4)
    green[:, 1] = 1
    assert DemoGreenness()(green, ("four circles",))[0].tolist() == [1.0]
