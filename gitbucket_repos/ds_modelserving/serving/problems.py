"""Errors that a client gets: a status, a type to program against, and words that tell nothing of the inside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole HTTP answer. `closes` ends the connection after it: what the client still sends is not read."""

    status: int
    body: bytes
    media_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    closes: bool = False


class ProblemError(Exception):
    """Something that a client is told about.

    Args:
        status: HTTP status.
        kind: the error's `type`, stable across releases.
        message: what was wrong, with the value found.
        hint: what to do.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        hint: str,
        *,
        headers: Mapping[str, str] | None = None,
        closes: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.message = message
        self.hint = hint
        self.headers = dict(headers or {})
        self.closes = closes

    def answer(self) -> Answer:
        """The answer that tells it."""
        value = {"error": {"type": self.kind, "message": self.message, "hint": self.hint}}
        return Answer(
            self.status, json.dumps(value, ensure_ascii=False).encode(), headers=self.headers, closes=self.closes
        )


def too_large(limit_bytes: int) -> ProblemError:
    return ProblemError(
        413,
        "too_large",
        f"the body is larger than {limit_bytes} bytes",
        "send a smaller picture, or raise deploy.max_upload in the pipeline's YAML",
        closes=True,
    )


def unsupported(found: str, accepted: list[str]) -> ProblemError:
    return ProblemError(
        415, "unsupported_media_type", f"this model does not take {found}", f"it takes: {', '.join(accepted)}"
    )


def unusable(message: str) -> ProblemError:
    return ProblemError(422, "unusable_input", message, "check that the file opens in a viewer, and send it again")


def busy() -> ProblemError:
    return ProblemError(
        503, "busy", "too many requests are waiting", "try again in a second", headers={"Retry-After": "1"}
    )


def not_ready(reason: str) -> ProblemError:
    return ProblemError(
        503, "not_ready", reason, "try again later; /health tells when it is ready", headers={"Retry-After": "2"}
    )


def stopping() -> ProblemError:
    return ProblemError(
        503, "stopping", "this process is stopping", "try again", headers={"Retry-After": "1"}, closes=True
    )


def internal() -> ProblemError:
    return ProblemError(
        500, "internal", "the model could not answer this request", "the service's log says why; tell its owner"
    )
