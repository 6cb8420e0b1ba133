"""A preference set and a recipe so small that the whole job takes seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

WORDS = [
    "take",
    "give",
    "hold",
    "move",
    "turn",
    "lift",
    "press",
    "mix",
    "cut",
    "join",
    "keep",
    "open",
    "close",
    "fill",
    "find",
]


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """PKU-SafeRLHF's columns with scores beside them: a third of the rows has exactly one safe response."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        answers = [" ".join(rng.choices(WORDS, k=rng.randint(2, 6))) for _ in range(2)]
        better, safer = rng.randint(0, 1), rng.randint(0, 1)
        if number % 3 == 0:
            safe = [i == safer for i in range(2)]
        else:
            safe = [True, True]
            safer = better
        made.append(
            {
                "prompt": f"how to {rng.choice(WORDS)} thing {number}",
                "response_0": answers[0],
                "response_1": answers[1] + " !",
                "is_response_0_safe": safe[0],
                "is_response_1_safe": safe[1],
                "better_response_id": better,
                "safer_response_id": safer,
                **{f"reward_{i}": 1.0 + (i == better) + rng.random() / 2 for i in range(2)},
                **{f"cost_{i}": -1.0 + 2.0 * (not safe[i]) - 0.5 * (i == safer) for i in range(2)},
            }
        )
    return made


def write(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def recipe(folder: Path, model: Path, data: Path, **changes: Any) -> Path:
    """A YAML recipe beside its data; ``changes`` replace top-level sections."""
    optim = {"lr": 1e-2, "steps": 6, "batch_size": 8, "batch_tokens": 512}
    content: dict[str, Any] = {
        "name": "small",
        "model": {"path": str(model)},
        "data": {
            "sets": [{"path": str(data)}],
            "template": "Q: {prompt} A:",
            "max_length": 96,
            "validation": 0.15,
        },
        "scores": {
            "reward": {"column": "reward_{i}"},
            "cost": {"column": "cost_{i}"},
            "workers": 1,
        },
        "lora": {"r": 4, "alpha": 8},
        "experts": {
            "safety": {
                "objective": {"name": "spe_dpo", "beta": 0.5, "margin_scale": 0.5},
                "optim": optim,
            },
            "helpfulness": {"objective": {"name": "b_dpo", "beta": 0.5}, "optim": optim},
        },
        "router": {"rule": "pareto", "optim": optim},
        "checkpoint": {"every_steps": 2},
        "logging": {"every": 2},
        **changes,
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
