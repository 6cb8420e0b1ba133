"""The record of a run directory: which stages are finished, from which inputs, with which files.

A stage is done when the named parts of its fingerprint equal those that were recorded and its files
are there, unchanged. Whether a stage is done is a pure function of the manifest and the files.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from .. import __version__
from ..config import Config, dump
from ..errors import UserError
from ..storage import Storage
from .lock import check_lock

MANIFEST = "manifest.json"


class Manifest:
    """``manifest.json`` of one run, which is changed only under the run directory's lock.

    Its content is {"recipe", "version", "stages": {name: record}}, where a record has the keys
    parts, files (name -> SHA-256), finished and seconds.

    Raises:
        UserError: the file is there and is not a manifest.
    """

    def __init__(self, run: Storage) -> None:
        self.run = run
        self.content = self._read()

    def claim(self, config: Config) -> None:
        """Take the directory for this recipe, and write the resolved configuration."""
        self.refuse_other(config)
        self._update(lambda content: content.update(recipe=config.name))
        self.run.write("run.yaml", dump(config).encode())

    def refuse_other(self, config: Config) -> None:
        """Raise UserError where the directory has a run of another recipe."""
        owner = self.content["recipe"]
        if owner not in (None, config.name):
            raise UserError(
                f"{self.run.uri}: holds a run of recipe {owner!r}, not {config.name!r}; "
                "name another --run-dir"
            )

    def why(self, stage: str, parts: Mapping[str, str]) -> str | None:
        """Why the stage must run, or None where it is done."""
        known = self.content["stages"].get(stage)
        if known is None:
            return "not done yet"
        changed = sorted(
            k for k in {*parts, *known["parts"]} if parts.get(k) != known["parts"].get(k)
        )
        if changed:
            return f"changed: {', '.join(changed)}"
        for name, sha in known["files"].items():
            if not self.run.exists(name):
                return f"{name} is missing"
            if self.run.sha256(name) != sha:
                return f"{name} is not the file that the stage wrote"
        return None

    def commit(self, stage: str, parts: Mapping[str, str], folder: str, seconds: float) -> None:
        """Record a finished stage with the hashes of all files in its folder."""
        files = {
            name: self.run.sha256(name)
            for name in (f"{folder}/{f}" for f in (self.run / folder).files())
        }
        record = {
            "parts": dict(parts),
            "files": files,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seconds": round(seconds, 2),
        }
        self._update(lambda content: content["stages"].update({stage: record}))

    def _read(self) -> dict[str, Any]:
        if not self.run.exists(MANIFEST):
            return {"recipe": None, "stages": {}}
        try:
            content = json.loads(self.run.read(MANIFEST))
            if isinstance(content["stages"], dict) and "recipe" in content:
                return content
        except (ValueError, KeyError, TypeError):
            pass
        raise UserError(f"{self.run.path(MANIFEST)}: not a run's manifest; name another --run-dir")

    def _update(self, change: Callable[[dict[str, Any]], None]) -> None:
        check_lock(self.run)
        self.content = self._read()
        change(self.content)
        self.content["version"] = __version__
        self.run.write(MANIFEST, json.dumps(self.content, indent=1, sort_keys=True).encode())
