"""The run directory's memory: which stages are finished, from which inputs, with which files.

A stage is done when the named parts of its fingerprint are those of last time and its files are there, unchanged. Everything
here is a pure function of the manifest and the files, so that what a command would do can be said without doing it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from .. import __version__
from ..config import Config, dump
from ..errors import UserError
from ..storage import Storage

MANIFEST = "manifest.json"


class Manifest:
    """``manifest.json`` of one run: {"recipe", "version", "stages": {name: {"parts", "files", "finished", "seconds"}}}."""

    def __init__(self, run: Storage) -> None:
        self.run = run
        self.content: dict[str, Any] = {"recipe": None, "stages": {}}
        if run.exists(MANIFEST):
            try:
                self.content = json.loads(run.read(MANIFEST))
                self.content["stages"]
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{run.path(MANIFEST)}: not a run's manifest; name another run directory"
                ) from None

    def claim(self, config: Config) -> None:
        """Take the directory for this recipe, and write the resolved configuration; another recipe's is refused."""
        self.refuse_other(config)
        self.content["recipe"] = config.name
        self._write()
        self.run.write("run.yaml", dump(config).encode())

    def refuse_other(self, config: Config) -> None:
        owner = self.content["recipe"]
        if owner not in (None, config.name):
            raise UserError(
                f"{self.run.uri}: holds a run of recipe {owner!r}, not {config.name!r}; name another --run-dir"
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
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.content["stages"][stage] = {
            "parts": dict(parts),
            "files": files,
            "finished": stamp,
            "seconds": round(seconds, 2),
        }
        self._write()

    def _write(self) -> None:
        self.content["version"] = __version__
        self.run.write(MANIFEST, json.dumps(self.content, indent=1, sort_keys=True).encode())
