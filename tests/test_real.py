"""Real pairs and a real Llama through the pipeline: two workers, ZeRO-2; skipped without data."""

import json
from pathlib import Path

import pytest
import torch
import yaml

import midpo_ray

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("objective", ["dpo", "b_dpo"])
def test_safety_expert_on_real_pairs(shared: Path, tmp_path: Path, objective: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = shared / "data/stories260k"
    recipe = tmp_path / "real.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "name": "real",
                "model": {"path": str(base)},
                "data": {
                    "sets": [{"path": str(shared / "data/pku_safety_pairs.jsonl"), "rows": 320}],
                    "max_length": 288,
                },
                "experts": {
                    "safety": {
                        "objective": {"name": objective, "beta": 0.1},
                        "optim": {"lr": 1e-3, "steps": 36, "batch_size": 16},
                        "group": {"workers": 2},
                    },
                    "helpfulness": {"objective": {"name": "dpo"}},
                },
                "router": {"rule": "labels"},
                "scores": {"workers": 2},
                "deepspeed": {"stage": 2},
                "logging": {"every": 6},
            }
        )
    )
    result = midpo_ray.run(
        midpo_ray.load_config(recipe),
        run_dir=str(tmp_path / "run"),
        until="safety",
    )
    assert result.ran == ["score", "safety"]
    rows = [
        json.loads(line)
        for line in (tmp_path / "run/metrics/safety.jsonl").read_text().splitlines()
    ]
    train = [r for r in rows if r["split"] == "train"]
    assert train[-1]["loss"] < train[0]["loss"] - 0.02
    held_out = next(r for r in rows if r["split"] == "validation")
    assert held_out["pairs"] > 10
    assert 0 < held_out["accuracy"] <= 1
    weights = train[0]["weight_chosen"] + train[0]["weight_rejected"]
    assert weights == pytest.approx(2)
    timed = json.loads((tmp_path / "run/metrics/safety.time.jsonl").read_text().splitlines()[-1])
    assert len(timed["nodes"]) == 2  # two workers
    # the adapter moves a plain PEFT model as in the run: the chosen's mean log-ratio is not zero
    plain = AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(plain, str(tmp_path / "run/experts/safety"))
    ids = torch.tensor([[1, 403, 407, 261, 378]])
    with torch.no_grad():
        moved = model(ids).logits
        with model.disable_adapter():
            still = model(ids).logits
    assert (moved - still).abs().max() > 1e-3
