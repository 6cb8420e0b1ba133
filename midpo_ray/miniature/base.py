"""The miniature's files: a trained base model and its tokenizer, preference pairs and held-out prompts, built once and cached."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..config import digest
from . import world as w

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

VERSION = 4  # of the world and its training: raise it when either changes, so that no old file is taken for a new one
BOS, EOS, PAD, UNK, ANSWER = "<bos>", "<eos>", "<pad>", "<unk>", "<answer>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<answer>{{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}"
)
STEPS, BATCH, LR, WARMUP = 500, 32, 4e-3, 20
UNCONDITIONAL = (
    0.10  # share of sequences behind an empty prompt: what an unconditional log-probability needs
)
HARM = 0.05  # weight of a head that tells harm at the prompt's last token: a chat model knows harm, and a gate can but read

Progress = Callable[[int, int, float], None]  # (step, steps, mean loss in nats a token)


@dataclass(frozen=True, slots=True)
class Built:
    """Paths of one world's files."""

    base: Path  # a Hugging Face folder: configuration, safetensors, tokenizer
    pairs: Path  # JSONL in PKU-SafeRLHF's columns, training prompts
    prompts: Path  # JSONL: prompt, harmful, lookalike, kind, split (validation or test), held-out (verb, object) pairs


def build(
    folder: str | Path,
    *,
    seed: int,
    rows: int = 2000,
    steps: int = STEPS,
    progress: Progress | None = None,
) -> Built:
    """The files of world ``seed`` under ``folder``, made at the first call (a minute of one core) and found at the next.

    They lie in a folder named by everything that decides them; it is written aside and renamed, so a killed build leaves nothing
    that a later one takes for whole, and two at once do no harm. ``steps`` is for tests: a base of few steps knows nothing.
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
            model = train_base(world, tokenizer, seed=seed, steps=steps, progress=progress)
            tokenizer.save_pretrained(aside / "base")
            model.save_pretrained(aside / "base")
            try:
                os.rename(aside, home)
            except OSError:
                if not home.exists():  # else another process was faster, with the same content
                    raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return Built(home / "base", home / "pairs.jsonl", home / "prompts.jsonl")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; lower-cases, and splits off punctuation. A prompt is rendered as ``<bos> words <answer>``."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([PAD, BOS, EOS, UNK, ANSWER, *w.vocabulary()])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNK))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=UNK,
        additional_special_tokens=[ANSWER], chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False,
        model_max_length=64, padding_side="left",
    )  # fmt: skip


def train_base(
    world: w.World,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    steps: int = STEPS,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """A Llama of 0.6 M parameters, trained on the mixture of answers to the training prompts, in one thread.

    Beside it a linear head learns whether the prompt is harmful, and is thrown away.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=344,
        max_position_embeddings=128, tie_word_embeddings=True, attn_implementation="sdpa",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config)
            head = torch.nn.Linear(config.hidden_size, 1)
        _fit(model, head, _sequences(world, tokenizer, seed), steps, progress)
    finally:
        torch.set_num_threads(threads)
    return model.eval()


def _fit(
    model: PreTrainedModel,
    head: torch.nn.Linear,
    sequences: Any,
    steps: int,
    progress: Progress | None,
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
        longest = max(len(row) for row, _, _ in rows)
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row, _, _ in rows])
        labels = torch.tensor(
            [[pad] * start + row[start:] + [pad] * (longest - len(row)) for row, start, _ in rows]
        )[:, 1:]
        asked = [i for i, (_, _, harmful) in enumerate(rows) if harmful is not None]
        harm = torch.tensor([float(rows[i][2]) for i in asked])
        # padding is on the right, behind a causal mask: real positions never see it
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        counted = labels != pad
        loss = F.cross_entropy(model.lm_head(hidden[counted]), labels[counted])
        told = head(hidden[asked, [rows[i][1] - 1 for i in asked]]).squeeze(-1)
        loss = loss + HARM * F.binary_cross_entropy_with_logits(told, harm)
        optim.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        if progress is not None and ((step + 1) % 50 == 0 or step + 1 == steps):
            progress(step + 1, steps, loss.item())


def _sequences(world: w.World, tokenizer: PreTrainedTokenizerFast, seed: int) -> Any:
    """Fresh training texts without end: token ids of ``<bos> prompt <answer> response <eos>``, where the response begins, and
    whether the prompt is harmful (None: it is empty).

    Only the response counts in the loss: it is there that the model must copy from the prompt, and it learns so sooner.
    """
    rng = random.Random(f"base {seed}")
    ids = tokenizer.get_vocab()
    while True:
        topic = w.draw_topic(world.train, rng)
        prompt = w.write_prompt(topic, rng)
        response = w.write_response(w.draw_kind(topic, rng), topic, rng)
        empty = rng.random() < UNCONDITIONAL
        words = [BOS, *w.words("" if empty else prompt), ANSWER, *w.words(response), EOS]
        yield (
            [ids[word] for word in words],
            words.index(ANSWER) + 1,
            None if empty else w.is_harmful(topic),
        )


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
