"""Where and how a run is executed: groups of workers, DeepSpeed, checkpoints, logging, the cluster.

Nothing here changes what is computed, apart from rounding.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from .section import Section


class Workers(Section):
    """An elastic group of workers."""

    min: int = Field(gt=0, description="The fewest workers that a stage starts or resumes with.")
    max: int = Field(gt=0, description="The most workers that a stage uses.")

    @model_validator(mode="after")
    def _ordered(self) -> Workers:
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, which is above max, {self.max}")
        return self


class Group(Section):
    """Where the workers of a stage run."""

    workers: int | Workers = Field(
        1,
        description="Number of training processes, usually one per GPU, or {min: 1, max: 4} for a "
        "group that shrinks and grows with the cluster.",
    )
    cpus_per_worker: float = Field(1, gt=0, description="CPUs that Ray reserves for each worker.")
    gpus_per_worker: float = Field(
        0, ge=0, description="GPUs that Ray reserves for each worker: 1 on a GPU cluster."
    )
    resources: dict[str, float] = Field(
        {}, description="Custom Ray resources that each worker needs."
    )
    label_selector: dict[str, str] = Field(
        {},
        description="Labels of the nodes that the group runs on, for example "
        "{midpo-group: safety}. Give each expert its own nodes where both train at once.",
    )

    @model_validator(mode="after")
    def _not_empty(self) -> Group:
        if self.min_workers < 1:
            raise ValueError(f"workers is {self.workers}, at least 1 is expected")
        return self

    @property
    def max_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers.max

    @property
    def min_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers.min


class DeepSpeed(Section):
    """DeepSpeed's settings, the same for all trained stages."""

    stage: Literal[0, 1, 2, 3] = Field(
        2,
        description="ZeRO stage: 2 shards optimizer state and gradients, 3 also parameters (for "
        "models that do not fit into one GPU).",
    )
    offload_optimizer: Literal["none", "cpu"] = Field(
        "none", description="Keep the optimizer state in host memory: slower, less GPU memory."
    )
    offload_param: Literal["none", "cpu"] = Field(
        "none", description="Keep parameters in host memory; with stage 3 only."
    )
    extra: dict[str, Any] = Field(
        {}, description="Keys that are merged into DeepSpeed's own configuration."
    )


class Checkpoint(Section):
    """When a stage saves its state; a killed stage resumes bit by bit from its newest state."""

    every_steps: int | None = Field(
        50, gt=0, description="Steps between checkpoints; null: by time only."
    )
    every_seconds: float | None = Field(
        None, gt=0, description="Seconds between checkpoints; null: by steps only."
    )
    keep: int = Field(2, gt=0, description="Checkpoints of a stage that are kept.")


class Logging(Section):
    """Training metrics, always written to metrics/STAGE.jsonl in the run directory."""

    every: int = Field(10, gt=0, description="Steps between two rows of training metrics.")
    validate_every: int | None = Field(
        None,
        gt=0,
        description="Steps between validations on the held-out pairs; null: at the end only.",
    )
    tensorboard: bool = Field(True, description="Also write TensorBoard files.")
    wandb: str | None = Field(
        None, description="Name of a Weights & Biases project; needs the package wandb."
    )
    mlflow: str | None = Field(
        None, description="Name of an MLflow experiment; needs the package mlflow."
    )


class Cluster(Section):
    """What a run does when the cluster is short of resources or loses a node."""

    resources_timeout: float = Field(
        0,
        ge=0,
        description="Seconds to wait for a group's resources; 0 fails at once. Set it to the "
        "start-up time of a node, for example 1800, on a cluster that scales.",
    )
    max_failures: int = Field(
        3, ge=0, description="Restarts of a stage after a worker or a node was lost."
    )
    stall_timeout: float = Field(
        1800,
        gt=0,
        description="Seconds without a step after which a stage counts as hung and is restarted. "
        "It must exceed the longest step, checkpoint or validation.",
    )
