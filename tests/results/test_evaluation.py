import json
import math
from contextlib import contextmanager
from itertools import combinations
from statistics import fmean, stdev

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import STEPS, nudge, stable_diffusion, with_adapter

from dpok_trl.policy.policy import Policy
from dpok_trl.results.drawing import EvaluationSampler, path_kl
from dpok_trl.results.evaluation import evaluate
from dpok_trl.results.evaluation_files import sample_rows
from dpok_trl.results.prompt_sets import read_prompt_sets, refuse_wrong_sets
from dpok_trl.rewards.base import RewardError
from dpok_trl.rewards.combining import RewardSet


# The KL by hand, from the means in float64, against the closed form in float32.
FLOAT32_TOLERANCE = 1e-5


def make_policy(nudged: bool, **kwargs) -> Policy:
    pipe = with_adapter(stable_diffusion(), nudged=nudged)
    return Policy(pipe, call_kwargs={"num_inference_steps": STEPS, "guidance_scale": 1.0}, **kwargs)


def brightness(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3)), {}


def length(images, prompts, metadata):
    return [float(len(prompt)) for prompt in prompts]


def nothing_for_cats(images, prompts):
    """Fails for the second image of each call, and does not apply to cats."""
    return [None if "cat" in prompt else math.nan if row == 1 else 1.0 for row, prompt in enumerate(prompts)]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_an_adapter_at_its_start_is_the_pretrained_model():
    evaluation = evaluate(
        make_policy(nudged=False), ["ab", "abcd"], {"brightness": brightness, "length": length}, images_per_prompt=3
    )
    (comparison,) = evaluation.sets.values()
    assert torch.equal(comparison.tuned.path_kl, torch.zeros(6))
    assert torch.equal(comparison.tuned.pictures, comparison.base.pictures)
    assert comparison.prompts == ["ab"] * 3 + ["abcd"] * 3
    assert comparison.seeds == [0, 1, 2, 3, 4, 5]
    difference = comparison.difference("brightness")
    assert (difference.mean, difference.standard_error) == (0.0, 0.0)
    assert comparison.tuned.scores["length"].tolist() == [2, 2, 2, 4, 4, 4]
    assert comparison.tuned_reward("length").mean == 3.0
    assert comparison.diversity()[2].mean == 0.0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_path_kl_is_the_hand_computed_sum_in_nats(reduction):
    policy = make_policy(nudged=True, log_prob_reduction=reduction)
    comparison = evaluate(policy, ["a"], images_per_prompt=2, batch_size=2).sets["prompts"]
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
    torch.testing.assert_close(comparison.tuned.path_kl.double(), expected, rtol=FLOAT32_TOLERANCE, atol=0)
    assert comparison.kl.mean == pytest.approx(comparison.tuned.path_kl.double().mean().item(), rel=1e-12)
    assert torch.equal(comparison.tuned.pictures, (trajectory.images * 255).round().to(torch.uint8))
    assert not torch.equal(comparison.tuned.pictures, comparison.base.pictures)


def test_pretrained_is_pretrained_even_where_the_reference_has_moved():
    policy = make_policy(nudged=True)
    before = evaluate(policy, ["a"], brightness, images_per_prompt=2).sets["prompts"]
    policy.tuned.move_reference()
    after = evaluate(policy, ["a"], brightness, images_per_prompt=2).sets["prompts"]
    assert torch.equal(after.base.scores["brightness"], before.base.scores["brightness"])
    assert torch.equal(after.tuned.path_kl, before.tuned.path_kl) and (after.tuned.path_kl > 0).all()


def test_both_models_are_the_pipeline_itself_with_the_same_seeds():
    policy = make_policy(nudged=True)
    comparison = evaluate(policy, ["a", "b"], brightness, images_per_prompt=2, batch_size=4, seed=7).sets["prompts"]
    prompts, seeds = ["a", "a", "b", "b"], [7, 8, 9, 10]
    assert (comparison.prompts, comparison.seeds) == (prompts, seeds)
    tuned = policy.rollout(prompts, seeds).images
    policy.pipe.unet.disable_adapters()
    base = policy.rollout(prompts, seeds).images
    assert torch.equal(comparison.tuned.scores["brightness"], tuned.mean((1, 2, 3)))
    assert torch.equal(comparison.base.scores["brightness"], base.mean((1, 2, 3)))


def test_sets_categories_and_held_out_rewards_are_told_apart():
    policy = make_policy(nudged=True)
    held_out = datasets.Dataset.from_list(
        [{"prompt": "b", "kind": "x"}, {"prompt": "cc", "kind": "y"}, {"prompt": "ddd", "kind": "x"}]
    )
    evaluation = evaluate(
        policy,
        {"training": [("a", {"seen": True})], "held-out": held_out},
        brightness,
        held_out_rewards={"letters": length},
        images_per_prompt=2,
        category_column="kind",
    )
    assert list(evaluation.sets) == ["training", "held-out"]
    comparison = evaluation.sets["held-out"]
    assert comparison.rewards == ["brightness", "letters"] and comparison.held_out == ("letters",)
    assert comparison.category_names == ["x", "y"] and evaluation.sets["training"].category_names == []
    assert [comparison.tuned_reward("letters", kind).mean for kind in ("x", "y")] == [2.0, 2.0]
    assert comparison.tuned_reward("letters", "x").images == 4
    scores = comparison.tuned.scores["brightness"].double().reshape(3, 2)
    assert comparison.tuned_reward("brightness", "x").mean == pytest.approx(scores[[0, 2]].mean().item(), rel=1e-12)
    labels = [cells(line)[0] for line in evaluation.table().splitlines() if line.startswith("|")]
    start = labels.index("held-out: 3 prompts × 2, same seeds")
    assert labels[start + 2 : start + 10] == [
        "brightness", "– x", "– y", "letters (held out)", "– x", "– y", "path KL (nats)", "diversity",
    ]  # fmt: skip
    metrics = evaluation.metrics()
    assert {name for name in metrics if name.startswith("eval/held-out/")} == {
        *(f"eval/held-out/{reward}/{part}" for reward in ("brightness", "letters") for part in ("base", "tuned", "difference")),
        "eval/held-out/kl",
        "eval/held-out/diversity",
    }  # fmt: skip
    assert metrics["eval/held-out/letters/tuned"] == 2.0
    assert metrics["eval/held-out/kl"] == comparison.kl.mean


def test_differences_are_paired_and_clustered_by_prompt():
    comparison = evaluate(make_policy(nudged=True), ["a", "bb", "c"], brightness, images_per_prompt=2).sets["prompts"]
    paired = (comparison.tuned.scores["brightness"].double() - comparison.base.scores["brightness"].double()).reshape(
        3, 2
    )
    means = paired.mean(1)
    images = paired.var(1) / 2  # of each prompt's mean
    expected = max(means.std().item() / math.sqrt(3), math.sqrt(images.sum().item()) / 3)
    difference = comparison.difference("brightness")
    assert difference.mean == pytest.approx(means.mean().item(), rel=1e-9)
    assert difference.standard_error == pytest.approx(expected, rel=1e-9)


def test_rewards_that_fail_are_counted_and_left_out_pairwise():
    policy = make_policy(nudged=True)

    def fails_for_a_tuned_one(images, prompts, metadata):
        rewards = images.mean((1, 2, 3))
        if calls.pop():
            rewards[0] = math.inf
        return rewards

    calls = [False, True]  # the tuned images are judged first
    comparison = evaluate(policy, ["a"], {"x": fails_for_a_tuned_one}, images_per_prompt=4).sets["prompts"]
    assert comparison.tuned.failed == {"x": 1} and comparison.base.failed == {"x": 0}
    assert comparison.tuned.scores["x"].isnan().tolist() == [True, False, False, False]
    for found in (comparison.base_reward("x"), comparison.tuned_reward("x"), comparison.difference("x")):
        assert found.images == 3
    assert comparison.base_reward("x").mean == pytest.approx(
        comparison.base.scores["x"][1:].double().mean().item(), rel=1e-12
    )
    assert comparison.largest_n("x") == 3


def test_what_does_not_apply_is_no_failure_and_nothing_is_no_zero():
    evaluation = evaluate(
        make_policy(nudged=False), ["a cat", "a dog"], {"x": nothing_for_cats}, images_per_prompt=2, batch_size=2
    )
    comparison = evaluation.sets["prompts"]
    assert comparison.tuned.failed == comparison.base.failed == {"x": 1}
    assert (comparison.tuned_reward("x").mean, comparison.tuned_reward("x").prompts) == (1.0, 1)
    assert "x is not finite for 1 of the 4 pretrained and 1 of the tuned images" in evaluation.table()
    only_cats = evaluate(make_policy(nudged=False), ["a cat"], {"x": nothing_for_cats})
    row = next(line for line in only_cats.table().splitlines() if line.startswith("| x"))
    assert cells(row) == ["x", "–", "–", "–", "0"]
    assert not [name for name in only_cats.metrics() if "/x/" in name]
    assert only_cats.to_dict()["sets"]["prompts"]["rewards"]["x"]["tuned"]["mean"] is None


def test_a_reward_of_groups_sees_the_whole_group_whatever_the_batch():
    class Group:
        wants_groups = True
        seen = []  # noqa: RUF012

        def __call__(self, images, prompts):
            self.seen.append((len(images), set(prompts)))
            return [0.0] * len(images)

    evaluate(make_policy(nudged=False), ["a", "b"], [Group(), brightness], images_per_prompt=3, batch_size=2)
    assert Group.seen == [(3, {"a"}), (3, {"b"})] * 2


def test_diversity_and_best_of_the_pretrained_model():
    policy = make_policy(nudged=True)
    comparison = evaluate(
        policy, ["a"], brightness, images_per_prompt=5, features=lambda pictures: torch.tensor([[float(np.mean(p))] for p in pictures])
    ).sets["prompts"]  # fmt: skip
    for drawn, found in zip((comparison.base, comparison.tuned), comparison.diversity()[:2], strict=True):
        means = drawn.pictures.double().mean((1, 2, 3))
        distances = (means[:, None] - means).abs().sum() / 20
        assert found.mean == pytest.approx(distances.item(), rel=FLOAT32_TOLERANCE)
    ordered = comparison.base.scores["brightness"].double().sort().values
    # C(i-1, 1) / C(5, 2) and C(i-1, 3) / C(5, 4)
    assert comparison.best_of("brightness", 2).mean == pytest.approx(
        (ordered @ torch.arange(5.0).double()).item() / 10, rel=1e-12
    )
    assert comparison.best_of("brightness", 4).mean == pytest.approx(
        (ordered[3] + 4 * ordered[4]).item() / 5, rel=1e-12
    )


@pytest.mark.parametrize(
    ("tuned", "n", "words"),
    [
        ([0.0, 1.0, 2.0, 3.0], None, "not distinguishable from one image"),  # the very same
        ([0.0, 1.0, 2.0, 3.2], 1.06, "not distinguishable from one image"),
        ([-9.0, -8.0, -7.0, -6.0], None, "less than one image"),
        ([9.0, 9.0, 9.0, 9.0], None, "more than the best of 3"),
    ],
)
def test_how_many_images_the_tuned_model_is_worth(tuned, n, words):
    def scored(images, prompts, metadata):
        return torch.arange(4.0) if calls.pop() == "base" else torch.tensor(tuned)

    calls = ["base", "tuned"]  # from the end
    evaluation = evaluate(make_policy(nudged=False), ["a"], {"x": scored})
    found = evaluation.sets["prompts"].equivalent_n("x")
    if n is not None:  # of 0, 1, 2, 3 the best of one is 1.5 and the best of two (1 + 2 * 2 + 3 * 3) / 6 = 2.33
        assert found.n == pytest.approx(1 + (n - 1), rel=1e-6)
    row = [line for line in evaluation.table().splitlines() if line.startswith("| x")][1]
    assert cells(row)[1] == words and cells(row)[2].startswith("2.333 ± ")
    assert evaluation.to_dict()["sets"]["prompts"]["rewards"]["x"]["equivalent_n"]["words"] == words


def test_what_is_always_right_is_worth_more_than_the_luck_of_a_few_images():
    base = torch.tensor([0.0, 1.0] * 8) * 0.7

    def scored(images, prompts, metadata):
        return base if calls.pop() == "base" else torch.full((16,), 0.7)

    calls = ["base", "tuned"]
    evaluation = evaluate(make_policy(nudged=False), ["a"], {"x": scored}, images_per_prompt=16, batch_size=16)
    # of 16 images 8 are wrong, so 9 have a right one among them; of other 16 it may be more
    found = evaluation.sets["prompts"].equivalent_n("x")
    assert found.n == pytest.approx(9.0, rel=1e-6) and math.isnan(found.high)
    assert str(found).endswith(" to more than 15)")


def test_the_range_has_the_errors_of_both_models():
    base, tuned = torch.arange(8.0), torch.tensor([5.0, 5.5, 4.5, 5.0, 4.0, 5.2, 4.8, 5.0])

    def scored(images, prompts, metadata):
        return base if calls.pop() == "base" else tuned

    def difference(rows, n):
        return tuned[rows].mean().item() - fmean(max(some) for some in combinations(base[rows].tolist(), n))

    calls = ["base", "tuned"]
    evaluation = evaluate(make_policy(nudged=False), ["a"], {"x": scored}, images_per_prompt=8, batch_size=8)
    found = evaluation.sets["prompts"].equivalent_n("x")
    numbers, means, errors = range(1, 8), [], []
    for n in numbers:
        without = [difference([row for row in range(8) if row != left], n) for left in range(8)]
        means.append(difference(list(range(8)), n))
        errors.append(stdev(without) * 7 / math.sqrt(8))
    for share, at in ((-1, found.low), (0, found.n), (1, found.high)):
        falling = [mean + share * error for mean, error in zip(means, errors, strict=True)]
        assert falling == sorted(falling, reverse=True) and falling[0] > 0 > falling[-1]
        assert at == pytest.approx(np.interp(0, np.negative(falling), numbers), rel=1e-6)
    assert 1 < found.low < found.n < found.high < 7


def test_one_image_per_prompt_has_no_diversity_and_says_so():
    evaluation = evaluate(make_policy(nudged=True), ["a", "b"], brightness, images_per_prompt=1)
    table = evaluation.table()
    assert "One image per prompt: there is no diversity" in table
    assert "| diversity" not in table and "best of |" not in table
    assert evaluation.to_dict()["sets"]["prompts"]["diversity"] is None
    assert "eval/prompts/diversity" not in evaluation.metrics()
    with pytest.raises(ValueError, match="there is 1 of each"):
        evaluation.sets["prompts"].diversity()


def test_the_files_say_what_was_evaluated(tmp_path):
    policy = make_policy(nudged=True)
    policy.pipe.register_to_config(_name_or_path="/home/somebody/models/base")
    evaluation = evaluate(policy, {"one": ["a"], "two": ["b", "c"]}, brightness, images_per_prompt=2, seed=5)
    assert evaluation.about["base"] == "base" and evaluation.about["versions"]["torch"] == torch.__version__
    evaluation.save(tmp_path)
    lines = (tmp_path / "evaluation.md").read_text().split("\n\n")[1].splitlines()
    rows = dict(line.removeprefix("* ").split(": ") for line in lines)
    assert rows["compared with"] == "base" and rows["seeds"] == "one 5–6, two 5–8"
    assert (rows["num_inference_steps"], rows["guidance_scale"]) == (str(STEPS), "1.0")
    assert f"torch {torch.__version__}" in rows["versions"] and rows["date"].endswith(" UTC")
    assert json.loads((tmp_path / "evaluation.json").read_text())["about"] == evaluation.about
    assert "/home" not in (tmp_path / "evaluation.md").read_text() + (tmp_path / "evaluation.json").read_text()


def test_the_rewards_of_a_set_are_asked_together_for_as_many_images_as_may_wait(monkeypatch):
    asked = []

    def scored(images, prompts, metadata):
        asked.append(len(images))
        return torch.zeros(len(images))

    def entries(waiting_bytes):
        monkeypatch.setattr("dpok_trl.results.drawing.WAITING_BYTES", waiting_bytes)
        entered = []

        @contextmanager
        def scoring(rewards):
            entered.append(list(rewards.names))
            yield
            assert asked

        policy, sets = make_policy(nudged=False), read_prompt_sets(["a", "b"])
        rewards = [RewardSet({"one": scored}), RewardSet({"two": brightness})]
        sampler = EvaluationSampler(policy, rewards, images_per_prompt=2, batch_size=1, scoring=scoring)
        samples = sampler.sample(sets[0], pretrained=True)
        return entered, samples.scores["two"]

    together, first = entries(2**30)
    apart, second = entries(1)
    assert together == [["one"], ["two"]] and apart == [["one"], ["two"]] * 4
    assert torch.equal(first, second) and asked == [1] * 8


def test_the_files(tmp_path):
    evaluation = evaluate(make_policy(nudged=True), {"one": ["a"], "two": ["b", "c"]}, brightness, images_per_prompt=2)
    assert evaluation.save(tmp_path / "new") == tmp_path / "new"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "evaluation.json",
        "evaluation.md",
        "grid.png",
        "samples",
    ]
    written = json.loads((tmp_path / "new" / "evaluation.json").read_text())
    comparison = evaluation.sets["two"]
    assert written["call"]["num_inference_steps"] == STEPS
    two = written["sets"]["two"]
    assert (two["images"], two["seeds"]) == (4, [0, 1, 2, 3])
    assert two["path_kl"]["mean"] == comparison.kl.mean
    assert two["rewards"]["brightness"]["tuned_values"] == comparison.tuned.scores["brightness"].tolist()
    assert (
        two["rewards"]["brightness"]["difference"]["standard_error"]
        == comparison.difference("brightness").standard_error
    )
    assert evaluation.table() in (tmp_path / "new" / "evaluation.md").read_text()
    assert two["samples"] == {f"samples/two-{row:04d}.png": row for row in range(4)}
    for row in range(4):
        picture = np.asarray(Image.open(tmp_path / "new" / f"samples/two-{row:04d}.png"))
        assert np.array_equal(picture, comparison.tuned.pictures[row].permute(1, 2, 0).numpy())
    table = evaluation.table().split("\n\n")[0].splitlines()
    assert len({len(line) for line in table}) == 1  # aligned
    assert cells(table[0]) == ["one: 1 prompt × 2, same seeds", "pretrained", "tuned", "difference", "n"]


def test_the_single_pictures_are_of_different_prompts_first():
    five = evaluate(make_policy(nudged=True), ["a", "b", "c", "d", "e"], brightness, images_per_prompt=2)
    two = evaluate(make_policy(nudged=True), ["a", "b"], brightness, images_per_prompt=3)
    assert sample_rows(five.sets["prompts"]) == [0, 2, 4, 6]
    assert sample_rows(two.sets["prompts"]) == [0, 1, 2, 3]


def test_the_grid_has_the_pretrained_picture_over_the_tuned_one(tmp_path):
    evaluation = evaluate(make_policy(nudged=True), {"one": ["a"], "two": ["b", "c"]}, brightness, images_per_prompt=2)
    for comparison in evaluation.sets.values():
        comparison.base.pictures[:] = torch.tensor([255, 0, 0])[:, None, None]
        comparison.tuned.pictures[:] = torch.tensor([0, 0, 255])[:, None, None]
    evaluation.save(tmp_path)
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    column = pixels[:, -60].tolist()  # through the last pair
    colours = ["red" if pixel == [255, 0, 0] else "blue" if pixel == [0, 0, 255] else None for pixel in column]
    runs = [name for index, name in enumerate(colours) if name and colours[index - 1] != name]
    assert [colours.count("red"), colours.count("blue")] == [128, 128]  # the first set has fewer columns
    assert runs == ["red", "blue"]
    first = pixels[:, 150].tolist()
    assert [first.count([255, 0, 0]), first.count([0, 0, 255])] == [256, 256]


def test_the_policy_is_left_as_it_was():
    policy = make_policy(nudged=True)
    before = policy.rollout(["a"], [0]).images

    def broken(images, prompts, metadata):
        raise KeyError("x")

    with pytest.raises(RewardError, match="broken raised KeyError"):
        evaluate(policy, ["a"], broken)
    assert torch.equal(policy.rollout(["a"], [0]).images, before)


def test_path_kl_grows_with_the_adapter():
    policy = make_policy(nudged=False)
    values = []
    for _ in range(2):
        nudge(policy.networks, 0.1)
        values.append(path_kl(policy, policy.rollout(["a"], [0])).item())
    assert 0 < values[0] < values[1]


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "the prompts of the set 'prompts': .*empty list"),
        ({"a": ["x"], "b": []}, {}, "the prompts of the set 'b': .*empty list"),
        ({}, {}, "no prompts to evaluate on"),
        ({"a/b": ["x"]}, {}, "'a/b' cannot be the name of a set"),
        (["x", "y", "x"], {}, "'x' stands 2 times in the set 'prompts' .1 prompts"),
        (["x"], {"images_per_prompt": 0}, "images_per_prompt = 0, but an evaluation needs a whole number of at least 1"),
        (["x"], {"batch_size": 0}, "batch_size = 0"),
        (["x"], {"images_per_prompt": "4"}, "images_per_prompt = '4', but an evaluation needs a whole number of at least 1"),
        (["x"], {"rewards": brightness, "held_out_rewards": brightness}, "brightness is trained on and among the held-out"),
        ([("x", {"kind": 1}), "y"], {"category_column": "kind"}, "1 of the 2 prompts of the set 'prompts' have a 'kind'"),
        ([("x", {"kind": 1}), "y"], {"call_columns": ["kind"]}, "comes without kind, which the pipeline's call is to get"),
    ],
)  # fmt: skip
def test_misuse_is_refused_in_words(prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate(make_policy(nudged=False), prompts, **settings)


@pytest.mark.parametrize("given", [stable_diffusion, lambda: torch.nn.Linear(1, 1)])
def test_what_is_no_policy_is_told_how_to_become_one(given):
    with pytest.raises(
        TypeError, match=r"needs a Policy, and this is a (StableDiffusionPipeline|Linear).*Policy\(pipe, call_kwargs="
    ):
        evaluate(given(), ["x"])


def test_a_function_is_no_set_of_prompts():
    with pytest.raises(TypeError, match="the set 'prompts' is a function"):
        read_prompt_sets(lambda: ("x", {}))


def test_held_out_prompts_are_not_trained_on():
    sets = read_prompt_sets({"training": ["a", "b"], "Held_Out": ["c", "b", "d"]})
    refuse_wrong_sets(sets, ["a", "e"])
    with pytest.raises(ValueError, match="1 of the 3 prompts of the set 'Held_Out' are trained on: 'b'"):
        refuse_wrong_sets(sets, ["a", "b"])


def test_blanks_and_capitals_make_no_other_prompt():
    sets = read_prompt_sets({"held-out": ["A green  triangle ", "a red triangle"]})
    with pytest.raises(
        ValueError, match="1 of the 2 prompts of the set 'held-out' are trained on: 'A green  triangle '"
    ):
        refuse_wrong_sets(sets, ["a green triangle"])


def test_training_prompts_are_trained_on():
    sets = read_prompt_sets({"training": ["a", "b"]})
    refuse_wrong_sets(sets, ["B ", "c"])
    with pytest.raises(
        ValueError, match="no prompt of the set 'training' is trained on: it holds 'a', 'b', and the training 'c'"
    ):
        refuse_wrong_sets(sets, ["c"])


def test_prompts_are_pairs_in_their_order():
    dataset = datasets.Dataset.from_list([{"prompt": "b", "kind": 1}, {"prompt": "a", "kind": 2}])
    for given in (dataset, [("b", {"kind": 1}), ("a", {"kind": 2})]):
        (one,) = read_prompt_sets(given)
        assert (one.prompts, one.metadata) == (("b", "a"), ({"kind": 1}, {"kind": 2}))


def test_the_same_prompt_with_other_metadata_is_another_entry():
    (one,) = read_prompt_sets([("a", {"picture": 1}), ("a", {"picture": 2})])
    assert one.prompts == ("a", "a") and len(one) == 2
