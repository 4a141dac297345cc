"""A vision-language model as judge, behind an OpenAI-compatible address (vLLM, SGLang, llama.cpp, a vendor)."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from dpok_trl.rewards.base import RewardError
from dpok_trl.rewards.client import Client, Transport
from dpok_trl.rewards.columns import column
from dpok_trl.rewards.info import RewardInfo
from dpok_trl.rewards.protocol import encode_picture, excerpt, to_pictures


logger = logging.getLogger(__name__)

# How UnifiedReward ends its answer, in bold or not. Of "1e3" or "4,5" the first digits are not the number.
FINAL_SCORE = r"Final Score:[\s*]*([-+]?\d+(?:\.\d+)?)(?!\d|[.,]\d|[eE][-+]?\d)"
TOP_LOGPROBS = 20  # the most that OpenAI and, by default, vLLM give

# What a request asks for besides its messages.
OPTIONS: dict[str, dict[str, Any]] = {
    "yes-probability": {"temperature": 0, "max_tokens": 1, "logprobs": True, "top_logprobs": TOP_LOGPROBS},
    "score": {"temperature": 0, "max_tokens": 1024},
}

AROUND_A_WORD = " \t\n\u2581\u0120\"'`*.,!"  # with the signs by which tokenizers write a space


class VLMJudge:
    """
    Shows each picture to a vision-language model with a question, and reads the reward off the answer. One request for each picture.

    Args:
        base_url (`str`): such as `"http://localhost:8000/v1"`; `/chat/completions` is added.
        model (`str`): name of the model there.
        question (`str`): `{prompt}` in it is replaced by the prompt. Other braces stay.
        mode (`str`, defaults to `"yes-probability"`): `"yes-probability"` is P(yes) / (P(yes) + P(no)) by the log-probabilities of the first
            token; `"score"` is the number in the answer.
        pattern (`str`): regular expression of mode `"score"`; its first group is the number. The last match of the answer counts.
        question_column (`str`, *optional*): column of the metadata that holds the question, in place of `question`. A sample whose question is
            `None` gets no reward.
        api_key (`str`, *optional*): sent as `Authorization: Bearer`.
        api_key_env (`str`, *optional*): name of the environment variable that holds the key; read with each call and not kept.
        options (`Mapping[str, Any]`, *optional*): further fields of the request; `None` takes one of ours away.
        timeout, retries, backoff, concurrency, headers, transport: as of [`RemoteReward`].

    Raises:
        `ValueError`: For settings that cannot be.
    """

    info = RewardInfo(
        name="vlm-judge",
        summary="a vision-language model's answer to a question about the picture",
        input="image, prompt",
        range="[0, 1], or the model's own scale",
        weights="the server's",
        licence="the server's",
        needs="an OpenAI-compatible server (docs/remote-rewards.md)",
        overlooks="What the model behind the address does not see, and whatever persuades it.",
    )
    image_type = "pil"
    overlaps = True

    def __init__(
        self,
        base_url: str,
        model: str,
        question: str = "Does this picture show: {prompt}? Answer yes or no.",
        mode: str = "yes-probability",
        *,
        pattern: str = FINAL_SCORE,
        question_column: str | None = None,
        api_key: str | None = None,
        api_key_env: str | None = None,
        options: Mapping[str, Any] | None = None,
        timeout: float = 60,
        retries: int = 4,
        backoff: float = 0.5,
        concurrency: int = 8,
        headers: Mapping[str, str] | None = None,
        transport: Transport | None = None,
    ) -> None:
        if mode not in OPTIONS:
            raise ValueError(f"mode must be one of {', '.join(map(repr, OPTIONS))}; got {mode!r}.")
        if api_key is not None and api_key_env is not None:
            raise ValueError("give api_key or api_key_env, not both.")
        try:
            self.pattern = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}.") from error
        if self.pattern.groups < 1:
            raise ValueError(f"pattern {pattern!r} has no group: put the number in parentheses.")
        if question_column is None and "{prompt}" not in question:
            logger.warning("The question of the judge has no {prompt}: it is the same for every picture. %r", question)
        self.client = Client(
            base_url.rstrip("/") + "/chat/completions",
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            concurrency=concurrency,
            headers=headers,
            transport=transport,
        )
        self.model = model
        self.question = question
        self.mode = mode
        self.question_column = question_column
        self.api_key = api_key
        self.api_key_env = api_key_env
        asked = {**OPTIONS[mode], **(options or {})}
        self.options = {name: value for name, value in asked.items() if value is not None}

    def __call__(
        self, images: Sequence[Image.Image] | Tensor, prompts: Sequence[str], metadata: Sequence[Any] | None = None
    ) -> tuple[list[float | None], dict[str, list[str | None]]]:
        """
        Args:
            images (`Sequence[PIL.Image.Image]` or `torch.Tensor` of shape `(B, 3, H, W)`): a tensor, of values in [0, 1], is rounded to 8 bits.
            metadata (`Sequence[Mapping]` of length B, *optional*): needed for `question_column`.

        Returns:
            `tuple[list[float | None], dict]`: the rewards, `None` where there is no question, NaN where no request was answered or the answer says
            neither yes nor no, or no number; and the answers, `{"answers": [...]}`.

        Raises:
            [`RewardError`]: If no request was answered, or an answer is not what the API gives.
            `ValueError`: If images and prompts differ in number, or a question is missing.
        """
        pictures = to_pictures(images)
        if len(pictures) != len(prompts):
            raise ValueError(f"images and prompts must be equally many; got {len(pictures)} and {len(prompts)}.")
        questions = self._questions(prompts, metadata)
        asked = [position for position, question in enumerate(questions) if question is not None]
        bodies = [self._body(pictures[position], questions[position]) for position in asked]

        rewards: list[float | None] = [None] * len(pictures)
        answers: list[str | None] = [None] * len(pictures)
        for position, body in zip(asked, self.client.post_all(bodies, self._authorization()), strict=True):
            rewards[position], answers[position] = (math.nan, None) if body is None else self._read(body)
        unread = [
            answers[position] for position in asked if answers[position] is not None and math.isnan(rewards[position])
        ]
        if unread:
            wanted = "yes or no" if self.mode == "yes-probability" else f"anything that {self.pattern.pattern!r} finds"
            logger.warning(
                "%d of %d answers of %s do not say %s. The first: %r",
                len(unread),
                len(asked),
                self.model,
                wanted,
                unread[0],
            )
        return rewards, {"answers": answers}

    def _questions(self, prompts: Sequence[str], metadata: Sequence[Any] | None) -> list[str | None]:
        if self.question_column is None:
            return [self.question.replace("{prompt}", prompt) for prompt in prompts]
        questions = column(metadata, self.question_column, len(prompts), "question_column")
        return [
            None if text is None else text.replace("{prompt}", prompt)
            for text, prompt in zip(questions, prompts, strict=True)
        ]

    def _body(self, picture: Image.Image, question: str) -> bytes:
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encode_picture(picture)}"}},
            {"type": "text", "text": question},
        ]
        request = {"model": self.model, "messages": [{"role": "user", "content": content}], **self.options}
        return json.dumps(request).encode()

    def _authorization(self) -> dict[str, str]:
        key = self.api_key
        if self.api_key_env is not None:
            key = os.environ.get(self.api_key_env)
            if not key:
                raise ValueError(
                    f"the environment variable {self.api_key_env}, which should hold the key of {self.client.url}, is not set."
                )
        return {} if key is None else {"Authorization": f"Bearer {key}"}

    def _read(self, body: bytes) -> tuple[float, str]:
        """The reward, NaN if the answer has none, and the text of the answer."""
        try:
            choice = json.loads(body)["choices"][0]
            text = choice["message"]["content"] or ""  # null where the model was cut off while thinking
            if self.mode == "score":
                return self._number(text), text
            first, *_ = choice["logprobs"]["content"]
            return yes_probability([(top["token"], float(top["logprob"])) for top in first["top_logprobs"]]), text
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            hint = "" if self.mode == "score" else " A server that gives no log-probabilities needs mode='score'."
            raise RewardError(
                f"{self.client.url} gave an answer that cannot be read ({type(error).__name__}: {error}); it begins {excerpt(body)}.{hint}"
            ) from error

    def _number(self, text: str) -> float:
        matches = list(self.pattern.finditer(text))
        try:
            value = float(matches[-1].group(1)) if matches else math.nan
        except (TypeError, ValueError):  # the group took no part, or holds a word
            return math.nan
        return value if math.isfinite(value) else math.nan


def yes_probability(tops: Sequence[tuple[str, float]]) -> float:
    """
    P(yes) / (P(yes) + P(no)), each the sum over the tokens that spell it: with a space before it, quoted, in capitals. NaN if neither is there.

    Args:
        tops (`Sequence[tuple[str, float]]`): tokens and their log-probabilities.
    """
    totals = {"yes": 0.0, "no": 0.0}
    for token, log_prob in tops:
        word = token.strip(AROUND_A_WORD).lower()
        if word in totals:
            totals[word] += math.exp(log_prob)
    both = totals["yes"] + totals["no"]
    return totals["yes"] / both if both > 0 else math.nan
