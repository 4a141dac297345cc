"""The protocol and its client, against servers on the loopback."""

import base64
import contextlib
import http.client
import io
import json
import math
import re
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from dpok_trl.rewards.base import RewardError
from dpok_trl.rewards.client import Client, RequestFailed, urllib_transport
from dpok_trl.rewards.pictures import to_pictures, to_tensor
from dpok_trl.rewards.protocol import (
    MAX_PIXELS,
    ProtocolError,
    decode_answer,
    decode_request,
    encode_answer,
    encode_picture,
    encode_request,
    join_infos,
)
from dpok_trl.rewards.remote import RemoteReward


# --- servers ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(answer):
    """A server of `answer(request) -> (status, body)`; the requests are kept, with the time of each."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((time.monotonic(), dict(self.headers), body))
            status, content = answer(body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            if status == 307:
                self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # of a client that did not wait
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", requests
        finally:
            server.shutdown()
            thread.join()


def lengths(request):
    """A reward that the client can know: the number of letters of the prompt."""
    return 200, json.dumps({"rewards": [len(prompt) / 7 for prompt in request["prompts"]]}).encode()


PROMPTS = ["a", "two", "seven..", "", "a cat ☂"]


def pictures(count, size=(9, 7)):
    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(count)]


def fast(url, **settings):
    return RemoteReward(url, **{"backoff": 0.001, "timeout": 5, **settings})


# --- what is sent and what comes back ---------------------------------------------------------------------------------


def test_rewards_in_order_whatever_the_batches():
    expected = [len(prompt) / 7 for prompt in PROMPTS]
    with serving(lengths) as (url, requests):
        for batch_size in (1, 2, 5, 8):
            requests.clear()
            assert fast(url, batch_size=batch_size)(pictures(5), PROMPTS) == expected
            assert len(requests) == math.ceil(5 / batch_size)


def test_the_request_is_the_documented_one():
    images = pictures(2)
    metadata = [{"n": 1, "t": torch.tensor([1, 2])}, {"n": np.int64(2), "t": np.array([0.5])}]
    with serving(lengths) as (url, requests):
        fast(url, headers={"Authorization": "Bearer x"})(images, ("a", "b"), metadata)
        fast(url, metadata_columns=["n"])(images, ("a", "b"), metadata)
        fast(url, metadata_columns=[])(images, ("a", "b"), metadata)
    (_, headers, request), (_, _, some), (_, _, none) = requests
    assert headers["Content-Type"] == "application/json" and headers["Authorization"] == "Bearer x"
    assert set(request) == {"images", "prompts", "metadata"}
    assert request["prompts"] == ["a", "b"]
    assert request["metadata"] == [{"n": 1, "t": [1, 2]}, {"n": 2, "t": [0.5]}]
    assert (some["metadata"], none["metadata"]) == ([{"n": 1}, {"n": 2}], [{}, {}])
    for text, image in zip(request["images"], images, strict=True):
        arrived = Image.open(io.BytesIO(base64.b64decode(text)))
        assert arrived.format == "PNG" and np.array_equal(np.asarray(arrived), np.asarray(image))


def test_a_tensor_is_sent_in_8_bits():
    values = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 1.0, 1.5, -1.0]).reshape(1, 1, 2, 3).expand(1, 3, 2, 3)
    [picture] = to_pictures(values)
    assert np.asarray(picture)[..., 0].tolist() == [[0, 0, 1], [255, 255, 0]]
    exact = torch.arange(256).float().div(255).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    assert torch.equal(to_tensor(to_pictures(exact)), exact)
    for wrong in (torch.zeros(3, 4, 4), torch.zeros(2, 4, 4, 4)):
        with pytest.raises(ValueError, match=r"must be of shape \(B, 3, H, W\); got"):
            to_pictures(wrong)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_modes_that_png_keeps(mode):
    picture = Image.new(mode, (3, 2), 1) if mode in ("1", "I;16") else pictures(1)[0].convert(mode)
    [arrived], prompts, metadata = decode_request(encode_request([picture], ["a"], [{}]))
    assert arrived.mode == mode and np.array_equal(np.asarray(arrived), np.asarray(picture))
    assert (prompts, metadata) == (["a"], [{}])


@pytest.mark.parametrize("mode", ["F", "CMYK", "YCbCr", "HSV"])
def test_modes_that_it_would_change_are_refused(mode):
    with pytest.raises(
        ValueError, match=f"PNG would change a picture of mode {mode}: convert it first, picture.convert"
    ):
        encode_picture(Image.new(mode, (2, 2)))


def test_null_does_not_apply_and_nan_failed():
    with serving(lambda request: (200, b'{"rewards": [1, null, NaN, 1e999, -2.5]}')) as (url, _):
        rewards = fast(url)(pictures(5), PROMPTS)
    assert rewards[:2] == [1.0, None] and all(math.isnan(reward) for reward in rewards[2:4]) and rewards[4] == -2.5
    assert decode_answer(encode_answer([0.1, None]), 2) == ([0.1, None], None)
    [huge], _ = decode_answer(b'{"rewards": [1' + b"0" * 400 + b"]}", 1)
    assert math.isnan(huge)


def test_info_of_several_requests():
    def per_picture(request):
        return 200, encode_answer([0.0] * len(request["prompts"]), {"said": request["prompts"]})

    with serving(per_picture) as (url, _):
        assert fast(url, batch_size=2)(pictures(5), PROMPTS)[1] == {"said": PROMPTS}
    with serving(lambda request: (200, encode_answer([0.0] * len(request["prompts"]), "fine"))) as (url, _):
        assert fast(url, batch_size=2)(pictures(5), PROMPTS)[1] == {"requests": ["fine"] * 3}
    assert join_infos([{"a": [1]}, None, {"a": [2], "b": [3]}], [1, 2, 1]) == {
        "a": [1, None, None, 2],
        "b": [None] * 3 + [3],
    }
    assert join_infos([{"a": 1}], [1]) == {"requests": [{"a": 1}]}


def test_no_pictures_no_request():
    assert RemoteReward("http://127.0.0.1:9")([], []) == []


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(status):
    answers = iter([status, status, 200])

    def busy(request):
        code = next(answers)
        return (code, b"busy") if code != 200 else lengths(request)

    with serving(busy) as (url, requests):
        assert fast(url, backoff=0.05)(pictures(1), ["seven.."]) == [1.0]
    first, second, third = (moment for moment, *_ in requests)
    assert second - first >= 0.05 and third - second >= 0.1


def test_the_waits_double():
    client = Client("http://x", timeout=1, retries=4, backoff=0.5, concurrency=1, headers=None, transport=None)
    assert client.waits == [0.5, 1.0, 2.0, 4.0]


@pytest.mark.parametrize("status", [307, 400, 401, 404, 413])
def test_a_refused_request_is_not_repeated(status, caplog):
    with serving(lambda request: (status, b'{"error": "no such thing"}')) as (url, requests):
        assert math.isnan(fast(url)(pictures(1), ["a"])[0])
        assert len(requests) == 1
    assert re.search(f"{url} refused the request \\(attempt 1\\): status {status}, .*no such thing", caplog.text)


def test_all_failed_is_nan_and_one_warning_names_address_attempts_and_the_last_error(caplog):
    with serving(lambda request: (503, b"overloaded")) as (url, requests):
        rewards = fast(url, retries=2, batch_size=1)(pictures(2), ["a", "b"])
        assert len(rewards) == 2 and all(math.isnan(reward) for reward in rewards)
        assert len(requests) == 6
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        f"2 of 2 requests failed. The last: the reward server {url} gave no usable answer in 3 attempts. "
        "The last error: status 503, 'overloaded'."
    )


def test_the_client_itself_raises_where_all_failed():
    client = Client(
        "http://x", timeout=1, retries=0, backoff=0, concurrency=2, headers=None, transport=lambda *_: (404, b"no")
    )
    with pytest.raises(RequestFailed, match=r"http://x refused the request \(attempt 1\): status 404, 'no'"):
        client.post_all([b"1", b"2"])


def test_nobody_listens(caplog):
    with serving(lengths) as (url, _):
        pass
    assert math.isnan(fast(url, retries=1)(pictures(1), ["a"])[0])
    assert "in 2 attempts. The last error: ConnectionRefusedError" in caplog.text


def test_a_hanging_server_is_given_up(caplog):
    release = threading.Event()

    def hang(request):
        release.wait(10)
        return lengths(request)

    with serving(hang) as (url, _):
        started = time.monotonic()
        assert math.isnan(fast(url, timeout=0.3, retries=1)(pictures(1), ["a"])[0])
        assert "in 2 attempts. The last error: no answer within 0.3 s" in caplog.text
        assert time.monotonic() - started < 5
        release.set()


class Drips(BaseHTTPRequestHandler):
    """A byte now and then, for four seconds."""

    def do_POST(self):
        self.send_response(200 if self.path == "/" else 500)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            for _ in range(200):
                self.wfile.write(b" ")
                time.sleep(0.02)

    def log_message(self, *args):
        pass


class BreaksOff(Drips):
    def do_POST(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"[")


@contextlib.contextmanager
def serving_by(handler):
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("path", ["/", "/error"])
def test_a_server_that_drips_is_given_up(path):
    with serving_by(Drips) as url:
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            urllib_transport(url + path, b"{}", {}, 0.2)
        assert time.monotonic() - started < 1


def test_an_answer_that_breaks_off_is_no_answer():
    with serving_by(BreaksOff) as url, pytest.raises(http.client.IncompleteRead):
        urllib_transport(url, b"{}", {}, 5)


def test_an_answer_that_is_too_large_is_not_asked_for_again(monkeypatch):
    monkeypatch.setattr("dpok_trl.rewards.client.MAX_ANSWER", 100)
    with serving(lambda request: (200, b"x" * 101)) as (url, requests):
        client = fast(url, retries=3).client
        with pytest.raises(RequestFailed, match="answered with more than 100 bytes"):
            client.post_all([b"{}"])
        assert len(requests) == 1


def test_a_failed_part_is_nan_and_the_log_says_so(caplog):
    def one_fails(request):
        return (500, b"boom") if "two" in request["prompts"] else lengths(request)

    with serving(one_fails) as (url, _):
        rewards = fast(url, batch_size=2, retries=1)(pictures(5), PROMPTS)
    assert all(math.isnan(reward) for reward in rewards[:2])
    assert rewards[2:] == [1.0, 0.0, 1.0]
    assert "1 of 3 requests failed. The last: the reward server" in caplog.text and "boom" in caplog.text


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<html>busy</html>", r"the answer is not JSON \(.*it begins '<html>busy</html>'"),
        (b"\xff\xfe\x00", "the answer is not JSON"),
        (b"[1, 2]", r"the answer must be a JSON object, it is a list"),
        (b'{"scores": [1, 2]}', r"""the answer has no "rewards", only \['scores'\]"""),
        (b'{"rewards": 1}', r'"rewards" must be a list, it is a number'),
        (b'{"rewards": [1]}', 'the answer has 1 "rewards" for 2 images'),
        (b'{"rewards": [1, "2"]}', r'"rewards"\[1\] must be a number or null, it is a string'),
        (b'{"rewards": [true, 2]}', r'"rewards"\[0\] must be a number or null, it is a boolean'),
        (b'{"rewards": [[1], [2]]}', r'"rewards"\[0\] must be a number or null, it is a list'),
    ],
)
def test_a_malformed_answer_is_named_and_not_asked_for_again(body, words):
    with serving(lambda request: (200, body)) as (url, requests):
        with pytest.raises(RewardError, match=f"{url} gave an answer that cannot be read: {words}"):
            fast(url)(pictures(2), ["a", "b"])
        assert len(requests) == 1


def test_an_injected_transport():
    seen = []

    def transport(url, body, headers, timeout):
        seen.append((url, headers["X-Key"], timeout))
        if len(seen) == 1:
            raise http.client.IncompleteRead(b"")
        return lengths(json.loads(body))

    reward = fast("https://judge.example/score", transport=transport, timeout=3, headers={"X-Key": "k"})
    assert reward(pictures(1), ["seven.."]) == [1.0]
    assert seen == [("https://judge.example/score", "k", 3)] * 2


def test_requests_overlap():
    delay, count = 0.2, 8

    def slow(request):
        time.sleep(delay)
        return lengths(request)

    with serving(slow) as (url, _):
        started = time.monotonic()
        rewards = fast(url, batch_size=1, concurrency=count)(pictures(count), ["seven.."] * count)
        elapsed = time.monotonic() - started
    assert rewards == [1.0] * count
    assert elapsed < count * delay * 0.75


def test_an_exception_of_our_own_stops_the_repeats():
    """Ctrl-C while requests wait to be repeated."""
    attempts = []

    def transport(url, body, headers, timeout):
        attempts.append(body)
        if body == b"broken":
            raise ZeroDivisionError
        raise ConnectionError

    client = Client("http://x", timeout=1, retries=3, backoff=30, concurrency=2, headers=None, transport=transport)
    started = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        client.post_all([b"broken", b"waits"])
    assert time.monotonic() - started < 5
    assert attempts.count(b"waits") <= 1


def test_an_exception_waits_neither_for_repeats_nor_for_what_is_under_way():
    begun, release, bodies = threading.Event(), threading.Event(), []

    def transport(url, body, headers, timeout):
        bodies.append(body)
        if body == b"hangs":
            begun.set()
            release.wait(10)
            return 200, b"{}"
        begun.wait(10)
        raise ZeroDivisionError

    client = Client("http://x", timeout=1, retries=3, backoff=30, concurrency=2, headers=None, transport=transport)
    started = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        client.post_all([b"hangs", b"broken", *[b"later"] * 20])
    assert time.monotonic() - started < 5
    release.set()
    assert bodies.count(b"later") < 20  # what was not begun is not


def test_ctrl_c_ends_the_waiting():
    """While one request is under way and another waits to be repeated."""
    begun, release = threading.Event(), threading.Event()

    def transport(url, body, headers, timeout):
        if body == b"away":
            raise ConnectionError
        begun.set()
        release.wait(10)
        return 200, b"{}"

    def press():
        begun.wait(10)
        time.sleep(0.1)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    client = Client("http://x", timeout=1, retries=3, backoff=30, concurrency=2, headers=None, transport=transport)
    threading.Thread(target=press).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        client.post_all([b"away", b"hangs"])
    assert time.monotonic() - started < 5
    release.set()


def test_a_message_counts_the_attempts_that_were_made():
    """Stopped before the first repeat."""

    def transport(url, body, headers, timeout):
        raise ConnectionError("away")

    client = Client("http://x", timeout=1, retries=3, backoff=30, concurrency=1, headers=None, transport=transport)
    stopped = threading.Event()
    stopped.set()
    assert "no usable answer in 1 attempt. The last error: ConnectionError: away" in str(
        client._post(b"", {}, stopped)
    )


# --- misuse -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"url": "localhost:8000"}, "begins with http:// or https://; got 'localhost:8000'"),
        ({"url": "file:///etc/hosts"}, "begins with http:// or https://"),
        ({"retries": -1}, "retries must be at least 0; got -1"),
        ({"backoff": -0.5}, "backoff must be at least 0"),
        ({"concurrency": 0}, "concurrency must be at least 1"),
        ({"timeout": 0}, "timeout must be above 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(ValueError, match=words):
        RemoteReward(**{"url": "http://x", **settings})


def test_wrong_arguments_are_refused():
    reward = RemoteReward("http://127.0.0.1:9")
    with pytest.raises(ValueError, match="must be equally many; got 1, 2 and 1"):
        reward(pictures(1), ["a", "b"])
    with pytest.raises(
        ValueError, match="a Image cannot be written as JSON. Name the columns to send in metadata_columns"
    ):
        reward(pictures(1), ["a"], [{"source": Image.new("RGB", (2, 2))}])
    with pytest.raises(ValueError, match="the metadata of image 0 has no column 'n' to send"):
        RemoteReward("http://127.0.0.1:9", metadata_columns=["n"])(pictures(1), ["a"], [{"m": 1}])
    with pytest.raises(ValueError, match="image 0 must be a PIL picture, it is a str"):
        reward(["photo.png"], ["a"])


@pytest.mark.parametrize(
    ("request_body", "words"),
    [
        (b"{", "the request is not JSON"),
        (b'{"prompts": []}', 'the request has no "images"'),
        (b'{"images": []}', 'the request has no "prompts"'),
        (b'{"images": {}, "prompts": []}', '"images" must be a list, it is an object'),
        (b'{"images": [1], "prompts": ["a"]}', r'"images"\[0\] must be base64 in a string, it is a number'),
        (b'{"images": ["!"], "prompts": ["a"]}', r'"images"\[0\] is not base64'),
        (b'{"images": ["AAAA"], "prompts": ["a"]}', r'"images"\[0\] cannot be read as a PNG, JPEG or WebP picture'),
        (b'{"images": [], "prompts": ["a"]}', 'the request has 0 "images" but 1 "prompts"'),
        (b'{"images": [], "prompts": [], "metadata": [{}]}', 'the request has 0 "images" but 1 "metadata"'),
        (b'{"images": ["AAAA"], "prompts": [null]}', r'"prompts"\[0\] must be a string, it is null'),
    ],
)
def test_a_malformed_request_is_named(request_body, words):
    with pytest.raises(ProtocolError, match=words):
        decode_request(request_body)


def test_a_text_chunk_that_unpacks_to_too_much_is_a_malformed_request():
    """Pillow raises a ValueError for it."""
    file, text = io.BytesIO(), PngImagePlugin.PngInfo()
    text.add_text("a", "x" * 2**21, zip=True)
    Image.new("RGB", (4, 4)).save(file, format="PNG", pnginfo=text)
    body = {"images": [base64.b64encode(file.getvalue()).decode()], "prompts": ["a"]}
    with pytest.raises(ProtocolError, match=r'"images"\[0\] cannot be read as a PNG, JPEG or WebP picture'):
        decode_request(json.dumps(body).encode())


def test_a_small_file_of_many_pixels_is_refused():
    file = io.BytesIO()
    Image.new("1", (2**14, MAX_PIXELS // 2**14 + 1)).save(file, format="PNG")
    assert len(file.getvalue()) < 100_000
    body = json.dumps({"images": [base64.b64encode(file.getvalue()).decode()], "prompts": ["a"]}).encode()
    with pytest.raises(ProtocolError, match=r"has 16384 x 4097 pixels, more than"):
        decode_request(body)


def test_the_transport_speaks_to_a_real_server():
    with serving(lambda request: (418, b"teapot")) as (url, _):
        assert urllib_transport(url, b"{}", {}, 5) == (418, b"teapot")
