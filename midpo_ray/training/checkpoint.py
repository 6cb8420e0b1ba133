"""Checkpoints of what is trained: parameters and AdamW's two moments, for any number of workers.

    <folder>/step-00000040/trainable.safetensors    "parameter/<name>", "exp_avg/<name>",
                                                    "exp_avg_sq/<name>", all float32
    <folder>/step-00000040/state.json               step, digest of the configuration, metric sums,
                                                    sha256 of the tensors

A checkpoint is written beside its name and then renamed. One that is torn or corrupt is skipped
with a warning. Nothing in it depends on pickle, on DeepSpeed's stage or on the number of workers.

The learning rate, the data's order and the random numbers are functions of step and seed (ours).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..storage import Storage

log = logging.getLogger(__name__)

TENSORS, STATE = "trainable.safetensors", "state.json"
KINDS = ("parameter", "exp_avg", "exp_avg_sq")
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class SavedState:
    step: int  # optimizer steps taken
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Checkpoints:
    """The last ``keep`` checkpoints of one stage. Only one process (rank 0) writes.

    Args:
        digest: of what the training depends on; a checkpoint with another is not resumed from.
    """

    def __init__(self, folder: Storage, *, keep: int, digest: str) -> None:
        self.folder, self.keep, self.digest = folder, keep, digest

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, complete or not, in rising order."""
        return steps_in(self.folder.names())

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write step ``step`` whole, then remove all but the last ``keep``.

        Raises:
            UserError: no space or no permission; older checkpoints stay, and nothing half-written.
        """
        data = safetensors.torch.save(
            {name: value.contiguous() for name, value in sorted(tensors.items())}
        )
        content = {
            **state,
            "step": step,
            "digest": self.digest,
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        _check_size(len(data), tensors)
        aside, name = f"writing-{step:08d}", name_of(step)
        try:
            self.folder.write(f"{aside}/{TENSORS}", data)
            self.folder.write(f"{aside}/{STATE}", json.dumps(content).encode())
            self.folder.rename(aside, name)
        except BaseException:
            self.folder.delete(aside)
            raise
        for old in beyond(self.steps(), self.keep):
            self.folder.delete(name_of(old))

    def load(self, step: int) -> SavedState:
        """Read one.

        Raises:
            ValueError: it is torn, corrupt, or of another configuration.
        """
        name = name_of(step)
        try:
            content = json.loads(self.folder.read(f"{name}/{STATE}"))
            data = self.folder.read(f"{name}/{TENSORS}")
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"{name} is torn ({' '.join(str(error).split())})") from None
        if not isinstance(content, dict) or content.get("step") != step:
            raise ValueError(f"{name} is corrupt ({STATE} is of another step)")
        if hashlib.sha256(data).hexdigest() != content.get("sha256"):
            raise ValueError(f"{name} is corrupt (the hash of {TENSORS} differs from {STATE})")
        if content.get("digest") != self.digest:
            raise ValueError(f"{name} is of another configuration")
        return SavedState(step, safetensors.torch.load(data), content)

    def resume(self) -> SavedState | None:
        """The newest good checkpoint, or None; anything newer in the folder is removed."""
        found = None
        for step in reversed(self.steps()):
            try:
                found = self.load(step)
                break
            except ValueError as error:
                log.warning("checkpoint %s: %s; the previous one is tried", self.folder.uri, error)
        kept = {name_of(s) for s in self.steps() if found and s <= found.step}
        for name in self.folder.names():
            if name not in kept:
                self.folder.delete(name)
        return found


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def steps_in(names: Iterable[str]) -> list[int]:
    """The steps of those names that are a checkpoint's, in rising order."""
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def beyond(steps: Iterable[int], keep: int) -> list[int]:
    """Steps to remove so that the newest ``keep`` stay."""
    return sorted(steps)[:-keep]


def _check_size(size: int, tensors: Mapping[str, Tensor]) -> None:
    """At most three float32 numbers per trained parameter, and headers: no frozen weight."""
    trained, headers = 0, 4096
    for name, value in tensors.items():
        kind = name.split("/")[0]
        if kind not in KINDS or value.dtype != torch.float32:
            raise AssertionError(f"checkpoint: {name} ({value.dtype}) is not expected")
        trained += value.numel() if kind == "parameter" else 0
        headers += len(name) + 200
    if size > 12 * trained + headers:
        raise AssertionError(f"checkpoint of {size} bytes for {trained} trained parameters")
