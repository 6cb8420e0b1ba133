"""A model's decoder over the rows of a TokenBatch: trees of responses, whatever the model's attention.

R rows, T tokens of a row, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..data.batching import TokenBatch
from ..errors import UserError
from . import attention


class TreeDecoder(nn.Module):
    """What reads the hidden states of every response of a batch.

    Args:
        model: a Hugging Face model with a decoder, or a PEFT or routed model of one. SDPA on a CPU becomes ``attention``; the
            model's own forward goes on as before.

    Raises:
        UserError: the model has attention layers of a kind that is not known here.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        inner = self._model
        config = inner.config.get_text_config()
        if config._attn_implementation == "sdpa" and inner.device.type == "cpu":
            attention.register()
            inner.set_attn_implementation(attention.NAME)
        self._windows = _windows(config, inner.name_or_path)

    @property
    def _model(self) -> Any:
        """The Hugging Face model within; not registered a second time, so that parameters keep one name."""
        from transformers import PreTrainedModel

        return next(
            module for module in self.model.modules() if isinstance(module, PreTrainedModel)
        )

    def hidden(self, batch: TokenBatch) -> Tensor:
        """[R * T, D]: the decoder's last hidden states, at flat positions."""
        states = self._model.get_decoder()(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            **self._attention(batch),
        ).last_hidden_state
        return states.flatten(0, 1)

    def _attention(self, batch: TokenBatch) -> dict[str, Any]:
        """The mask as the model's attention takes it; one for each kind of layer where windows differ and matter."""
        if self._model.get_decoder().config._attn_implementation == attention.NAME:
            nothing = torch.zeros(
                1, 1, 1, 1, device=batch.input_ids.device
            )  # keeps transformers from making a mask
            return {"attention_mask": nothing, "tree": attention.Tree(batch)}
        length = batch.input_ids.shape[1]
        windows = {
            kind: w if w is not None and w < length else None for kind, w in self._windows.items()
        }
        masks = {window: self._mask(batch, window) for window in set(windows.values())}
        same = len(masks) == 1
        return {
            "attention_mask": masks.popitem()[1]
            if same
            else {kind: masks[window] for kind, window in windows.items()}
        }

    def _mask(self, batch: TokenBatch, window: int | None) -> Any:
        kind = self._model.get_decoder().config._attn_implementation
        if kind == "eager":
            return attention.bias(batch, window, self._model.dtype)
        if kind == "flex_attention":
            return attention.block_mask(batch, window)
        if kind == "sdpa":
            return batch.mask(window)
        raise UserError(
            f"model.attention is {kind}, which takes no tree of responses: use auto, sdpa, eager or flex_attention"
        )


def _windows(config: Any, name: str) -> dict[str, int | None]:
    """Kind of attention layer -> how many positions it sees, itself included; None is all."""
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [])
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise UserError(
            f"model {name}: its layers are of kind {', '.join(sorted(unknown))}; full_attention and sliding_attention are known"
        )
    if not kinds:
        return {"all": window}
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}
