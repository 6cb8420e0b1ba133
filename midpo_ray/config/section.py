"""The base class of every section: strict, frozen, and helpful about unknown keys."""

from __future__ import annotations

import difflib
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """A mapping of known keys.

    ``renamed`` maps keys that older versions had to the keys that replace them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=True)
    renamed: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known_keys_only(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        for key in raw:
            if key in cls.renamed:
                hint = f", it was replaced by {cls.renamed[key]}"
            elif key not in cls.model_fields:
                near = difflib.get_close_matches(str(key), cls.model_fields, 1)
                hint = f", did you mean {near[0]}?" if near else ""
            else:
                continue
            known = ", ".join(cls.model_fields)
            raise PydanticCustomError(
                "unknown_key",
                "{hint} (known keys: {known})",
                {"key": str(key), "hint": hint, "known": known},
            )
        return raw
