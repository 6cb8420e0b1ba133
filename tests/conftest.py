"""Fakes for every test: a byte-level tokenizer and a two-layer random Llama, made in memory; and real data where it is."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)

SPECIAL = ("<pad>", "<s>", "</s>")  # ids 0, 1, 2; byte tokens follow
REPOSITORY = Path(__file__).resolve().parent.parent


LONGEST = (
    "test_run.py",
    "test_tuning.py",
    "test_bad_input.py",
    "test_real.py",
    "test_watch.py",
)  # minutes each


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where files run side by side, the longest begin first, so that none is left alone at the end."""
    items.sort(
        key=lambda item: (
            LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST)
        )
    )


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models (environment variable MIDPO_SHARED, default ../shared beside the repository)."""
    folder = Path(os.environ.get("MIDPO_SHARED", REPOSITORY / ".." / "shared")).resolve()
    if not (folder / "data").is_dir():
        pytest.skip(
            f"no real data: {folder}/data is not there (MIDPO_SHARED names the folder that holds it)"
        )
    return folder


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """259 tokens: <pad> 0, <s> 1, </s> 2, then one for each byte. Like Llama's it puts BOS in front and no EOS behind."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *alphabet))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def tiny_llama(byte_tokenizer) -> Callable[..., LlamaForCausalLM]:
    """``tiny_llama(seed=0, **LlamaConfig keys)``: two layers, d 32, d_ff 64, float32, random by seed, in evaluation mode."""

    def make(seed: int = 0, **keys) -> LlamaForCausalLM:
        config = LlamaConfig(
            **{
                "vocab_size": len(byte_tokenizer),
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 512,
                "initializer_range": 0.2,  # wider than usual, so that a random model's log-probabilities differ visibly
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                **keys,
            }
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture
def tiny_model_dir(tmp_path_factory, tiny_llama, byte_tokenizer) -> Callable[..., Path]:
    """``tiny_model_dir(seed=0, **LlamaConfig keys)``: a new folder with that model and its tokenizer."""

    def make(seed: int = 0, **keys) -> Path:
        folder = tmp_path_factory.mktemp("tiny")
        tiny_llama(seed, **keys).save_pretrained(folder)
        byte_tokenizer.save_pretrained(folder)
        return folder

    return make
