import math

import pytest
import torch
from tiny import STEPS, nudge, stable_diffusion, with_adapter

from dpok_trl.policy.policy import Policy
from dpok_trl.results.evaluation import compare, estimate, path_kl_to_reference
from dpok_trl.rewards.base import RewardError


# The KL by hand, from the means in float64, against the closed form in float32.
FLOAT32_TOLERANCE = 1e-5


def make_policy(nudged: bool, **kwargs) -> Policy:
    pipe = with_adapter(stable_diffusion(), nudged=nudged)
    return Policy(pipe, call_kwargs={"num_inference_steps": STEPS, "guidance_scale": 1.0}, **kwargs)


def brightness(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3)), {}


def length(images, prompts, metadata):
    return [float(len(prompt)) for prompt in prompts]


def test_estimate_by_hand():
    result = estimate(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert result.mean == 3.0
    assert result.standard_error == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3 / 4), rel=1e-12)
    assert str(result) == "3.000 ± 1.080"
    assert str(estimate(torch.tensor([0.5]))) == "0.500"


def test_an_adapter_at_its_start_is_the_pretrained_model():
    comparison = compare(
        make_policy(nudged=False), ["ab", "abcd"], [3, 5, 8], {"brightness": brightness, "length": length}, 4
    )
    assert torch.equal(comparison.path_kl, torch.zeros(6))
    assert torch.equal(comparison.tuned_images, comparison.base_images)
    assert comparison.prompts == ["ab"] * 3 + ["abcd"] * 3
    assert comparison.seeds == [3, 5, 8, 3, 5, 8]
    assert (comparison.difference("brightness").mean, comparison.difference("brightness").standard_error) == (0.0, 0.0)
    assert comparison.tuned_scores["length"].tolist() == [2, 2, 2, 4, 4, 4]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_path_kl_is_the_hand_computed_sum_in_nats(reduction):
    policy = make_policy(nudged=True, log_prob_reduction=reduction)
    comparison = compare(policy, ["a"], [0, 1], {"brightness": brightness}, 2)
    with torch.no_grad():
        trajectory = policy.rollout(["a"] * 2, [0, 1])
        expected = torch.zeros(2, dtype=torch.float64)
        for step in trajectory.steps:
            (tuned,) = policy(trajectory, steps=[step])
            with policy.reference():
                (base,) = policy(trajectory, steps=[step])
            squares = (tuned.distribution.mean.double() - base.distribution.mean.double()).square().flatten(1).sum(1)
            expected += squares / (2 * tuned.distribution.std.double().square())
    assert (expected > 0).all()
    torch.testing.assert_close(comparison.path_kl.double(), expected, rtol=FLOAT32_TOLERANCE, atol=0)
    assert not torch.equal(comparison.tuned_images, comparison.base_images)
    assert torch.equal(comparison.tuned_images, trajectory.images)


def test_differences_are_paired_and_the_table_says_them():
    policy = make_policy(nudged=True)
    comparison = compare(policy, ["a"], range(4), {"brightness": brightness}, 4)
    paired = comparison.tuned_scores["brightness"] - comparison.base_scores["brightness"]
    assert comparison.difference("brightness").standard_error == pytest.approx(
        paired.double().std().item() / 2, rel=1e-6
    )
    header, rule, scores, kl = comparison.table().splitlines()
    assert len({len(line) for line in (header, rule, scores, kl)}) == 1
    assert [cell.strip() for cell in header.split("|")[1:-1]] == [
        "4 images, same seeds",
        "pretrained",
        "tuned",
        "difference",
    ]
    assert [cell.strip() for cell in kl.split("|")[1:-1]] == ["path KL (nats)", "0", str(comparison.kl), ""]
    assert [cell.strip() for cell in scores.split("|")[2:4]] == [
        str(comparison.base("brightness")),
        str(comparison.tuned("brightness")),
    ]
    written = comparison.to_dict()
    assert written["images"] == 4 and written["seeds"] == [0, 1, 2, 3]
    assert written["path_kl"]["mean"] == comparison.kl.mean
    assert written["scores"]["brightness"]["tuned_values"] == comparison.tuned_scores["brightness"].tolist()


def test_the_policy_is_left_as_it_was():
    policy = make_policy(nudged=True)
    before = policy.rollout(["a"], [0]).images

    def broken(images, prompts, metadata):
        raise KeyError("x")

    with pytest.raises(RewardError, match="broken raised KeyError"):
        compare(policy, ["a"], [0], {"broken": broken}, 1)
    assert torch.equal(policy.rollout(["a"], [0]).images, before)


def test_path_kl_grows_with_the_adapter():
    policy = make_policy(nudged=False)
    values = []
    for _ in range(2):
        nudge(policy.networks, 0.1)
        values.append(path_kl_to_reference(policy, policy.rollout(["a"], [0])).item())
    assert 0 < values[0] < values[1]


def test_misuse_is_refused_in_words():
    policy = make_policy(nudged=False)
    with pytest.raises(ValueError, match="needs a prompt, a seed and a batch size, got 0, 1 and 1"):
        compare(policy, [], [0], {}, 1)
    with pytest.raises(ValueError, match="3 seeds, but only 2 different"):
        compare(policy, ["a"], [0, 1, 0], {}, 1)
    with pytest.raises(ValueError, match="1 prompts and 2 metadata"):
        compare(policy, ["a"], [0], {}, 1, metadata=[{}, {}])
