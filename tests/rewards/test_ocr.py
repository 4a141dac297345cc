"""The text in a picture against the text wanted."""

import builtins
import random
import threading
import time

import pytest
import torch
from PIL import Image

from dpok_trl.rewards.base import score_batch
from dpok_trl.rewards.binding import BoundReward, RewardInputs
from dpok_trl.rewards.ocr import OCRReward, edit_distance, similarity


def by_definition(a, b):
    """Levenshtein's recursion, word for word."""
    if not a or not b:
        return len(a) + len(b)
    if a[0] == b[0]:
        return by_definition(a[1:], b[1:])
    return 1 + min(by_definition(a[1:], b), by_definition(a, b[1:]), by_definition(a[1:], b[1:]))


def test_edit_distance():
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == edit_distance("abc", "") == 3
    rng = random.Random(0)
    for _ in range(60):
        a, b = ("".join(rng.choices("abc", k=rng.randint(0, 5))) for _ in range(2))
        assert edit_distance(a, b) == by_definition(a, b)


@pytest.mark.parametrize(
    ("read", "wanted", "reward"),
    [
        ("Hello World", "hello world", 1.0),
        ("HELLO\nWORLD", "HelloWorld", 1.0),
        ("hallo", "hello", 0.8),
        ("", "hello", 0.0),
        ("something else altogether", "hello", 0.0),  # further away than the text is long
        ("hello there", "hello", 0.0),  # five letters too many, of five
        ("hello!", "hello", 0.8),
    ],
)
def test_similarity(read, wanted, reward):
    assert similarity(read, wanted) == pytest.approx(reward, abs=1e-15)


def pictures(*texts):
    """Pictures that the recognizer below can read."""
    images = []
    for text in texts:
        image = Image.new("RGB", (4, 4))
        image.info["text"] = text
        images.append(image)
    return images


def read_info(picture):
    return picture.info["text"]


def test_rewards_by_a_column():
    reward = OCRReward("say", recognizer=read_info)
    rewards, info = reward(
        pictures("Stop", "STOB", "anything"), ["a"] * 3, [{"say": "stop"}, {"say": "stop"}, {"say": None}]
    )
    assert rewards == [1.0, 0.75, None] and info == {"read": ["Stop", "STOB", None]}


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        (None, "image 0 has no column 'text', none at all"),
        (
            [{"txt": "a"}],
            "image 0 has no column 'text', only 'txt'. Give it with the prompts, or name another with column",
        ),
        ([{"text": " \n"}], "'text' of image 0 is empty: use None for a picture without a text"),
        ([{"text": 5}], "'text' of image 0 must be a text or None; got 5"),
    ],
)
def test_a_missing_text(metadata, words):
    with pytest.raises(ValueError, match=words):
        OCRReward(recognizer=read_info)(pictures("a"), ["a"], metadata)


def test_the_missing_package_is_named_with_its_command(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "rapidocr":
            raise ModuleNotFoundError("No module named 'rapidocr'", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"No module named 'rapidocr'\): pip install \"dpok-trl\[ocr\]\"$"):
        OCRReward()(pictures("a"), ["a"], [{"text": "a"}])


def test_one_picture_at_a_time():
    busy = threading.Lock()

    def recognizer(picture):
        assert busy.acquire(blocking=False), "called from two threads at once"
        time.sleep(0.01)
        busy.release()
        return "a"

    reward, results = OCRReward(recognizer=recognizer), []
    threads = [
        threading.Thread(target=lambda: results.append(reward(pictures("a", "b"), ["a"] * 2, [{"text": "a"}] * 2)[0]))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[1.0, 1.0]] * 4


def test_under_the_contract():
    bound = BoundReward(OCRReward(recognizer=lambda picture: f"{picture.width}x{picture.height}"))
    scored = score_batch(bound, RewardInputs(torch.zeros(2, 3, 5, 4), ("a", "b"), ({"text": "4X5"}, {"text": None})))
    assert scored.values[0] == 1.0 and scored.applies.tolist() == [True, False]
    assert (bound.name, bound.overlaps) == ("ocr", True)
