import json
import random
import subprocess
import sys
from collections import Counter

import datasets
import numpy as np
import pytest

from dpok_trl.prompts import prompt_source


FIVE = ["zero", "one", "two", "three", "four"]


def draw_on_all(sources, num_samples):
    """What the processes get together, in the order of their ranks."""
    return [prompt for source in sources for prompt in source.draw(num_samples)[0]]


# --- lists ------------------------------------------------------------------------------------------------------------


def test_list_is_used_in_shuffled_passes():
    source = prompt_source(FIVE, seed=3)
    passes = [source.draw(5)[0] for _ in range(20)]
    assert all(sorted(one_pass) == sorted(FIVE) for one_pass in passes)
    assert len({tuple(one_pass) for one_pass in passes}) > 10  # shuffled anew each time


def test_draws_do_not_have_to_fit_the_passes():
    source, in_passes = prompt_source(FIVE, seed=3), prompt_source(FIVE, seed=3)
    pieces = [prompt for size in (3, 4, 1, 7, 5) for prompt in source.draw(size)[0]]
    assert pieces == [prompt for _ in range(4) for prompt in in_passes.draw(5)[0]]


@pytest.mark.parametrize("num_processes", [1, 2, 3, 4])
@pytest.mark.parametrize("images_per_prompt", [1, 2])
def test_every_prompt_once_per_pass_on_any_number_of_processes(num_processes, images_per_prompt):
    sources = [
        prompt_source(
            FIVE, images_per_prompt=images_per_prompt, seed=7, process_index=rank, num_processes=num_processes
        )
        for rank in range(num_processes)
    ]
    one_process = prompt_source(FIVE, seed=7)
    # 10 draws of 2 prompts per process are 4 * num_processes whole passes.
    together = [prompt for _ in range(10) for prompt in draw_on_all(sources, 2 * images_per_prompt)]
    alone = one_process.draw(20 * num_processes)[0]
    assert together == [prompt for prompt in alone for _ in range(images_per_prompt)]
    for start in range(0, 20 * num_processes, 5):
        assert sorted(alone[start : start + 5]) == sorted(FIVE)


def test_groups_stand_together():
    prompts, metadata = prompt_source([("a", {"n": 1}), ("b", {"n": 2})], images_per_prompt=3).draw(6)
    assert prompts[:3] in (["a"] * 3, ["b"] * 3)
    assert prompts[3:] == [{"a": "b", "b": "a"}[prompts[0]]] * 3
    assert [m["n"] for m in metadata] == [{"a": 1, "b": 2}[p] for p in prompts]


def test_seed_decides_the_order():
    def order(seed):
        return prompt_source(FIVE, seed=seed).draw(40)[0]

    assert order(0) == order(0) != order(1)


def test_order_is_independent_of_the_global_generator_and_leaves_it_alone():
    random.seed(1)
    before = random.getstate()
    first = prompt_source(FIVE).draw(15)[0]
    assert random.getstate() == before
    random.seed(2)
    assert prompt_source(FIVE).draw(15)[0] == first


def test_strings_pairs_and_the_empty_string():
    source = prompt_source(("plain", ("with", 5), ("as a list", None), ""))
    prompts, metadata = source.draw(4)
    assert dict(zip(prompts, metadata, strict=True)) == {"plain": {}, "with": 5, "as a list": None, "": {}}
    assert source.num_prompts == 4


def test_one_string_is_one_prompt():
    source = prompt_source("ab")
    assert source.draw(3) == (["ab"] * 3, [{}] * 3)
    assert source.num_prompts == 1


# --- functions --------------------------------------------------------------------------------------------------------


def test_function_is_called_once_per_group():
    calls = iter(range(100))
    source = prompt_source(lambda: (f"prompt {next(calls)}", {"any": "thing"}), images_per_prompt=2)
    assert source.draw(4) == (["prompt 0", "prompt 0", "prompt 1", "prompt 1"], [{"any": "thing"}] * 4)
    assert source.draw(2)[0] == ["prompt 2", "prompt 2"]
    assert source.num_prompts is None


def returns_a_string():
    return "ab"  # two letters: would unpack into a prompt and its metadata


def returns_three():
    return "a", {}, 1


def returns_nothing():
    return None


def returns_a_number():
    return 5, {}


@pytest.mark.parametrize(
    ("function", "given"),
    [
        (returns_a_string, "'ab' of type str"),
        (returns_three, "('a', {}, 1) of type tuple"),
        (returns_nothing, "None of type NoneType"),
        (returns_a_number, "(5, {}) of type tuple"),
    ],
)
def test_function_that_returns_something_else(function, given):
    with pytest.raises(TypeError) as error:
        prompt_source(function).draw(1)
    assert f"the prompt function {function.__name__} must return (prompt, metadata)" in str(error.value)
    assert given in str(error.value)


def test_error_inside_the_function_is_not_touched():
    def fails():
        raise KeyError("its own")

    with pytest.raises(KeyError, match="its own"):
        prompt_source(fails).draw(1)


# --- datasets ---------------------------------------------------------------------------------------------------------


def test_dataset_rows_with_their_other_columns():
    rows = [{"prompt": f"p{i}", "count": i, "label": str(i)} for i in range(4)]
    source = prompt_source(datasets.Dataset.from_list(rows), images_per_prompt=2)
    prompts, metadata = source.draw(8)
    assert Counter(prompts) == {f"p{i}": 2 for i in range(4)}
    assert metadata == [{"count": int(p[1:]), "label": p[1:]} for p in prompts]


def test_dataset_and_list_have_the_same_order():
    dataset = datasets.Dataset.from_dict({"prompt": FIVE})
    assert prompt_source(dataset, seed=2).draw(15) == prompt_source(FIVE, seed=2).draw(15)


def test_format_of_the_dataset_is_for_the_metadata_alone():
    dataset = datasets.Dataset.from_dict({"prompt": ["a"], "count": [1]}).with_format("numpy")
    [prompt], [metadata] = prompt_source(dataset).draw(1)
    assert type(prompt) is str  # and not numpy.str_
    assert isinstance(metadata["count"], np.int64)


def test_dataset_errors():
    with pytest.raises(ValueError, match=r"no column \"prompt\"; its columns are \['caption', 'id'\]"):
        prompt_source(datasets.Dataset.from_dict({"caption": ["a"], "id": [1]}))
    with pytest.raises(ValueError, match="dataset of prompts is empty"):
        prompt_source(datasets.Dataset.from_dict({"prompt": []}))
    with pytest.raises(
        TypeError, match=r"row 1 of the column \"prompt\" must be a string; it is None of type NoneType"
    ):
        prompt_source(datasets.Dataset.from_dict({"prompt": ["a", None]}))
    with pytest.raises(TypeError, match=r"row 0 .* it is 3 of type int"):
        prompt_source(datasets.Dataset.from_dict({"prompt": [3]}))
    both = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"prompt": ["a"]})})
    with pytest.raises(TypeError, match=r"the splits \['train'\]: pass one of them, e.g. dataset\['train'\]"):
        prompt_source(both)


def test_lists_need_neither_datasets_nor_torch():
    code = (
        "import sys; from dpok_trl.prompts import prompt_source; prompt_source(['a', 'b']).draw(2);"
        "assert not {'datasets', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_samples", "images_per_prompt", "nearest"), [(10, 4, "8 and 12"), (3, 4, "4"), (0, 2, "2"), (7, 2, "6 and 8")]
)
def test_groups_that_do_not_fit(num_samples, images_per_prompt, nearest):
    source = prompt_source(FIVE, images_per_prompt=images_per_prompt)
    with pytest.raises(ValueError) as error:
        source.draw(num_samples)
    assert str(error.value) == (
        f"num_samples={num_samples} images cannot be split into groups of images_per_prompt={images_per_prompt}: "
        f"the nearest that can: {nearest}."
    )
    assert source.state_dict()["position"] == 0  # a refused draw uses nothing up


@pytest.mark.parametrize("empty", [[], ()])
def test_empty_list(empty):
    with pytest.raises(ValueError, match="empty list: give at least one prompt"):
        prompt_source(empty)


@pytest.mark.parametrize(
    ("item", "given"),
    [
        (7, "7 of type int"),
        (None, "None of type NoneType"),
        (("a", 1, 2), "('a', 1, 2) of type tuple"),
        ((1, "a"), "(1, 'a') of type tuple"),
        ({"prompt": "a"}, "{'prompt': 'a'} of type dict"),
    ],
)
def test_entry_that_is_no_prompt(item, given):
    with pytest.raises(TypeError) as error:
        prompt_source(["fine", item])
    assert f"entry 1 of the prompts must be a string or a (prompt, metadata) pair; it is {given}." in str(error.value)


@pytest.mark.parametrize("thing", [5, None, {"a": 1}, b"bytes"])
def test_something_that_is_no_source_at_all(thing):
    with pytest.raises(TypeError, match="prompt_function must be a function that takes nothing .* got .* of type"):
        prompt_source(thing)


def test_long_values_are_shortened_in_messages():
    with pytest.raises(TypeError) as error:
        prompt_source([("a", "b", "c" * 1000)])
    assert len(str(error.value)) < 300


def test_options_are_checked():
    with pytest.raises(ValueError, match="images_per_prompt must be at least 1, got 0"):
        prompt_source(FIVE, images_per_prompt=0)
    with pytest.raises(ValueError, match="process_index=2 of num_processes=2"):
        prompt_source(FIVE, process_index=2, num_processes=2)


# --- resume -----------------------------------------------------------------------------------------------------------


def test_resume_is_exact_and_the_state_is_json():
    source = prompt_source(FIVE, seed=1)
    source.draw(7)
    state = json.loads(json.dumps(source.state_dict()))
    rest = [source.draw(4) for _ in range(6)]
    resumed = prompt_source(FIVE, seed=1)
    resumed.load_state_dict(state)
    assert [resumed.draw(4) for _ in range(6)] == rest


def test_resume_on_another_number_of_processes_goes_on_in_the_same_order():
    two = [prompt_source(FIVE, process_index=rank, num_processes=2) for rank in range(2)]
    before = draw_on_all(two, 3)
    assert two[0].state_dict() == two[1].state_dict()
    one = prompt_source(FIVE)
    one.load_state_dict(two[0].state_dict())
    assert before + one.draw(9)[0] == prompt_source(FIVE).draw(15)[0]


def test_resume_of_a_function_that_draws_from_random():
    def draw_one():
        return random.choice(FIVE), {}

    random.seed(0)
    source = prompt_source(draw_one)
    source.draw(5)
    state, generator = source.state_dict(), random.getstate()
    rest = source.draw(10)
    resumed = prompt_source(draw_one)
    random.setstate(generator)
    resumed.load_state_dict(state)  # makes no call of its own, so the restored generator is where it was
    assert resumed.draw(10) == rest


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (prompt_source(FIVE[:4], seed=1), "num_prompts=5, this run has num_prompts=4"),
        (prompt_source(FIVE, seed=2), "seed=1, this run has seed=2"),
        (prompt_source(lambda: ("a", {}), seed=1), "num_prompts=5, this run has num_prompts=None"),
    ],
)
def test_resume_with_other_prompts_is_refused(source, message):
    with pytest.raises(ValueError, match=f"the checkpoint was made with {message}"):
        source.load_state_dict(prompt_source(FIVE, seed=1).state_dict())
