"""A model's decoder over the rows of a TokenBatch: trees of responses, or padded rows.

R rows, T tokens of a row, N response tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.batching import Document, TokenBatch, collate
from . import attention
from .selfcheck import Way, choose_way

_WAY = "_midpo_way"  # attribute of a Hugging Face model: how it is read, once it is proven


class TreeDecoder(nn.Module):
    """Reads the hidden states of every response of a batch.

    A model is read the way in which it gives its own values (``selfcheck``): as trees of responses,
    where SDPA on a CPU becomes ``attention``, or as padded rows with the model's own attention.

    Args:
        model: a Hugging Face model with a decoder, or a PEFT or routed model of one. The model's
            own forward stays as it is. A routed model must have been proven before its modules were
            wrapped, as ``assembly.route`` does.

    Raises:
        UserError: the model gives its own values in no way that is known here.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        inner, config = self._model, self._model.config.get_text_config()
        self._own = (
            "sdpa" if config._attn_implementation == attention.NAME else config._attn_implementation
        )
        self._windows = _windows(config)
        self.way: Way = "tree"
        if hasattr(inner, _WAY):
            self.use(getattr(inner, _WAY))
        else:
            setattr(inner, _WAY, choose_way(inner, self))

    @property
    def _model(self) -> Any:
        """The Hugging Face model within; not registered again, so that parameters keep one name."""
        return hugging_face_model(self.model)

    @property
    def _decoder(self) -> Any:
        """What gives hidden states: some families call their head, or all of it, a decoder."""
        decoder = self._model.get_decoder()
        named = isinstance(decoder, PreTrainedModel) and decoder is not self._model
        if named:
            return decoder
        parts = (m for m in self._model.modules() if isinstance(m, PreTrainedModel))
        return next((m for m in parts if m is not self._model), self._model)

    def use(self, way: Way) -> None:
        """Read batches this way from now on."""
        if way == "tree" and self._windows is None:
            raise ValueError("attention layers of an unknown kind")
        self.way = way
        segments = way == "tree" and self._own == "sdpa" and self._model.device.type == "cpu"
        if segments:
            attention.register()
        wanted = attention.NAME if segments else self._own
        if self._model.config.get_text_config()._attn_implementation != wanted:
            self._model.set_attn_implementation(wanted)

    def arrange(self, batch: TokenBatch) -> TokenBatch:
        """The batch as it is read: itself, or its responses in padded rows, in the same order."""
        return batch if self.way == "tree" else as_padded(batch)

    def hidden(self, batch: TokenBatch) -> Tensor:
        """[R * T, D]: the decoder's last hidden states of an arranged batch, at flat positions."""
        if self.way == "rows":
            inputs = {"attention_mask": (batch.document_ids >= 0).long()}
        else:
            inputs = {"position_ids": batch.position_ids, **self._tree_attention(batch)}
        output = self._decoder(input_ids=batch.input_ids, use_cache=False, **inputs)
        return output.last_hidden_state.flatten(0, 1)

    def _tree_attention(self, batch: TokenBatch) -> dict[str, Any]:
        """The mask as the model's attention takes it; one for each kind of layer."""
        assert self._windows is not None
        length = batch.input_ids.shape[1]
        kind = self._decoder.config._attn_implementation
        effective = {
            k: w if w is not None and w < length else None for k, w in self._windows.items()
        }
        if kind == attention.NAME:
            tree = attention.Tree(batch, self._windows.values())
            masks = {window: tree.mark(window) for window in set(effective.values())}
        else:
            masks = {window: self._mask(kind, batch, window) for window in set(effective.values())}
        if len(masks) == 1:
            return {"attention_mask": masks.popitem()[1]}
        return {"attention_mask": {k: masks[window] for k, window in effective.items()}}

    def _mask(self, kind: str, batch: TokenBatch, window: int | None) -> Any:
        if kind == "eager":
            return attention.bias(batch, window, self._model.dtype)
        if kind == "flex_attention":
            return attention.block_mask(batch, window)
        if kind == "sdpa":
            return batch.mask(window)
        raise ValueError(f"attention {kind} takes no mask of a tree")

    # --- what the self-check compares -----------------------------------------------------------

    def values(self, batch: TokenBatch) -> Tensor:
        """[N, D]: the hidden states that predict the response tokens."""
        batch = self.arrange(batch)
        return self.hidden(batch).index_select(0, batch.predict_index).float()

    def reference(self, document: list[int]) -> Tensor:
        """[T, D]: the decoder's own hidden states of one row."""
        ids = torch.tensor([document], device=self._model.device)
        return self._decoder(input_ids=ids, use_cache=False).last_hidden_state[0]

    def compared(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return outputs.float()


def hugging_face_model(model: nn.Module) -> Any:
    """The Hugging Face model in a PEFT or routed model of one, or itself."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def as_padded(batch: TokenBatch) -> TokenBatch:
    """The same responses in the same order, in rows of layout ``padded``."""
    documents: list[Document] = []
    ids = batch.input_ids.tolist()
    for row, prompt, own in batch.segments:
        if prompt.start == prompt.stop:
            documents.append(Document(ids[row][own], []))
        else:
            documents[-1].suffixes.append(ids[row][own])
    return collate(documents, "padded").to(batch.input_ids.device)


def _windows(config: Any) -> dict[str, int | None] | None:
    """Kind of attention layer -> how many positions it sees, itself included; None is all.

    Returns None where a layer is of another kind than full or sliding attention.
    """
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [])
    if kinds - {"full_attention", "sliding_attention"}:
        return None
    if not kinds:
        return {"all": window}
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}
