"""Reading a configuration: shipped or from a YAML file, with overrides, and errors of one line."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from ..errors import UserError
from .recipe import EXPERTS, Config

_Checked = TypeVar("_Checked", bound=BaseModel)


def shipped_recipes() -> list[str]:
    return _shipped("midpo_ray.recipes")


def shipped_studies() -> list[str]:
    return _shipped("midpo_ray.studies")


def _shipped(package: str) -> list[str]:
    names = [p.name for p in resources.files(package).iterdir()]
    return sorted(n.removesuffix(".yaml") for n in names if n.endswith(".yaml"))


def load_config(recipe_or_path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a shipped recipe or a YAML file, with ``key.sub=value`` overrides (values are YAML).

    Raises:
        UserError: one line that names the key, its path, what is allowed, and the nearest key.
    """
    text, path = str(recipe_or_path), Path(recipe_or_path)
    source: Any = path
    where = text
    if text in shipped_recipes():
        source, where = resources.files("midpo_ray.recipes") / f"{text}.yaml", f"recipe {text}"
    elif path.suffix not in (".yaml", ".yml"):
        near = difflib.get_close_matches(text, shipped_recipes(), 1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise UserError(
            f"recipe {text!r} is not known{hint} (shipped recipes: {', '.join(shipped_recipes())};"
            " a file ends in .yaml)"
        )
    raw = {"name": path.stem, **read_mapping(source, where)}
    return with_overrides(raw, parse_overrides(overrides), where)


def read_mapping(source: Any, where: str) -> dict[str, Any]:
    """Read a YAML file, a path or a resource, that holds a mapping.

    Raises:
        UserError: it cannot be read or holds something else; the message begins with ``where``.
    """
    try:
        raw = yaml.safe_load(source.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: cannot be read ({error.__class__.__name__}: {error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        what = "is empty" if raw is None else f"holds a {type(raw).__name__}"
        raise UserError(f"{where}: a mapping of keys is expected, the file {what}")
    return raw


def dump(config: Config) -> str:
    """The resolved configuration as YAML; ``load_config`` reads it back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def digest(*parts: Any) -> str:
    """A content hash (32 hex digits) of JSON-able values and configuration sections."""
    plain = [p.model_dump(mode="json") if isinstance(p, BaseModel) else p for p in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:32]


def parse_overrides(words: Iterable[str]) -> dict[str, Any]:
    """``key.sub=value`` words of a command line as a mapping; values are YAML.

    Raises:
        UserError: a word has another form.
    """
    overrides = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"override {word!r}: key.sub=value is expected")
        try:
            overrides[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"override {word!r}: the value is not YAML") from None
    return overrides


def with_overrides(
    config: Config | Mapping[str, Any], overrides: Mapping[str, Any], where: str
) -> Config:
    """The recipe with some keys replaced, validated as a whole; ``config`` itself is not changed.

    Args:
        config: a configuration, or the mapping that a recipe's file holds.
        overrides: dotted keys and their values. A number is a place in a list, and
            ``experts.*.KEY`` is the key of both experts.
        where: what begins an error message, for example ``study paper: SPE-DPO: set``.

    Raises:
        UserError: one line that names the key and what would have been right.
    """
    raw: Any = config.model_dump() if isinstance(config, Config) else config
    for name, value in overrides.items():
        keys = [name]
        if name.startswith("experts.*."):
            keys = [name.replace("*", expert, 1) for expert in EXPERTS]
        for key in keys:
            try:
                raw = _replaced(raw, key.split("."), value)
            except KeyError as error:
                raise UserError(f"{where}: {name}: {error.args[0]!r} is not a key there") from None
    return validated(Config, raw, where)


def _replaced(node: Any, path: list[str], value: Any) -> Any:
    """``node`` with the value at ``path`` replaced. The containers on the path are new: YAML's
    aliases share one object, and replacing a key of one expert must not change the other."""
    if not path:
        return value
    part, *rest = path
    if isinstance(node, list | tuple):
        if not part.isdigit() or int(part) >= len(node):
            raise KeyError(part)
        items = list(node)
        items[int(part)] = _replaced(items[int(part)], rest, value)
        return items
    if node is not None and not isinstance(node, Mapping):
        raise KeyError(part)
    mapping = dict(node or {})
    mapping[part] = _replaced(mapping.get(part), rest, value)
    return mapping


def validated(section: type[_Checked], raw: Mapping[str, Any], where: str) -> _Checked:
    """``raw`` as a section of this class: a recipe, a sweep's space, a study.

    Raises:
        UserError: one line that begins with ``where`` and names every key that is wrong.
    """
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error, raw)}") from None


def _explain(error: ValidationError, raw: Mapping[str, Any]) -> str:
    """Every wrong key with its fault, in one line.

    A union reports one error per alternative. Alternatives that want another type of value are
    left out where a nearer fault is known; what is left is joined by "or".
    """
    faults = [(_path(e["loc"], raw, e["type"]), e) for e in error.errors()]
    messages: dict[str, list[str]] = {}
    for path, fault in faults:
        nearer = [
            p for p, f in faults if p[: len(path)] == path and not f["type"].endswith("_type")
        ]
        if fault["type"].endswith("_type") and nearer:
            continue
        key = ".".join(path)
        text = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "unknown_key":
            unknown = ".".join([*path, fault["ctx"]["key"]])
            messages.setdefault(f"unknown key {unknown}{text}", [])
        elif fault["type"] == "missing":
            messages.setdefault(f"key {key} is missing", [])
        elif key:
            value = "" if isinstance(fault["input"], dict) else f", this is {fault['input']!r}"
            texts = messages.setdefault(f"key {key}: ", [])
            texts.append(f"{text[0].lower()}{text[1:]}{value}")
        else:
            messages.setdefault(text, [])
    return "; ".join(head + " or ".join(texts) for head, texts in messages.items())


def _path(loc: tuple[int | str, ...], raw: Any, kind: str) -> list[str]:
    """The keys of an error's location, without the names of a union's alternatives."""
    path: list[str] = []
    for place, part in enumerate(loc):
        known = isinstance(raw, Mapping) and part in raw
        known = known or (isinstance(raw, list | tuple) and isinstance(part, int))
        if known:
            raw = raw[part]
            path.append(str(part))
        elif kind == "missing" and place == len(loc) - 1:
            path.append(str(part))
    return path
