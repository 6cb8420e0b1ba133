"""Base model, LoRA experts, scorers, response log-probabilities, router; no Ray or DeepSpeed."""

from .assembly import load_routed, route, save_router
from .base import add_lora, load_adapter, load_base, load_tokenizer, model_fingerprint
from .logprobs import ResponseLogProbs
from .probe import fit_probes, start_from_probes
from .routed import RoutedCausalLM
from .scorers import load_scorer

__all__ = [
    "ResponseLogProbs",
    "RoutedCausalLM",
    "add_lora",
    "fit_probes",
    "load_adapter",
    "load_base",
    "load_routed",
    "load_scorer",
    "load_tokenizer",
    "model_fingerprint",
    "route",
    "save_router",
    "start_from_probes",
]
