"""The lm-evaluation-harness' own Hugging Face model, for every kind of model that is evaluated.

Tokenisation, stop texts and windows are the harness'. Continuations are scored here: those of one
context share its forward pass, and a request's context is its prompt, so that with scope ``last`` a
routed model decides its gates at the context's last token and keeps them for the continuation.
N continuation tokens of a pass, S continuations, D hidden.

This module needs the harness, an extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from ..data.batching import Document, TokenBatch, collate, split_batch
from ..errors import UserError
from ..models.logprobs import CHUNK, ResponseLogProbs
from ..models.selfcheck import BATCHED
from .generate import Generator

PASS_TOKENS = 8192  # of one forward pass (ours)
ROW_TOKENS = 1024  # of a context with the continuations that share its row (ours)
LogLikelihood = tuple[float, bool]  # nats, and whether the continuation is the greedy one


class HarnessModel(HFLM):
    """Answers the harness' requests with a generator's model.

    Raises:
        UserError: a continuation that the model's context does not hold.
    """

    def __init__(self, generator: Generator) -> None:
        routed = generator.spec.routed is not None
        self._causal = generator.model.model if routed else generator.model
        super().__init__(
            pretrained=self._causal,
            tokenizer=generator.tokenizer,
            max_length=generator.context - 1,  # its windows have one token more
            batch_size=generator.options.batch if getattr(self._causal, BATCHED, True) else 1,
        )
        self._model = generator.model
        self._logprobs = ResponseLogProbs(self._causal)
        self._anchored = generator.model.anchored if routed else lambda batch: nullcontext()

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[LogLikelihood]:
        """Of (texts, context ids, continuation ids); a long context loses its beginning."""
        documents: list[Document] = []
        members: list[list[int]] = []  # of each document, the numbers of its requests
        lengths: list[int] = []
        longest = self.max_length + 1
        for i, (_, context, continuation) in enumerate(requests):
            size = len(continuation)
            room = longest - size
            if not size or room < 1:
                raise UserError(
                    f"a continuation of {size} tokens: 1 to {longest - 1} fit the model"
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
        return [scores[i] for i in range(len(requests))]

    @torch.no_grad()
    def _forward(self, batch: TokenBatch) -> list[LogLikelihood]:
        batch = self._logprobs.arrange(batch.to(self.device))
        head = self._causal.get_output_embeddings()
        with self._anchored(batch):
            hidden = self._logprobs.hidden(batch).index_select(0, batch.predict_index)  # [N, D]
            nats = head(hidden, batch.labels)
            parts = hidden.split(max(1, CHUNK // head.out_features))
            best = torch.cat([head(part).argmax(-1) for part in parts])
        zeros = torch.zeros(batch.responses, dtype=torch.float64, device=nats.device)  # [S]
        total = zeros.index_add(0, batch.owner, nats.double())
        missed = zeros.index_add(0, batch.owner, (best != batch.labels).double())
        return list(zip(total.tolist(), (missed == 0).tolist(), strict=True))
