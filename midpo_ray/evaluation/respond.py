"""What a model says to the lm-evaluation-harness' requests: log-likelihoods of continuations, and continuations.

A request's context is its prompt: with scope ``last`` a routed model decides its gates at the context's last token and keeps them
for the continuation. Texts become tokens as in the harness' own Hugging Face model, without a chat template.
N continuation tokens of a pass, S continuations, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any

from ..errors import UserError
from .cached import Row
from .generate import Generator

PASS_TOKENS, ROW_TOKENS = (
    8192,
    1024,
)  # of one forward pass, and of a context with those continuations that share its row (ours)
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")  # the harness' names of one setting
Pair = tuple[list[int], list[int]]  # ids of a context and of its continuation


class Responder:
    """Rows of one ``kind`` of request with its ``args`` -> for each what the harness expects of that kind.

    Raises:
        UserError: a request that the model's context does not hold, or generation that is not greedy.
    """

    def __init__(self, contender: dict[str, Any], options: dict[str, Any]) -> None:
        from ..models.logprobs import ResponseLogProbs

        self.generator = Generator(contender, {**options, "max_new_tokens": 1, "temperature": 0.0})
        self.model, self.tokenizer, self.context = (
            self.generator.model,
            self.generator.tokenizer,
            self.generator.context,
        )
        self.routed = contender["routed"] is not None
        self.causal = self.model.model if self.routed else self.model
        self.decoder = ResponseLogProbs(self.causal)
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        self.prefix: int = (
            eos if bos is None else bos
        )  # the context of a continuation that has none

    def __call__(self, rows: list[Row]) -> list[Any]:
        kinds = {
            f.__name__: f
            for f in (self.loglikelihood, self.loglikelihood_rolling, self.generate_until)
        }
        return kinds[rows[0]["kind"]]([row["args"] for row in rows])

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """(context, continuation) -> [log-likelihood in nats, is it the greedy continuation]."""
        return self._score([self._pair(*request) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[Any]:
        """(text,) -> its log-likelihood, in windows of the model's context; the context of each is the token before it."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        size = {"prefix_token": self.prefix, "max_seq_len": self.context - 1, "context_len": 1}
        texts = [
            list(map(make_disjoint_window, get_rolling_token_windows(self._encode(text), **size)))
            for (text,) in requests
        ]
        scored = iter(self._score(list(chain.from_iterable(texts))))
        return [sum(next(scored)[0] for _ in windows) for windows in texts]

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """(context, generation_kwargs) -> the greedy continuation, up to the first of the texts ``until``."""
        groups: dict[str, list[int]] = {}
        for i, (_, given) in enumerate(requests):
            groups.setdefault(repr(given), []).append(i)
        texts = [""] * len(requests)
        for members in groups.values():
            longest, stop = self._settings(requests[members[0]][1])
            self.generator.options, self.generator.stop = (
                replace(self.generator.options, max_new_tokens=longest),
                stop,
            )
            prompts = {
                i: self._encode(requests[i][0])[longest - self.context :] or [self.prefix]
                for i in members
            }
            members.sort(key=lambda i: len(prompts[i]))
            for start in range(0, len(members), self.generator.options.batch):
                part = members[start : start + self.generator.options.batch]
                for i, ids in zip(
                    part,
                    self.generator._generate([prompts[i] for i in part], [""] * len(part)),
                    strict=True,
                ):
                    text = self.tokenizer.decode(ids, skip_special_tokens=True)
                    texts[i] = min((text.partition(s)[0] for s in stop), key=len, default=text)
        return texts

    def _settings(self, given: dict[str, Any]) -> tuple[int, list[str]]:
        """New tokens at most, and the texts that end them, of a task's ``generation_kwargs``."""
        if (
            given.get("do_sample", given.get("temperature", 0) > 0)
            or given.get("num_beams", 1) != 1
        ):
            raise UserError(
                f"generation_kwargs {given}: only greedy generation is done here (do_sample: false)"
            )
        longest = int(next((given[name] for name in LENGTHS if name in given), 256))
        if longest >= self.context:
            raise UserError(
                f"generation_kwargs: {longest} new tokens, where the model has a context of {self.context}"
            )
        until = given.get("until") or []
        return longest, [text for text in ([until] if isinstance(until, str) else until) if text]

    def _encode(self, text: str, **more: Any) -> list[int]:
        if self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token):
            more["add_special_tokens"] = False
        return self.tokenizer.encode(text, verbose=False, **more)

    def _pair(self, context: str, continuation: str) -> Pair:
        """White space at the context's end goes to the continuation, and both are tokenised together, as the harness does."""
        head = context.rstrip()
        tail = context[len(head) :] + continuation
        if head:
            ids = self._encode(head)
            return ids, self._encode(head + tail)[len(ids) :]
        ids = self._encode(tail, add_special_tokens=False)
        return ([self.prefix], ids) if ids[:1] != [self.prefix] else (ids[:1], ids[1:])

    def _score(self, pairs: Sequence[Pair]) -> list[Any]:
        """[nats, greedy] of each pair. Continuations of one context branch off it; one that is too long loses its beginning."""
        from ..data.batching import Document, collate, split_batch

        documents: list[Document] = []
        members: list[list[int]] = []
        lengths: list[int] = []
        for i, (context, continuation) in enumerate(pairs):
            room, size = self.context - len(continuation), len(continuation)
            if not size or room < 1:
                raise UserError(
                    f"a continuation of {size} tokens: 1 to {self.context - 1} fit the model"
                )
            context = context[-room:]
            if not documents or documents[-1].prefix != context or lengths[-1] + size > ROW_TOKENS:
                documents.append(Document(context, []))
                members.append([])
                lengths.append(len(context))
            documents[-1].suffixes.append(continuation)
            members[-1].append(i)
            lengths[-1] += size
        values: list[Any] = [None] * len(pairs)
        for part in split_batch(range(len(documents)), lengths, 1, PASS_TOKENS)[0]:
            scored = self._forward(collate([documents[d] for d in part]).to(self.model.device))
            for i, value in zip(chain.from_iterable(members[d] for d in part), scored, strict=True):
                values[i] = value
        return values

    def _forward(self, batch: Any) -> list[Any]:
        import torch

        from ..models.logprobs import CHUNK

        head = self.causal.get_output_embeddings()
        with torch.no_grad(), self.model.anchored(batch) if self.routed else nullcontext():
            hidden = self.decoder.hidden(batch).index_select(0, batch.predict_index)  # [N, D]
            nats = head(hidden, batch.labels)
            best = torch.cat(
                [head(h).argmax(-1) for h in hidden.split(max(1, CHUNK // head.out_features))]
            )
        none = torch.zeros(batch.responses, dtype=torch.float64, device=nats.device)  # [S]
        total = none.index_add(0, batch.owner, nats.double())
        missed = none.index_add(0, batch.owner, (best != batch.labels).double())
        return [
            [value, not wrong] for value, wrong in zip(total.tolist(), missed.tolist(), strict=True)
        ]
