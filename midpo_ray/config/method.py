"""What a run computes: model, data, scores, objectives, optimizers, router."""

from __future__ import annotations

import logging
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from .execution import Group
from .section import Section

log = logging.getLogger(__name__)

_Share = Annotated[float, Field(ge=0, lt=1)]
_Count = Annotated[int, Field(gt=0)]


class Model(Section):
    """The base model: policy, reference and unconditional scorer in one."""

    path: str = Field(description="A hub name, a local folder, or builtin:miniature.")
    revision: str | None = Field(
        None, description="Branch, tag or commit on the hub; pin a commit to repeat a run exactly."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Type of the frozen weights: bfloat16 on GPUs, float32 on CPUs."
    )
    attention: Literal["auto", "sdpa", "eager", "flex_attention"] = Field(
        "auto", description="Attention kernel; auto is sdpa on CPUs and flex_attention on CUDA."
    )
    trust_remote_code: bool = Field(
        False, description="Run code that comes with the model. Only for sources that you trust."
    )


class DataSet(Section):
    """One preference set."""

    path: str = Field(
        description="A hub name, a file or folder (JSONL, JSON, Parquet, CSV, each also .gz), or "
        "builtin:miniature."
    )
    split: str = Field("train", description="Split of a hub data set.")
    revision: str | None = Field(
        None, description="Branch, tag or commit of a hub data set; pin a commit to repeat a run."
    )
    rows: int | None = Field(
        None, gt=0, description="Take this many rows, drawn by the seed; null takes all."
    )
    weight: float | None = Field(
        None,
        gt=0,
        description="Share of the mixture: sets that have a weight are drawn in proportion. "
        "Instead of rows.",
    )
    labels: Literal["both", "better", "safer"] = Field(
        "both",
        description="What chosen and rejected columns compare: helpfulness (better), safety "
        "(safer, which also says which response is safe), or both.",
    )


class Data(Section):
    """The preference pairs and how they become tokens."""

    sets: tuple[DataSet, ...] = Field(min_length=1, description="The preference sets.")
    template: str = Field(
        "auto",
        description="Prompt format: chat (the tokenizer's template), chat:NAME (one of its named "
        "templates), paper (Safe RLHF's format), auto (chat where the tokenizer has one, else "
        "paper), or a text with {prompt}.",
    )
    null_context: Literal["template", "bos"] = Field(
        "template",
        description="What precedes a response for its unconditional log-probability: the "
        "template with an empty prompt, or BOS alone. B-DPO uses it.",
    )
    max_length: int = Field(
        512, gt=1, description="Longest prompt and response together, in tokens."
    )
    max_prompt_length: int | None = Field(
        None,
        gt=0,
        description="Longest prompt, in tokens; null: half of max_length. The end of a longer "
        "prompt is kept.",
    )
    long_prompts: Literal["error", "truncate", "drop"] = Field(
        "error", description="What happens to pairs whose prompt is longer than max_length."
    )
    validation: _Share = Field(
        0.1, description="Held-out share of the prompts: 0.1 for small sets, 0.02 for large ones."
    )


class Scorer(Section):
    """One source of a reward (higher is better) or a cost (lower is safer, below 0 is safe)."""

    model: str | None = Field(
        None,
        description="A PKU score model, or a sequence classification model with one output.",
    )
    revision: str | None = Field(
        None,
        description="Branch, tag or commit of a hub score model; pin a commit to repeat a run.",
    )
    column: str | None = Field(
        None,
        description="A column of the data, with {i} for the number of the response, for example "
        "reward_{i}.",
    )
    function: str | None = Field(
        None,
        description="module:function of (prompts, responses), two lists of texts, which returns "
        "numbers.",
    )
    max_length: int = Field(
        2048, gt=1, description="Tokens that a score model reads; the end of longer input is cut."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Type of a score model's weights; auto: as it is saved."
    )
    trust_remote_code: bool = Field(
        False, description="Run code that comes with the model. Only for sources that you trust."
    )

    @model_validator(mode="after")
    def _one_source(self) -> Scorer:
        if sum(x is not None for x in (self.model, self.column, self.function)) != 1:
            raise ValueError("a scorer names exactly one of model, column, function")
        return self


class Scores(Section):
    """Every response is scored once by frozen models; all stages and runs read this table."""

    reward: Scorer | None = Field(
        None, description="Source of the helpfulness reward; SPE-DPO and the pareto rule need it."
    )
    cost: Scorer | None = Field(
        None, description="Source of the safety cost; SPE-DPO, pareto and ranked need it."
    )
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="Scoring processes; auto: one per GPU of the cluster, or per CPU (at most 8); "
        "0: the command's own process.",
    )
    cpus_per_worker: float = Field(1, gt=0, description="CPUs that Ray reserves for each worker.")
    gpus_per_worker: float = Field(
        0, ge=0, description="GPUs that Ray reserves for each worker: 1 on a GPU cluster."
    )
    batch_tokens: _Count | Literal["auto"] = Field(
        "auto", description="Tokens of one forward pass; halve it when memory runs out."
    )

    @property
    def group(self) -> Group:
        """The resources of one scoring worker."""
        return Group(cpus_per_worker=self.cpus_per_worker, gpus_per_worker=self.gpus_per_worker)


class Lora(Section):
    """The adapter of each expert; the router mixes both adapters layer by layer."""

    r: int = Field(16, gt=0, description="Rank: 8 to 64.")
    alpha: float = Field(32, gt=0, description="Scale; the update is multiplied by alpha / r.")
    dropout: _Share = Field(0.0, description="Dropout on the adapter's input.")
    target_modules: tuple[str, ...] = Field(
        ("down_proj",),
        min_length=1,
        description="Names of the linear layers that get an adapter. A router takes exactly one.",
    )


class Objective(Section):
    """What an expert minimises; the equations are in midpo_ray.objectives."""

    name: Literal["dpo", "spe_dpo", "b_dpo", "spe_b_dpo", "modpo"] = Field(
        "spe_dpo",
        description="dpo, spe_dpo (with a margin from scores), b_dpo (balanced by mutual "
        "information, no scorer needed), spe_b_dpo (both), or modpo (a baseline).",
    )
    beta: float = Field(
        0.1,
        gt=0,
        description="Strength of the pull towards the reference model: 0.05 to 0.5; higher stays "
        "closer.",
    )
    margin_scale: float = Field(
        1.0,
        ge=0,
        description="λ, the margin's factor; 0 is DPO. λ / beta is the log-ratio that one unit of "
        "margin asks for: lower it when text degenerates.",
    )
    margin_from: Literal["scores", "column"] = Field(
        "scores",
        description="Source of the margin: the scorer of the pair's own preference, or the "
        "data's margin column.",
    )
    margin_unit: Literal["raw", "std"] = Field(
        "raw",
        description="std divides margins by the scorer's standard deviation over the set, so that "
        "λ means the same for every scorer.",
    )
    temperature: float = Field(
        1.0, gt=0, description="τ of B-DPO's weights, 0.3 to 3; .inf is DPO."
    )
    information: Literal["token", "total"] = Field(
        "token", description="Mutual information per token or in total."
    )
    balance: bool = Field(
        True, description="Use B-DPO's weights; false keeps only the scaling (an ablation)."
    )
    scaling: Literal["none", "gradient_norm", "imbalance"] = Field(
        "gradient_norm", description="Rule of B-DPO's scaling factor of each pair."
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Assumed share of wrong labels, as in cDPO."
    )
    modpo_weight: float = Field(
        0.5, gt=0, le=1, description="MODPO's weight of the preference that the pairs are about."
    )

    @property
    def uses_margin(self) -> bool:
        return self.name in ("spe_dpo", "spe_b_dpo") and self.margin_scale > 0

    @property
    def uses_information(self) -> bool:
        return self.name in ("b_dpo", "spe_b_dpo")


class Optim(Section):
    """AdamW, its learning rate schedule, and the batches."""

    lr: float = Field(
        1e-5, gt=0, description="Peak learning rate: 1e-5 for 7B models, 1e-4 to 1e-3 for small."
    )
    betas: tuple[_Share, _Share] = Field((0.9, 0.999), description="AdamW's decay rates.")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Decay of the learning rate after the warm-up, to 0 or not at all."
    )
    warmup: _Share = Field(0.03, description="Share of all steps in which the rate rises from 0.")
    epochs: float = Field(3.0, gt=0, description="Passes over the data; 1 to 3 is usual.")
    steps: int | None = Field(
        None, gt=0, description="Number of optimizer steps, instead of epochs."
    )
    batch_size: int = Field(16, gt=0, description="Pairs of one optimizer step, over all workers.")
    batch_tokens: int = Field(
        4096,
        gt=0,
        description="Tokens of one forward pass on one worker: batches are split to fit. It "
        "changes memory and speed, not results.",
    )
    clip: float | None = Field(1.0, gt=0, description="Largest l2 norm of a gradient; null: none.")
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations: less memory, about a third more time."
    )
    layout: Literal["tree", "packed", "padded"] = Field(
        "tree",
        description="Rows of a batch: one per pair that shares its prompt (tree), one for all "
        "pairs (packed), or one per response (padded). Tree is fastest on most models.",
    )


class Expert(Section):
    """One expert: its pairs, its objective, its optimizer and its workers."""

    pairs: Literal["own", "mixed", "dual"] = Field(
        "own",
        description="Training pairs: those of the expert's own preference, those of both, or the "
        "router's. mixed and dual train one adapter for both goals (baselines).",
    )
    objective: Objective = Field(Objective(), description="The loss.")
    optim: Optim = Field(Optim(), description="Optimizer and batches.")
    group: Group = Field(Group(), description="Where the stage's workers run.")


class Experts(Section):
    """Both experts; they train at the same time where the cluster holds both groups."""

    safety: Expert = Field(Expert(), description="The safety expert.")
    helpfulness: Expert = Field(Expert(), description="The helpfulness expert.")


class Prior(Section):
    """What the router's gates are drawn towards, beside the loss of its pairs."""

    kind: Literal["risk", "paper", "none"] = Field(
        "paper",
        description="risk: the safety expert for prompts of risk 1, the helpfulness expert for "
        "prompts of risk 0. A prompt's risk is 1 where any response to it in the data is labelled "
        "unsafe (or has a cost above 0, where there is no label). paper: the helpfulness expert "
        "for every prompt, as published.",
    )
    weight: float = Field(
        0.01,
        ge=0,
        description="ρ. For risk 0.3 to 1; for paper 0 to 0.1: the published code has 1, which can "
        "close the safety gates.",
    )


class Router(Section):
    """The gates in every layer that weigh the two frozen experts."""

    gate: Literal["linear", "bottleneck", "mlp"] = Field(
        "linear", description="Form of a gate; bottleneck is the published one."
    )
    width: int | None = Field(
        None, gt=0, description="Hidden width; null: 512 for a bottleneck, 16 for an mlp."
    )
    scope: Literal["last", "token", "prompt"] = Field(
        "last",
        description="last: one gate per prompt and layer, read at the prompt's last token. token: "
        "one gate per token and layer (as published). prompt: one decision per prompt for all "
        "layers, from the base model's features; a prompt costs one more forward pass.",
    )
    decision: Literal["soft", "hard"] = Field(
        "soft",
        description="Only scope prompt. hard: once trained, the expert of the larger gate answers "
        "alone.",
    )
    temperature: float = Field(
        1.0, gt=0, description="Only scope prompt: factor of the mean gate logit over layers."
    )
    rule: Literal["pareto", "pareto_labels", "safe_first", "labels", "ranked"] = Field(
        "pareto",
        description="Which pairs train the router. pareto needs both scorers, ranked needs the "
        "cost; pareto_labels, safe_first (the safe response, else the better of two safe ones) "
        "and labels (as published) need none.",
    )
    prior: Prior = Field(
        Prior(),
        description="What the gates are drawn towards. A number is the weight of the paper's.",
    )
    beta: float = Field(0.1, gt=0, description="As in the experts' objective.")
    optim: Optim = Field(Optim(), description="Optimizer and batches.")
    group: Group = Field(Group(), description="Where the stage's workers run.")

    @field_validator("prior", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        """A plain number, from before there were kinds, is the weight of the paper's prior."""
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            return value
        log.info("router.prior: %s is read as {kind: paper, weight: %s}", value, value)
        return {"kind": "paper", "weight": value}


class RewardModel(Section):
    """The reward and the cost model that `midpo reward` trains."""

    model: Model | None = Field(
        None, description="The model that they are trained from; null: the recipe's model."
    )
    data: Data | None = Field(None, description="Their training data; null: the recipe's data.")
    train: Literal["lora", "full"] = Field(
        "lora",
        description="Train the score head and an adapter, which is merged when saved, or every "
        "parameter.",
    )
    lora: Lora = Field(Lora(), description="The adapter.")
    layers: int | None = Field(
        None,
        gt=0,
        description="Only this many of the last decoder layers get the adapter, which is faster: "
        "no gradient goes below them. null: all.",
    )
    optim: Optim = Field(Optim(), description="Optimizer and batches.")
    group: Group = Field(Group(), description="Where the stage's workers run.")
