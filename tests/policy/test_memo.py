"""Where the batch lies in what `encode_prompt` returns, and that each prompt is encoded once."""

import torch

from dpok_trl.policy.memo import LIST, NOTHING, PromptMemo, batch_axes, select_rows


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
