"""A vision-language model as judge, against a server on the loopback that speaks as OpenAI's does."""

import base64
import contextlib
import io
import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from dpok_trl.rewards.base import RewardError, score_batch
from dpok_trl.rewards.binding import BoundReward, RewardInputs
from dpok_trl.rewards.judge import VLMJudge, yes_probability
from dpok_trl.rewards.protocol import to_tensor


@contextlib.contextmanager
def serving(answer):
    """`answer(request) -> (status, body)`, where a body may be what json can write; the requests are kept, with path and headers."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, dict(self.headers), body))
            status, content = answer(body)
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", requests
        finally:
            server.shutdown()
            thread.join()


def says(text, tops=None):
    content = (
        [{"token": text, "logprob": -0.1, "top_logprobs": [{"token": t, "logprob": p} for t, p in tops]}]
        if tops
        else None
    )
    return {
        "choices": [{"message": {"role": "assistant", "content": text}, "logprobs": content and {"content": content}}]
    }


def question_of(request):
    [message] = request["messages"]
    return message["content"][1]["text"]


def by_prompt(table):
    """Answers by the word of the question that the table has."""
    return lambda request: (200, next(answer for word, answer in table.items() if word in question_of(request)))


def pictures(count):
    rng = np.random.default_rng(5)
    return [Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)) for _ in range(count)]


def judge(url, *args, **settings):
    return VLMJudge(url, "judge-7b", *args, **{"backoff": 0.001, "timeout": 5, **settings})


YES, NO = math.log(0.6), math.log(0.2)


# --- P(yes) -----------------------------------------------------------------------------------------------------------


def test_yes_against_no():
    assert yes_probability([("yes", YES), ("no", NO)]) == pytest.approx(0.75, rel=1e-12)
    spelled = [
        ("Yes", math.log(0.3)),
        (" yes", math.log(0.2)),
        ("▁YES", math.log(0.1)),
        ("No.", NO),
        ("maybe", -1.0),
        ("not", -1.0),
    ]
    assert yes_probability(spelled) == pytest.approx(0.75, rel=1e-12)
    assert yes_probability([("Ġyes", -3.0)]) == 1.0
    assert yes_probability([("no", -9999.0), ("no", -0.1)]) == 0.0
    assert math.isnan(yes_probability([("I", -0.1)]))
    assert math.isnan(yes_probability([("yes", -9999.0)]))  # what servers write for minus infinity


def test_the_request_is_openais():
    images = pictures(1)
    with serving(lambda request: (200, says("Yes", [("Yes", YES), ("No", NO)]))) as (url, requests):
        rewards, info = judge(url + "/", api_key="key")(images, ["a {red} cat"])
    assert rewards == [pytest.approx(0.75, rel=1e-12)] and info == {"answers": ["Yes"]}
    [(path, headers, request)] = requests
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer key"
    [message] = request.pop("messages")
    assert request == {"model": "judge-7b", "temperature": 0, "max_tokens": 1, "logprobs": True, "top_logprobs": 20}
    picture, text = message["content"]
    assert text == {"type": "text", "text": "Does this picture show: a {red} cat? Answer yes or no."}
    kind, _, data = picture["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), np.asarray(images[0]))


def test_options_are_added_and_taken_away():
    with serving(lambda request: (200, says("5. Final Score: 5"))) as (url, requests):
        judge(url, mode="score", options={"max_tokens": None, "max_completion_tokens": 9})(pictures(1), ["a"])
    assert "max_tokens" not in requests[0][2] and requests[0][2]["max_completion_tokens"] == 9


def test_scores_in_order_and_what_says_neither_is_nan(caplog):
    table = {
        "cat": says("Yes", [("Yes", YES), ("No", NO)]),
        "dog": says("no", [("no", math.log(0.5)), ("yes", math.log(0.5))]),
        "fog": says("Well", [("Well", -0.1)]),
    }
    with serving(by_prompt(table)) as (url, _):
        rewards, info = judge(url)(pictures(4), ["cat", "fog", "dog", "cat"])
    assert rewards == pytest.approx([0.75, math.nan, 0.5, 0.75], rel=1e-12, nan_ok=True)
    assert info == {"answers": ["Yes", "Well", "no", "Yes"]}
    assert "1 of 4 answers of judge-7b do not say yes or no. The first: 'Well'" in caplog.text


# --- a number ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Alignment: 3\nFinal Score: 4.25", 4.25),
        ("Final Score: 1 ... no, Final Score:-2", -2.0),
        ("Final Score: high", math.nan),
        ("**Final Score:** 3", 3.0),
        ("**Final Score: 3**", 3.0),
        ("Final Score: **4.5**.", 4.5),
        ("Final Score: 4/5", 4.0),
        ("Final Score: 4, since", 4.0),
        ("Final Score: 1e3", math.nan),
        ("Final Score: 12E+3", math.nan),
        ("Final Score: 4,5", math.nan),
        ("Final Score: 14.25.1", math.nan),
        ("", math.nan),
    ],
)
def test_the_final_score(text, score):
    with serving(lambda request: (200, says(text))) as (url, requests):
        [reward], _ = judge(url, mode="score")(pictures(1), ["a"])
    assert reward == score or (math.isnan(reward) and math.isnan(score))
    assert requests[0][2]["max_tokens"] == 1024 and "logprobs" not in requests[0][2]


def test_a_pattern_of_ones_own():
    with serving(lambda request: (200, says("<score>7</score>, or <score>x</score>"))) as (url, _):
        assert judge(url, mode="score", pattern=r"<score>(\d+)</score>")(pictures(1), ["a"])[0] == [7.0]
        assert math.isnan(judge(url, mode="score", pattern=r"<score>(\w)</score>")(pictures(1), ["a"])[0][0])


def test_an_answer_without_content_is_unread():
    """Of a model that was cut off while thinking."""
    with serving(lambda request: (200, {"choices": [{"message": {"content": None}}]})) as (url, _):
        [reward], info = judge(url, mode="score")(pictures(1), ["a"])
    assert math.isnan(reward) and info == {"answers": [""]}


# --- questions --------------------------------------------------------------------------------------------------------


def test_questions_from_a_column():
    rows = [{"ask": "cat?"}, {"ask": None}, {"ask": "is '{prompt}' {shown}?"}]
    with serving(lambda request: (200, says("yes", [("yes", YES), ("no", NO)]))) as (url, requests):
        rewards, info = judge(url, question_column="ask", concurrency=1)(pictures(3), ["a", "b", "c"], rows)
    assert rewards == pytest.approx([0.75, None, 0.75]) and info == {"answers": ["yes", None, "yes"]}
    assert [question_of(request) for _, _, request in requests] == ["cat?", "is 'c' {shown}?"]


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        (
            None,
            "image 0 has no column 'ask', none at all. Give it with the prompts, or name another with question_column",
        ),
        ([{"text": "a", "n": 1}], "image 0 has no column 'ask', only 'text', 'n'"),
        ([{"ask": 3}], "'ask' of image 0 must be a text or None; got 3 of type int"),
        ([], "images and metadata must be equally many; got 1 and 0"),
    ],
)
def test_a_missing_question(metadata, words):
    with pytest.raises(ValueError, match=words):
        judge("http://127.0.0.1:9/v1", question_column="ask")(pictures(1), ["a"], metadata)


def test_a_question_without_a_prompt_is_told(caplog):
    judge("http://127.0.0.1:9/v1", "Is it pretty?")
    assert "has no {prompt}" in caplog.text


# --- a server's bad days ----------------------------------------------------------------------------------------------


def test_503_is_asked_again():
    statuses = iter([503, 503, 200])

    def busy(request):
        status = next(statuses)
        return (status, b"") if status != 200 else (200, says("no", [("no", -0.1)]))

    with serving(busy) as (url, requests):
        assert judge(url)(pictures(1), ["a"])[0] == [0.0]
        assert len(requests) == 3


def test_one_that_hangs_is_nan_the_others_count():
    release = threading.Event()

    def answer(request):
        if "hang" in question_of(request):
            release.wait(10)
        return 200, says("yes", [("yes", -0.1)])

    with serving(answer) as (url, _):
        started = time.monotonic()
        rewards, info = judge(url, timeout=0.7, retries=0)(pictures(2), ["hang", "a"])
        elapsed = time.monotonic() - started
        release.set()
    assert math.isnan(rewards[0]) and rewards[1] == 1.0 and info == {"answers": [None, "yes"]}
    assert elapsed < 5


def test_all_failed():
    with serving(lambda request: (401, {"error": {"message": "wrong key"}})) as (url, requests):
        with pytest.raises(RewardError, match=f"{url}/chat/completions refused the request .*401.*wrong key") as error:
            judge(url, api_key="s3cret")(pictures(2), ["a", "b"])
        assert len(requests) == 2 and "s3cret" not in str(error.value)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"oops", r"cannot be read \(JSONDecodeError.*it begins 'oops'"),
        ({"choices": []}, r"cannot be read \(IndexError"),
        ({"error": "x"}, r"cannot be read \(KeyError: 'choices'\)"),
        (b"[" * 100_000, r"cannot be read \(RecursionError"),
        ([], r"cannot be read \(TypeError"),
        (says("yes", [("yes", 1e4)]), r"cannot be read \(OverflowError"),
        (says("yes", [("yes", 10**400)]), r"cannot be read \(OverflowError"),
        (says("yes"), r"cannot be read \(TypeError.*A server that gives no log-probabilities needs mode='score'"),
    ],
)
def test_a_malformed_answer_is_named(body, words):
    with serving(lambda request: (200, body)) as (url, _), pytest.raises(RewardError, match=words):
        judge(url)(pictures(1), ["a"])


def test_eight_requests_overlap():
    delay = 0.2

    def slow(request):
        time.sleep(delay)
        return 200, says("yes", [("yes", YES), ("no", NO)])

    with serving(slow) as (url, requests):
        started = time.monotonic()
        rewards, _ = judge(url)(pictures(8), list("abcdefgh"))
        elapsed = time.monotonic() - started
    assert rewards == pytest.approx([0.75] * 8) and len(requests) == 8
    assert elapsed < 8 * delay * 0.75


# --- settings ---------------------------------------------------------------------------------------------------------


def test_the_key_may_be_in_the_environment(monkeypatch):
    with serving(lambda request: (200, says("yes", [("yes", -0.1)]))) as (url, requests):
        reward = judge(url, api_key_env="JUDGE_KEY")
        monkeypatch.delenv("JUDGE_KEY", raising=False)
        with pytest.raises(ValueError, match="environment variable JUDGE_KEY, which should hold the key of"):
            reward(pictures(1), ["a"])
        monkeypatch.setenv("JUDGE_KEY", "abc")
        reward(pictures(1), ["a"])
        judge(url)(pictures(1), ["a"])
    assert [headers.get("Authorization") for _, headers, _ in requests] == ["Bearer abc", None]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "probability"}, "mode must be one of 'yes-probability', 'score'; got 'probability'"),
        ({"pattern": "("}, "is not a regular expression"),
        ({"pattern": r"\d+"}, "has no group: put the number in parentheses"),
        ({"api_key": "a", "api_key_env": "B"}, "api_key or api_key_env, not both"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(ValueError, match=words):
        judge("http://x/v1", **settings)


def test_under_the_contract():
    """Bound by name: pictures, and the metadata that the questions come from."""
    images = pictures(3)
    rows = ({"ask": "cat?"}, {"ask": None}, {"ask": "fog?"})
    table = {"cat": says("yes", [("yes", YES), ("no", NO)]), "fog": says("hm", [("hm", -0.1)])}
    with serving(by_prompt(table)) as (url, requests):
        bound = BoundReward(judge(url, question_column="ask"))
        scored = score_batch(bound, RewardInputs(to_tensor(images), ("a", "b", "c"), rows))
    assert (bound.name, bound.overlaps) == ("vlm-judge", True)
    assert scored.values[0].item() == pytest.approx(0.75) and scored.values[2].isnan()
    assert scored.applies.tolist() == [True, False, True]
    assert scored.info == {"answers": ["yes", None, "hm"]} and len(requests) == 2
