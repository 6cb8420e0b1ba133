"""Gates that start from linear probes of a prompt's risk (ours).

A probe is a ridge regression, in each routed layer, of the risk on the base model's input of that
layer at the prompt's last token. A router that starts from probes and is not trained is the
baseline that a trained router must beat.

N prompts, L layers, F d_ff.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .routed import ROWS, Prompt, RoutedCausalLM, messages, pad
from .router import LinearGate
from .routing import RoutingState, base_features, row_anchors

STRENGTHS = (1e-2, 1e-1, 1.0, 1e1, 1e2)  # of the ridge, times the mean squared singular value


@dataclass(frozen=True)
class Probes:
    """One probe per routed layer: risk is about weight @ h + bias, 1 for harmful, -1 for benign."""

    weight: Tensor  # [L, F] float64
    bias: Tensor  # [L] float64
    strength: float
    error: float  # mean squared error on the validation prompts, of the mean over layers


def ridge(
    features: Tensor, targets: Tensor, strengths: Sequence[float] = STRENGTHS
) -> tuple[Tensor, Tensor]:
    """Ridge regressions with a free intercept, in closed form by one singular value decomposition.

    Args:
        features: [N, F].
        targets: [N].
        strengths: S of them; the penalty is a strength times the mean squared singular value of the
            centred features, so that it does not depend on their scale.

    Returns:
        Weights [S, F] and intercepts [S], float64.
    """
    x, y = features.double(), targets.double()
    mean = x.mean(0)
    u, s, v = torch.linalg.svd(x - mean, full_matrices=False)
    penalty = torch.tensor(strengths, dtype=torch.float64)[:, None] * s.square().mean()  # [S, 1]
    weights = (s / (s.square() + penalty) * (u.T @ (y - y.mean()))) @ v
    return weights, y.mean() - weights @ mean


def fit_probes(
    routed: RoutedCausalLM,
    prompts: Sequence[Prompt],
    harmful: Sequence[bool],
    validation: Sequence[bool],
    strengths: Sequence[float] = STRENGTHS,
) -> Probes:
    """The probes of every routed layer, from one forward pass of each prompt through the base.

    Features are kept in a temporary file and read layer by layer, so that memory holds those of one
    layer. The strength is the one with the least error of the mean over layers on validation
    prompts.

    Args:
        harmful: the risk of each prompt.
        validation: which prompts choose the strength; the others are fitted.

    Raises:
        UserError: the fitted or the validation prompts are of one kind only.
    """
    held_out = torch.tensor(validation, dtype=torch.bool)
    targets = torch.tensor(harmful, dtype=torch.float64) * 2 - 1  # [N]
    for name, part in (("fitted", targets[~held_out]), ("validation", targets[held_out])):
        if len(part.unique()) < 2:
            raise UserError(f"probes: the {name} prompts must hold harmful and benign ones")
    weights, biases, predictions = [], [], []
    with _features(routed, prompts) as features:
        for layer in range(len(routed.layers)):
            x = torch.from_numpy(np.array(features[layer]))  # [N, F]
            weight, bias = ridge(x[~held_out], targets[~held_out], strengths)
            weights.append(weight)
            biases.append(bias)
            predictions.append(x[held_out].double() @ weight.T + bias)  # [validation, S]
    pooled = torch.stack(predictions).mean(0)
    errors = (pooled - targets[held_out][:, None]).square().mean(0)
    best = int(errors.argmin())
    weight, bias = (torch.stack(values)[:, best] for values in (weights, biases))
    return Probes(weight, bias, strengths[best], float(errors[best]))


@torch.no_grad()
def start_from_probes(routed: RoutedCausalLM, probes: Probes) -> None:
    """Set linear gates: the safety gate opens with the risk, and the helpfulness gate closes.

    Raises:
        UserError: the gates are not linear ones.
    """
    for layer, weight, bias in zip(routed.layers.values(), probes.weight, probes.bias, strict=True):
        if not isinstance(layer.gate, LinearGate):
            raise UserError(
                f"router.gate is {routed.router.gate}: only linear gates can start from probes"
            )
        layer.gate.weight.copy_(torch.stack([weight, -weight]))
        layer.gate.bias.copy_(torch.stack([bias, -bias]))


@contextmanager
def _features(routed: RoutedCausalLM, prompts: Sequence[Prompt]) -> Iterator[Any]:
    """An array [L, N, F] in a file: the base model's inputs at each prompt's last token."""
    tokens = [routed.tokenization.prompt_ids(messages(prompt)) for prompt in prompts]
    layers = list(routed.layers.values())
    shape = (len(layers), len(tokens), layers[0].base.in_features)
    by_length = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    with tempfile.TemporaryFile() as file:
        features: Any = np.memmap(file, dtype=np.float32, mode="w+", shape=shape)
        for start in range(0, len(tokens), ROWS):
            part = by_length[start : start + ROWS]
            inputs = pad([tokens[i] for i in part], routed.device)
            mask = inputs["attention_mask"]
            anchors = row_anchors((mask.shape[0], mask.shape[1]), mask, routed.device)
            state = RoutingState("last", anchors)
            found = base_features(routed.model.get_decoder(), (), inputs, state)
            for layer, h in found.items():
                features[layer, part] = h.float().cpu().numpy()
        yield features
