"""midpo_ray: align a language model for safety and helpfulness, offline, on a Ray cluster.

It is light to import: ``run`` and ``load_routed`` import Ray and transformers when they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import Config, load_config
from .errors import UserError

if TYPE_CHECKING:
    import torch

    from .models.routed import RoutedCausalLM
    from .pipeline.run import RunResult

__version__ = "0.1.0"
__all__ = ["Config", "UserError", "load_config", "load_routed", "run"]


def run(config: Config, address: str | None = None, **options: Any) -> RunResult:
    """Run a recipe, or what is missing of it; see ``midpo_ray.pipeline.run.run``."""
    from .pipeline.run import run as run_pipeline

    return run_pipeline(config, address, **options)


def load_routed(
    path: str, device: str | None = None, dtype: str | torch.dtype | None = None
) -> RoutedCausalLM:
    """The aligned model of a run directory; see ``midpo_ray.models.assembly.load_routed``."""
    from .models.assembly import load_routed as load

    return load(path, device=device, dtype=dtype)
