"""A training stage: its model is built, trained under a watchdog, and saved.

There is one way to run one, ``run_stage``, and three places for it: a group of workers of Ray Train
(``launch``: runs and score models), this process (``run_alone``: studies), and a placement that the
caller holds (``start_workers``: trials of a sweep).
"""

from __future__ import annotations

import gc
import os
import socket
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Any

from ..config import EXPERTS, SCORES, Config
from ..errors import UserError
from ..storage import Storage
from .cluster import TRAIN_ENVIRONMENT, bundle, scaling
from .plan import FOLDERS
from .watch import STOP, Watchdog, is_draining

# Ray is imported inside functions, after ``cluster.connect`` has set the environment that it reads;
# torch, transformers and DeepSpeed only in the workers: the driver starts without them.


class Outcome(Enum):
    FINISHED = "finished"
    STOPPED = "stopped"  # by a notice to the whole run
    PREEMPTED = "preempted"  # by a notice to the node; another node can resume
    FAILED = "failed"  # because of the user's input: restarting would repeat it


@dataclass(frozen=True)
class StageResult:
    """How a stage ended.

    Args:
        step: optimizer steps taken.
        values: metrics of the held-out pairs, where ``StageSpec.share`` asks for them.
        error: one line, where the outcome is FAILED.
    """

    outcome: Outcome
    step: int = 0
    seconds: float = 0.0
    values: Mapping[str, float] = field(default_factory=dict)
    error: str = ""

    def raise_failure(self) -> StageResult:
        if self.outcome is Outcome.FAILED:
            raise UserError(self.error)
        return self


@dataclass(frozen=True)
class StageSpec:
    """What the workers of a stage need; it is sent to them.

    Args:
        run: URI of the run directory. The stage's table lies there already.
        digest: of all that the training depends on; other checkpoints are not resumed.
        experts: URI of the folder with the adapters that a router is built on; default ``run``.
        notice: URI of the folder whose ``logs/stop`` stops the stage; default ``run``.
        share: train to this share of the steps and measure the held-out pairs, instead of training
            to the end and saving the model.
        log: write the metrics files, TensorBoard and so on.
    """

    config: Config
    stage: str
    run: str
    digest: str
    experts: str = ""
    notice: str = ""
    share: float | None = None
    log: bool = True

    @property
    def work(self) -> Storage:
        """The folder of checkpoints and of an expert's table, for as long as the stage runs."""
        return Storage(self.run) / f"{FOLDERS[self.stage]}.work"


# --- on a group of workers of Ray Train ---


def launch(spec: StageSpec, after: Sequence[Any] = ()) -> Any:
    """Submit a stage as a Ray task that waits for the tasks ``after``.

    The task, and Ray Train's controller in it, stays on the driver's node, so that the death of any
    other node is a restart.

    Returns:
        The reference of its ``StageResult``, never FAILED: that is raised as UserError.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=here)(_fit_on_group)
    return task.remote(spec, *after)


def _fit_on_group(spec: StageSpec, *after: StageResult) -> StageResult:
    """Restarts after the death of a worker or node are Ray Train's; a worker resumes by itself.

    After a notice to a node its workers stop with a checkpoint; a new group resumes elsewhere.
    """
    if any(result.outcome is not Outcome.FINISHED for result in after):
        return StageResult(Outcome.STOPPED)  # what it needs is missing
    # A process that does not even answer is ended by Train: its watchdog may be frozen with it.
    frozen = min(600.0, 2 * spec.config.cluster.stall_timeout)
    os.environ.update(TRAIN_ENVIRONMENT, RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S=str(frozen))
    from ray.train import FailureConfig, RunConfig  # reads the environment when it is imported
    from ray.train.torch import TorchTrainer

    started, group = time.monotonic(), spec.config.group(spec.stage)
    elastic = not isinstance(group.workers, int)
    result = StageResult(Outcome.PREEMPTED)
    while result.outcome is Outcome.PREEMPTED:
        trainer = TorchTrainer(
            _group_worker,
            train_loop_config={"spec": spec},
            scaling_config=scaling(
                group, (group.min_workers, group.max_workers) if elastic else group.min_workers
            ),
            run_config=RunConfig(
                name=f"{spec.stage}-{spec.digest[:8]}-{uuid.uuid4().hex[:8]}",
                storage_path=(Storage(spec.run) / "logs/train").uri,
                failure_config=FailureConfig(max_failures=spec.config.cluster.max_failures),
            ),
        )
        result = trainer.fit().return_value
    return replace(result.raise_failure(), seconds=time.monotonic() - started)


def _group_worker(settings: dict[str, StageSpec]) -> StageResult:
    from ray.train import get_context
    from ray.train.torch import get_device

    return run_stage(settings["spec"], get_device(), get_context().get_world_rank())


# --- in this process, and in a placement ---


def run_alone(spec: StageSpec) -> StageResult:
    """Run a stage with a single worker in this process, which may run others afterwards."""
    return _placed_worker(spec, 0, 1, None)


def start_workers(spec: StageSpec, placement: Any, first: int) -> list[Any]:
    """Run a stage in bundles ``first``, ``first + 1``, ... of a placement group, one per worker.

    Returns:
        One reference of a ``StageResult`` per worker. A single worker's process is kept warm.
    """
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = spec.config.group(spec.stage)
    world, amounts = group.min_workers, bundle(group)
    options: dict[str, Any] = {"max_retries": 0}
    if world > 1:  # a process belongs to one process group in its life
        environment = {"env_vars": {"MIDPO_WORLD": str(world)}}
        options = {"max_retries": 0, "max_calls": 1, "runtime_env": environment}

    def place(function: Any, rank: int) -> Any:
        return ray.remote(
            num_cpus=amounts["CPU"],
            num_gpus=amounts["GPU"],
            resources=dict(group.resources) or None,
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement, first + rank),
            **options,
        )(function)

    address = ray.get(place(_free_address, 0).remote()) if world > 1 else None
    return [place(_placed_worker, rank).remote(spec, rank, world, address) for rank in range(world)]


def _free_address() -> str:
    import ray

    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"


def _placed_worker(spec: StageSpec, rank: int, world: int, address: str | None) -> StageResult:
    import torch
    import torch.distributed as dist

    on_gpu = spec.config.group(spec.stage).gpus_per_worker > 0
    os.environ["LOCAL_RANK"] = "0"
    if not dist.is_initialized():  # DeepSpeed keeps a group of one for the stages that follow
        where: dict[str, Any] = {"store": dist.HashStore()}
        if address:
            where = {"init_method": f"tcp://{address}"}
        backend = "nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=world, **where)
    try:
        return run_stage(spec, torch.device("cuda" if on_gpu else "cpu"), rank)
    finally:
        gc.collect()


# --- what every worker does ---


def run_stage(spec: StageSpec, device: Any, rank: int) -> StageResult:
    """Build, train and save; every rank of an initialised process group calls it.

    A user's fault that all ranks meet is a result; of one rank alone it is raised, which ends the
    others too.
    """
    started = time.monotonic()
    try:
        result = _train(spec, device, rank)
    except UserError as error:
        if not _all_ranks_arrive():
            raise
        result = StageResult(Outcome.FAILED, error=str(error))
    return replace(result, seconds=time.monotonic() - started)


def _all_ranks_arrive() -> bool:
    import torch.distributed as dist

    wait = timedelta(seconds=20)
    try:
        if dist.get_world_size() > 1:
            dist.monitored_barrier(dist.new_group(backend="gloo", timeout=wait), timeout=wait)
    except RuntimeError:
        return False
    return True


def _train(spec: StageSpec, device: Any, rank: int) -> StageResult:
    import ray
    import torch

    from ..training.checkpoint import Checkpoints
    from ..training.engine import trained_state
    from ..training.loop import fit, measure_held_out
    from ..training.table import RouterTable, ScoreTable, StageTable

    config, stage, run = spec.config, spec.stage, Storage(spec.run)
    torch.set_num_threads(max(1, int(config.group(stage).cpus_per_worker)))
    kinds = {"router": RouterTable, **dict.fromkeys(SCORES, ScoreTable)}
    table_kind = kinds.get(stage, StageTable)
    table = table_kind.load(run / "dual" if stage == "router" else spec.work, "pairs.parquet")
    notice = Storage(spec.notice or spec.run)
    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else "this one"
    is_first, owner = rank == 0, None
    if is_first:
        owner = (f"{FOLDERS[stage]}.work/owner", uuid.uuid4().hex.encode())
        run.write(*owner)
    checkpoints = Checkpoints(
        spec.work / "checkpoints", keep=config.checkpoint.keep, digest=spec.digest
    )
    watchdog = Watchdog(
        run, stage, rank, node, config.cluster.stall_timeout,
        notice=notice, owner=owner, leaving=is_draining,
    )  # fmt: skip
    metrics = _metrics_log(spec, run) if is_first and spec.log else None
    with watchdog, metrics or nullcontext(), tempfile.TemporaryDirectory() as scratch:
        model, engine, step = build(spec, device, Path(scratch))
        result = fit(
            engine=engine,
            step=step,
            table=table,
            optim=config.optim(stage),
            seed=config.seed_of_training,
            checkpoints=checkpoints,
            metrics=metrics,
            checkpoint=config.checkpoint,
            logging=config.logging,
            dtype=config.model.dtype,
            node=node,
            heartbeat=watchdog.heartbeat,
            should_stop=watchdog.is_preempted,
            share=spec.share,
        )
        if not result.finished:
            outcome = Outcome.STOPPED if notice.exists(STOP) else Outcome.PREEMPTED
            return StageResult(outcome, result.step)
        if spec.share is not None:
            values = measure_held_out(engine, step, table, config.optim(stage), watchdog.heartbeat)
            return StageResult(Outcome.FINISHED, result.step, values=values)
        watchdog.heartbeat(result.step, "save")
        state = trained_state(engine, model, keep_dtype=stage not in SCORES)
        if is_first:
            save_stage(config, stage, model, state, run, Path(scratch))
    return StageResult(Outcome.FINISHED, result.step)


def _metrics_log(spec: StageSpec, run: Storage) -> Any:
    from ..training.metrics import MetricsLog

    events = (run / f"logs/tensorboard/{spec.stage}").local
    return MetricsLog(
        run / "metrics",
        spec.stage,
        spec.config.logging,
        tensorboard=str(events) if events else None,
        run=f"{spec.config.name}-{spec.digest[:8]}",
    )


def build(spec: StageSpec, device: Any, scratch: Path) -> tuple[Any, Any, Any]:
    """(model, engine around it, training step), untrained; every rank calls it."""
    import torch.distributed as dist

    from ..models.logprobs import ResponseLogProbs
    from ..models.score_model import ResponseScores
    from ..training import engine as engines

    config, stage = spec.config, spec.stage
    optim = config.optim(stage)
    settings = engines.deepspeed_settings(
        config.deepspeed, optim, config.model.dtype, dist.get_world_size()
    )
    keep = engines.prepare(settings, on_gpu=device.type == "cuda")
    model = build_model(config, stage, Storage(spec.experts or spec.run), device, scratch)
    if stage in SCORES:
        module: Any = ResponseScores(model)
    else:
        module = ResponseLogProbs(model.model if stage == "router" else model)
    engine = engines.deepspeed(module, optim, settings, device)
    del keep
    return model, engine, make_step(config, stage, engine, model)


def make_step(config: Config, stage: str, policy: Any, model: Any) -> Any:
    """The stage's training step over ``policy``, an engine or the module inside it."""
    from ..training.steps import ExpertStep, RouterStep, ScoreStep

    if stage in SCORES:
        return ScoreStep(policy, stage)
    if stage == "router":
        prior = config.router.prior
        return RouterStep(
            policy, model, beta=config.router.beta, prior=prior.weight, kind=prior.kind
        )
    objective = getattr(config.experts, stage).objective
    return ExpertStep(policy, beta=objective.beta, label_smoothing=objective.label_smoothing)


def build_model(config: Config, stage: str, experts: Storage, device: Any, scratch: Path) -> Any:
    """What a stage trains.

    Returns:
        A PeftModel (the base with a fresh LoRA), a RoutedCausalLM (the base with both frozen
        experts and fresh gates), or a score model.
    """
    from ..models.assembly import route
    from ..models.base import add_lora, load_base, load_tokenizer
    from ..models.score_model import build_score_model

    seed = config.seed_of_training
    if stage in SCORES:
        model: Any = build_score_model(config, device)
    elif stage == "router":
        base = load_base(config.model, device=device)
        safety, helpfulness = (experts.download(FOLDERS[name], scratch / name) for name in EXPERTS)
        model = route(
            base, safety, helpfulness, config.router,
            tokenizer=load_tokenizer(config.model), data=config.data, base=config.model, seed=seed,
        )  # fmt: skip
    else:
        model = add_lora(load_base(config.model, device=device), config.lora, seed=seed)
    if config.optim(stage).gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def save_stage(
    config: Config, stage: str, model: Any, state: dict[str, Any], run: Storage, scratch: Path
) -> None:
    """Write the result whole under its final name: a PEFT adapter, a router, or a classifier."""
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
