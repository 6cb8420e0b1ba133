"""The files of the miniature: a base model and its tokenizer, preference pairs, held-out prompts.

They are built once and cached.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from ..config import digest
from . import world as w

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

log = logging.getLogger(__name__)

# Of the world and its training: raise it when either changes, so that no old file is used.
VERSION = 4
BOS, EOS, PAD, UNK, ANSWER = "<bos>", "<eos>", "<pad>", "<unk>", "<answer>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<answer>{{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}"
)
STEPS, BATCH, LR, WARMUP = 500, 32, 4e-3, 20
# Share of training texts behind an empty prompt: B-DPO needs unconditional log-probabilities.
UNCONDITIONAL = 0.10
# Weight of a head that predicts harm at the prompt's last token. A chat model represents harm, and
# a gate can only read what is represented.
HARM = 0.05


@dataclass(frozen=True, slots=True)
class MiniatureFiles:
    """Paths of the files of one world."""

    base: Path  # a Hugging Face folder: configuration, safetensors, tokenizer
    pairs: Path  # JSONL in PKU-SafeRLHF's columns, training prompts
    prompts: Path  # JSONL: prompt, harmful, lookalike, kind, split (validation or test)


def build_files(
    folder: str | Path,
    *,
    seed: int,
    rows: int = 2000,
    steps: int = STEPS,
) -> MiniatureFiles:
    """Build the files of world ``seed`` under ``folder``, or find those of an earlier call.

    Building takes a minute on one core. The files are in a folder that is named by everything that
    decides them; it is written aside and renamed, so that a killed build leaves nothing behind and
    two at once do no harm. ``steps`` is for tests: a base of few steps has learned nothing.
    """
    home = Path(folder) / f"miniature-{digest('miniature', VERSION, seed, rows, steps)}"
    if not home.exists():
        aside = home.with_name(f".{home.name}-{uuid.uuid4().hex[:8]}")
        aside.mkdir(parents=True)
        try:
            world = w.make_world(seed)
            _write_lines(aside / "pairs.jsonl", w.preference_rows(world, seed, rows))
            _write_lines(aside / "prompts.jsonl", w.held_out_prompts(world, seed))
            tokenizer = make_tokenizer()
            model = train_base(world, tokenizer, seed=seed, steps=steps)
            tokenizer.save_pretrained(aside / "base")
            model.save_pretrained(aside / "base")
            try:
                os.rename(aside, home)
            except OSError:
                if not home.exists():  # else another process was faster, with the same content
                    raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return MiniatureFiles(home / "base", home / "pairs.jsonl", home / "prompts.jsonl")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, lower-cased, no punctuation. A prompt is ``<bos> words <answer>``."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([PAD, BOS, EOS, UNK, ANSWER, *w.vocabulary()])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNK))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=UNK,
        additional_special_tokens=[ANSWER], chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False, model_max_length=64, padding_side="left",
    )  # fmt: skip


def train_base(
    world: w.World,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    steps: int = STEPS,
) -> PreTrainedModel:
    """A Llama of 0.6 M parameters, trained on the mixture of answers in one thread.

    A linear head beside it learns whether the prompt is harmful, and is thrown away.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=344,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config)
            head = torch.nn.Linear(config.hidden_size, 1)
        _fit(model, head, _texts(world, tokenizer, seed), steps)
    finally:
        torch.set_num_threads(threads)
    return model.eval()


def _fit(
    model: PreTrainedModel,
    head: torch.nn.Linear,
    sequences: Iterator[_Text],
    steps: int,
) -> None:
    model.train()
    optim = torch.optim.AdamW(
        [*model.parameters(), *head.parameters()], lr=LR, betas=(0.9, 0.98), weight_decay=0.01
    )
    pad = model.config.pad_token_id
    for step in range(steps):
        warm = min(1.0, (step + 1) / WARMUP)
        for group in optim.param_groups:
            group["lr"] = LR * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        rows = [next(sequences) for _ in range(BATCH)]
        longest = max(len(row.ids) for row in rows)
        ids = torch.full((BATCH, longest), pad)
        labels = torch.full((BATCH, longest), pad)
        for i, row in enumerate(rows):
            ids[i, : len(row.ids)] = torch.tensor(row.ids)
            labels[i, row.start : len(row.ids)] = torch.tensor(row.ids[row.start :])
        labels = labels[:, 1:]
        # Padding is on the right of a causal model, so that real positions never see it.
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        counted = labels != pad
        loss = F.cross_entropy(model.lm_head(hidden[counted]), labels[counted])
        asked = [i for i, row in enumerate(rows) if row.harmful is not None]
        harm = torch.tensor([float(bool(rows[i].harmful)) for i in asked])
        predicted = head(hidden[asked, [rows[i].start - 1 for i in asked]]).squeeze(-1)
        loss = loss + HARM * F.binary_cross_entropy_with_logits(predicted, harm)
        optim.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        if step in (0, steps - 1) or (step + 1) % 100 == 0:
            loss_text = f"loss {loss.item():.3f} nats per token"
            log.info("miniature: its base model at step %d of %d, %s", step + 1, steps, loss_text)


class _Text(NamedTuple):
    """``<bos> prompt <answer> response <eos>``."""

    ids: list[int]
    start: int  # index of the response's first token
    harmful: bool | None  # whether the prompt is; None where it is empty


def _texts(world: w.World, tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[_Text]:
    """Fresh training texts without end.

    Only the response counts in the loss: there the model must copy from the prompt, which it
    learns sooner so.
    """
    rng = random.Random(f"base {seed}")
    ids = tokenizer.get_vocab()
    while True:
        topic = w.draw_topic(world.train, rng)
        prompt = w.write_prompt(topic, rng)
        response = w.write_response(w.draw_kind(topic, rng), topic, rng)
        empty = rng.random() < UNCONDITIONAL
        words = [BOS, *w.words("" if empty else prompt), ANSWER, *w.words(response), EOS]
        harmful = None if empty else w.is_harmful(topic)
        yield _Text([ids[word] for word in words], words.index(ANSWER) + 1, harmful)


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
