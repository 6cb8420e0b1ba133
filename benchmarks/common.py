"""What the benchmarks share: processes of their own, peak memory, the machine's description, results as JSON and Markdown."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "peft", "trl", "ray", "deepspeed")
GIB = 1 << 30


def isolated(module: str, arguments: Sequence[str], threads: int | None = None) -> dict[str, Any]:
    """What ``python -m module ARGUMENTS --result FILE`` writes into FILE, as JSON; raises with its output where it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if threads is not None:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", module, *arguments, "--result", str(result)]
        environment["HF_DATASETS_CACHE"] = folder  # nothing is found from an earlier run
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode or not result.exists():
            raise RuntimeError(
                f"{' '.join(command)} failed ({done.returncode}):\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            )
        return json.loads(result.read_text("utf-8"))


def peak_memory() -> int:
    """Bytes: the device's peak where there is a GPU, else this process's peak resident size."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def wait() -> None:
    """Until the device has done all that it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> dict[str, Any]:
    """Hardware, versions, date."""
    import torch

    names = [
        line.partition(":")[2].strip()
        for line in _read("/proc/cpuinfo").splitlines()
        if line.startswith("model name")
    ]
    flags = next(
        (line for line in _read("/proc/cpuinfo").splitlines() if line.startswith("flags")), ""
    )
    memory = next(
        (
            line.split()[1]
            for line in _read("/proc/meminfo").splitlines()
            if line.startswith("MemTotal")
        ),
        "0",
    )
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "features": [
            f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags.split()
        ],
        "memory_gib": round(int(memory) * 1024 / GIB, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "load_before": round(os.getloadavg()[0], 2),
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except OSError:
        return ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def save(
    name: str,
    result: Mapping[str, Any],
    title: str,
    rows: Sequence[Mapping[str, Any]],
    out: Path | None = None,
) -> str:
    """Write ``name``.json (or ``out``) and the Markdown table beside it; returns the Markdown."""
    path = out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    here = result["machine"]
    processor = (
        here["gpu"] or f"{here['cores']} cores of {here['cpu']} ({', '.join(here['features'])})"
    )
    versions = ", ".join(f"{k} {v}" for k, v in here["versions"].items() if v)
    text = f"## {title}\n\n{markdown(rows)}\n\n{here['date']}; {processor}, {here['memory_gib']} GiB; {versions}.\n"
    path.with_suffix(".md").write_text(text, "utf-8")
    return text


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a table."""
    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads), *([_cell(row[h]) for h in heads] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
