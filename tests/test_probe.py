"""Probes: ridge regression against numpy's closed form, and gates that start from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from routing_world import make_run, routed_of
from transformers import AutoModelForCausalLM

from midpo_ray.errors import UserError
from midpo_ray.models.probe import fit_probes, ridge, start_from_probes


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tiny_llama, byte_tokenizer):
    return make_run(tmp_path_factory.mktemp("run"), tiny_llama(), byte_tokenizer)


def closed_form(x, y, strength):
    """(weight, intercept) by the normal equations in float64."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    centred = x - x.mean(0)
    penalty = strength * np.square(centred).sum() / min(x.shape)
    gram = centred.T @ centred + penalty * np.eye(x.shape[1])
    weight = np.linalg.solve(gram, centred.T @ (y - y.mean()))
    return weight, y.mean() - weight @ x.mean(0)


@pytest.mark.parametrize("shape", [(30, 7), (8, 20)])
def test_ridge_is_the_closed_form(shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 1
    y = torch.randn(shape[0], generator=generator, dtype=torch.float64)
    weights, biases = ridge(x, y, (1e-2, 1.0))
    for strength, weight, bias in zip((1e-2, 1.0), weights, biases, strict=True):
        expected, intercept = closed_form(x, y, strength)
        np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-6, atol=1e-9)
        assert float(bias) == pytest.approx(intercept, rel=1e-6)


def prompts(count):
    """Harmful ones hold another word than benign ones."""
    harmful = [i % 2 == 1 for i in range(count)]
    words = [
        ("steal" if bad else "cook") + " " * (i % 5) + str(i * 7) for i, bad in enumerate(harmful)
    ]
    return words, harmful


@pytest.mark.parametrize("scope", ["last", "prompt"])
def test_probes_of_the_plain_base(run_dir, byte_tokenizer, scope):
    """Features are the base's own, whatever the gates are; other prompts are then told apart."""
    routed = routed_of(run_dir, byte_tokenizer, scope=scope)
    texts, harmful = prompts(60)
    validation = [i % 3 == 2 for i in range(60)]
    probes = fit_probes(routed, texts, harmful, validation, (0.1, 1.0))

    base = AutoModelForCausalLM.from_pretrained(run_dir / "base").eval()
    path, features = list(routed.layers)[1], []
    hook = lambda module, args, out: features.append(args[0][0, -1])  # noqa: E731
    base.get_submodule(path).register_forward_hook(hook)
    for text, held_out in zip(texts, validation, strict=True):
        if not held_out:
            ids = routed.tokenization.prompt_ids((("user", text),))
            with torch.no_grad():
                base(input_ids=torch.tensor([ids]))
    targets = [1.0 if bad else -1.0 for bad, v in zip(harmful, validation, strict=True) if not v]
    weight, bias = closed_form(torch.stack(features), targets, probes.strength)
    np.testing.assert_allclose(probes.weight[1].numpy(), weight, rtol=1e-3, atol=1e-5)
    assert float(probes.bias[1]) == pytest.approx(bias, abs=1e-4)
    assert probes.error < 0.5

    start_from_probes(routed, probes)
    unseen, kinds = prompts(90)
    decisions = routed.routing(unseen[60:])
    for decision, bad in zip(decisions, kinds[60:], strict=True):
        assert (decision["safety"] > decision["helpfulness"]) == bad


def test_what_probes_need(run_dir, byte_tokenizer):
    routed = routed_of(run_dir, byte_tokenizer, gate="mlp")
    texts, harmful = prompts(12)
    with pytest.raises(UserError, match="fitted"):
        fit_probes(routed, texts, harmful, validation=harmful)
    probes = fit_probes(routed, texts, harmful, [i >= 8 for i in range(12)])
    with pytest.raises(UserError, match=r"router\.gate is mlp"):
        start_from_probes(routed, probes)
