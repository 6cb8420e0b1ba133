"""Runs a function in several processes that form one gloo group."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """``function(rank, world, *args)`` in ``world`` spawned processes (a top-level function); what each returned, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(world, folder, function, args), nprocs=world)
        return [
            torch.load(Path(folder) / f"result-{rank}", weights_only=False) for rank in range(world)
        ]


def _rank(
    rank: int, world: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), DS_ACCELERATOR="cpu"
    )
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    try:
        torch.save(function(rank, world, *args), Path(folder) / f"result-{rank}")
        dist.barrier()
    finally:
        dist.destroy_process_group()
