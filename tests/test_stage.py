"""A training stage in one process: its outcomes, and resuming from one share of its steps to the next."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import smallworld
from test_tuning import small_scored

from midpo_ray.config import load_config
from midpo_ray.errors import UserError
from midpo_ray.pipeline.signals import stage_table, write_table
from midpo_ray.pipeline.stage import Outcome, StageSpec, run_alone
from midpo_ray.pipeline.watch import STOP
from midpo_ray.storage import Storage


@pytest.fixture
def spec(tmp_path: Path, tiny_model_dir) -> StageSpec:
    """The safety expert of a tiny model, whose table is written; its reference is not the model's."""
    data = smallworld.write(tmp_path / "pairs.jsonl", smallworld.rows(60))
    checkpoint = {"every_steps": 2, "keep": 2}
    recipe = smallworld.recipe(tmp_path, tiny_model_dir(), data, checkpoint=checkpoint)
    config = load_config(recipe)
    made = StageSpec(config, "safety", str(tmp_path / "run"), "digest")
    table, _ = stage_table(config, "safety", small_scored())
    zeros = pa.array([0.0] * len(table))
    for name in ("reference_chosen", "reference_rejected", "margin"):
        table = table.set_column(table.column_names.index(name), name, zeros)
    write_table(made.work, "pairs.parquet", table)
    return made


@pytest.fixture
def untrained(monkeypatch) -> None:
    """The check of the first loss is another test's: this table has no real reference."""
    monkeypatch.setattr("midpo_ray.pipeline.watch._NOTICE_INTERVAL", 0.05)
    monkeypatch.setattr("midpo_ray.training.loop.check_untrained", lambda *_: None)


@pytest.mark.slow
def test_a_stage_in_this_process_is_resumed_stopped_and_saved(spec, untrained) -> None:
    part = run_alone(replace(spec, share=0.5, log=False))
    assert (part.outcome, part.step) == (Outcome.FINISHED, 3)
    assert 0 <= part.values["accuracy"] <= 1
    run = Storage(spec.run)
    assert not run.exists("experts/safety")
    assert not run.exists("metrics")
    notice = Storage(f"{spec.run}-notice")
    notice.write(STOP, b"")
    stopped = run_alone(replace(spec, notice=notice.uri, config=_long(spec)))
    assert stopped.outcome is Outcome.STOPPED
    assert 3 < stopped.step < 2000
    notice.delete(STOP)
    done = run_alone(spec)
    assert done.outcome is Outcome.FINISHED
    assert done.seconds > 0
    assert run.exists("experts/safety/adapter_config.json")
    steps = [json.loads(line)["step"] for line in run.read("metrics/safety.jsonl").splitlines()]
    assert steps[-1] == done.step
    assert run.names("logs/faults") == []


@pytest.mark.slow
def test_a_user_s_fault_is_an_outcome(spec) -> None:
    result = run_alone(spec)
    assert result.outcome is Outcome.FAILED
    assert "reference" in result.error
    with pytest.raises(UserError, match="reference"):
        result.raise_failure()


def _long(spec: StageSpec):
    experts = spec.config.experts
    optim = (experts.safety.optim or experts.optim).model_copy(update={"steps": 2000})
    return spec.config.model_copy(
        update={
            "experts": experts.model_copy(
                update={"safety": experts.safety.model_copy(update={"optim": optim})}
            )
        }
    )
