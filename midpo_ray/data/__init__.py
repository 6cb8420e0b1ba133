"""From preference sets to token ids: reading, selection rules, tokenising, batching."""

from .read import ReadReport, read_pairs
from .schema import Document, Pair, Prompt, prompt_key, response_key
from .selection import RULES, Selected, is_validation, require, risk_of_prompts, select
from .tokens import Tokenization

__all__ = [
    "RULES",
    "Document",
    "Pair",
    "Prompt",
    "ReadReport",
    "Selected",
    "Tokenization",
    "is_validation",
    "prompt_key",
    "read_pairs",
    "require",
    "response_key",
    "risk_of_prompts",
    "select",
]
