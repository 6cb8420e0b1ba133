"""A model's responses to the lm-evaluation-harness: log-likelihoods of continuations, and texts.

A request's context is its prompt: with scope ``last`` a routed model decides its gates at the
context's last token and keeps them for the continuation. Texts become tokens as in the harness' own
Hugging Face model, without a chat template. Continuations of one context share its forward pass,
which the harness' own model cannot do. N continuation tokens of a pass, S continuations, D hidden.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from ..data.batching import Document, TokenBatch, collate, split_batch
from ..errors import UserError
from ..models.generation import generate_ids
from ..models.logprobs import CHUNK, ResponseLogProbs
from ..pipeline.cached_map import CacheRow, Values
from .generate import GenerationOptions, Generator, ModelSpec

PASS_TOKENS = 8192  # of one forward pass (ours)
ROW_TOKENS = 1024  # of a context with the continuations that share its row (ours)
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")  # the harness' names of one setting
LogLikelihood = tuple[float, bool]  # nats, and whether the continuation is the greedy one
Pair = tuple[list[int], list[int]]  # ids of a context and of its continuation


class Responder:
    """Rows of one ``kind`` of request with its ``args`` as JSON -> the response as JSON.

    Raises:
        UserError: a request that the model's context does not hold, or generation by sampling.
    """

    def __init__(self, spec: ModelSpec, options: GenerationOptions) -> None:
        greedy = replace(options, max_new_tokens=1, temperature=0.0)
        self._generator = Generator(spec, greedy)
        self._tokenizer, self._context = self._generator.tokenizer, self._generator.context
        self._routed = spec.routed is not None
        model = self._generator.model
        self._causal = model.model if self._routed else model
        self._logprobs = ResponseLogProbs(self._causal)
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        self._prefix: int = eos if bos is None else bos  # the context where a request has none

    def __call__(self, rows: Sequence[CacheRow]) -> list[dict[str, Values]]:
        kinds: dict[str, Callable[[Sequence[Any]], Sequence[Any]]] = {
            "loglikelihood": self.loglikelihood,
            "loglikelihood_rolling": self.loglikelihood_rolling,
            "generate_until": self.generate_until,
        }
        responses = kinds[rows[0]["kind"]]([json.loads(row["args"]) for row in rows])
        return [{"response": {"response": json.dumps(response)}} for response in responses]

    def loglikelihood(self, requests: Sequence[Any]) -> list[LogLikelihood]:
        """Of each (context, continuation)."""
        return self._score([self._pair(*request) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Of each (text,), in windows of the model's context; each begins one token earlier."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # an extra

        pairs: list[Pair] = []
        owners: list[int] = []
        for i, (text,) in enumerate(requests):
            windows = get_rolling_token_windows(
                self._encode(text),
                prefix_token=self._prefix,
                max_seq_len=self._context - 1,
                context_len=1,
            )
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owners.append(i)
        totals = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self._score(pairs), strict=True):
            totals[owner] += nats
        return totals

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The greedy continuation of each (context, generation_kwargs), up to its stop text."""
        groups: dict[str, list[int]] = {}
        for i, (_, settings) in enumerate(requests):
            groups.setdefault(json.dumps(settings), []).append(i)
        texts = [""] * len(requests)
        batch = self._generator.options.batch
        for settings, members in groups.items():
            longest, stop = self._settings(json.loads(settings))
            room = self._context - longest
            contexts = [self._encode(requests[i][0])[-room:] or [self._prefix] for i in members]
            order = sorted(range(len(members)), key=lambda n: len(contexts[n]))
            for start in range(0, len(order), batch):
                part = order[start : start + batch]
                ids = generate_ids(
                    self._generator.model,
                    [contexts[n] for n in part],
                    self._generator.eos,
                    max_new_tokens=longest,
                    stop_strings=stop or None,
                    tokenizer=self._tokenizer,
                )
                for n, response in zip(part, ids, strict=True):
                    text = self._tokenizer.decode(response, skip_special_tokens=True)
                    ends = [text.partition(s)[0] for s in stop]
                    texts[members[n]] = min(ends, key=len, default=text)
        return texts

    def _settings(self, given: dict[str, Any]) -> tuple[int, list[str]]:
        """The most new tokens, and the texts that end them, of a task's ``generation_kwargs``."""
        sampled = given.get("do_sample", given.get("temperature", 0) > 0)
        if sampled or given.get("num_beams", 1) != 1:
            raise UserError(
                f"generation_kwargs {given}: only greedy generation is supported (do_sample: false)"
            )
        longest = int(next((given[name] for name in _LENGTHS if name in given), 256))
        if longest >= self._context:
            raise UserError(
                f"generation_kwargs: {longest} new tokens, but the model has a context of "
                f"{self._context}"
            )
        until = given.get("until") or []
        texts = [until] if isinstance(until, str) else until
        return longest, [text for text in texts if text]

    def _encode(self, text: str, **options: Any) -> list[int]:
        bos = self._tokenizer.bos_token
        if bos and text.startswith(bos):
            options["add_special_tokens"] = False
        return self._tokenizer.encode(text, verbose=False, **options)

    def _pair(self, context: str, continuation: str) -> Pair:
        """Both texts' tokens, cut as by the harness: white space between belongs to the second."""
        head = context.rstrip()
        tail = context[len(head) :] + continuation
        if head:
            ids = self._encode(head)
            return ids, self._encode(head + tail)[len(ids) :]
        ids = self._encode(tail, add_special_tokens=False)
        return ([self._prefix], ids) if ids[:1] != [self._prefix] else (ids[:1], ids[1:])

    def _score(self, pairs: Sequence[Pair]) -> list[LogLikelihood]:
        """The score of each pair; a context that is too long loses its beginning."""
        documents: list[Document] = []
        members: list[list[int]] = []  # of each document, the numbers of its pairs
        lengths: list[int] = []
        for i, (context, continuation) in enumerate(pairs):
            size = len(continuation)
            room = self._context - size
            if not size or room < 1:
                raise UserError(
                    f"a continuation of {size} tokens: 1 to {self._context - 1} fit the model"
                )
            context = context[-room:]
            if not documents or documents[-1].prefix != context or lengths[-1] + size > ROW_TOKENS:
                documents.append(Document(context, []))
                members.append([])
                lengths.append(len(context))
            documents[-1].suffixes.append(continuation)
            members[-1].append(i)
            lengths[-1] += size
        scores: dict[int, LogLikelihood] = {}
        for part in split_batch(range(len(documents)), lengths, 1, PASS_TOKENS)[0]:
            batch = collate([documents[d] for d in part])
            numbers = [i for d in part for i in members[d]]
            scores |= zip(numbers, self._forward(batch), strict=True)
        return [scores[i] for i in range(len(pairs))]

    @torch.no_grad()
    def _forward(self, batch: TokenBatch) -> list[LogLikelihood]:
        model = self._generator.model
        batch = batch.to(model.device)
        head = self._causal.get_output_embeddings()
        with model.anchored(batch) if self._routed else nullcontext():
            hidden = self._logprobs.hidden(batch).index_select(0, batch.predict_index)  # [N, D]
            nats = head(hidden, batch.labels)
            parts = hidden.split(max(1, CHUNK // head.out_features))
            best = torch.cat([head(part).argmax(-1) for part in parts])
        zeros = torch.zeros(batch.responses, dtype=torch.float64, device=nats.device)  # [S]
        total = zeros.index_add(0, batch.owner, nats.double())
        missed = zeros.index_add(0, batch.owner, (best != batch.labels).double())
        return list(zip(total.tolist(), (missed == 0).tolist(), strict=True))
