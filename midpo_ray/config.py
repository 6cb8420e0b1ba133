"""The run configuration: strict, typed, from a shipped recipe or a YAML file, with dotted overrides.

Nothing but the recipe decides a run's results. Every key has one place here, with its meaning beside it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable
from copy import copy
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import UserError

Stage = Literal["safety", "helpfulness", "router"]
EXPERTS: tuple[str, str] = ("safety", "helpfulness")
SCORES: tuple[str, str] = ("reward", "cost")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=True)


class Model(Section):
    """The base model: policy, reference and unconditional scorer in one."""

    path: str  # hub name, local folder, or builtin:miniature
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["auto", "sdpa", "eager", "flex_attention"] = (
        "auto"  # auto: sdpa on CPU, flex_attention on CUDA
    )
    trust_remote_code: bool = False


class DataSet(Section):
    path: str  # hub name, file (JSONL, JSON, Parquet, CSV, each also .gz), or builtin:miniature
    split: str = "train"
    rows: int | None = Field(None, gt=0)  # take this many, drawn by seed
    weight: float | None = Field(
        None, gt=0
    )  # or this share of the mixture: sets with a weight are drawn in proportion
    labels: Literal["both", "better", "safer"] = (
        "both"  # what chosen/rejected rows compare; safer says too which one is safe
    )


class Data(Section):
    sets: tuple[DataSet, ...] = Field(min_length=1)
    template: str = "auto"  # auto: the tokenizer's chat template, else paper; chat; paper; or a text with {prompt}
    null_context: Literal["template", "bos"] = (
        "template"  # what stands before a response for its unconditional log-probability
    )
    max_length: int = Field(512, gt=1)  # tokens of prompt and response together
    max_prompt_length: int | None = Field(
        None, gt=0
    )  # default: half of max_length; the end of a longer prompt is kept
    long_prompts: Literal["error", "truncate", "drop"] = (
        "error"  # for prompts longer than max_length
    )
    validation: float = Field(0.1, ge=0, lt=1)  # held-out share of the prompts


class Scorer(Section):
    """One source of a reward (higher is better) or a cost (lower is safer, below 0 is safe)."""

    model: str | None = (
        None  # a PKU score model or an AutoModelForSequenceClassification with one output
    )
    column: str | None = (
        None  # a column of the data with {i} for the response's number, for example "reward_{i}"
    )
    function: str | None = (
        None  # module:function of (prompts, responses), lists of texts, that returns numbers
    )
    max_length: int = Field(2048, gt=1)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of a model; auto: as it is saved
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> Scorer:
        if sum(x is not None for x in (self.model, self.column, self.function)) != 1:
            raise ValueError("a scorer names exactly one of model, column, function")
        return self


class Scores(Section):
    reward: Scorer | None = None
    cost: Scorer | None = None
    workers: int | Literal["auto"] = (
        "auto"  # auto: one for each GPU, or each CPU, of the cluster, at most 8 on CPUs
    )
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: float = Field(0, ge=0)
    batch_tokens: int | Literal["auto"] = "auto"  # tokens of one forward pass

    @property
    def group(self) -> Group:
        """One of its workers."""
        return Group(cpus_per_worker=self.cpus_per_worker, gpus_per_worker=self.gpus_per_worker)


class Lora(Section):
    r: int = Field(16, gt=0)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] = Field(("down_proj",), min_length=1)


class Objective(Section):
    """What an expert minimises; see midpo_ray.objectives."""

    name: Literal["dpo", "spe_dpo", "b_dpo", "spe_b_dpo", "modpo"] = "spe_dpo"
    beta: float = Field(0.1, gt=0)
    margin_scale: float = Field(1.0, ge=0)  # lambda; 0 is DPO
    margin_from: Literal["scores", "column"] = (
        "scores"  # the scorer of the pair's own preference, or the data's margin column
    )
    margin_unit: Literal["raw", "std"] = (
        "raw"  # std: divided by the scorer's standard deviation over the set
    )
    temperature: float = Field(1.0, gt=0)  # tau; .inf is DPO
    information: Literal["token", "total"] = "token"  # mutual information per token or in total
    balance: bool = True  # B-DPO's weights; off leaves the scaling alone (an ablation)
    scaling: Literal["none", "gradient_norm", "imbalance"] = "gradient_norm"
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    modpo_weight: float = Field(
        0.5, gt=0, le=1
    )  # share of the preference that the pairs are labelled for

    @property
    def uses_margin(self) -> bool:
        return self.name in ("spe_dpo", "spe_b_dpo") and self.margin_scale > 0

    @property
    def uses_information(self) -> bool:
        return self.name in ("b_dpo", "spe_b_dpo")


class Optim(Section):
    lr: float = Field(1e-5, gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(0.03, ge=0, lt=1)  # share of all steps
    epochs: float = Field(3.0, gt=0)
    steps: int | None = Field(None, gt=0)  # instead of epochs
    batch_size: int = Field(16, gt=0)  # pairs of one optimizer step, all workers together
    batch_tokens: int = Field(
        4096, gt=0
    )  # tokens of one forward pass on one worker: a batch is split to fit
    clip: float | None = Field(1.0, gt=0)  # bound on the gradient's l2 norm
    gradient_checkpointing: bool = False
    layout: Literal["tree", "packed", "padded"] = (
        "tree"  # one row a pair; all pairs in one row; one row a response
    )


class Workers(Section):
    """An elastic group."""

    min: int = Field(gt=0)
    max: int = Field(gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Workers:
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, above max, {self.max}")
        return self


class Group(Section):
    """Where a stage's workers run."""

    workers: int | Workers = 1
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: float = Field(0, ge=0)
    resources: dict[str, float] = {}  # custom resources of each worker
    label_selector: dict[str, str] = {}  # node labels, for example {midpo-group: safety}

    @model_validator(mode="after")
    def _some(self) -> Group:
        if self.min_workers < 1:
            raise ValueError(f"workers is {self.workers}, at least 1 is expected")
        return self

    @property
    def max_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers.max

    @property
    def min_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers.min


class Expert(Section):
    pairs: Literal["own", "mixed", "dual"] = (
        "own"  # one adapter for both goals: both preferences' pairs, or the router's
    )
    objective: Objective = Objective()
    optim: Optim = Optim()
    group: Group = Group()


class Experts(Section):
    safety: Expert = Expert()
    helpfulness: Expert = Expert()


class Router(Section):
    gate: Literal["linear", "bottleneck", "mlp"] = "linear"
    width: int | None = Field(None, gt=0)  # of the bottleneck (512) or the mlp (16)
    scope: Literal["last", "token"] = "last"
    rule: Literal["pareto", "pareto_labels", "labels", "ranked"] = (
        "pareto"  # which pairs are dual data
    )
    prior: float = Field(0.01, ge=0)  # rho; the paper's code has 1
    beta: float = Field(0.1, gt=0)
    optim: Optim = Optim()
    group: Group = Group()


class RewardModel(Section):
    """The reward and the cost model that `midpo reward` trains."""

    model: Model | None = None  # what they grow from; default: the recipe's model
    data: Data | None = None  # default: the recipe's data
    train: Literal["lora", "full"] = (
        "lora"  # the score head, and a LoRA (merged when saved) or every parameter
    )
    lora: Lora = Lora()
    layers: int | None = Field(
        None, gt=0
    )  # only the last so many decoder layers get the LoRA; no gradient goes below them
    optim: Optim = Optim()
    group: Group = Group()


class DeepSpeed(Section):
    stage: Literal[0, 1, 2, 3] = 2
    offload_optimizer: Literal["none", "cpu"] = "none"
    offload_param: Literal["none", "cpu"] = "none"
    extra: dict[str, Any] = {}  # merged into DeepSpeed's own configuration


class Checkpoint(Section):
    every_steps: int | None = Field(50, gt=0)
    every_seconds: float | None = Field(None, gt=0)
    keep: int = Field(2, gt=0)


class Logging(Section):
    every: int = Field(10, gt=0)  # steps
    validate_every: int | None = Field(None, gt=0)  # steps; default: at the end only
    tensorboard: bool = True
    wandb: str | None = None  # a project's name; needs the package wandb
    mlflow: str | None = None  # an experiment's name; needs the package mlflow


class Cluster(Section):
    resources_timeout: float = Field(
        0, ge=0
    )  # seconds to wait for a group's resources; 0: fail at once
    max_failures: int = Field(3, ge=0)  # restarts of a stage after a worker or node died
    stall_timeout: float = Field(1800, gt=0)  # seconds without a step before a stage counts as hung


class Evaluate(Section):
    prompts: int = Field(400, gt=0)
    max_new_tokens: int = Field(48, gt=0)


class Config(Section):
    name: str
    seed: int = Field(0, ge=0)
    training_seed: int | None = Field(
        None, ge=0
    )  # of adapters, gates and the order of batches alone; default: seed
    model: Model
    data: Data
    scores: Scores = Scores()
    lora: Lora = Lora()
    experts: Experts = Experts()
    router: Router = Router()
    reward_model: RewardModel = RewardModel()
    deepspeed: DeepSpeed = DeepSpeed()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()
    cluster: Cluster = Cluster()
    evaluate: Evaluate | None = (
        None  # the table of a world whose true scores are known (builtin:miniature)
    )
    cache: str | None = (
        None  # where scores are kept across runs; default: the folder "cache" beside the run directory
    )

    @model_validator(mode="after")
    def _signals(self) -> Config:
        for name in EXPERTS:
            expert: Expert = getattr(self.experts, name)
            objective = expert.objective
            own, other = ("cost", "reward") if name == "safety" else ("reward", "cost")
            scored = objective.uses_margin and objective.margin_from == "scores"
            if expert.pairs != "own" and (scored or objective.name == "modpo"):
                raise ValueError(
                    f"experts.{name}.pairs is {expert.pairs}, and the scores of {objective.name} are of one preference: "
                    "use dpo or b_dpo"
                )
            need = (
                own
                if scored
                else other
                if objective.name == "modpo" and objective.modpo_weight < 1
                else None
            )
            if need and getattr(self.scores, need) is None:
                raise ValueError(
                    f"experts.{name}.objective.name is {objective.name}, which needs scores.{need}: name a scorer there, "
                    "or use dpo or b_dpo"
                )
        if self.router.rule == "pareto" and None in (self.scores.reward, self.scores.cost):
            raise ValueError(
                "router.rule is pareto, which needs scores.reward and scores.cost: use pareto_labels or labels"
            )
        if self.router.rule == "ranked" and self.scores.cost is None:
            raise ValueError(
                "router.rule is ranked, which needs scores.cost: use pareto_labels or labels"
            )
        return self

    @property
    def seed_of_training(self) -> int:
        return self.seed if self.training_seed is None else self.training_seed

    def optim(self, stage: str) -> Optim:
        return self._of(stage).optim

    def group(self, stage: str) -> Group:
        return self._of(stage).group

    def _of(self, stage: str) -> Expert | Router | RewardModel:
        if stage in SCORES:
            return self.reward_model
        return self.router if stage == "router" else getattr(self.experts, stage)


def shipped_recipes() -> list[str]:
    return _shipped("midpo_ray.recipes")


def shipped_studies() -> list[str]:
    return _shipped("midpo_ray.studies")


def _shipped(package: str) -> list[str]:
    return sorted(
        p.name.removesuffix(".yaml")
        for p in resources.files(package).iterdir()
        if p.name.endswith(".yaml")
    )


def read_mapping(source: Any, where: str) -> dict[str, Any]:
    """A YAML file (a path or a resource) that is a mapping; ``where`` begins the one-line UserError."""
    try:
        raw = yaml.safe_load(source.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: cannot be read ({error.__class__.__name__}: {error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(
            f"{where}: a mapping of keys is expected, this is {'empty' if raw is None else type(raw).__name__}"
        )
    return raw


def load_config(recipe_or_path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The configuration of a shipped recipe or a YAML file, with ``key.sub=value`` overrides (values in YAML's syntax).

    Raises:
        UserError: one line that names the key, its path, what is allowed, and the nearest known key.
    """
    text = str(recipe_or_path)
    path = Path(text)
    source: Any
    if text in shipped_recipes():
        source, where = resources.files("midpo_ray.recipes") / f"{text}.yaml", f"recipe {text}"
    elif path.suffix in (".yaml", ".yml"):
        source, where = path, text
    else:
        near = difflib.get_close_matches(text, shipped_recipes(), 1)
        raise UserError(
            f"recipe {text!r} is not known{f', did you mean {near[0]}?' if near else ''}; shipped are "
            f"{', '.join(shipped_recipes())}; a file ends in .yaml"
        )
    raw = read_mapping(source, where)
    raw.setdefault("name", path.stem)
    for override in overrides:
        _override(raw, override)
    return validate(raw, where)


def validate(raw: dict[str, Any], where: str) -> Config:
    """``raw`` as a Config; ``where`` begins the one-line error."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error)}") from None


def dump(config: Config) -> str:
    """The resolved configuration as YAML; ``load_config`` reads it back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def digest(*parts: Any) -> str:
    """A short content hash (32 hex digits) of JSON-able values and configuration sections."""
    plain = [p.model_dump(mode="json") if isinstance(p, BaseModel) else p for p in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: key.sub=value is expected")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: the value is not YAML") from None
    node: Any = raw
    *parents, last = key.split(".")
    for part in parents:
        step = (
            int(part)
            if isinstance(node, list) and part.isdigit() and int(part) < len(node)
            else part
        )
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        try:
            node[step] = node = copy(node[step])  # of its own: YAML's aliases share one object
        except (KeyError, IndexError, TypeError):
            raise UserError(f"override {override!r}: {part!r} is not a key there") from None
    if isinstance(node, list) and last.isdigit() and int(last) < len(node):
        node[int(last)] = parsed
    elif isinstance(node, dict):
        node[last] = parsed
    else:
        raise UserError(f"override {override!r}: {last!r} is not a key there")


def explain(error: ValidationError, root: type[BaseModel] = Config) -> str:
    """The first fault of a ``root`` in one line: its path, what is wrong, what is allowed, and the nearest known key."""
    # Of a union's alternatives, the one that was meant: the deepest, and not one that wants another type altogether.
    first = max(error.errors(), key=lambda e: (len(e["loc"]), not e["type"].endswith("_type")))
    key = ".".join(
        str(p)
        for p in first["loc"]
        if not (isinstance(p, str) and ("[" in p or p in ("int", "Workers")))
    )
    if first["type"] == "extra_forbidden":
        known = _known_keys(root, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, 1)
        hint = f", did you mean {near[0]}?" if near else ""
        return f"unknown key {key}{hint} (known there: {', '.join(known)})"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"key {key} is missing"
    if not key:
        return message
    given = (
        f", this is {first['input']!r}" if not isinstance(first["input"], dict | BaseModel) else ""
    )
    return f"key {key}: {message[0].lower()}{message[1:]}{given}"


def _known_keys(root: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    section: Any = root
    for part in path:
        if isinstance(part, int) or part not in getattr(section, "model_fields", {}):
            continue
        section = section.model_fields[part].annotation
        while not (isinstance(section, type) and issubclass(section, BaseModel)):
            inner = [a for a in get_args(section) if a is not type(None) and a is not Ellipsis]
            section = next(
                (a for a in inner if isinstance(a, type) and issubclass(a, BaseModel)),
                inner[0] if inner else Config,
            )
    return list(section.model_fields)
