"""One preference pair as text and as tokens, and the keys that identify its texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Message = tuple[str, str]  # (role, content); the role is system, user or assistant
Prompt = tuple[Message, ...]  # ends with a user message; a plain text is (("user", text),)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two responses to one prompt with their human labels; a label that is not known is None."""

    prompt: Prompt
    responses: tuple[str, str]
    safe: tuple[bool | None, bool | None] = (None, None)
    better: int | None = None  # 0 or 1, the more helpful response
    safer: int | None = None  # 0 or 1, the safer response
    margin: float | None = None  # TRL's margin column
    source: str = ""  # "FILE:LINE" or "FILE row N", for messages
    extra: Mapping[str, Any] = field(default_factory=dict)  # other columns, for column scorers

    @property
    def labels(self) -> tuple[bool | None, bool | None, int | None, int | None]:
        """Response 0 safe, response 1 safe, the better response, the safer response."""
        return (*self.safe, self.better, self.safer)

    @property
    def keys(self) -> tuple[str, str]:
        """``response_key`` of either response."""
        first, second = self.responses
        return response_key(self.prompt, first), response_key(self.prompt, second)


@dataclass
class Document:
    """Token ids of a prompt and of each of its responses; none of them is empty."""

    prefix: list[int]
    suffixes: list[list[int]]
    keys: tuple[str, ...] = ()  # ``response_key`` of each response, where the texts are known


def prompt_key(prompt: Prompt) -> str:
    """32 hex digits that identify a prompt in every file and order."""
    return _hash(prompt)


def response_key(prompt: Prompt, response: str) -> str:
    """32 hex digits that identify a response to a prompt: the key of the score table."""
    return _hash([prompt, response])


def _hash(content: Any) -> str:
    text = json.dumps(content, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
