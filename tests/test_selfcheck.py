"""A model is read in a way that gives its own values, or is refused in one line that names it."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from families import build, plain_log_probs
from ranks import run_ranks
from routing_world import make_run, routed_of

from midpo_ray.data.batching import Document, collate
from midpo_ray.errors import UserError
from midpo_ray.models import selfcheck
from midpo_ray.models.base import add_lora, load_base
from midpo_ray.models.decoder import as_padded
from midpo_ray.models.logprobs import ResponseLogProbs
from midpo_ray.models.selfcheck import check_generation, documents, relative_error

TEN = (
    "llama", "qwen2", "qwen3", "gemma2", "mistral", "phi3", "stablelm", "nemotron", "gpt2",
    "granite",
)  # fmt: skip


@pytest.mark.parametrize("family", TEN)
def test_what_is_compared_is_the_plain_log_probability(family: str) -> None:
    """The figures of the check: forward of one row, log_softmax, gather."""
    model = build(family)
    cases = documents(model.config.vocab_size)
    expected = []
    for document in cases:
        for suffix in document.suffixes:
            ids = torch.tensor([document.prefix + suffix])
            logs = model(input_ids=ids).logits[0].double().log_softmax(-1)
            start = len(document.prefix) - 1
            expected += [logs[start + i, token] for i, token in enumerate(suffix)]
    policy = ResponseLogProbs(model)
    assert policy.way == "tree"
    policy.use("rows")
    reference = selfcheck._reference(policy, cases[0], model.device)
    torch.testing.assert_close(
        reference.double(), torch.stack(expected)[: len(reference)], rtol=1e-5, atol=1e-5
    )
    for way in ("tree", "rows"):
        policy.use(way)
        for layout in ("tree", "packed", "padded"):
            values = policy.values(collate(cases, layout)).double()
            torch.testing.assert_close(values, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_gradients_of_padded_rows_are_those_of_the_tree() -> None:
    cases = documents(97)
    gradients = []
    for way in ("tree", "rows"):
        model = build("llama")
        model.model.layers[0].mlp.down_proj.weight.requires_grad_()
        policy = ResponseLogProbs(model)
        policy.use(way)
        (policy(collate(cases)) * torch.arange(1.0, 4.0)).sum().backward()
        gradients.append(model.model.layers[0].mlp.down_proj.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


def test_padded_rows_keep_the_order_of_responses() -> None:
    cases = [Document([5, 6, 7], [[8, 2], [9, 2]]), Document([4], [[3]])]
    for layout in ("tree", "packed", "padded"):
        padded = as_padded(collate(cases, layout))
        again = collate(cases, "padded")
        assert padded.input_ids.tolist() == again.input_ids.tolist()
        assert padded.labels.tolist() == again.labels.tolist()
        assert padded.owner.tolist() == again.owner.tolist()


class Broken(transformers.LlamaForCausalLM):
    """Adds to its logits what depends on the width of the batch: right in no layout."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * torch.linspace(1.0, 2.0, output.logits.shape[-1])
        return output


def broken(name: str = "broken") -> Broken:
    config = build("llama").config
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Broken(config).eval()
    model.name_or_path = name
    return model


def test_what_is_right_in_no_way_is_refused_by_name() -> None:
    for _ in range(2):  # also where the answer is kept
        with pytest.raises(UserError, match="broken") as caught:
            ResponseLogProbs(broken())
        assert "\n" not in str(caught.value)
        assert "Broken" in str(caught.value)


def test_the_fall_back_is_logged_and_kept(caplog, monkeypatch) -> None:
    monkeypatch.setattr(selfcheck, "_chosen", {})
    with caplog.at_level(logging.WARNING, logger="midpo_ray"):
        assert ResponseLogProbs(build("bloom")).way == "rows"
        first = len(caplog.records)
        assert ResponseLogProbs(build("bloom")).way == "rows"
    assert first == len(caplog.records) == 1
    assert len(selfcheck._chosen) == 1


def test_the_reference_is_independent_of_our_attention(monkeypatch) -> None:
    """While the model's own forward runs, its own attention and no tree is installed."""
    seen = []
    model = build("llama")
    plain = ResponseLogProbs.reference

    def spy(self, document):
        seen.append(self._model.config._attn_implementation)
        return plain(self, document)

    monkeypatch.setattr(selfcheck, "_chosen", {})
    monkeypatch.setattr(ResponseLogProbs, "reference", spy)
    assert ResponseLogProbs(model).way == "tree"
    assert set(seen) == {"sdpa"}


def test_the_check_changes_neither_random_numbers_nor_modes() -> None:
    model = build("llama")
    model.model.layers[0].train()
    before = torch.get_rng_state()
    ResponseLogProbs(model)
    check_generation(model, "llama")
    assert torch.equal(before, torch.get_rng_state())
    assert model.model.layers[0].training
    assert not model.model.layers[1].training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_passes(dtype: torch.dtype) -> None:
    for family in ("llama", "gemma2", "qwen3"):
        assert ResponseLogProbs(build(family).to(dtype)).way == "tree"


def test_generation() -> None:
    assert check_generation(build("llama"), "llama")
    assert not check_generation(build("rwkv"), "rwkv")  # it does not know padding
    with pytest.raises(UserError, match="xlnet"):
        check_generation(build("xlnet"), "xlnet")


def test_relative_error() -> None:
    reference = torch.tensor([3.0, 4.0])
    assert relative_error(reference, reference) == 0.0
    assert relative_error(torch.tensor([3.0, 4.5]), reference) == pytest.approx(0.1)
    assert relative_error(torch.tensor([3.0, float("nan")]), reference) == float("inf")


def test_the_documents_are_the_same_everywhere() -> None:
    first = documents(97)
    assert first == documents(97)
    assert all(0 <= i < 97 for d in first for ids in (d.prefix, *d.suffixes) for i in ids)
    assert len(plain_log_probs(build("llama"), first)) == 3


def sharded_log_probs(rank: int, world: int, folder: str) -> tuple[str, int, torch.Tensor]:
    """A base model of which ZeRO-3 gives every rank its share only."""
    from midpo_ray import config
    from midpo_ray.training.engine import deepspeed, deepspeed_settings, prepare

    optim = config.Optim(lr=1e-3, batch_size=2)
    settings = deepspeed_settings(config.DeepSpeed(stage=3), optim, "float32", world)
    kept = prepare(settings, on_gpu=False)
    base = load_base(config.Model(path=folder))
    policy = ResponseLogProbs(add_lora(base, config.Lora(r=2), 1))
    del kept
    held = sum(p.numel() for p in base.parameters() if not p.requires_grad)
    engine = deepspeed(policy, optim, settings, "cpu")
    return policy.way, held, engine(collate(documents(97))).detach()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "way"), [("llama", "tree"), ("mpt", "rows")])
def test_models_that_are_sharded(tmp_path, family: str, way: str) -> None:
    model = build(family)
    model.save_pretrained(tmp_path)
    expected = plain_log_probs(model, documents(97))
    for chosen, held, values in run_ranks(sharded_log_probs, 2, str(tmp_path)):
        assert chosen == way
        assert held == 0  # they are sharded again
        torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("keys", [{"scope": "last"}, {"scope": "token"}, {"scope": "prompt"}])
def test_routed_models_generate_as_their_gates_decide(
    tmp_path, tiny_llama, byte_tokenizer, monkeypatch, keys
) -> None:
    routed = routed_of(make_run(tmp_path, tiny_llama(), byte_tokenizer), **keys)
    assert check_generation(routed, "routed", routed=True)
    forward = type(routed).forward

    def other_gates(self, *args, **inputs):
        with self.force_gates(1.0, 0.0):
            return forward(self, *args, **inputs)

    monkeypatch.setattr(type(routed), "forward", other_gates)
    with pytest.raises(UserError, match="routed"):
        check_generation(routed, "routed", routed=True)
