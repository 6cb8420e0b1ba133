"""The loop: what is due when, checks before and during training, and resuming to the last bit, in one process and in two."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from training_world import LORA, OPTIM, expert, llama, table

from midpo_ray import config
from midpo_ray.errors import UserError
from midpo_ray.models import ResponseLogProbs, RoutedCausalLM, add_lora, load_base, route
from midpo_ray.pipeline.train import on_sigterm
from midpo_ray.storage import Storage
from midpo_ray.training.checkpoint import Checkpoints, name_of
from midpo_ray.training.engine import (
    Engine,
    deepspeed,
    deepspeed_settings,
    plain,
    prepare,
    trained_state,
)
from midpo_ray.training.loop import FitResult, fit
from midpo_ray.training.metrics import MetricsLog, lines_until, means
from midpo_ray.training.schedule import BatchSchedule, Due, due, learning_rate, step_seed
from midpo_ray.training.steps import ExpertStep, RouterStep
from midpo_ray.training.table import StageTable

LOGGING = config.Logging(every=3, validate_every=4, tensorboard=False)
CHECKPOINT = config.Checkpoint(every_steps=2, keep=2)
TOTAL = 8  # 24 training pairs in batches of 6, two epochs


class Killed(BaseException):
    """The process ends here."""


def kill_at(step: int, phase: str) -> Callable[[int, str], None]:
    def watch(now: int, name: str) -> None:
        if (now, name) == (step, phase):
            raise Killed

    return watch


def run(
    engine: Engine,
    folder: Path | str,
    data: StageTable | None = None,
    optim: config.Optim = OPTIM,
    routed: RoutedCausalLM | None = None,
    **keys: Any,
) -> FitResult:
    first, storage = engine.group.rank == 0, Storage(str(folder))
    options = {"checkpoint": CHECKPOINT, "logging": LOGGING, **keys}
    return fit(
        engine=engine,
        step=RouterStep(engine, routed, beta=0.5, prior=0.3)
        if routed
        else ExpertStep(engine, beta=0.5),
        table=data or table(),
        optim=optim,
        seed=3,
        checkpoints=Checkpoints(
            storage / "checkpoints", keep=options["checkpoint"].keep, digest="d"
        ),
        metrics=MetricsLog(storage / "metrics", "safety", options["logging"]) if first else None,
        **options,
    )


def one(dropout: float = 0.0, optim: config.Optim = OPTIM) -> Engine:
    return plain(expert(dropout=dropout), optim)


def routed_model(folder: str | Path) -> RoutedCausalLM:
    """The Llama with two experts that differ, and fresh gates; ``folder`` holds or gets the experts."""
    for seed, name in enumerate(("safety", "helpfulness")):
        if not (Path(folder) / name).exists():
            adapter = add_lora(llama(), LORA, seed)
            for parameter in adapter.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter.data, std=0.3)
            adapter.save_pretrained(Path(folder) / name)
    return route(llama(), Path(folder) / "safety", Path(folder) / "helpfulness", config.Router())


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics/safety.jsonl").read_text().splitlines()]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    folder, engine = tmp_path_factory.mktemp("undisturbed"), one()
    assert run(engine, folder) == FitResult(TOTAL, TOTAL, 0)
    return folder, engine.state()


def test_metrics_are_written_at_intervals_and_at_the_end(undisturbed):
    folder, _ = undisturbed
    records = metrics_of(folder)
    assert [(r["step"], r["split"]) for r in records] == [
        (3, "train"), (4, "validation"), (6, "train"), (8, "train"), (8, "validation"),
    ]  # fmt: skip
    assert [r["pairs"] for r in records] == [18, 6, 18, 12, 6]
    assert records[3]["epoch"] == 2.0
    assert records[3]["loss"] < records[0]["loss"] < math.log(2)
    assert records[3]["accuracy"] > 0.8
    assert records[3]["lr"] == learning_rate(7, TOTAL, OPTIM)
    assert set(records[0]) - set(records[1]) == {"lr", "grad_norm"}
    times = [
        json.loads(line) for line in (folder / "metrics/safety.time.jsonl").read_text().splitlines()
    ]
    assert [len(t["steps"]) for t in times] == [3, 3, 2]
    assert all(begin <= end for t in times for begin, end in t["steps"])
    assert all(t["tokens_per_second"] > 0 and len(t["nodes"]) == 1 for t in times)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [name_of(6), name_of(8)]


def test_again_does_nothing(undisturbed):
    folder, state = undisturbed
    before = (folder / "metrics/safety.jsonl").read_bytes()
    engine = one()
    assert run(engine, folder) == FitResult(TOTAL, TOTAL, TOTAL)
    assert same(engine.state(), state)
    assert (folder / "metrics/safety.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("step", "phase", "resumed"),
    [
        (1, "train", 0),
        (4, "train", 2),
        (6, "log", 4),
        (4, "validate", 2),
        (6, "checkpoint", 4),
        (8, "train", 6),
    ],
)
def test_killed_and_resumed_is_the_same_to_the_last_bit(
    tmp_path, undisturbed, step, phase, resumed
):
    folder, state = undisturbed
    with pytest.raises(Killed):
        run(one(), tmp_path, heartbeat=kill_at(step, phase))
    with (
        open(tmp_path / "metrics/safety.jsonl", "ab")
        if step > 3
        else open(os.devnull, "ab") as file
    ):
        file.write(b'{"step": 9')  # it was writing
    engine = one()
    assert run(engine, tmp_path) == FitResult(TOTAL, TOTAL, resumed)
    assert same(engine.state(), state)
    assert (tmp_path / "metrics/safety.jsonl").read_bytes() == (
        folder / "metrics/safety.jsonl"
    ).read_bytes()


def test_a_damaged_newest_checkpoint_costs_steps_and_nothing_else(tmp_path, undisturbed):
    folder, state = undisturbed
    with pytest.raises(Killed):
        run(one(), tmp_path, heartbeat=kill_at(7, "train"))
    (tmp_path / "checkpoints" / name_of(6) / "trainable.safetensors").write_bytes(b"torn")
    engine = one()
    assert run(engine, tmp_path) == FitResult(TOTAL, TOTAL, 4)
    assert same(engine.state(), state)
    assert (tmp_path / "metrics/safety.jsonl").read_bytes() == (
        folder / "metrics/safety.jsonl"
    ).read_bytes()


def test_dropout_s_random_numbers_are_resumed(tmp_path):
    whole, killed = one(dropout=0.3), one(dropout=0.3)
    run(whole, tmp_path / "whole")
    with pytest.raises(Killed):
        run(killed, tmp_path / "killed", heartbeat=kill_at(6, "train"))
    again = one(dropout=0.3)
    torch.manual_seed(99)
    run(again, tmp_path / "killed")
    assert same(again.state(), whole.state())


def test_sigterm_leaves_a_checkpoint_and_the_same_command_goes_on(tmp_path, undisturbed):
    folder, state = undisturbed

    def notice(now: int, name: str) -> None:
        if (now, name) == (5, "train"):
            signal.raise_signal(signal.SIGTERM)

    with on_sigterm() as noticed:
        stopped = run(one(), tmp_path, heartbeat=notice, should_stop=noticed.is_set)
    assert stopped == FitResult(5, TOTAL, 0)
    assert not stopped.finished
    engine = one()
    assert run(engine, tmp_path) == FitResult(TOTAL, TOTAL, 5)
    assert same(engine.state(), state)
    assert (tmp_path / "metrics/safety.jsonl").read_bytes() == (
        folder / "metrics/safety.jsonl"
    ).read_bytes()


def test_the_router_trains_its_gates(tmp_path):
    routed = routed_model(tmp_path)
    engine = plain(ResponseLogProbs(routed.model), OPTIM)
    assert run(engine, tmp_path, routed=routed).finished
    records = [r for r in metrics_of(tmp_path) if r["split"] == "train"]
    assert records[-1]["loss"] < records[0]["loss"]
    assert all(
        r["prior"] == pytest.approx(r["safety_gate"] + 1 - r["helpfulness_gate"], rel=1e-5)
        for r in records
    )
    assert records[0]["prior"] != records[-1]["prior"]
    values = trained_state(engine, routed)
    assert values.keys() == set(routed.gate_state())
    routed_wrong = routed_model(tmp_path)
    wrong = plain(ResponseLogProbs(routed_wrong.model), OPTIM)
    with pytest.raises(UserError, match="reference"):
        run(wrong, tmp_path / "wrong", table(reference_rejected=[-4.0] * 30), routed=routed_wrong)


def test_trained_state_has_the_adapter_s_own_names(undisturbed):
    engine = one()
    adapter = engine.module.model
    values = trained_state(engine, adapter)
    assert values.keys() == {n for n, p in adapter.named_parameters() if p.requires_grad}
    assert all(torch.equal(values[n], p) for n, p in adapter.named_parameters() if p.requires_grad)


def test_a_wrong_reference_stops_before_the_first_step(tmp_path):
    wrong = table(reference_chosen=[-5.0] * 30)
    with pytest.raises(UserError, match=r"must be 0\.6931 per pair.*reference"):
        run(one(), tmp_path, wrong)
    assert not (tmp_path / "checkpoints").exists()
    margins = table(margin=[1.0] * 30)
    run(one(), tmp_path, margins, config.Optim(steps=1, lr=1e-5, batch_size=4))


@pytest.mark.parametrize("checkpoint", [2, 50])
def test_a_non_finite_loss_names_its_row_and_is_not_kept(tmp_path, checkpoint):
    engine = one()
    victim = BatchSchedule(table().split()[0].lengths("tree"), OPTIM, 3).batch(1)[2]

    class Broken(ExpertStep):
        def __call__(self, batch):
            loss, values = super().__call__(batch)
            bad = (
                batch.signals["reference_chosen"]
                == table().split()[0].signals([victim])["reference_chosen"]
            )
            return loss + (float("nan") if bad.any() else 0.0), values

    storage = Storage(tmp_path)
    with pytest.raises(UserError, match="step 2: the loss or its gradient is not finite") as error:
        fit(
            engine=engine,
            step=Broken(engine, beta=0.5),
            table=table(),
            optim=OPTIM,
            seed=3,
            checkpoints=Checkpoints(storage / "checkpoints", keep=2, digest="d"),
            metrics=None,
            checkpoint=config.Checkpoint(every_steps=checkpoint),
            logging=LOGGING,
        )
    assert table().split()[0].ids([victim])[0] in str(error.value)
    assert not (tmp_path / "checkpoints").exists()


def test_a_non_finite_gradient_names_the_batch(tmp_path):
    engine = one()

    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    step = ExpertStep(lambda tokens: Steep.apply(engine(tokens)), beta=0.5)
    storage = Storage(tmp_path)
    with pytest.raises(
        UserError, match=r"step 1: the loss or its gradient is not finite, rows data\.jsonl"
    ):
        fit(
            engine=engine, step=step, table=table(), optim=OPTIM, seed=3, metrics=None, checkpoint=CHECKPOINT, logging=LOGGING,
            checkpoints=Checkpoints(storage / "checkpoints", keep=2, digest="d"),
        )  # fmt: skip


def test_no_row_to_train_on(tmp_path):
    with pytest.raises(UserError, match="no pair is left"):
        run(one(), tmp_path, StageTable(table().arrow.slice(4, 1)))


# --- decisions, without a model ---


def test_due():
    every = {"logging": LOGGING, "checkpoint": config.Checkpoint(every_steps=5, every_seconds=60)}
    assert due(1, 10, **every) == Due(log=False, validate=False, checkpoint=False, stop=False)
    assert due(3, 10, **every).log
    assert due(4, 10, **every).validate
    assert due(5, 10, **every).checkpoint
    assert due(1, 10, since_checkpoint=60, **every).checkpoint
    assert due(1, 10, stop_requested=True, **every) == Due(
        log=False, validate=False, checkpoint=True, stop=True
    )
    assert due(10, 10, stop_requested=True, **every) == Due(
        log=True, validate=True, checkpoint=True, stop=False
    )
    never = config.Checkpoint(every_steps=None)
    assert not due(50, 100, logging=LOGGING, checkpoint=never, since_checkpoint=1e9).checkpoint
    assert due(100, 100, logging=config.Logging(), checkpoint=never).validate  # at the end at least


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate(schedule):
    optim = config.Optim(lr=0.5, schedule=schedule, warmup=0.1)
    rates = [learning_rate(step, 100, optim) for step in range(100)]
    assert rates[:10] == pytest.approx([0.05 * (i + 1) for i in range(10)])
    assert rates[10] == 0.5
    after = {
        "cosine": 0.25 * (1 + math.cos(math.pi * 60 / 90)),
        "linear": 0.5 * 30 / 90,
        "constant": 0.5,
    }
    assert rates[70] == pytest.approx(after[schedule])
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert learning_rate(0, 1, optim) > 0


def test_plan_is_the_same_for_every_world_and_covers_an_epoch():
    lengths = [5 + i % 7 for i in range(23)]
    plan = BatchSchedule(lengths, config.Optim(batch_size=4, epochs=1.5, batch_tokens=20), seed=1)
    assert (plan.steps_per_epoch, plan.total) == (6, 9)
    assert sorted(i for step in range(6) for i in plan.batch(step)) == list(range(23))
    assert [plan.batch(step) for step in (7, 0, 7)] == [plan.batch(7), plan.batch(0), plan.batch(7)]
    assert plan.batch(0) != plan.batch(6)
    for world in (1, 2, 3):
        shares = [plan.micro_batches(2, rank, world) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1
        assert sorted(i for share in shares for rows in share for i in rows) == sorted(
            plan.batch(2)
        )


def test_step_seed_depends_on_all_it_is_given():
    seeds = {
        step_seed(seed, step, rank) for seed in range(3) for step in range(3) for rank in range(3)
    }
    assert len(seeds) == 27
    assert step_seed(0, 1, 2) == step_seed(0, 1, 2)


def test_means():
    sums = {
        "loss": 3.0,
        "pairs": 4.0,
        "tokens": 30.0,
        "padding": 10.0,
        "grad_norm": 5.0,
        "steps": 2.0,
        "prior": 15.0,
    }
    assert means(sums) == {
        "loss": 0.75,
        "pairs": 4,
        "tokens": 30,
        "padding": 0.25,
        "grad_norm": 2.5,
        "prior": 0.5,
    }


def test_lines_until():
    content = b'{"step": 3}\n{"step": 6}\n{"step": 9}\nno json\n{"step": 3'
    assert lines_until(content, 6) == b'{"step": 3}\n{"step": 6}\n'
    assert lines_until(content, 0) == b""


def test_tensorboard_files_and_missing_services(tmp_path):
    folder = Storage(tmp_path)
    metrics = MetricsLog(folder, "safety", config.Logging(), tensorboard=str(tmp_path / "board"))
    metrics.resume(0)
    metrics.write({"step": 1, "split": "train", "loss": 0.5}, {"step": 1, "tokens_per_second": 3.0})
    metrics.__exit__(None)
    assert list((tmp_path / "board").glob("events*"))
    for service in ("wandb", "mlflow"):
        try:
            __import__(service)
        except ImportError:
            with pytest.raises(UserError, match=f"package {service} is not installed"):
                MetricsLog(folder, "safety", config.Logging(**{service: "project"}))


def test_an_mlflow_run_is_resumed_by_its_name_and_ended_on_an_error(tmp_path, monkeypatch):
    calls: list[tuple] = []
    known: list[SimpleNamespace] = []
    fake = SimpleNamespace(
        set_experiment=lambda name: None,
        search_runs=lambda **_: known,
        start_run=lambda **keys: calls.append(("start", keys)),
        log_metrics=lambda values, step: calls.append(("log", values, step)),
        end_run=lambda status: calls.append(("end", status)),
    )
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    logging = config.Logging(mlflow="project", tensorboard=False)
    with MetricsLog(Storage(tmp_path), "safety", logging, run="small") as metrics:
        metrics.write({"step": 1, "split": "train", "loss": 0.5})
    known.append(SimpleNamespace(info=SimpleNamespace(run_id="7")))
    with pytest.raises(Killed), MetricsLog(Storage(tmp_path), "safety", logging, run="small"):
        raise Killed
    assert calls == [
        ("start", {"run_name": "small-safety"}),
        ("log", {"train/loss": 0.5}, 1),
        ("end", "FINISHED"),
        ("start", {"run_id": "7"}),
        ("end", "FAILED"),
    ]


# --- two ranks ---


def make(kind: str | int, module: torch.nn.Module | None = None) -> Engine:
    if kind == "plain":
        return plain(module or expert(), OPTIM)
    persist = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    settings = deepspeed_settings(
        config.DeepSpeed(stage=kind, extra=persist),
        OPTIM,
        "float32",
        torch.distributed.get_world_size(),
    )
    kept = prepare(settings, on_gpu=False)
    engine = deepspeed(module or expert(), OPTIM, settings, "cpu")
    del kept
    return engine


ROUTERS: tuple[str | int, ...] = ("plain", 2, 3)


def whole_and_killed(
    rank: int, world: int, folder: str, kinds: list[str | int]
) -> dict[str | int, bool]:
    exact = {}
    for kind in kinds:
        whole = make(kind)
        run(whole, f"{folder}/{kind}-whole")
        with pytest.raises(Killed):
            run(make(kind), f"{folder}/{kind}-killed", heartbeat=kill_at(6, "train"))
        again = make(kind)
        result = run(again, f"{folder}/{kind}-killed")
        exact[kind] = result.resumed_from == 4 and same(again.state(), whole.state())
    for kind in ROUTERS:
        routed = [routed_model(folder) for _ in range(3)]
        engines = [make(kind, ResponseLogProbs(r.model)) for r in routed]
        run(engines[0], f"{folder}/router-{kind}-whole", routed=routed[0])
        with pytest.raises(Killed):
            run(
                engines[1],
                f"{folder}/router-{kind}-killed",
                routed=routed[1],
                heartbeat=kill_at(6, "train"),
            )
        run(engines[2], f"{folder}/router-{kind}-killed", routed=routed[2])
        exact[f"router-{kind}"] = same(engines[0].state(), engines[2].state())
    settings = deepspeed_settings(config.DeepSpeed(stage=3), OPTIM, "float32", world)
    kept = prepare(settings, on_gpu=False)  # from here every rank loads its share only
    sharded = load_base(config.Model(path=f"{folder}/base"))
    exact["sharded"] = not sum(parameter.numel() for parameter in sharded.parameters())
    run(
        deepspeed(ResponseLogProbs(add_lora(sharded, LORA, 1)), OPTIM, settings, "cpu"),
        f"{folder}/sharded",
    )
    del kept
    for stage in ("plain", 2):  # begun by one rank, finished by two
        assert run(make(stage), f"{folder}/grown-{stage}").resumed_from == 4
    return exact


@pytest.mark.slow
def test_two_ranks_all_stages_agree_with_one_and_resume_to_the_last_bit_and_elastically(
    tmp_path, undisturbed
):
    folder, state = undisturbed
    kinds: list[str | int] = ["plain", 0, 1, 2, 3]
    for stage in ("plain", 2):
        with pytest.raises(Killed):
            run(one(), tmp_path / f"grown-{stage}", heartbeat=kill_at(6, "train"))
    alone = routed_model(tmp_path)
    llama().save_pretrained(tmp_path / "base")
    run(plain(ResponseLogProbs(alone.model), OPTIM), tmp_path / "router", routed=alone)
    exact = run_ranks(whole_and_killed, 2, str(tmp_path), kinds)
    assert (
        exact
        == [dict.fromkeys([*kinds, *(f"router-{kind}" for kind in ROUTERS), "sharded"], True)] * 2
    )
    assert_close(tmp_path / "sharded", folder, 1e-5)
    for kind in ROUTERS:
        assert_close(tmp_path / f"router-{kind}-whole", tmp_path / "router", 1e-5)
    for kind in kinds:
        whole, killed = tmp_path / f"{kind}-whole", tmp_path / f"{kind}-killed"
        assert (whole / "metrics/safety.jsonl").read_bytes() == (
            killed / "metrics/safety.jsonl"
        ).read_bytes(), kind
        assert_close(whole, folder, 1e-5)
        last = Checkpoints(Storage(whole / "checkpoints"), keep=2, digest="d").load(TOTAL)
        torch.testing.assert_close(last.tensors, state, rtol=1e-4, atol=1e-6)
        shrunk = whole / "checkpoints" / name_of(6)  # begun by two ranks, finished by one
        shutil.copytree(shrunk, tmp_path / f"shrunk-{kind}/checkpoints" / name_of(6))
        shutil.copytree(whole / "metrics", tmp_path / f"shrunk-{kind}/metrics")
        assert run(one(), tmp_path / f"shrunk-{kind}").resumed_from == 6
        assert_close(tmp_path / f"shrunk-{kind}", folder, 1e-4)
    for stage in ("plain", 2):
        assert_close(tmp_path / f"grown-{stage}", folder, 1e-4)


def assert_close(folder: Path, other: Path, relative: float) -> None:
    """Every number of two metrics files agrees; padding is that of the micro-batches, which depend on the ranks."""
    for mine, theirs in zip(metrics_of(folder), metrics_of(other), strict=True):
        assert mine.pop("split") == theirs.pop("split")
        del mine["padding"], theirs["padding"]
        assert mine == pytest.approx(theirs, rel=relative, abs=1e-6), folder.name
