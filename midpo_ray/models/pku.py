"""PKU's score model (Safe RLHF, arXiv 2310.12773; beaver-7b-unified-reward and -cost).

A decoder and ``score_head``, a Linear(D, 1). R rows, T tokens, D hidden.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Scorer
from ..errors import UserError


def source_of(scorer: Scorer) -> dict[str, Any]:
    """The keyword arguments of ``from_pretrained`` that say what is loaded."""
    return {"revision": scorer.revision, "trust_remote_code": scorer.trust_remote_code}


def load_weights(auto: Any, scorer: Scorer, config: Any) -> nn.Module:
    """A scorer's model by one of transformers' auto classes, in the scorer's dtype.

    Raises:
        UserError: the weights cannot be loaded.
    """
    dtype = scorer.dtype if scorer.dtype == "auto" else getattr(torch, scorer.dtype)
    options = {"config": config, "dtype": dtype, "use_safetensors": True, **source_of(scorer)}
    try:
        model: nn.Module = auto.from_pretrained(scorer.model, **options)
    except OSError as error:
        raise UserError(f"scorer {scorer.model}: {str(error).strip().splitlines()[0]}") from None
    return model


class ScoreModel(nn.Module):
    """PKU's score model: input_ids and attention_mask [R, T] -> [R] at each row's last token."""

    mean: Tensor
    std: Tensor

    def __init__(self, scorer: Scorer, config: Any) -> None:
        from transformers import AutoModel

        super().__init__()
        head = _head_tensors(scorer)
        self.config, self.backbone = config, load_weights(AutoModel, scorer, config)
        weight = head.get("score_head.weight")
        if weight is None or tuple(weight.shape) != (1, config.hidden_size):
            state = "is missing" if weight is None else f"is {tuple(weight.shape)}"
            raise UserError(
                f"scorer {scorer.model}: score_head.weight {state}, (1, {config.hidden_size}) is "
                "expected"
            )
        self.score_head = nn.Linear(config.hidden_size, 1)
        with torch.no_grad():
            self.score_head.weight.copy_(weight)
            self.score_head.bias.copy_(head.get("score_head.bias", torch.zeros(1)))
        self.normalize = bool(getattr(config, "do_normalize", False))
        is_reward = getattr(config, "score_type", "reward") == "reward"
        mean = _statistic(head, config, "mean", 0.0) if is_reward else torch.zeros(1)
        self.register_buffer("mean", mean)
        self.register_buffer("std", _statistic(head, config, "var", 1.0).sqrt() + 1e-8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        last = hidden[torch.arange(len(hidden), device=hidden.device), attention_mask.sum(-1) - 1]
        # float32 whatever the backbone's dtype (ours): bfloat16 scores are coarse
        score: Tensor = self.score_head(last.float()).squeeze(-1)
        return (score - self.mean) / self.std if self.normalize else score


def _statistic(head: dict[str, Tensor], config: Any, name: str, default: float) -> Tensor:
    """[1], the checkpoint's, else the configuration's."""
    value = head.get(f"normalizer.{name}")
    if value is None:
        value = torch.as_tensor(getattr(config, name, None) or [default])
    return value.float().reshape(1)


def _head_tensors(scorer: Scorer) -> dict[str, Tensor]:
    """score_head.* and normalizer.* of a checkpoint of one or several safetensors files."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    def find(name: str) -> str | None:
        return cached_file(
            scorer.model,
            name,
            revision=scorer.revision,
            _raise_exceptions_for_missing_entries=False,
        )

    prefixes = ("score_head.", "normalizer.")
    names = {"model.safetensors"}
    index = find("model.safetensors.index.json")
    if index:
        files = json.loads(Path(index).read_text("utf-8"))["weight_map"]
        names = {file for key, file in files.items() if key.startswith(prefixes)}
    tensors: dict[str, Tensor] = {}
    with ExitStack() as opened:
        for name in names:
            path = find(name)
            if path is None:
                raise UserError(
                    f"scorer {scorer.model}: {name} is missing; a score model in safetensors is "
                    "expected, no pickle is read"
                )
            file = opened.enter_context(safe_open(path, framework="pt"))
            for key in file.keys():  # noqa: SIM118 - safe_open is not iterable
                if key.startswith(prefixes):
                    tensors[key] = file.get_tensor(key)
    return tensors
