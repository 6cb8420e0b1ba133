"""The run configuration: strict, typed, from a shipped recipe or a YAML file, with overrides."""

# ruff: noqa: F401, I001
from .execution import Checkpoint, Cluster, DeepSpeed, Group, Logging, Workers
from .load import digest, dump, load_config, parse_overrides, read_mapping
from .load import shipped_recipes, shipped_studies, validated, with_overrides
from .method import Data, DataSet, Expert, Experts, Lora, Model, Objective, Optim
from .method import RewardModel, Router, Scorer, Scores
from .recipe import EXPERTS, SCORES, Config, Evaluate, Stage
from .section import Section
