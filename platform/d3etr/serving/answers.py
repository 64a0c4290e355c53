"""What a request gets: an HTTP status and a JSON body."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from d3etr.text import redacted

BAD_REQUEST, TOO_SLOW, TOO_LARGE, FAILED, BUSY = 400, 408, 413, 500, 503


@dataclass(frozen=True)
class Answer:
    """An HTTP answer.

    Attributes:
        status: of HTTP.
        body: plain values, sent as JSON.
        headers: beside those that every answer has.
    """

    status: int
    body: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)


def refusal(status: int, text: object) -> Answer:
    """The answer to a request that gets no detections: why."""
    headers = {"Retry-After": "1"} if status == BUSY else {}
    return Answer(status, {"error": redacted(str(text))}, headers)


class RefusedError(Exception):
    """A request that cannot be answered with detections.

    Attributes:
        answer: what it gets instead.
        body_was_read: all of the request's body, or as much as is waited for.
    """

    def __init__(self, status: int, text: object, *, body_was_read: bool = False) -> None:
        super().__init__(str(text))
        self.answer, self.body_was_read = refusal(status, text), body_was_read
