"""A training stage on Ray: one TorchTrainer in its own group, launched as a task; and what each of its workers does."""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..config import EXPERTS, SCORES, Config
from ..errors import UserError
from ..storage import Storage
from .plan import FOLDERS
from .watch import STOP, Watch, draining


def stage_spec(config: Config, stage: str, run: Storage, digest: str) -> dict[str, Any]:
    """All that a stage's workers need, as plain values."""
    return {
        "config": config.model_dump(mode="json"),
        "stage": stage,
        "run": run.uri,
        "digest": digest,
    }


def launch(spec: dict[str, Any], after: Sequence[Any] = ()) -> Any:
    """Start a stage as a Ray task that waits for ``after``; returns the reference of its outcome.

    It stays on the driver's node, and Train's controller with it, so that the death of any other node is a restart.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=here)(_fit_stage)
    return task.remote(spec, *after)


def _fit_stage(spec: dict[str, Any], *after: Any) -> dict[str, Any]:
    """The task: fit one TorchTrainer. Restarts after a worker's or node's death are Train's; resuming is the worker's own.

    Where a node has notice to go, its workers write a checkpoint and stop, and another TorchTrainer goes on elsewhere.
    """
    import os

    from .cluster import TRAIN_ENVIRONMENT, scaling

    config, stage = Config.model_validate(spec["config"]), spec["stage"]
    if any("stopped" in outcome for outcome in after):
        return {"stopped": 0}  # what it needs is not there
    # A process that does not even answer is Train's to end: its own watch may be frozen with it.
    frozen = min(600.0, 2 * config.cluster.stall_timeout)
    os.environ.update(TRAIN_ENVIRONMENT, RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S=str(frozen))
    from ray.train import FailureConfig, RunConfig
    from ray.train.torch import TorchTrainer

    group = config.group(stage)
    started = time.monotonic()
    workers = (
        group.workers if isinstance(group.workers, int) else (group.workers.min, group.workers.max)
    )
    outcome: dict[str, Any] = {"again": True}
    while outcome.get("again"):
        trainer = TorchTrainer(
            train_worker,
            train_loop_config=spec,
            scaling_config=scaling(group, workers),
            run_config=RunConfig(
                name=f"{stage}-{spec['digest'][:8]}-{uuid.uuid4().hex[:8]}",
                storage_path=(Storage(spec["run"]) / "logs/train").uri,
                failure_config=FailureConfig(max_failures=config.cluster.max_failures),
            ),
        )
        outcome = trainer.fit().return_value
    if "error" in outcome:
        raise UserError(outcome["error"])
    return {**outcome, "seconds": time.monotonic() - started}


def train_worker(spec: dict[str, Any]) -> dict[str, Any]:
    """What every worker of a stage does: build, fit, and (rank 0) write the result under its final name."""
    try:
        return _train(spec)
    except UserError as error:
        # The same fault on all ranks is an answer, and restarting would only repeat it. A fault of one rank alone must end the
        # others too, so it is raised.
        if _all_here():
            return {"error": str(error)}
        raise


def _all_here() -> bool:
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return True
    try:
        dist.monitored_barrier(
            dist.new_group(backend="gloo", timeout=timedelta(seconds=20)),
            timeout=timedelta(seconds=20),
        )
    except RuntimeError:
        return False
    return True


def _train(spec: dict[str, Any]) -> dict[str, Any]:
    import torch
    from ray import get_runtime_context
    from ray.train import get_context
    from ray.train.torch import get_device

    from ..training.checkpoint import Checkpoints
    from ..training.engine import trained_state
    from ..training.loop import fit
    from ..training.table import ScoreTable, StageTable

    config, stage, run = Config.model_validate(spec["config"]), spec["stage"], Storage(spec["run"])
    group, optim, context = config.group(stage), config.optim(stage), get_context()
    torch.set_num_threads(max(1, int(group.cpus_per_worker)))
    device = get_device()
    work = run / f"{FOLDERS[stage]}.work"
    tables = ScoreTable if stage in SCORES else StageTable
    table = tables.load(run / "dual" if stage == "router" else work, "pairs.parquet")
    rank, node = context.get_world_rank(), get_runtime_context().get_node_id()
    first = rank == 0
    owner = (f"{FOLDERS[stage]}.work/owner", uuid.uuid4().hex.encode()) if first else None
    if owner:
        run.write(*owner)
    watch = Watch(run, stage, rank, node, config.cluster.stall_timeout, owner, draining)
    with watch, tempfile.TemporaryDirectory() as scratch:
        model, engine, step = build(config, stage, run, device, Path(scratch))
        checkpoints = Checkpoints(
            work / "checkpoints", keep=config.checkpoint.keep, digest=spec["digest"]
        )
        metrics = _metrics(config, stage, run, spec["digest"]) if first else None
        result = fit(
            engine=engine,
            step=step,
            table=table,
            optim=optim,
            seed=config.seed_of_training,
            checkpoints=checkpoints,
            metrics=metrics,
            checkpoint=config.checkpoint,
            logging=config.logging,
            dtype=config.model.dtype,
            node=node,
            phase=watch.beat,
            should_stop=watch.noticed,
        )
        if metrics:
            metrics.close()
        if not result.finished:
            return {"stopped": result.step, "again": not run.exists(STOP)}
        watch.beat(result.step, "save")
        state = trained_state(engine, model, keep_dtype=stage not in SCORES)
        if first:
            save(config, stage, model, state, run, Path(scratch))
    return {"stage": stage}


def _metrics(config: Config, stage: str, run: Storage, digest: str) -> Any:
    from ..training.log import Metrics

    events = (run / f"logs/tensorboard/{stage}").local
    name = f"{config.name}-{digest[:8]}"
    return Metrics(
        run / "metrics",
        stage,
        config.logging,
        tensorboard=str(events) if events else None,
        run=name,
    )


def build(
    config: Config, stage: str, run: Storage, device: Any, scratch: Path
) -> tuple[Any, Any, Any]:
    """(model, DeepSpeed engine around it, training step), untrained; every rank of a process group calls it."""
    import torch.distributed as dist

    from ..models.logprobs import ResponseLogProbs
    from ..models.score_model import ResponseScores
    from ..training import engine as engines

    optim = config.optim(stage)
    settings = engines.deepspeed_settings(
        config.deepspeed, optim, config.model.dtype, dist.get_world_size()
    )
    keep = engines.prepare(settings, on_gpu=device.type == "cuda")
    model = build_model(config, stage, run, device, scratch)
    module = (
        ResponseScores(model)
        if stage in SCORES
        else ResponseLogProbs(model.model if stage == "router" else model)
    )
    engine = engines.deepspeed(module, optim, settings, device)
    del keep
    return model, engine, make_step(config, stage, engine, model)


def make_step(config: Config, stage: str, policy: Any, model: Any) -> Any:
    """The stage's training step over ``policy``, an engine or the module that one is of."""
    from ..training.steps import ExpertStep, RouterStep, ScoreStep

    if stage in SCORES:
        return ScoreStep(policy, stage)
    if stage == "router":
        return RouterStep(policy, model, beta=config.router.beta, prior=config.router.prior)
    objective = getattr(config.experts, stage).objective
    return ExpertStep(policy, beta=objective.beta, label_smoothing=objective.label_smoothing)


def build_model(config: Config, stage: str, run: Storage, device: Any, scratch: Path) -> Any:
    """The base with a fresh LoRA (a PeftModel); with both frozen experts and fresh gates (a RoutedCausalLM); a score model."""
    from ..models.assembly import route
    from ..models.base import add_lora, load_base, load_tokenizer
    from ..models.score_model import build_score_model

    if stage in SCORES:
        model: Any = build_score_model(config, device)
    elif stage == "router":
        base = load_base(config.model, device=device)
        safety, helpfulness = (run.download(FOLDERS[name], scratch / name) for name in EXPERTS)
        model = route(
            base, safety, helpfulness, config.router,
            tokenizer=load_tokenizer(config.model), data=config.data, base=config.model, seed=config.seed_of_training,
        )  # fmt: skip
    else:
        model = add_lora(
            load_base(config.model, device=device), config.lora, seed=config.seed_of_training
        )
    if config.optim(stage).gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def save(
    config: Config, stage: str, model: Any, state: dict[str, Any], run: Storage, scratch: Path
) -> None:
    """Write the stage's result whole under its final name: a plain PEFT adapter, the router, or a classifier."""
    from ..models.assembly import save_router
    from ..models.score_model import save_score_model

    folder = scratch / "result"
    if stage in SCORES:
        save_score_model(config, state, folder)
    elif stage == "router":
        save_router(model, folder, state)
    else:
        model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
    run.upload(folder, FOLDERS[stage])


def evaluate_miniature(config: Config, run: Storage, prompts: Path) -> dict[str, Any]:
    """The miniature's table (``evaluation.miniature``), computed by a Ray task on one core."""
    import ray

    local = run.local
    if local is None:
        raise UserError(f"{run.uri}: the miniature's table needs a local or shared run directory")
    assert config.evaluate is not None
    options = config.evaluate.model_dump()
    return ray.get(ray.remote(num_cpus=1)(_evaluate).remote(str(local), str(prompts), options))


def _evaluate(run: str, prompts: str, options: dict[str, Any]) -> dict[str, Any]:
    import torch

    from ..evaluation.miniature import evaluate_run  # a layer above this one

    torch.set_num_threads(1)
    return evaluate_run(run, prompts, **options)
