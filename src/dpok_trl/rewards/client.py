"""Requests to a reward server: retries, several at once, and errors in words. Standard library only."""

from __future__ import annotations

import http.client
import logging
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

from dpok_trl.rewards.base import RewardError
from dpok_trl.rewards.protocol import excerpt


logger = logging.getLogger(__name__)

# (url, body, headers, timeout) -> (status, body of the answer); raises OSError or http.client.HTTPException where there is no answer.
Transport = Callable[[str, bytes, Mapping[str, str], float], tuple[int, bytes]]

OK = 200
TOO_MANY_REQUESTS = 429
SERVER_ERROR = 500
MAX_ANSWER = 64 * 2**20  # bytes
CHUNK = 2**16
MAX_DIGITS = 20  # of a Content-Length


class RequestFailed(RewardError):
    """One request got no answer that could be used, whatever was tried."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would repeat a POST as a GET, and send the headers, a key among them, wherever it is told to."""

    def redirect_request(self, *args: object) -> None:
        return None


def urllib_transport(url: str, body: bytes, headers: Mapping[str, str], timeout: float) -> tuple[int, bytes]:
    """One POST. `timeout` holds for each wait for bytes, and for the body as a whole: a server that drips is given up as well.

    Raises:
        `OSError`, `http.client.HTTPException`: Where there is no answer in time.
        [`RequestFailed`]: For an answer of more than `MAX_ANSWER` bytes.
    """
    request = urllib.request.Request(url, data=body, headers=dict(headers), method="POST")
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout) as response:
            return response.status, _read(response, url, timeout)
    except urllib.error.HTTPError as error:  # any status that is not a success
        with error:
            return error.code, _read(error, url, timeout)


def _read(response: Any, url: str, timeout: float) -> bytes:
    """The body, as it comes: `read()` would wait for all of it, however long that takes."""
    deadline = time.monotonic() + timeout
    length = response.headers.get("Content-Length", "")
    expected = int(length) if length.isdecimal() and len(length) < MAX_DIGITS else None
    parts: list[bytes] = []
    size = 0
    while part := response.read1(CHUNK):
        parts.append(part)
        size += len(part)
        if size > MAX_ANSWER:
            raise RequestFailed(f"the reward server {url} answered with more than {MAX_ANSWER} bytes.")
        if size == expected:  # `read1` of Python 3.11 does not count, and would wait for the end of the connection
            break
        if time.monotonic() > deadline:
            raise TimeoutError
    body = b"".join(parts)
    if expected is not None and size != expected:  # `read1` takes a broken connection for the end
        raise http.client.IncompleteRead(body)
    return body


class Client:
    """
    Sends requests to one address, several at once, and repeats what may go better the next time: no connection, a timeout, status 429 or 5xx.
    Other statuses are the request's own fault and not repeated.

    Args:
        url (`str`): http or https.
        timeout (`float`): seconds of each attempt to wait for the answer to begin, and then for all of it.
        retries (`int`): attempts after the first.
        backoff (`float`): seconds before the first of them; each further wait is twice the one before.
        concurrency (`int`): requests under way at once.
        headers (`Mapping[str, str]`, *optional*): sent with each request. They are in no message.
        transport (`Callable`, *optional*): `(url, body, headers, timeout) -> (status, body)` in place of urllib.

    Raises:
        `ValueError`: For settings that cannot be.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float,
        retries: int,
        backoff: float,
        concurrency: int,
        headers: Mapping[str, str] | None,
        transport: Transport | None,
    ) -> None:
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise ValueError(f"the address of a reward server begins with http:// or https://; got {url!r}.")
        for name, value, least in (("retries", retries, 0), ("backoff", backoff, 0), ("concurrency", concurrency, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}.")
        if not timeout > 0:
            raise ValueError(f"timeout must be above 0 seconds; got {timeout}.")
        self.url = url
        self.timeout = timeout
        self.waits = [backoff * 2**attempt for attempt in range(retries)]
        self.concurrency = concurrency
        self.headers = {"Content-Type": "application/json", "Accept": "application/json", **(headers or {})}
        self.transport = transport or urllib_transport

    def post_all(self, bodies: Sequence[bytes], headers: Mapping[str, str] | None = None) -> list[bytes | None]:
        """
        The answers in the order of the requests; `None` for a request that failed, of which the log says why.

        Raises:
            [`RequestFailed`]: If all of them failed, and there is at least one.
        """
        stopped = threading.Event()
        pool = ThreadPoolExecutor(max(1, min(self.concurrency, len(bodies))), "reward-request")
        try:
            futures = [pool.submit(self._post, body, {**self.headers, **(headers or {})}, stopped) for body in bodies]
            # Not one after another: an error of the last would wait for the repeats of the first.
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()  # raises what one of them raised
            results = [future.result() for future in futures]
        finally:  # with an error, or Ctrl-C, nothing more begins and nobody waits for what is under way: it ends with its timeout
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
        failures = [result for result in results if isinstance(result, RequestFailed)]
        if failures and len(failures) == len(results):
            raise failures[-1]
        if failures:
            logger.warning("%d of %d requests failed. The last: %s", len(failures), len(results), failures[-1])
        return [None if isinstance(result, RequestFailed) else result for result in results]

    def _post(self, body: bytes, headers: Mapping[str, str], stopped: threading.Event) -> bytes | RequestFailed:
        """The answer, or what was tried for it."""
        for attempt, pause in enumerate([*self.waits, None], start=1):
            try:
                status, answer = self.transport(self.url, body, headers, self.timeout)
            except RequestFailed as error:
                return error
            except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
                problem = self._describe(error)
            else:
                if status == OK:
                    return answer
                problem = f"status {status}, {excerpt(answer, 300)}"
                if status != TOO_MANY_REQUESTS and status < SERVER_ERROR:
                    return RequestFailed(
                        f"the reward server {self.url} refused the request (attempt {attempt}): {problem}."
                    )
            if pause is None or stopped.wait(pause):
                break
        return RequestFailed(
            f"the reward server {self.url} gave no usable answer in {attempt} {'attempt' if attempt == 1 else 'attempts'}. "
            f"The last error: {problem}."
        )

    def _describe(self, error: Exception) -> str:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, TimeoutError):
            return f"no answer within {self.timeout:g} s"
        return f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else str(reason)
