"""Where the batch lies in what `encode_prompt` returns, and that each prompt is encoded once."""

import pytest
import torch
from walks import log_probs, pipeline, policy_of

from dpok_trl.policy.memo import LIST, NOTHING, PromptMemo, batch_axes, select_rows


OTHER_BATCH_SHAPE = 1e-5  # mean-reduced log-probability, fp32: kernels round differently at another batch shape


class Encoder:
    """Returns what the families return between them: batch first, batch second, a list, no batch, nothing."""

    def __init__(self, padded: bool = False):
        self.calls: list[list[str]] = []
        self.padded = padded

    def encode_prompt(self, prompt, device=None, negative_prompt=None, num_images_per_prompt=1):
        self.calls.append(prompt)
        length = max(len(p) for p in prompt) if self.padded else 5
        values = torch.tensor([[float(len(p))] for p in prompt])
        first = values[:, :, None].expand(-1, length, 3).clone()
        layers = values[None].expand(4, -1, 3).clone()
        return first, layers, [torch.full((len(p),), 1.0) for p in prompt], torch.zeros(5, 3), None


def test_batch_axes_are_measured():
    encode = Encoder().encode_prompt
    assert batch_axes(encode(["a"]), encode(["a", "a"])) == (0, 1, LIST, None, NOTHING)


def test_rows_are_selected_in_any_order_and_repeated():
    encode = Encoder().encode_prompt
    output = encode(["a", "bbb", "cc"])
    first, layers, listed, positions, nothing = select_rows(output, (0, 1, LIST, None, NOTHING), [2, 0, 2])
    assert first[:, 0, 0].tolist() == [2, 1, 2] and layers[0, :, 0].tolist() == [2, 1, 2]
    assert [len(entry) for entry in listed] == [2, 1, 2]
    assert positions is output[3] and nothing is None


def test_each_prompt_is_encoded_once_and_a_replay_not_at_all():
    encoder = Encoder()
    memo = PromptMemo(encoder.encode_prompt)
    memo((["a", "bb", "a", "a"],), {})
    assert encoder.calls == [["a"], ["a", "a"], ["a", "bb"]]  # two to measure the batch, one for the distinct prompts
    memo((["a", "a", "bb"],), {})
    assert len(encoder.calls) == 3  # the same distinct prompts
    output, record = memo((), {"prompt": ["ccc", "bb"]})
    assert encoder.calls[3:] == [["ccc", "bb"]]  # in other company a prompt may be padded to another length
    assert output[0][:, 0, 0].tolist() == [3, 2] and output[1][0, :, 0].tolist() == [3, 2]
    assert record.select([1, 1])[0][:, 0, 0].tolist() == [2, 2]
    assert [len(entry) for entry in record.select([1])[2]] == [2]
    assert len(encoder.calls) == 4


def test_what_is_given_does_not_depend_on_what_was_encoded_before():
    encoder = Encoder(padded=True)
    memo = PromptMemo(encoder.encode_prompt)
    for prompts in (["a"], ["a", "dddd"], ["a"]):
        output, _ = memo((prompts,), {})
        assert torch.equal(output[0], Encoder(padded=True).encode_prompt(prompts)[0])


def test_lists_of_words_that_are_no_prompts_are_plain_arguments():
    """Sana hands a list of instructions over, as long as some batches."""
    calls = []

    def encode_prompt(prompt, instruction=None):
        calls.append((prompt, instruction))
        return (torch.tensor([[float(len(p))] for p in prompt]),)

    memo = PromptMemo(encode_prompt)
    output, record = memo((["a", "bb"],), {"instruction": ["be", "kind"]})
    assert output[0].flatten().tolist() == [1, 2] and record is not None
    assert [instruction for _, instruction in calls] == [["be", "kind"]] * 3


def test_a_row_count_that_equals_another_dimension_does_not_confuse():
    """Three prompts and (5, 3) positions without a batch: guessing from sizes would cut the positions."""
    memo = PromptMemo(Encoder().encode_prompt)
    output, _ = memo((["a", "bb", "a"],), {})
    assert output[3].shape == (5, 3) and output[0].shape == (3, 5, 3)


def test_other_arguments_are_part_of_the_key():
    encoder = Encoder()
    memo = PromptMemo(encoder.encode_prompt)
    memo((["a"],), {"negative_prompt": ["x"]})
    memo((["a"],), {"negative_prompt": ["y"]})
    assert len(encoder.calls) == 4  # measured once; ("a", "x") and ("a", "y") are different rows


def test_ready_made_embeddings_are_passed_on():
    encoder = Encoder()
    memo = PromptMemo(encoder.encode_prompt)
    _, record = memo((["a"],), {"device": torch.zeros(1)})
    assert record is None and encoder.calls == [["a"]]


def test_lists_are_fresh_every_time():
    """Some pipelines write into the lists they get."""
    memo = PromptMemo(Encoder().encode_prompt)
    output, record = memo((["a", "bb"],), {})
    output[2].clear()
    assert len(record.select(None)[2]) == 2


# ---------------------------------------------------------------- a mask where prompts differ in length, else nothing


class MaskingEncoder:
    """As Qwen-Image's: a mask only where some prompt is shorter than the longest."""

    def __init__(self):
        self.calls: list[list[str]] = []

    def encode_prompt(self, prompt, device=None):
        self.calls.append(prompt)
        lengths = torch.tensor([len(p) for p in prompt])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        return lengths[:, None, None] * mask[:, :, None].float(), None if mask.all() else mask


EQUAL, UNEQUAL = ["aa", "bb"], ["a", "bbb", "cc"]


@pytest.mark.parametrize("order", [[EQUAL, UNEQUAL], [UNEQUAL, EQUAL]], ids=["equal first", "unequal first"])
def test_a_mask_is_there_where_the_pipeline_makes_one(order):
    memo = PromptMemo(MaskingEncoder().encode_prompt)
    for prompts in [*order, *order]:
        prompts = [*prompts, prompts[0]]
        (embeddings, mask), record = memo((prompts,), {})
        expected, expected_mask = MaskingEncoder().encode_prompt(prompts)
        assert torch.equal(embeddings, expected)
        assert mask is None if expected_mask is None else torch.equal(mask, expected_mask)
        embeddings, mask = record.select([1, 0])
        assert torch.equal(embeddings, expected[[1, 0]])
        assert mask is None if expected_mask is None else torch.equal(mask, expected_mask[[1, 0]])


@pytest.mark.parametrize(
    "prompts", [["a cat", "a dog", "a cat"], ["a cat", "two red dogs", "a cat"]], ids=["equal", "unequal"]
)
def test_qwen_image_replays_prompts_of_equal_and_unequal_length(prompts):
    policy = policy_of(pipeline("QwenImagePipeline"))
    embeddings, mask = policy.pipe.encode_prompt(prompts)
    assert (mask is None) == (prompts[1] == "a dog")
    for _ in range(2):  # the second time from what is remembered
        trajectory = policy.rollout(prompts, [1, 2, 3])
        assert torch.equal(trajectory.recording.encoded[0].select(None)[0], embeddings)
        assert torch.equal(log_probs(policy(trajectory, verify=True)), trajectory.log_probs)
        with torch.no_grad():
            replayed = log_probs(policy(trajectory, samples=[2, 1]))
        assert (replayed - trajectory.log_probs[[2, 1]]).abs().max() <= OTHER_BATCH_SHAPE


# ---------------------------------------------------------------- what is remembered, and how long


def test_tuples_and_lists_are_arguments_like_others():
    """FLUX.2 hands over which layers of its language model are read."""
    calls = []

    def encode_prompt(prompt, layers=(1,)):
        calls.append(layers)
        return (torch.full((len(prompt), 2), float(sum(layers))),)

    memo = PromptMemo(encode_prompt)
    for layers, total in ((1, 2), 3), ([1, 2], 3), ((3, 4), 7), ((1, 2), 3):
        output, record = memo((["a", "bb"],), {"layers": layers})
        assert record is not None and (output[0] == total).all()
    assert len(calls) == 3 * 3  # twice to measure and once to encode, for each that is new


def test_embeddings_under_autocast_are_others():
    layer = torch.nn.Linear(1, 2)

    def encode_prompt(prompt):
        return (layer(torch.tensor([[float(len(p))] for p in prompt])),)

    memo = PromptMemo(encode_prompt)
    dtypes = []
    for enabled in (False, True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            dtypes.append(memo((["a", "bb"],), {})[0][0].dtype)
    assert dtypes == [torch.float32, torch.bfloat16] * 2


def test_outputs_without_rows_are_passed_on():
    """Cumulative lengths belong to the batch as a whole."""
    calls = []

    def encode_prompt(prompt):
        calls.append(prompt)
        return torch.cumsum(torch.tensor([0, *map(len, prompt)]), 0)

    memo = PromptMemo(encode_prompt)
    for _ in range(2):
        output, record = memo((["a", "bb"],), {})
        assert record is None and output.tolist() == [0, 1, 3]
    assert calls[-1] == calls[-2] == ["a", "bb"]


def test_the_prompts_longest_unused_are_forgotten(monkeypatch):
    monkeypatch.setattr("dpok_trl.policy.memo.MAX_CACHED_PROMPTS", 4)
    encoder = Encoder()
    memo = PromptMemo(encoder.encode_prompt)
    for prompts in (["a", "b"], ["c", "d"], ["a", "b"], ["e", "f"]):
        memo((prompts,), {})
    asked = len(encoder.calls)
    memo((["a", "b"],), {})
    assert len(encoder.calls) == asked  # used later than "c" and "d", so still there
    memo((["c", "d"],), {})
    assert encoder.calls[asked:] == [["c", "d"]]
    many = [letter * 2 for letter in "abcdefgh"]
    output, record = memo((many,), {})  # more than fit are remembered for as long as they are in use
    assert output[0].shape[0] == 8 and memo((many,), {})[1].output is record.output
