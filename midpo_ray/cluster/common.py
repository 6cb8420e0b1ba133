"""What the checks of both kinds of cluster file share."""

from __future__ import annotations

import difflib
import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jsonschema

from ..config import EXPERTS, Config
from ..pipeline.cluster import Node, hold
from .secrets import known_key, looks_secret

# A key and what is wrong with it.
Fault = tuple[str, str]


class Versions(NamedTuple):
    """What a job is submitted from; nodes must agree."""

    ray: str  # 2.60.0
    python: str  # 3.11

    @classmethod
    def local(cls) -> Versions:
        import ray

        return cls(ray.__version__, ".".join(platform.python_version_tuple()[:2]))


def unknown_key(path: str, key: str, known: Iterable[str]) -> Fault:
    """A key that nobody reads, with the nearest that somebody does."""
    names = sorted(known)
    near = difflib.get_close_matches(key, names, 1, 0.5)
    return join(path, key), "unknown key" + (
        f", did you mean {near[0]}?" if near else f" (known there: {', '.join(names)})"
    )


def join(*parts: str | int) -> str:
    return ".".join(str(p) for p in parts if str(p))


def schema_faults(document: Any, schema: Mapping[str, Any], at: str = "") -> Iterator[Fault]:
    """Each violation of a JSON schema, by its key."""
    for error in jsonschema.validators.validator_for(schema)(schema).iter_errors(document):
        yield from explain(error, at)


def explain(error: jsonschema.ValidationError, at: str = "") -> Iterator[Fault]:
    """A schema's complaint by its key, without the document that it is about."""
    path = join(at, *error.absolute_path)
    if error.validator == "additionalProperties" and isinstance(error.instance, dict):
        known = error.schema.get("properties", {})
        for key in error.instance:
            if key not in known:
                yield unknown_key(path, str(key), known)
    elif error.validator == "required" and isinstance(error.instance, dict):
        for key in error.validator_value:
            if key not in error.instance:
                yield join(path, key), "missing"
    elif error.validator == "enum":
        yield (
            path,
            f"one of {', '.join(map(str, error.validator_value))} is expected, this is {error.instance!r}",
        )
    elif error.validator == "type":
        types = (
            error.validator_value
            if isinstance(error.validator_value, list)
            else [error.validator_value]
        )
        yield path, f"{' or '.join(types)} is expected, this is {type(error.instance).__name__}"
    elif known_key(str(error.instance)) or looks_secret(f"{path}={error.instance}"):
        yield path, f"not what is expected there ({error.validator})"
    else:
        yield path, " ".join(error.message.split())[:200]


def strings(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a document with its key; a mapping's name/value pair (an environment variable) as ``NAME=value``."""
    if isinstance(node, Mapping):
        if isinstance(node.get("name"), str) and isinstance(node.get("value"), str):
            yield join(path, node["name"]), f"{node['name']}={node['value']}"
        for key, value in node.items():
            yield from strings(value, join(path, key))
    elif isinstance(node, Sequence) and not isinstance(node, str | bytes):
        for i, value in enumerate(node):
            yield from strings(value, join(path, i))
    elif isinstance(node, str):
        yield path, node


def secret_faults(documents: Sequence[Any], text: str) -> Iterator[Fault]:
    """Secrets by value, among the keys and in comments."""
    advice = "by value: name the file that holds it instead"
    found = False
    for document in documents:
        for path, value in strings(document):
            if kind := looks_secret(value) or looks_secret(f"{path.rpartition('.')[2]}={value}"):
                found = True
                yield path, f"{kind} {advice}"
    if not found:
        for number, line in enumerate(text.splitlines(), 1):
            if kind := known_key(line):
                yield f"line {number}", f"{kind} {advice}"


def version_faults(path: str, text: str, local: Versions) -> Iterator[Fault]:
    """Ray and Python versions that an image's name or a set-up command gives, where they differ from the local ones."""
    if re.search(r"rayproject/ray(?:-ml)?(?::(?:latest|nightly)\S*|\s*$)", text):
        yield (
            path,
            f"the image names no Ray version: rayproject/ray:{local.ray}-py{local.python.replace('.', '')} would match",
        )
    for found in re.findall(r"\bray(?:-ml)?(?:\[[\w,]*\])?(?::|==|-|_)v?(\d+\.\d+\.\d+)", text):
        if found != local.ray:
            yield (
                path,
                f"Ray {found} differs from the local {local.ray}: nodes and submitting machine need the same",
            )
    for major, minor in re.findall(r"(?:-py|python[=]{0,2}|/cp)(\d)\.?(\d+)", text):
        if f"{major}.{minor}" != local.python:
            yield (
                path,
                f"Python {major}.{minor} differs from the local {local.python}: nodes and submitting machine need the same",
            )


def lacking(recipe: Config, nodes: Sequence[Node], offered: str) -> Iterator[Fault]:
    """Groups of a recipe that the cluster, scaled up, can never hold."""
    groups = {f"experts.{name}.group": getattr(recipe.experts, name).group for name in EXPERTS}
    groups["router.group"] = recipe.router.group
    groups["scores"] = recipe.scores.group
    for key, group in groups.items():
        if hold([group], nodes) is None:
            continue
        need = {"CPU": group.cpus_per_worker, "GPU": group.gpus_per_worker, **group.resources}
        wanted = ", ".join(f"{v:g} {k}" for k, v in need.items() if v > 0)
        where = ", ".join(f"{k}: {v}" for k, v in group.label_selector.items())
        labelled = [n for n in nodes if n.holds({}, group.label_selector)]
        why = f"no node type offers that with {where}" if where else "no node type offers that"
        if not labelled:
            why = f"none is labelled {where}"
        if any(n.holds(need, group.label_selector) for n in nodes):
            why = "there are too few at full scale"
        yield offered, f"the recipe's {key} needs {group.min_workers} worker(s) of {wanted}: {why}"
