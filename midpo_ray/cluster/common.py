"""What the checks of both kinds of cluster file share."""

from __future__ import annotations

import difflib
import math
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import jsonschema
import yaml

from ..config import Config
from .secrets import known_key, looks_secret

Fault = tuple[str, str]  # a key, and what is wrong with it

_TYPES: dict[str, dict[str, Any]] = {
    "any": {},
    "text": {"type": "string", "minLength": 1},
    "texts": {"type": "object", "additionalProperties": {"type": "string"}},
    "boolean": {"type": "boolean"},
    "object": {"type": "object"},
    "number": {"type": "number", "minimum": 0},
    "count": {"type": "integer", "minimum": 0},
    "positive": {"type": "integer", "minimum": 1},
}


class Versions(NamedTuple):
    """The versions of a machine that submits jobs; the nodes' must be the same."""

    ray: str  # 2.60.0
    python: str  # 3.11

    @classmethod
    def local(cls) -> Versions:
        import ray  # slow to import, and a submitting machine's version may be given

        return cls(ray.__version__, ".".join(platform.python_version_tuple()[:2]))


class Offer(NamedTuple):
    """Nodes of one kind, at full scale."""

    resources: Mapping[str, float]
    labels: Mapping[str, str]
    nodes: int

    def workers(self, need: Mapping[str, float], selector: Mapping[str, str]) -> int:
        """How many workers that need these resources run here."""
        if any(self.labels.get(key) != value for key, value in selector.items()):
            return 0
        shares = [self.resources.get(k, 0.0) / v + 1e-9 for k, v in need.items() if v > 0]
        return self.nodes * int(min([*shares, 1e6]))


def load_schemas(name: str) -> dict[str, Any]:
    """The JSON schemas of a file in schemas/, by their names.

    Its notation: ``key: type``; ``key!`` is required; a list is an enumeration; /.../ is a pattern;
    a mapping is a section that has no other keys, ``key[]`` a list of such sections, ``key*`` a
    section or a list of them; ``names`` and ``more`` list keys of any type.
    """
    text = (resources.files(__package__) / "schemas" / name).read_text("utf-8")
    return {key: _schema(node) for key, node in yaml.safe_load(text).items()}


def _schema(node: Any) -> dict[str, Any]:
    if isinstance(node, list):
        return {"enum": node}
    if isinstance(node, str):
        return {"pattern": f"^{node[1:-1]}$"} if node.startswith("/") else _TYPES[node]
    names = f"{node.get('names', '')} {node.get('more', '')}".split()
    properties: dict[str, Any] = {name: {} for name in names}
    required = []
    for key, value in node.items():
        if key in ("names", "more"):
            continue
        name, schema = key.rstrip("!*[]"), _schema(value)
        if key.endswith("[]"):
            schema = {"type": "array", "items": schema}
        elif key.endswith("*"):
            schema = {"if": {"type": "array"}, "then": {"items": schema}, "else": schema}
        elif key.endswith("!"):
            required.append(name)
        properties[name] = schema
    section = {"properties": properties, "required": required, "additionalProperties": False}
    return {"type": "object", **section}


def join(*parts: str | int) -> str:
    return ".".join(str(part) for part in parts if str(part))


def schema_faults(document: Any, schema: Mapping[str, Any], at: str = "") -> Iterator[Fault]:
    """Each violation of a JSON schema."""
    validator = jsonschema.validators.validator_for(schema)(schema)
    for error in validator.iter_errors(document):
        yield from violation(error, at)


def without_nulls(node: Any) -> Any:
    """A document without keys and items that have no value: they count as missing."""
    if isinstance(node, dict):
        return {key: without_nulls(value) for key, value in node.items() if value is not None}
    if isinstance(node, list):
        return [without_nulls(item) for item in node if item is not None]
    return node


def violation(error: jsonschema.ValidationError, at: str = "") -> Iterator[Fault]:
    """What a schema finds wrong, by key and without the document that it is about."""
    path, value, rule = join(at, *error.absolute_path), error.instance, error.validator_value
    if error.validator == "additionalProperties" and isinstance(value, dict):
        known = sorted(error.schema.get("properties", {}))
        for key in sorted(value.keys() - set(known)):
            near = difflib.get_close_matches(str(key), known, 1, 0.5)
            hint = f", did you mean {near[0]}?" if near else f" (known keys: {', '.join(known)})"
            yield join(path, key), f"unknown key{hint}"
    elif error.validator == "required":
        yield from ((join(path, key), "missing") for key in rule if key not in value)
    elif error.validator == "enum":
        yield path, f"one of {', '.join(map(str, rule))} is expected, this is {value!r}"
    elif error.validator == "type":
        types = rule if isinstance(rule, list) else [rule]
        yield path, f"{' or '.join(types)} is expected, this is {type(value).__name__}"
    elif known_key(str(value)) or looks_secret(f"{path}={value}"):
        yield path, f"not what is expected there ({error.validator})"
    else:
        yield path, " ".join(error.message.split())[:200]


def strings(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a document with its key; an environment variable as ``NAME=value``."""
    if isinstance(node, Mapping):
        if isinstance(node.get("name"), str) and isinstance(node.get("value"), str):
            yield join(path, node["name"]), f"{node['name']}={node['value']}"
        for key, value in node.items():
            yield from strings(value, join(path, key))
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            yield from strings(value, join(path, i))
    elif isinstance(node, str):
        yield path, node


def secret_faults(documents: Sequence[Any], text: str) -> Iterator[Fault]:
    """Secrets by value, in keys and in comments."""
    advice = "by value: name the file that holds it instead"
    found = False
    for path, value in strings(list(documents)):
        path = path.partition(".")[2]  # without the document's number
        if kind := looks_secret(value) or looks_secret(f"{path.rpartition('.')[2]}={value}"):
            found = True
            yield path, f"{kind} {advice}"
    for number, line in enumerate(text.splitlines(), 1):
        if not found and (kind := known_key(line)):
            yield f"line {number}", f"{kind} {advice}"


def version_faults(path: str, text: str, local: Versions) -> Iterator[Fault]:
    """Versions in an image's name or a set-up command that differ from the local ones."""
    if re.search(r"rayproject/ray(?:-ml)?(?::(?:latest|nightly)\S*|\s*$)", text):
        fitting = f"rayproject/ray:{local.ray}-py{local.python.replace('.', '')}"
        yield path, f"the image names no Ray version; {fitting} would match"
    rays = re.findall(r"\bray(?:-ml)?(?:\[[\w,]*\])?(?::|==|-|_)v?(\d+\.\d+\.\d+)", text)
    pythons = re.findall(r"(?:-py|python[=]{0,2}|/cp)(\d)\.?(\d+)", text)
    versions = [("Ray", v, local.ray) for v in rays]
    versions += [("Python", ".".join(v), local.python) for v in pythons]
    for what, version, own in versions:
        if version != own:
            yield path, f"{what} {version} differs from the local {own}: they must be the same"


def lacking(recipe: Config, offers: Sequence[Offer], key: str) -> Iterator[Fault]:
    """Groups of a recipe that the cluster, scaled up, can never hold."""
    groups = {
        "experts.safety.group": recipe.experts.safety.group,
        "experts.helpfulness.group": recipe.experts.helpfulness.group,
        "router.group": recipe.router.group,
        "scores": recipe.scores.group,
    }
    for name, group in groups.items():
        need = {"CPU": group.cpus_per_worker, "GPU": group.gpus_per_worker, **group.resources}
        selector = group.label_selector
        room = sum(offer.workers(need, selector) for offer in offers)
        if room >= group.min_workers:
            continue
        wanted = ", ".join(f"{v:g} {k}" for k, v in need.items() if v > 0)
        where = ", ".join(f"{k}: {v}" for k, v in selector.items())
        why = f"there is room for {room} at full scale"
        if not any(offer.workers({}, selector) for offer in offers):
            why = f"no node is labelled {where}"
        elif room == 0:
            why = "no node type offers that" + (f" with {where}" if where else "")
        yield key, f"the recipe's {name} needs {group.min_workers} worker(s) of {wanted}: {why}"


def quantity(value: Any) -> float:
    """A Kubernetes quantity, 8, "8" or "500m"; unlimited without a value."""
    if value is None:
        return math.inf
    parts = re.fullmatch(r"([\d.]+)(m?)", str(value))
    return float(parts[1]) / (1000 if parts[2] else 1) if parts else math.inf
