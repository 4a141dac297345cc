"""Weighted passes: how often each prompt is drawn, in which order, on how many processes."""

import json
import math
import random
from collections import Counter
from fractions import Fraction
from itertools import product

import datasets
import numpy as np
import pytest

from dpok_trl.prompts import prompt_source


# uneven, with a prompt that is never drawn and one that fills more than half of a pass
UNEVEN = [0.5, 1.0, 0.0, 7.25, 1.0, 0.1, 2.0]
PASSES = 400
# Over passes the count of a prompt is Bernoulli around its share; 5 standard errors, the largest variance being 1/4.
MEAN_TOLERANCE = 5 * 0.5 / math.sqrt(PASSES)


def weighted(weights, **options):
    pairs = [(f"p{row}", {"weight": weight, "row": row}) for row, weight in enumerate(weights)]
    return prompt_source(pairs, weight_column="weight", **options)


def passes_of(source, number, length):
    return [Counter(source.draw(length)[0]) for _ in range(number)]


@pytest.mark.parametrize("weights", [UNEVEN, [1, 2, 3], [5], [0, 0, 1e-300], [1e300, 1e-300], [3, 3, 3, 4]])
def test_counts_of_a_pass_are_the_share_rounded_down_or_up(weights):
    total = sum(Fraction(weight) for weight in weights)
    for counts in passes_of(weighted(weights, seed=5), 40, len(weights)):
        assert counts.total() == len(weights)
        for row, weight in enumerate(weights):
            share = len(weights) * Fraction(weight) / total  # exact, so that 2 is not 1.9999
            assert counts[f"p{row}"] in {math.floor(share), math.ceil(share)}


def test_the_mean_over_passes_is_the_share():
    passes = passes_of(weighted(UNEVEN, seed=1), PASSES, len(UNEVEN))
    for row, weight in enumerate(UNEVEN):
        mean = sum(counts[f"p{row}"] for counts in passes) / PASSES
        assert abs(mean - len(UNEVEN) * weight / sum(UNEVEN)) <= MEAN_TOLERANCE


def test_every_pass_has_an_offset_of_its_own():
    passes = passes_of(weighted([1, 2], seed=0), 60, 2)  # shares of 2/3 and 4/3
    assert {counts["p0"] for counts in passes} == {0, 1}


def test_a_weight_of_0_is_never_drawn():
    source = weighted([1.0, 0.0, 3.0, 0], seed=2)
    assert set(source.draw(4 * 50)[0]) == {"p0", "p2"}


@pytest.mark.parametrize("weight", [1, 0.1, 1 / 3, 7e-5, 2.5e8, np.float32(0.3), np.int64(2)])
@pytest.mark.parametrize("number", [1, 5, 49])
def test_equal_weights_are_no_weights_bit_for_bit(weight, number):
    weights = [weight] * number
    with_weights, without = weighted(weights, seed=9), prompt_source([f"p{row}" for row in range(number)], seed=9)
    assert with_weights.draw(6 * number)[0] == without.draw(6 * number)[0]


def test_the_order_is_what_it_was_before_there_were_weights():
    """The first two passes as random.Random shuffles them, seeded with the text "seed/pass"."""
    expected = []
    for pass_index in range(2):
        order = list(range(6))
        random.Random(f"3/{pass_index}").shuffle(order)
        expected += [f"p{row}" for row in order]
    assert prompt_source([f"p{row}" for row in range(6)], seed=3).draw(12)[0] == expected


def test_a_dataset_and_a_list_with_weights_are_alike_and_keep_their_columns():
    rows = [{"prompt": f"p{row}", "weight": weight, "row": row} for row, weight in enumerate(UNEVEN)]
    of_dataset = prompt_source(datasets.Dataset.from_list(rows), weight_column="weight", seed=4).draw(21)
    assert of_dataset == weighted(UNEVEN, seed=4).draw(21)
    assert all(
        entry == {"weight": UNEVEN[int(p[1:])], "row": int(p[1:])} for p, entry in zip(*of_dataset, strict=True)
    )
    formatted = datasets.Dataset.from_list(rows).with_format("numpy")
    assert prompt_source(formatted, weight_column="weight", seed=4).draw(21)[0] == of_dataset[0]


# --- ranks and groups -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, UNEVEN])
@pytest.mark.parametrize(("ranks", "group", "number"), list(product([1, 2, 3, 4], [1, 3], [1, 5, 7])))
def test_all_ranks_together_walk_the_passes_of_one(weights, ranks, group, number):
    """Each rank draws 2 groups at a time; 12 rounds of it are 24 * ranks groups, cut anywhere by the ends of the passes."""
    options = {} if weights is None else {"weight_column": "weight"}
    table = {"prompt": [f"p{row}" for row in range(number)], "weight": (weights or [1.0] * number)[:number]}
    dataset = datasets.Dataset.from_dict({**table, "row": list(range(number))})
    sources = [
        prompt_source(dataset, images_per_prompt=group, seed=11, process_index=rank, num_processes=ranks, **options)
        for rank in range(ranks)
    ]
    together = []
    for _ in range(12):
        for source in sources:
            prompts, metadata = source.draw(2 * group)
            for start in range(0, 2 * group, group):  # a group is one prompt, with one row of columns, on one rank
                assert len(set(prompts[start : start + group])) == 1
                assert all(entry["row"] == int(prompts[start][1:]) for entry in metadata[start : start + group])
                together.append(prompts[start])
    assert together == prompt_source(dataset, seed=11, **options).draw(24 * ranks)[0]
    for start in range(0, len(together) - number + 1, number):
        counts = Counter(together[start : start + number])
        if weights is None:
            assert sorted(counts) == sorted(table["prompt"]) and set(counts.values()) == {1}
        else:
            shares = [number * weight / sum(table["weight"]) for weight in table["weight"]]
            assert all(abs(counts[p] - share) < 1 for p, share in zip(table["prompt"], shares, strict=True))


def test_resume_by_the_position_alone_on_another_number_of_ranks():
    two = [weighted(UNEVEN, seed=6, process_index=rank, num_processes=2) for rank in range(2)]
    before = [prompt for source in two for prompt in source.draw(9)[0]]  # 18: in the middle of the third pass
    state = json.loads(json.dumps(two[1].state_dict()))
    assert state == {"position": 18, "num_prompts": len(UNEVEN), "seed": 6}
    three = [weighted(UNEVEN, seed=6, process_index=rank, num_processes=3) for rank in range(3)]
    for source in three:
        source.load_state_dict(state)
    after = [prompt for source in three for prompt in source.draw(5)[0]]
    assert before + after == weighted(UNEVEN, seed=6).draw(33)[0]


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (-0.5, ValueError, "row 1 of the weights 'weight' must be finite and at least 0; it is -0.5."),
        (math.nan, ValueError, "row 1 of the weights 'weight' must be finite and at least 0; it is nan."),
        (math.inf, ValueError, "row 1 of the weights 'weight' must be finite and at least 0; it is inf."),
        ("2", TypeError, "row 1 of the weights 'weight' must be a number; it is '2' of type str."),
        (None, TypeError, "row 1 of the weights 'weight' must be a number; it is None of type NoneType."),
        (True, TypeError, "row 1 of the weights 'weight' must be a number; it is True of type bool."),
    ],
)
def test_a_weight_that_is_none_is_named(weight, error, message):
    with pytest.raises(error) as raised:
        weighted([1.0, weight, 2.0])
    assert str(raised.value) == message


def test_weights_of_which_none_is_positive():
    with pytest.raises(ValueError, match="all 3 weights 'weight' are 0: no prompt could be drawn"):
        weighted([0.0, 0, 0.0])


def test_a_missing_weight_column_is_named():
    dataset = datasets.Dataset.from_dict({"prompt": ["a"], "share": [1.0]})
    with pytest.raises(ValueError, match=r"is 'weight', which is none of the prompts' columns: \['prompt', 'share'\]"):
        prompt_source(dataset, weight_column="weight")
    with pytest.raises(
        ValueError, match=r"the metadata of prompt 1 has \['share'\]. Write \(prompt, \{'weight': 1.0\}\)"
    ):
        prompt_source([("a", {"weight": 1}), ("b", {"share": 1})], weight_column="weight")
    with pytest.raises(ValueError, match=r"the metadata of prompt 0 has \[\]"):
        prompt_source("one prompt", weight_column="weight")
    with pytest.raises(ValueError, match="the metadata of prompt 0 is 5 of type int"):
        prompt_source([("a", 5)], weight_column="weight")
    with pytest.raises(ValueError, match="weight_column = 'weight' with a prompt function"):
        prompt_source(lambda: ("a", {}), weight_column="weight")
