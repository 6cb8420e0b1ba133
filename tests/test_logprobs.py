"""Tree, packed, padded and the plain Hugging Face forward agree, in loss and gradient."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from midpo_ray.config import Lora
from midpo_ray.data.batching import Document, collate
from midpo_ray.errors import UserError
from midpo_ray.models.base import add_lora
from midpo_ray.models.logprobs import LogProbHead, ResponseLogProbs
from midpo_ray.objectives import preference_loss

LAYOUTS = ("tree", "packed", "padded")
SHAPE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings":
    64, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
ARCHITECTURES = {
    "Llama": {},
    "Llama, tied": {"tie_word_embeddings": True},
    "Mistral": {"sliding_window": 5},
    "Qwen2": {},
    "Qwen2, mixed": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "Qwen3": {},
    "Gemma": {"num_key_value_heads": 1},
    "Gemma2": {"sliding_window": 5, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
}


def causal_lm(name: str, **keys) -> transformers.PreTrainedModel:
    kind = name.partition(",")[0]
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **ARCHITECTURES[name], **keys})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)


def adapted(name: str, **keys):
    model = add_lora(
        causal_lm(name, **keys), Lora(r=4, target_modules=("down_proj", "q_proj")), seed=1
    )
    generator = torch.Generator().manual_seed(2)
    for key, parameter in model.named_parameters():
        if ".lora_B." in key:
            parameter.data.normal_(0, 0.3, generator=generator)
    return model


def pairs(count: int = 4, seed: int = 0) -> list[Document]:
    rng = random.Random(seed)
    ids = lambda low, high: [rng.randrange(3, 97) for _ in range(rng.randint(low, high))]  # noqa: E731
    return [Document(ids(1, 9), [ids(1, 12), ids(1, 12)]) for _ in range(count)]


def plain(model: nn.Module, documents: list[Document]) -> torch.Tensor:
    """log_softmax of the model's own logits, one response at a time."""
    result = []
    for document in documents:
        for suffix in document.suffixes:
            logits = (
                model(input_ids=torch.tensor([document.prefix + suffix]))
                .logits[0]
                .double()
                .log_softmax(-1)
            )
            places = torch.arange(len(document.prefix) - 1, len(document.prefix) + len(suffix) - 1)
            result.append(logits[places, torch.tensor(suffix)].sum().float())
    return torch.stack(result)


def loss_and_gradients(
    model: nn.Module, log_probabilities: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    zero = torch.zeros(len(log_probabilities) // 2)
    loss = preference_loss(
        log_probabilities[0::2], log_probabilities[1::2], zero, zero, beta=0.1
    ).sum()
    model.zero_grad()
    loss.backward()
    return loss.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def assert_same(one, two, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(one[0], two[0], rtol=tolerance, atol=tolerance)
    assert one[1].keys() == two[1].keys()
    for name in one[1]:
        scale = float(two[1][name].abs().max())
        torch.testing.assert_close(
            one[1][name], two[1][name], rtol=tolerance, atol=tolerance * max(scale, 1e-3)
        )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layouts_equal_the_plain_forward(name) -> None:
    model, documents = adapted(name), pairs()
    expected_values = plain(model, documents)
    expected = loss_and_gradients(model, expected_values)
    policy = ResponseLogProbs(model)
    for layout in LAYOUTS:
        values = policy(collate(documents, layout))
        torch.testing.assert_close(values, expected_values, rtol=1e-5, atol=1e-4)
        assert_same(loss_and_gradients(model, values), expected)
        with torch.no_grad():
            torch.testing.assert_close(
                policy(collate(documents, layout)), expected_values, rtol=1e-5, atol=1e-4
            )
    torch.testing.assert_close(
        plain(model, documents), expected_values
    )  # the model's own forward is as before


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2, mixed"])
def test_attention_by_masks(name, attention) -> None:
    """By masks, one for each kind of layer, values and gradients are those by segments."""
    model, documents = adapted(name), pairs()
    policy = ResponseLogProbs(model)
    assert model.config._attn_implementation == "midpo_tree"
    for layout in LAYOUTS:
        model.get_base_model().set_attn_implementation("midpo_tree")
        expected = loss_and_gradients(model, policy(collate(documents, layout)))
        model.get_base_model().set_attn_implementation(attention)
        assert_same(loss_and_gradients(model, policy(collate(documents, layout))), expected)


def test_attention_in_parts(monkeypatch) -> None:
    """Few heads at a time, as for long rows, gives the same."""
    model, batch = adapted("Llama"), collate(pairs())
    policy = ResponseLogProbs(model)
    expected = loss_and_gradients(model, policy(batch))
    monkeypatch.setattr("midpo_ray.models.attention._SCORES", 1)
    assert_same(loss_and_gradients(model, policy(batch)), expected)


def test_a_window_matters() -> None:
    """The sliding window is honoured, not ignored: without it the values differ."""
    documents = pairs()
    narrow, wide = (
        ResponseLogProbs(causal_lm("Mistral", sliding_window=w))(collate(documents))
        for w in (5, 500)
    )
    assert (narrow - wide).abs().max() > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_neighbours_and_padding_do_not_matter(layout) -> None:
    policy, documents = ResponseLogProbs(adapted("Llama")), pairs(6)
    together = policy(collate(documents, layout)).view(-1, 2)
    alone = torch.stack([policy(collate([d], layout)) for d in documents])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    order = [3, 1, 5, 0, 2, 4]
    torch.testing.assert_close(
        policy(collate([documents[i] for i in order], layout, pad_id=7)).view(-1, 2), alone[order]
    )


def test_no_gradient_is_nan_with_padding() -> None:
    model = adapted("Llama")
    documents = [
        Document([3], [[4], [5]]),
        Document(list(range(3, 30)), [list(range(40, 60)), list(range(60, 90))]),
    ]
    _, gradients = loss_and_gradients(model, ResponseLogProbs(model)(collate(documents)))
    assert all(bool(g.isfinite().all()) for g in gradients.values())


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_gradient_checkpointing_changes_nothing(name) -> None:
    model, batch = adapted(name), collate(pairs())
    policy = ResponseLogProbs(model)
    expected = loss_and_gradients(model, policy(batch))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy.train()
    assert_same(loss_and_gradients(model, policy(batch)), expected, 1e-6)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_head_against_float64(softcap, bias, scale, monkeypatch) -> None:
    monkeypatch.setattr("midpo_ray.models.logprobs.CHUNK", 60)  # chunks of two rows
    torch.manual_seed(0)
    linear = nn.Linear(16, 30, bias=bias).requires_grad_(False)
    head, labels, upstream = (
        LogProbHead(linear, scale, softcap),
        torch.randint(30, (11,)),
        torch.randn(11),
    )
    hidden = torch.randn(11, 16, requires_grad=True)
    values = head(hidden, labels)
    values.backward(upstream)
    exact = hidden.detach().double().requires_grad_()
    logits = F.linear(
        exact, linear.weight.double(), None if linear.bias is None else linear.bias.double()
    )
    logits = logits * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = logits.log_softmax(-1)[torch.arange(11), labels]
    expected.backward(upstream.double())
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(head(hidden, labels), values.detach())
    torch.testing.assert_close(head(hidden), linear(hidden))


def test_a_head_that_trains() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(16, 30)
    head, hidden, labels = (
        LogProbHead(linear, 1.0, 4.0),
        torch.randn(7, 16, requires_grad=True),
        torch.randint(30, (7,)),
    )
    head(hidden, labels).sum().backward()
    fused = hidden.grad.clone(), linear.weight.grad.clone()
    hidden.grad, linear.weight.grad = None, None
    (4.0 * torch.tanh(linear(hidden) / 4.0)).log_softmax(-1)[
        torch.arange(7), labels
    ].sum().backward()
    torch.testing.assert_close(fused, (hidden.grad, linear.weight.grad))


def test_bfloat16_stays_near_float32() -> None:
    batch = collate(pairs(8))
    model = adapted("Llama")
    policy = ResponseLogProbs(model)
    expected = policy(batch)
    values = policy.to(torch.bfloat16)(batch)
    assert values.dtype == torch.float32
    values.sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.bfloat16}
    assert (values - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_names_and_ties_are_kept() -> None:
    model = causal_lm("Llama, tied")
    before = [name for name, _ in model.named_parameters()]
    policy = ResponseLogProbs(model)
    assert [name for name, _ in model.named_parameters()] == before
    assert [name for name, _ in policy.named_parameters()] == [f"model.{name}" for name in before]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert ResponseLogProbs(model).model.lm_head is policy.model.lm_head  # replaced once
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(
        model.generate(ids, max_new_tokens=4),
        causal_lm("Llama, tied").generate(ids, max_new_tokens=4),
    )


def test_the_backward_pass_stops_at_the_lowest_trainable_layer() -> None:
    model = causal_lm("Llama")
    model.model.layers[2].mlp.down_proj.weight.requires_grad_()
    seen = []
    for layer in model.model.layers:
        layer.register_full_backward_hook(lambda module, *_: seen.append(module))
    ResponseLogProbs(model)(collate(pairs())).sum().backward()
    assert seen == [model.model.layers[2]]


def test_a_wrapped_head_is_refused() -> None:
    model = add_lora(causal_lm("Llama"), Lora(r=2, target_modules=("lm_head",)), seed=0)
    with pytest.raises(UserError, match=r"lora\.target_modules"):
        ResponseLogProbs(model)


def test_memory_of_the_head_does_not_grow_with_the_logits() -> None:
    """V 32 Ki: 4,096 more response tokens would be 512 MiB of logits; it grows by far less."""
    code = (
        "import resource, torch\n"
        "from torch import nn\n"
        "from midpo_ray.models.logprobs import LogProbHead\n"
        "torch.set_num_threads(1)\n"
        "head = LogProbHead(nn.Linear(32, 1 << 15, bias=False).requires_grad_(False))\n"
        "peak = []\n"
        "for n in (512, 4608):\n"
        "    hidden = torch.randn(n, 32, requires_grad=True)\n"
        "    head(hidden, torch.zeros(n, dtype=torch.long)).sum().backward()\n"
        "    peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)\n"
        "print(peak[1] - peak[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 64  # MiB
