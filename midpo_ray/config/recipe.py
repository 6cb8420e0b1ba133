"""The whole configuration of a run. Nothing but the recipe decides a run's results."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .execution import Checkpoint, Cluster, DeepSpeed, Group, Logging
from .method import Data, Expert, Experts, Lora, Model, Optim, RewardModel, Router, Scores
from .section import Section

Stage = Literal["safety", "helpfulness", "router"]
EXPERTS: tuple[str, str] = ("safety", "helpfulness")
SCORES: tuple[str, str] = ("reward", "cost")


class Evaluate(Section):
    """The table of true scores at the end of a run on builtin:miniature."""

    prompts: int = Field(400, gt=0, description="Number of held-out prompts.")
    max_new_tokens: int = Field(48, gt=0, description="Longest answer, in tokens.")


class Config(Section):
    """A recipe."""

    name: str = Field(description="Name of the run; default: the file's name.")
    seed: int = Field(
        0, ge=0, description="Seed of the split, of drawn rows and, by default, of training."
    )
    training_seed: int | None = Field(
        None,
        ge=0,
        description="Seed of adapters, gates and the order of batches alone; null: seed.",
    )
    model: Model = Field(description="The base model.")
    data: Data = Field(description="The preference pairs.")
    scores: Scores = Field(Scores(), description="The frozen models that score every response.")
    lora: Lora = Field(Lora(), description="The adapter of each expert.")
    experts: Experts = Field(Experts(), description="The two experts.")
    router: Router = Field(Router(), description="The router.")
    reward_model: RewardModel = Field(
        RewardModel(), description="The score models that `midpo reward` trains."
    )
    deepspeed: DeepSpeed = Field(DeepSpeed(), description="DeepSpeed's settings.")
    checkpoint: Checkpoint = Field(Checkpoint(), description="When a stage saves its state.")
    logging: Logging = Field(Logging(), description="Training metrics.")
    cluster: Cluster = Field(Cluster(), description="Waiting, restarts, and hung stages.")
    evaluate: Evaluate | None = Field(
        None, description="Print a table of true scores at the end; builtin:miniature only."
    )
    cache: str | None = Field(
        None,
        description="Path or URI where scores are kept for all runs; null: the folder cache "
        "beside the run directory.",
    )

    @model_validator(mode="after")
    def _scorers_are_named(self) -> Config:
        for name, expert in (
            ("safety", self.experts.safety),
            ("helpfulness", self.experts.helpfulness),
        ):
            self._check_expert(name, expert)
        scores = {"reward": self.scores.reward, "cost": self.scores.cost}
        needed = {"pareto": ("reward", "cost"), "ranked": ("cost",)}.get(self.router.rule, ())
        if any(scores[kind] is None for kind in needed):
            what = " and ".join(f"scores.{kind}" for kind in needed)
            raise ValueError(
                f"router.rule is {self.router.rule}, which needs {what}: "
                "use pareto_labels, safe_first or labels"
            )
        return self

    def _check_expert(self, name: str, expert: Expert) -> None:
        """The scorer that an expert's objective reads is there."""
        objective = expert.objective
        own, other = ("cost", "reward") if name == "safety" else ("reward", "cost")
        uses_scores = objective.uses_margin and objective.margin_from == "scores"
        if expert.pairs != "own" and (uses_scores or objective.name == "modpo"):
            raise ValueError(
                f"experts.{name}.pairs is {expert.pairs}, and the scores of {objective.name} are "
                "of one preference: use dpo or b_dpo"
            )
        needed = None
        if uses_scores:
            needed = own
        elif objective.name == "modpo" and objective.modpo_weight < 1:
            needed = other
        if needed and getattr(self.scores, needed) is None:
            raise ValueError(
                f"experts.{name}.objective.name is {objective.name}, which needs "
                f"scores.{needed}: name a scorer there, or use dpo or b_dpo"
            )

    @property
    def seed_of_training(self) -> int:
        return self.seed if self.training_seed is None else self.training_seed

    def optim(self, stage: str) -> Optim:
        return self._section(stage).optim

    def group(self, stage: str) -> Group:
        return self._section(stage).group

    def _section(self, stage: str) -> Expert | Router | RewardModel:
        if stage in SCORES:
            return self.reward_model
        return self.router if stage == "router" else getattr(self.experts, stage)
