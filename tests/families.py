"""Tiny random models of every causal-LM family that the installed transformers can build."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 97
# A configuration's whole numbers, by name, and their tiny values.
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "d_model": 32, "n_embd": 32, "embedding_size":
    32, "word_embed_proj_dim": 32, "dim_model": 32, "num_attention_heads": 4, "n_head": 4,
    "n_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_heads": 4,
    "head_dim": 8, "dim_head": 8, "attention_head_dim": 8, "intermediate_size": 64, "ffn_dim": 64,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "ffn_hidden_size": 64, "dim_ff": 64, "dff": 64,
    "n_inner": 64, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16, "shared_intermediate_size": 16, "mlp_hidden_size":
    64, "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "moe_top_k":
    2, "n_group": 1, "topk_group": 1, "num_expert_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "o_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "qk_head_dim": 16, "rotary_dim": 8,
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_seq_len": 64,
    "max_sequence_length": 64, "sliding_window": 5, "state_size": 8, "mamba_d_state": 8,
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_num_heads": 8,
    "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "mamba_n_groups": 1,
    "mamba_chunk_size": 16, "chunk_size": 16, "time_step_rank": 4, "mamba_dt_rank": 4,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "lru_width": 32, "global_head_dim": 8,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "index_head_dim":
    16, "index_n_heads": 2, "index_topk": 64, "attention_hidden_size": 32,
    "moe_num_shared_experts": 1, "num_shared_experts": 1, "n_shared_experts": 1,
}  # fmt: skip
LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
)
KEY_HEADS = (
    "num_key_value_heads",
    "num_kv_heads",
    "multi_query_group_num",
    "num_global_key_value_heads",
)
UNSET = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
}  # where it is None
SPECIAL: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "reformer": {
        "axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 8),
        "attn_layers": ["local", "local"],
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "xlm": {"n_langs": 1, "emb_dim": 32, "n_words": VOCABULARY},
    "xlstm": {"num_blocks": 2},
}  # fmt: skip


def tiny_config(family: str) -> Any:
    """The family's default configuration, shrunk: a layer of each kind, and no size above 97."""
    config = transformers.AutoConfig.for_model(family)
    text = config.get_text_config(decoder=True)
    shrink(text)
    for name, value in SPECIAL.get(family, {}).items():
        setattr(text, name, value)
    return text


def shrink(config: Any) -> None:
    values = dict(vars(config))
    kinds = list(dict.fromkeys(values.get("layer_types") or []))
    count = max(2, len(kinds))
    heads = next(
        (values[n] for n in ("num_attention_heads", "n_head", "n_heads") if n in values), None
    )
    for name, value in values.items():
        if isinstance(value, transformers.PreTrainedConfig):
            shrink(value)
            continue
        small = tiny(name, value, count, heads, values)
        if small is not None:
            setattr(config, name, small)
    if kinds:
        config.layer_types = (kinds * count)[:count]
    if "is_decoder" in values:
        config.is_decoder = True


def tiny(name: str, value: Any, count: int, heads: Any, values: dict[str, Any]) -> Any:
    """The small value of one setting; None leaves it as it is."""
    if value is None:
        return UNSET.get(name)
    if isinstance(value, list):
        if name.endswith("token_id"):
            return 2
        return value[:count] if len(value) > count and len(value) == depth(values) else None
    if name in ("initializer_range", "init_std") and isinstance(value, float):
        return 0.2  # wider than usual, so that faults show
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    if name in LAYERS:
        return count
    if name in KEY_HEADS:
        return 1 if value == 1 else 4 if value == heads else 2
    if name.endswith("token_id"):
        return 2 if value >= VOCABULARY else None
    return SIZES.get(name)


def depth(values: dict[str, Any]) -> int:
    return next((values[name] for name in LAYERS if isinstance(values.get(name), int)), -1)


def build(family: str, **settings: Any) -> Any:
    """A random model of the family; raises what transformers raises where it cannot be tiny."""
    config = tiny_config(family)
    for name, value in settings.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])
        if isinstance(model, tuple):
            model = model[0]
        return model(config).eval().requires_grad_(False)


def plain_log_probs(model: Any, documents: list[Any]) -> torch.Tensor:
    """[S] float64: the model's own forward on one row per response, log_softmax, gather, sum."""
    sums = []
    with torch.no_grad():
        for document in documents:
            for suffix in document.suffixes:
                ids = torch.tensor([[*document.prefix, *suffix]])
                logs = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
                start = len(document.prefix) - 1
                places = torch.arange(start, start + len(suffix))
                sums.append(logs[places, torch.tensor(suffix)].sum())
    return torch.stack(sums)
