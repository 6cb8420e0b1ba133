"""One preference row, and the identity of its texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Message = tuple[str, str]  # (role, content); roles are system, user, assistant
Prompt = tuple[Message, ...]  # ends with a user's message; a plain text is (("user", text),)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two responses to one prompt, and what people said of them; None is a label that is not there."""

    prompt: Prompt
    responses: tuple[str, str]
    safe: tuple[bool | None, bool | None] = (None, None)
    better: int | None = None  # 0 or 1, the more helpful response
    safer: int | None = None  # 0 or 1, the safer response
    margin: float | None = None  # TRL's margin column
    source: str = ""  # "FILE:LINE" or "FILE row N", for messages
    extra: Mapping[str, Any] = field(
        default_factory=dict
    )  # the other columns' plain values, for column scorers

    @property
    def labels(self) -> tuple[bool | None, bool | None, int | None, int | None]:
        """Response 0 safe, response 1 safe, the better, the safer."""
        return (*self.safe, self.better, self.safer)


def prompt_key(prompt: Prompt) -> str:
    """32 hex digits that name a prompt, wherever and in whatever order it is read."""
    return _hash(prompt)


def response_key(prompt: Prompt, response: str) -> str:
    """32 hex digits that name a response to a prompt; the key of the table of scores."""
    return _hash([prompt, response])


def _hash(content: Any) -> str:
    return hashlib.blake2b(
        json.dumps(content, ensure_ascii=False).encode(), digest_size=16
    ).hexdigest()
