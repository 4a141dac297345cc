"""Rewards over HTTP: what is served is what is computed here."""

import argparse
import contextlib
import http.client
import json
import math
import socket
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

from dpok_trl.commands import serve_reward
from dpok_trl.rewards.base import score_batch
from dpok_trl.rewards.binding import BoundReward, RewardInputs
from dpok_trl.rewards.combining import RewardSet
from dpok_trl.rewards.diversity import PairwiseDiversity
from dpok_trl.rewards.info import RewardInfo
from dpok_trl.rewards.protocol import encode_request
from dpok_trl.rewards.remote import RemoteReward
from dpok_trl.rewards.server import RewardServer, about, reward_scorer


@contextlib.contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    with server:
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def serving(reward, **settings):
    return running(RewardServer(("127.0.0.1", 0), reward_scorer(reward), about(reward), **settings))


def remote(url, **settings):
    return RemoteReward(url, **{"timeout": 5, "retries": 0, **settings})


def port_of(url):
    return int(url.rsplit(":", 1)[1])


def post(url, body):
    """Status and JSON of the answer, errors too."""
    connection = http.client.HTTPConnection("127.0.0.1", port_of(url), timeout=5)
    connection.request("POST", "/", body)
    with contextlib.closing(connection):
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def images(count, size=(6, 5)):
    """In 8 bits, as pipelines give them to rewards that take pictures."""
    values = np.random.default_rng(7).integers(0, 256, (count, 3, *size))
    return torch.from_numpy(values).float() / 255


def pictures(count):
    return RewardInputs(images(count), ("",) * count, ({},) * count).pictures


PROMPTS = ("a", "two", "three cats", "", "ü")


# --- the same numbers as here -----------------------------------------------------------------------------------------


def ddpo(images, prompts, metadata):
    weights = torch.linspace(0.1, 1.7, images[0].numel()).reshape(images.shape[1:])
    return (images * weights).sum(dim=(1, 2, 3)) + torch.tensor([float(m["bonus"]) for m in metadata])


def by_name(prompts, images, bonus):
    return [
        np.asarray(image).astype(np.float64).std() * b + len(p)
        for image, p, b in zip(images, prompts, bonus, strict=True)
    ]


def with_info(images, prompts):
    return [0.1 * len(p) for p in prompts], {
        "length": [len(p) for p in prompts],
        "size": torch.tensor([i.width for i in images]),
    }


def sometimes(images, prompts):
    return [None if prompt == "two" else math.nan if prompt == "ü" else 1.0 / 3 for prompt in prompts]


@pytest.mark.parametrize("reward", [ddpo, by_name, with_info, sometimes], ids=lambda reward: reward.__name__)
@pytest.mark.parametrize("batch_size", [None, 2])
def test_scores_equal_the_local_ones(reward, batch_size):
    inputs = RewardInputs(images(5), PROMPTS, tuple({"bonus": 0.1 * i} for i in range(5)))
    local = score_batch(BoundReward(reward), inputs)
    with serving(reward, batch_size=batch_size) as url:
        for request_size in (1, 3, 8):
            there = score_batch(BoundReward(remote(url, batch_size=request_size)), inputs)
            assert torch.equal(there.applies, local.applies)
            assert torch.equal(there.values.nan_to_num(-7), local.values.nan_to_num(-7))
    if reward is with_info:
        assert there.info == {"length": [len(p) for p in PROMPTS], "size": [5] * 5}


def test_by_its_address_among_the_rewards_of_a_run():
    inputs = RewardInputs(images(4), PROMPTS[:4], ({},) * 4)
    with serving(sometimes) as url:
        scores = RewardSet({"there": url, "here": sometimes}).score(inputs)
    assert torch.equal(scores.values[:, 0].nan_to_num(-7), scores.values[:, 1].nan_to_num(-7))
    assert scores.applies.tolist() == [[True] * 2, [False] * 2, [True] * 2, [True] * 2]


def test_one_call_at_a_time_and_of_the_batch_size():
    sizes, busy = [], threading.Lock()

    def slow(images, prompts):
        assert busy.acquire(blocking=False), "called from two threads at once"
        time.sleep(0.005)
        sizes.append(len(images))
        busy.release()
        return [1.0] * len(images)

    with serving(slow, batch_size=2) as url:
        assert remote(url, batch_size=3, concurrency=8)(pictures(12), ["a"] * 12) == [1.0] * 12
    assert sorted(sizes) == [1] * 4 + [2] * 4


# --- what it says of itself -------------------------------------------------------------------------------------------


def test_get_says_what_it_is():
    class Shipped:
        info = RewardInfo("nice", "niceness", "image", "[0, 1]", "none", "MIT", "nothing more")

        def __call__(self, images, prompts):
            return [1.0] * len(images)

    for reward, name in ((ddpo, "ddpo"), (Shipped(), "nice")):
        with serving(reward) as url, urllib.request.urlopen(url) as response:
            answer = json.loads(response.read())
        assert answer["name"] == name
    assert answer["info"] == {
        "name": "nice",
        "summary": "niceness",
        "input": "image",
        "range": "[0, 1]",
        "weights": "none",
        "licence": "MIT",
        "needs": "nothing more",
        "overlooks": "",
    }


# --- errors -----------------------------------------------------------------------------------------------------------


def broken(images, prompts):
    if prompts[0] == "two few":
        return [1.0]
    if prompts[0] == "info":
        return [1.0, 2.0], {"object": object()}
    raise ZeroDivisionError("division by zero")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a", "the reward function broken raised ZeroDivisionError: division by zero"),
        ("two few", "the reward function broken returned 1 rewards for 2 images"),
        ("info", "the info of the reward cannot be sent: a object cannot be written as JSON"),
    ],
)
def test_an_error_of_the_reward_is_a_sentence_and_the_server_stays(prompt, words):
    body = encode_request(pictures(2), [prompt] * 2, [{}] * 2)
    with serving(broken) as url:
        for _ in range(2):
            status, answer = post(url, body)
            assert (status, list(answer)) == (422, ["error"]) and words in answer["error"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "the request is not JSON"),
        (b"\x80\x04\x95", "the request is not JSON"),  # a pickle
        (b'{"images": []}', 'the request has no "prompts"'),
    ],
)
def test_a_malformed_request_is_400(body, words):
    with serving(ddpo) as url:
        status, answer = post(url, body)
    assert status == 400 and words in answer["error"]


def test_pictures_of_two_sizes_are_400():
    different = [Image.new("RGB", (4, 4)), Image.new("RGB", (4, 5))]
    with serving(ddpo) as url:
        status, answer = post(url, encode_request(different, ["a"] * 2, [{}] * 2))
    assert (status, answer) == (
        400,
        {
            "error": 'the "images" of the request: pictures that are scored in one call must be of one size; there are 4 x 4 and 4 x 5.'
        },
    )


def test_a_reward_that_raises_is_not_asked_again(caplog):
    calls = []

    def fails(images, prompts):
        calls.append(prompts)
        raise ZeroDivisionError("division by zero")

    with serving(fails) as url:
        assert math.isnan(remote(url, retries=3, backoff=0.001)(pictures(1), ["a"])[0])
    assert len(calls) == 1
    assert "refused the request (attempt 1): status 422" in caplog.text and "ZeroDivisionError" in caplog.text


def test_a_reward_of_groups_cannot_be_served():
    with pytest.raises(
        ValueError, match="diversity cannot be served: it is a reward of all images of a prompt together"
    ):
        reward_scorer(PairwiseDiversity())


def test_a_request_too_large_is_413_and_read_to_its_end(caplog):
    large = b"x" * 3_000_000  # more than the buffers of a connection hold: unread, it would break
    with serving(ddpo, max_bytes=1000) as url:
        status, answer = post(url, large)
        assert (status, answer["error"]) == (413, "the request has 3000000 bytes, more than 1000: send fewer pictures")
        assert math.isnan(remote(url, retries=3)([Image.effect_noise((99, 99), 50)], ["a"])[0])
        assert "refused the request (attempt 1): status 413" in caplog.text


def test_other_paths_and_requests_without_a_length():
    with serving(ddpo) as url:
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(url + "/score")
        with socket.create_connection(("127.0.0.1", port_of(url)), timeout=5) as connection:
            connection.sendall(b"POST / HTTP/1.0\r\n\r\n")
            with connection.makefile("rb") as answer:
                assert b"411" in answer.readline()
        with socket.create_connection(("127.0.0.1", port_of(url)), timeout=5) as connection:
            connection.sendall(b"POST / HTTP/1.0\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n")
            with connection.makefile("rb") as answer:
                assert b"400" in answer.readline()


def test_a_client_that_leaves_does_not_stop_the_server():
    body = encode_request(pictures(1), ["a"], [{"bonus": 0}])
    with serving(ddpo) as url:
        with socket.create_connection(("127.0.0.1", port_of(url))) as connection:
            connection.sendall(b"POST / HTTP/1.0\r\nContent-Length: 100\r\n\r\n{")
        assert post(url, body)[0] == 200


# --- the command ------------------------------------------------------------------------------------------------------


def arguments(*argv):
    parser = argparse.ArgumentParser()
    serve_reward.add_arguments(parser)
    return parser.parse_args([*argv, "--port", "0"])


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module in the current folder, as users have theirs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    (tmp_path / "my_rewards.py").write_text(
        "CONSTANT = 3\n"
        "class Red:\n"
        "    def __call__(self, images, prompts):\n        return [float(image.getpixel((0, 0))[0]) for image in images]\n"
        "    def to(self, device):\n        self.device = device\n"
        "def length(images, prompts):\n    return [float(len(prompt)) for prompt in prompts]\n"
    )
    yield
    sys.modules.pop("my_rewards", None)


def test_a_function_of_ones_own_is_served(module, monkeypatch, capsys):
    with running(serve_reward.make_server(arguments("my_rewards:length"))) as url:
        assert remote(url)(pictures(2), ["a", "two"]) == [1.0, 3.0]
    with running(serve_reward.make_server(arguments("my_rewards:Red", "--device", "meta"))) as url:
        assert remote(url)([Image.new("RGB", (2, 2), (9, 0, 0))], ["a"]) == [9.0]

    def interrupted(server):
        raise KeyboardInterrupt

    monkeypatch.setattr(RewardServer, "serve_forever", interrupted)
    assert serve_reward.run(arguments("my_rewards:length")) == 0
    assert "Serving length at http://127.0.0.1:" in capsys.readouterr().out


def test_a_device_for_what_has_none_is_refused(module):
    with pytest.raises(ValueError, match="my_rewards:length has no method `to`, so --device cuda would do nothing"):
        serve_reward.make_server(arguments("my_rewards:length", "--device", "cuda"))


def test_wrong_arguments(module, capsys):
    for argv in (["--batch-size", "0"], ["--max-megabytes", "-1"]):
        with pytest.raises(SystemExit):
            arguments("my_rewards:length", *argv)
        assert "is not at least 1" in capsys.readouterr().err
    for port in ("-1", "65536"):
        with pytest.raises(SystemExit):
            arguments("my_rewards:length", f"--port={port}")
        assert f"{port} is not between 0 and 65535" in capsys.readouterr().err
    with pytest.raises(ValueError, match="diversity cannot be served"):
        serve_reward.make_server(arguments("diversity"))
    with pytest.raises(ValueError, match="my_rewards"):
        serve_reward.make_server(arguments("my_rewards:lenght"))
    with pytest.raises(ValueError, match="my_rewards:CONSTANT' is 3 of type int: a reward is something to call"):
        serve_reward.make_server(arguments("my_rewards:CONSTANT"))
    with pytest.raises(ValueError, match="'cuda:99' is no device of this machine"):
        serve_reward.make_server(arguments("my_rewards:Red", "--device", "cuda:99"))
