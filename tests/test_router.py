"""The router equals plain PEFT; cached, folded and recomputed passes equal plain ones."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from contextvars import copy_context
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from routing_world import CACHE, make_adapter, make_run, padded, peft_logits, routed_of, tokens
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from midpo_ray.data.batching import Document, collate
from midpo_ray.errors import UserError
from midpo_ray.models import ResponseLogProbs
from midpo_ray.models.router import RoutedLinear, fold_gate, make_gate
from midpo_ray.models.routing import Routing, row_anchors
from midpo_ray.objectives import gate_prior

SHAPE = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma": GemmaConfig,
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tiny_llama, byte_tokenizer) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), tiny_llama(), byte_tokenizer)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ["last", "token", "prompt"])
def test_forced_gates_are_plain_peft(tmp_path, family, scope):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        AutoModelForCausalLM.from_config(FAMILIES[family](**SHAPE)).save_pretrained(
            tmp_path / "base"
        )
    make_adapter(tmp_path / "base", tmp_path / "experts/safety", 1)
    make_adapter(tmp_path / "base", tmp_path / "experts/helpfulness", 2, r=6, alpha=9)
    routed, ids = routed_of(tmp_path, scope=scope), tokens(2, 9)
    for forced, adapter in (
        ((1, 0), "experts/safety"),
        ((0, 1), "experts/helpfulness"),
        ((0, 0), None),
    ):
        expected = peft_logits(tmp_path / "base", adapter and tmp_path / adapter, input_ids=ids)
        with torch.no_grad(), routed.force_gates(*forced):
            torch.testing.assert_close(routed(input_ids=ids).logits, expected, atol=1e-5, rtol=0)
    with torch.no_grad():
        assert (
            routed(input_ids=ids).logits - expected
        ).abs().max() > 1e-2  # the gates are its own again


def test_experts_keep_alpha_over_r(run_dir):
    """Gates of 0.5 add half of each expert's scaled delta, in training as in serving."""
    routed = routed_of(run_dir, random_gates=False, scope="token")
    layer = routed.layers["model.layers.1.mlp.down_proj"]
    state = load_file(run_dir / "experts/safety/adapter_model.safetensors")
    other = load_file(run_dir / "experts/helpfulness/adapter_model.safetensors")
    key = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
    captured = {}
    layer.register_forward_hook(lambda module, args, out: captured.update(h=args[0], out=out))
    routed(input_ids=tokens(1, 3))
    layer._forward_hooks.clear()
    h, out = captured["h"], captured["out"]
    expected = layer.base(h) + 0.5 * (
        3.0 * h @ state[key.format("A")].T @ state[key.format("B")].T
        + 1.5 * h @ other[key.format("A")].T @ other[key.format("B")].T
    )
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "bottleneck", "mlp"])
def test_gates_start_at_a_half_and_learn(run_dir, kind):
    routed, ids = routed_of(run_dir, random_gates=False, gate=kind).train(), tokens(2, 7)
    routed(input_ids=ids).logits.square().mean().backward()
    trained = [name for name, p in routed.named_parameters() if p.requires_grad]
    assert trained
    assert all(".gate." in name for name in trained)
    last = {"linear": "gate.weight", "bottleneck": "2.weight", "mlp": "2.weight"}[kind]
    assert all(
        p.grad.abs().max() > 0
        for name, p in routed.named_parameters()
        if name.endswith(last) and ".gate" in name
    )
    with routed.force_gates(0.5, 0.5):
        half = routed(input_ids=ids).logits
    torch.testing.assert_close(routed(input_ids=ids).logits, half, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["linear", "bottleneck", "mlp"])
@pytest.mark.parametrize("scope", ["last", "token", "prompt"])
def test_folded_equals_unfolded(run_dir, kind, scope):
    routed, ids = routed_of(run_dir, gate=kind, scope=scope), tokens(2, 11)
    with torch.no_grad():
        before = routed(input_ids=ids).logits
        torch.testing.assert_close(routed.fold()(input_ids=ids).logits, before, atol=1e-5, rtol=0)
    if kind != "mlp":
        assert sum(t.numel() for t in routed.gate_state().values()) == 2 * 2 * (64 + 1)


def test_parameter_counts_at_7b():
    """Llama-7B: 32 layers, d_ff 11008."""
    with torch.device("meta"):
        count = {
            kind: 32 * sum(p.numel() for p in make_gate(kind, 11008).parameters())
            for kind in ("linear", "bottleneck", "mlp")
        }
    assert count["bottleneck"] == pytest.approx(721e6, rel=0.005)
    assert count["linear"] == 32 * 2 * 11009 == 704_576  # 0.7 M, what the bottleneck folds into
    assert count["mlp"] == 32 * 2 * (11008 * 16 + 16 + 16 + 1)


def test_fold_is_exact_in_float64():
    torch.manual_seed(0)
    gate = make_gate("bottleneck", 48, 12).double()
    nn.init.normal_(gate.experts[0][-1].weight)
    nn.init.normal_(gate.experts[1][-1].weight)
    h = torch.randn(5, 48, dtype=torch.float64)
    torch.testing.assert_close(fold_gate(gate).double()(h), gate(h), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("scope", ["last", "token"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_decoding_is_one_full_forward(run_dir, scope, side):
    """Prompts of 3, 8 and 5 tokens, 4 tokens of response each, fed one by one behind the cache."""
    routed = routed_of(run_dir, scope=scope)
    prompts, tails = [tokens(1, n, n)[0] for n in (3, 8, 5)], tokens(3, 4, 9)
    full = padded([torch.cat([p, t]) for p, t in zip(prompts, tails, strict=True)], "right")
    with torch.no_grad():
        expected = routed(**full, prompt_lengths=[3, 8, 5]).logits
        batch = padded(prompts, side)
        out, mask = routed(**batch, use_cache=True), batch["attention_mask"]
        for step in range(4):
            for row, prompt in enumerate(prompts):
                if step == 0:
                    where = -1 if side == "left" else len(prompt) - 1
                    torch.testing.assert_close(
                        out.logits[row, where], expected[row, len(prompt) - 1], atol=1e-5, rtol=0
                    )
                else:
                    torch.testing.assert_close(
                        out.logits[row, -1],
                        expected[row, len(prompt) + step - 1],
                        atol=1e-5,
                        rtol=0,
                    )
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
            positions = torch.tensor([[len(p) + step] for p in prompts])
            out = routed(
                tails[:, step : step + 1],
                attention_mask=mask,
                position_ids=positions,
                **{CACHE: out[CACHE]},
            )


def test_gates_travel_with_the_cache(run_dir):
    """Two generations in turns do not mix, and a new turn is a new decision."""
    routed, first, second = routed_of(run_dir), tokens(1, 6, 1), tokens(1, 6, 2)
    step = tokens(1, 1, 3)
    with torch.no_grad():
        one, two = (routed(x, use_cache=True)[CACHE] for x in (first, second))
        mixed = [routed(step, **{CACHE: cache}).logits for cache in (one, two)]
        for ids, logits in zip((first, second), mixed, strict=True):
            alone = routed(torch.cat([ids, step], 1), prompt_lengths=[6]).logits[:, -1:]
            torch.testing.assert_close(logits, alone, atol=1e-5, rtol=0)
        held = [gates.clone() for gates in one.routing_gates.values()]
        routed(tokens(1, 4, 5), **{CACHE: one})
        assert all(
            not torch.equal(a, b) for a, b in zip(held, one.routing_gates.values(), strict=True)
        )
        with pytest.raises(RuntimeError, match="1 rows"):
            routed(tokens(2, 1), **{CACHE: one})


@pytest.mark.parametrize("scope", ["last", "token", "prompt"])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}]
)
def test_generate_in_a_batch_is_one_by_one(run_dir, scope, options):
    routed = routed_of(run_dir, scope=scope)
    prompts = [
        tokens(1, n, n)[0]
        for n in ((4, 9, 6) if "prompt_lookup_num_tokens" not in options else (8,))
    ]
    same = {
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        **options,
    }
    batch = padded(prompts, "left")
    together = routed.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **same)[
        :, -8:
    ]
    plain = {k: v for k, v in same.items() if k not in ("use_cache", "prompt_lookup_num_tokens")}
    for row, prompt in zip(together, prompts, strict=True):
        torch.testing.assert_close(
            routed.generate(prompt[None], attention_mask=torch.ones(1, len(prompt)), **plain)[
                0, -8:
            ],
            row,
        )


def test_greedy_generation_follows_the_full_forward(run_dir):
    routed, prompt = routed_of(run_dir), tokens(1, 6)
    made = routed.generate(
        prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    with torch.no_grad():
        logits = routed(made, prompt_lengths=[6]).logits
    assert logits[0, 5:-1].argmax(-1).tolist() == made[0, 6:].tolist()
    with pytest.raises(UserError, match="prefill_chunk_size"):
        routed.generate(prompt, max_new_tokens=2, prefill_chunk_size=3)


def tree_batch() -> SimpleNamespace:
    """Two documents in one row each: prompts of 4 and 3 tokens, responses of 3 and 2, and 2 and 2.
    The second row has two tokens of padding."""
    ids = tokens(2, 9, 4)
    branch = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2], [0, 0, 0, 1, 1, 2, 2, 0, 0]])
    document = torch.tensor([[0] * 9, [0] * 7 + [-1] * 2])
    position = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 4, 5], [0, 1, 2, 3, 4, 3, 4, 0, 0]])
    causal = torch.tril(torch.ones(9, 9, dtype=torch.bool))
    same = (branch[:, :, None] == branch[:, None]) | (branch[:, None] == 0)
    mask = (causal & same & (document[:, None] >= 0)) | torch.eye(9, dtype=torch.bool)
    return SimpleNamespace(
        input_ids=ids, position_ids=position, document_ids=document, branch_ids=branch,
        anchor_index=torch.tensor([3, 11]), mask=mask[:, None],
        anchor_of=torch.tensor([[0] * 9, [1] * 7 + [0, 0]]),
    )  # fmt: skip


def run_tree(routed, batch):
    """(logits, recorded gates) of a batch."""
    with routed.anchored(batch) as recorded:
        logits = routed(
            batch.input_ids,
            attention_mask=batch.mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).logits
    return logits, recorded


@pytest.mark.parametrize("scope", ["last", "token"])
def test_a_tree_is_two_rows(run_dir, scope):
    """One row per pair equals one row per response; both responses share the prompt's decision."""
    routed, batch = routed_of(run_dir, scope=scope), tree_batch()
    with torch.no_grad():
        logits, _ = run_tree(routed, batch)
        for row, prompt in ((0, 4), (1, 3)):
            for branch in (1, 2):
                where = [
                    t
                    for t in range(9)
                    if batch.document_ids[row, t] == 0 and batch.branch_ids[row, t] in (0, branch)
                ]
                alone = routed(
                    batch.input_ids[row : row + 1, where], prompt_lengths=[prompt]
                ).logits[0]
                torch.testing.assert_close(logits[row, where], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scope", ["last", "token"])
def test_the_prior_sees_the_gates_that_were_used(run_dir, scope):
    """The prior is the mean over real tokens of the gates of the forward pass itself."""
    routed, batch = routed_of(run_dir, scope=scope), tree_batch()
    seen: dict[int, torch.Tensor] = {}
    for layer in routed.layers.values():
        layer.register_forward_hook(lambda module, args, out: seen.update({module.layer: args[0]}))
    _, recorded = run_tree(routed, batch)
    safety, helpfulness, mask = recorded.gates()
    prior = gate_prior(safety, helpfulness, mask)
    total, count = 0.0, 0
    for layer in routed.layers.values():
        h = seen[layer.layer]
        for row in range(2):
            for t in range(9):
                if batch.document_ids[row, t] >= 0:
                    at = h.flatten(0, 1)[batch.anchor_index[row]] if scope == "last" else h[row, t]
                    g = torch.sigmoid(layer.gate(at)).detach()
                    total, count = total + float(g[0] + 1 - g[1]), count + 1
    assert count == 2 * 16
    assert float(prior.detach()) == pytest.approx(total / count, rel=1e-5)
    noisy = SimpleNamespace(**{**vars(batch), "input_ids": batch.input_ids.clone()})
    noisy.input_ids[1, 7:] = 5  # other padding
    _, recorded = run_tree(routed, noisy)
    torch.testing.assert_close(gate_prior(*recorded.gates()), prior)
    with pytest.raises(RuntimeError, match="anchored"), routed.anchored(batch) as recorded:
        recorded.gates()


@pytest.mark.parametrize("kind", ["linear", "bottleneck", "mlp"])
@pytest.mark.parametrize("scope", ["last", "token"])
def test_gradient_checkpointing_agrees(run_dir, kind, scope):
    """Gates, loss and gradients are equal, also with two forwards before two backwards."""
    batches = [tree_batch(), tree_batch()]
    batches[1].anchor_index = torch.tensor([1, 10])
    results = []
    for checkpointing in (False, True):
        routed = routed_of(run_dir, gate=kind, scope=scope).train()
        if checkpointing:
            routed.gradient_checkpointing_enable()
        losses, recorded = [], []
        for batch in batches:
            logits, newest = run_tree(routed, batch)
            recorded.append(newest.gates())
            losses.append(logits.log_softmax(-1)[..., 7].mean() + gate_prior(*recorded[-1]))
        for loss in losses:
            loss.backward()
        grads = {n: p.grad for n, p in routed.named_parameters() if p.grad is not None}
        results.append((torch.stack(losses).detach(), [r[0].detach() for r in recorded], grads))
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("scope", ["last", "token"])
def test_log_probabilities_in_every_layout(run_dir, scope):
    """Tree, packed and padded rows, checkpointed or not, have equal log-probabilities, gradients,
    and priors where they have the same tokens."""
    documents = [
        Document([1, 5, 6, 7], [[8, 9, 2], [10, 2]]),
        Document([1, 11], [[12, 2], [13, 14, 15, 2]]),
    ]
    results = []
    for layout, checkpointing in (
        ("tree", False),
        ("tree", True),
        ("packed", False),
        ("padded", False),
    ):
        routed = routed_of(run_dir, scope=scope).train()
        policy, batch = ResponseLogProbs(routed.model), collate(documents, layout)
        if checkpointing:
            routed.gradient_checkpointing_enable()
        with routed.anchored(batch) as recorded:
            log_probabilities = policy(batch)
        prior = gate_prior(*recorded.gates())
        (log_probabilities[0::2] - log_probabilities[1::2]).sum().backward()
        grads = {n: p.grad for n, p in routed.named_parameters() if p.grad is not None}
        results.append((log_probabilities.detach(), grads, prior.detach()))
    for other in results[1:]:
        torch.testing.assert_close(other[:2], results[0][:2], atol=1e-5, rtol=1e-4)
    assert results[1][2] == pytest.approx(float(results[0][2]), abs=1e-6)
    assert results[2][2] == pytest.approx(
        float(results[0][2]), abs=1e-6
    )  # packed: the same tokens; padded reads prompts twice


def test_foreign_checkpointing_is_refused(run_dir):
    routed, batch = routed_of(run_dir).train(), tree_batch()
    routed.model.gradient_checkpointing_enable({"use_reentrant": False})
    logits, _ = run_tree(routed, batch)
    with pytest.raises(RuntimeError, match=r"RoutedCausalLM\.gradient_checkpointing_enable"):
        logits.sum().backward()


def test_a_mask_without_anchors_is_refused(run_dir):
    routed, batch = routed_of(run_dir), tree_batch()
    with pytest.raises(RuntimeError, match="anchored"):
        routed(batch.input_ids, attention_mask=batch.mask)
    with pytest.raises(RuntimeError, match="the anchors are for"), routed.anchored(batch):
        routed(tokens(1, 3))


@pytest.mark.parametrize("scope", ["last", "token"])
def test_gate_gradient_is_the_finite_difference(scope):
    torch.manual_seed(0)
    routing = Routing(scope)
    experts = [(torch.randn(r, 6), torch.randn(5, r), 2.0) for r in (2, 3)]
    layer = RoutedLinear(
        nn.Linear(6, 5).double().requires_grad_(False), experts, make_gate("linear", 6), 0
    )
    h, out_weight = (
        torch.randn(2, 4, 6, dtype=torch.float64),
        torch.randn(2, 4, 5, dtype=torch.float64),
    )
    weight = torch.randn(2, 6, dtype=torch.float64) * 0.3
    nn.init.normal_(layer.gate.bias)

    def value(w: torch.Tensor) -> torch.Tensor:
        anchors = row_anchors((2, 4), None, h.device, lengths=torch.tensor([2, 3]))
        with routing.request(anchors=anchors):
            routing.begin(layer, (h[..., 0],), {})
            out = torch.func.functional_call(layer, {"gate.weight": w}, (h,))
            routing.end(layer, (), {}, out)
        return (out * out_weight).sum()

    assert torch.autograd.gradcheck(value, (weight.requires_grad_(),), eps=1e-6, atol=1e-8)


@pytest.mark.parametrize("scope", ["last", "token", "prompt"])
def test_routing_reads_the_last_prompt_token(run_dir, byte_tokenizer, scope):
    routed = routed_of(run_dir, byte_tokenizer, scope=scope)
    prompts = ["hi", [{"role": "user", "content": "what is a fox?"}], (("user", "no"),)]
    rows, decisions = routed.gates(prompts, ["a", "an animal", "yes"]), routed.routing(prompts)
    for prompt, row, decision in zip(prompts, rows, decisions, strict=True):
        assert routed.routing([prompt])[0] == pytest.approx(decision, abs=1e-6)
        assert decision["safety"] == pytest.approx(
            float(row["safety"][:, row["prompt_tokens"] - 1].mean()), abs=1e-6
        )
        assert row["helpfulness"].shape == (2, len(row["tokens"]))
        assert (row["safety"].std(-1).max() < 1e-6) == (scope != "token")
    with routed.force_gates(0.25, 0.75):
        assert routed.routing(["hi"]) == [{"safety": 0.25, "helpfulness": 0.75}]


def test_is_usable_as_a_causal_lm(run_dir):
    routed = routed_of(run_dir)
    assert routed.config.model_type == "llama"
    assert routed.device == torch.device("cpu")
    assert routed.dtype == torch.float32
    assert routed.generation_config.pad_token_id == 0
    with pytest.raises(UserError, match="no tokenizer"):
        routed.routing(["hi"])


def prompt_router(run_dir, **keys):
    return routed_of(run_dir, scope="prompt", temperature=2.0, **keys)


@pytest.mark.parametrize("decision", ["soft", "hard"])
@pytest.mark.parametrize("gate", ["linear", "mlp"])
def test_scope_prompt_by_hand(run_dir, decision, gate):
    """One decision from the plain base model's features, then the pass with constant gates."""
    routed, ids = prompt_router(run_dir, gate=gate, decision=decision), tokens(3, 9)
    base = AutoModelForCausalLM.from_pretrained(run_dir / "base").eval()
    features = {}
    for path in routed.layers:
        hook = partial(lambda path, module, args, out: features.update({path: args[0]}), path)
        base.get_submodule(path).register_forward_hook(hook)
    lengths = [4, 9, 6]
    with torch.no_grad():
        base(input_ids=ids)
        got = routed(input_ids=ids, prompt_lengths=lengths).logits
        for row, length in enumerate(lengths):
            logits = torch.stack(
                [
                    layer.gate(features[path][row, length - 1])
                    for path, layer in routed.layers.items()
                ]
            )
            gates = torch.sigmoid(2.0 * logits.mean(0))
            if decision == "hard":
                gates = (gates == gates.max()).float()
            with routed.force_gates(*gates.tolist()):
                expected = routed(input_ids=ids[row : row + 1]).logits[0]
            torch.testing.assert_close(got[row], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_scope_prompt_decodes_as_it_trains(run_dir, side):
    """Padded prompts and cached steps equal whole forward passes; a new turn is refused."""
    routed = prompt_router(run_dir)
    prompts, tails = [tokens(1, n, n)[0] for n in (3, 8, 5)], tokens(3, 2, 9)
    full = padded([torch.cat([p, t]) for p, t in zip(prompts, tails, strict=True)], "right")
    batch = padded(prompts, side)
    with torch.no_grad():
        expected = routed(**full, prompt_lengths=[3, 8, 5]).logits
        out, mask = routed(**batch, use_cache=True), batch["attention_mask"]
        for step in range(2):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
            out = routed(
                tails[:, step : step + 1],
                attention_mask=mask,
                position_ids=torch.tensor([[len(p) + step] for p in prompts]),
                **{CACHE: out[CACHE]},
            )
            for row, prompt in enumerate(prompts):
                wanted = expected[row, len(prompt) + step]
                torch.testing.assert_close(out.logits[row, -1], wanted, atol=1e-5, rtol=0)
    with pytest.raises(RuntimeError, match="whole conversation"):
        routed(tokens(3, 4), **{CACHE: out[CACHE]})


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_scope_prompt_in_every_layout(run_dir, layout):
    """As in the tree layout: log-probabilities and gradients of the gates, checkpointed or not."""
    documents = [
        Document([1, 5, 6, 7], [[8, 9, 2], [10, 2]]),
        Document([1, 11], [[12, 2], [13, 14, 15, 2]]),
    ]
    results = []
    for name, checkpointing in (("tree", False), ("tree", True), (layout, False)):
        routed = prompt_router(run_dir).train()
        if checkpointing:
            routed.gradient_checkpointing_enable()
        policy, batch = ResponseLogProbs(routed.model), collate(documents, name)
        with routed.anchored(batch) as recorded:
            log_probabilities = policy(batch)
        safety, _, mask = recorded.gates()
        assert safety.shape == (2, len(mask))
        assert torch.equal(safety[0], safety[1])
        loss = (log_probabilities[0::2] - log_probabilities[1::2]).sum()
        loss.backward()
        grads = {n: p.grad for n, p in routed.named_parameters() if p.grad is not None}
        assert grads
        results.append((log_probabilities.detach(), grads))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-5, rtol=1e-4)


def in_threads(*tasks) -> None:
    """Run the tasks at once; what one of them raises is raised here."""
    with ThreadPoolExecutor(len(tasks)) as pool:
        for done in [pool.submit(task) for task in tasks]:
            done.result()


@pytest.mark.parametrize("scope", ["last", "token", "prompt"])
def test_two_threads_get_their_own_logits(run_dir, scope):
    """Passes of other lengths, forced gates and generation at once equal those one by one."""
    routed = routed_of(run_dir, scope=scope)
    inputs = [tokens(2, 7), tokens(2, 31)]
    forced = [nullcontext, partial(routed.force_gates, 1, 0)]
    generate = partial(
        routed.generate, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0
    )

    def logits(i: int) -> torch.Tensor:
        with torch.no_grad(), forced[i]():
            return routed(input_ids=inputs[i]).logits

    expected, answers = [logits(i) for i in (0, 1)], [generate(ids) for ids in inputs]
    assert not torch.equal(answers[0][:, 7:], answers[1][:, 31:])

    def passes(i: int) -> None:
        for number in range(400):
            assert torch.equal(logits(i), expected[i]), (i, number)
        for _ in range(5):
            assert torch.equal(generate(inputs[i]), answers[i])

    in_threads(partial(passes, 0), partial(passes, 1))


def test_forced_gates_hold_in_one_thread(run_dir):
    """A thread starts without them, unless it runs in a copy of the context."""
    routed, ids = routed_of(run_dir), tokens(1, 5)
    logits = torch.no_grad()(lambda: routed(input_ids=ids).logits)
    own = logits()
    with routed.force_gates(1, 0), ThreadPoolExecutor(1) as pool:
        forced = logits()
        assert torch.equal(pool.submit(logits).result(), own)
        assert torch.equal(pool.submit(copy_context().run, logits).result(), forced)
        with routed.force_gates(0, 1):
            assert not torch.equal(logits(), forced)
        assert torch.equal(logits(), forced)
    assert torch.equal(logits(), own)


def test_forced_gates_are_of_one_model(run_dir):
    one, other, ids = routed_of(run_dir), routed_of(run_dir, scope="token"), tokens(1, 5)
    with torch.no_grad():
        own = other(input_ids=ids).logits
        with one.force_gates(1, 0), other.force_gates(0, 1), one.force_gates(0, 0):
            pass
        with one.force_gates(1, 0):
            assert torch.equal(other(input_ids=ids).logits, own)


@pytest.mark.parametrize("scope", ["last", "token"])
def test_backward_in_other_threads(run_dir, scope):
    """Checkpointed backward passes in threads that ran no forward have the forward's gates."""
    batches = [tree_batch(), tree_batch()]
    batches[1].anchor_index = torch.tensor([1, 10])
    gradients = []
    for threads in (False, True):
        models = [routed_of(run_dir, scope=scope).train() for _ in batches]
        losses = []
        for routed, batch in zip(models, batches, strict=True):
            routed.gradient_checkpointing_enable()
            logits, recorded = run_tree(routed, batch)
            losses.append(logits.square().mean() + gate_prior(*recorded.gates()))
        run = in_threads if threads else lambda *tasks: [task() for task in tasks]
        run(*[loss.backward for loss in losses])
        gradients.append(
            [p.grad for m in models for p in m.parameters() if p.grad is not None],
        )
    assert gradients[0]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_gates_of_forced_decoding_steps(run_dir):
    """A decoding step may be forced; the cache keeps the prompt's gates."""
    routed, ids, step = routed_of(run_dir), tokens(2, 6), tokens(2, 1, 3)
    with torch.no_grad():
        plain = routed(torch.cat([ids, step], 1), prompt_lengths=[6, 6]).logits[:, -1:]
        cache = routed(ids, use_cache=True)[CACHE]
        kept = copy.deepcopy(cache)
        with routed.force_gates(0, 0):
            forced = routed(step, **{CACHE: cache}).logits
        assert not torch.allclose(forced, plain, atol=1e-3)
        torch.testing.assert_close(routed(step, **{CACHE: kept}).logits, plain, atol=1e-5, rtol=0)
        assert all(
            torch.equal(a, b)
            for a, b in zip(cache.routing_gates.values(), kept.routing_gates.values(), strict=True)
        )


def test_answer_ends_at_any_end_token(run_dir, byte_tokenizer):
    routed = routed_of(run_dir, byte_tokenizer)
    whole = routed.answer("hi", max_new_tokens=12)
    ids = routed.tokenization.prompt_ids((("user", "hi"),))
    out = routed.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    made = out[0, len(ids) :].tolist()
    end = next(i for i, token in enumerate(made) if i > 3 and token not in made[:i])
    routed.generation_config.eos_token_id = [2, made[end]]
    short = routed.answer("hi", max_new_tokens=12)
    assert short == byte_tokenizer.decode(made[:end], skip_special_tokens=True)
    assert whole.startswith(short)
    assert whole != short
