"""Every causal language model of the installed transformers, so small that a processor trains it in seconds.

Nothing here knows an architecture by its code: the sizes in a configuration are replaced by small ones, by their names, and the
layers that are kept are those that show every kind of layer once. What does not fit so stands in `FITTED`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["FITTED", "VARIANTS", "architectures", "make_base", "small_config", "write_base_of"]

HIDDEN, HEADS, KEY_HEADS, HEAD, INNER, VOCABULARY, LONGEST = 64, 4, 2, 16, 96, 272, 128
WINDOW = 8
"""Of a sliding window: rows are longer."""

SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "word_embed_proj_dim"), HIDDEN),
    **dict.fromkeys(
        ("embedding_size", "input_embedding_size", "output_embedding_size", "lru_width", "hidden_dim"), HIDDEN
    ),
    **dict.fromkeys(("hidden_size_global", "backbone_hidden_size", "out_hidden_size", "attention_hidden_size"), HIDDEN),
    **dict.fromkeys(("pronunciation_embed_dim", "shape_embed_dim", "adapter_out_dim", "input_size"), HIDDEN),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff", "dim_ff", "dff"), INNER
    ),
    **dict.fromkeys(("n_inner", "d_inner", "mlp_dim", "feed_forward_size", "intermediate_size_mlp"), INNER),
    **dict.fromkeys(("ffn_hidden_size", "shared_intermediate_size", "dense_intermediate_size"), INNER),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size", "prompt_mid_dim"), 32),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "attention_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads", "conf_num_attention_heads"), HEADS),
    **dict.fromkeys(("linear_num_heads", "linear_num_value_heads", "index_n_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads"), KEY_HEADS),
    **dict.fromkeys(("linear_num_key_heads", "num_global_key_value_heads"), KEY_HEADS),
    **dict.fromkeys(
        ("head_dim", "qk_head_dim", "kv_channels", "attention_head_size", "dim_head", "d_kv", "d_head"), HEAD
    ),
    **dict.fromkeys(
        ("linear_head_dim", "linear_key_head_dim", "linear_value_head_dim", "swa_head_dim", "v_head_dim"), HEAD
    ),
    **dict.fromkeys(("global_head_dim", "index_head_dim", "mamba_d_head", "mamba_head_dim"), HEAD),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), HEAD // 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "gated_norm_rank", "laurel_rank", "d_rel"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "depth"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("conf_num_hidden_layers", "num_global_layers", "num_layers_per_stack"), 1),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k"), 2),
    **dict.fromkeys(("n_group", "num_expert_group", "topk_group", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "moe_layer_start_index"), 1),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_dt_rank", "time_step_rank"), 8),
    **dict.fromkeys(
        ("mamba_n_groups", "n_groups", "num_nextn_predict_layers", "zero_expert_num", "interleave_moe_layer_step"), 1
    ),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "block_size", "index_block_size"), 8),
    **dict.fromkeys(
        ("index_topk", "indexer_budget", "keep_window_size"), LONGEST
    ),  # as long as a row: ties decide nothing
    **dict.fromkeys(("expert_layer_period", "attn_layer_period", "layer_group_size", "no_rope_layer_interval"), 2),
    **dict.fromkeys(("attn_layer_offset", "expert_layer_offset", "moe_layer_end_index", "moe_layer_interval"), 1),
    **dict.fromkeys(
        ("global_attn_every_n_layers", "sliding_window_pattern", "_sliding_window_pattern", "index_topk_blocks"), 2
    ),
    **dict.fromkeys(
        ("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "unpadded_vocab_size"), VOCABULARY
    ),
    **dict.fromkeys(
        ("pronunciation_vocab_size", "shape_vocab_size", "audio_vocab_size", "encoder_hash_byte_group_vocab"),
        VOCABULARY,
    ),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), LONGEST),
    **dict.fromkeys(("model_max_length", "max_target_positions", "original_max_position_embeddings"), LONGEST),
    **dict.fromkeys(("max_source_positions", "window_size", "attention_chunk_size", "rel_extent"), 32),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "local_attention"), WINDOW),
    **dict.fromkeys(("image_size", "crop_size"), 32),
    **dict.fromkeys(
        ("hidden_size_per_layer_input", "num_centroids", "codebook_dim", "ple_embed_dim", "hc_lowrank"), 16
    ),
    **dict.fromkeys(("num_kv_shared_layers", "prefix_dense_sliding_window_pattern"), 0),
    **dict.fromkeys(("patch_size",), 8),
    "type_vocab_size": 2,
    "ngram_vocab_size_base": 200,
    "mamba_d_ssm": 128,
    "attention_head_dim": HEAD,
    "prompt_length": 4,
}
"""Name of a size to a small one."""

NOT_GIVEN = (
    "_name_or_path",
    "_heterogeneity_spec",
    "_post_init_done",
    "_output_attentions",
    "ignore_keys_at_rope_validation",
    "id2label",
    "label2id",
)
"""Of a configuration, what is worked out and not given."""

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")

_QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 128,
    "indexer_compress_ratio": 2,
}
_DOTS3 = {
    "swa_num_attention_heads": HEADS,
    "swa_num_key_value_heads": HEADS,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_qk_rope_head_dim": 8,
    "swa_head_dim": 16,
    "swa_v_head_dim": 16,
}
_ZAMBA = {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], "num_hidden_layers": 4}

FITTED: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": KEY_HEADS, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"adapter_in_dim": HIDDEN},
        "audio_config": {"adapter_input_size": HIDDEN},
    },
    "dots3_note_text": _DOTS3,
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": HEAD},
    "gemma3n_text": {"intermediate_size": [INNER] * 4, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0]},
    "got_ocr2": {"vision_config": {"output_channels": 16}},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4": {
        "vision_config": {
            "vision_output_dim": HIDDEN,
            "projector_input_dim": HIDDEN,
            "projector_output_dim": HIDDEN,
            "intermediate_size": 4 * HIDDEN,
        }
    },
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": HEAD},
    "nemotron": {"num_key_value_heads": KEY_HEADS},
    "phi4_multimodal": {
        "audio_config": {"ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 32}
    },
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        "attention_head_size": HEAD,
        "axial_pos_embds": False,
        "attn_layers": ["local", "local"],
        "num_hidden_layers": 2,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {**_ZAMBA, "n_mamba_heads": 2, "attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {
        **_ZAMBA,
        "hybrid_layer_ids": [1, 3],
        "mamba_headdim": HEAD,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
}
"""Type to what its configuration needs beside `SIZES`."""

_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * (HEAD // 2),
    "long_factor": [2.0] * (HEAD // 2),
    "original_max_position_embeddings": 64,
}
_LLAMA3 = {**_YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "bart": {"absolute": {"scale_embedding": True}},
    "bert": {"encoder": {"is_decoder": False}},
    "deepseek_v3": {"no-q-lora": {"q_lora_rank": None}},
    "falcon": {"alibi": {"alibi": True}, "new": {"new_decoder_architecture": True}},
    "gpt_bigcode": {"multi-head": {"multi_query": False}},
    "gpt_neox": {"sequential": {"use_parallel_residual": False}},
    "gpt2": {"untied": {"tie_word_embeddings": False}},
    "llama": {
        "tied": {"tie_word_embeddings": True},
        "biases": {"attention_bias": True, "mlp_bias": True},
        "llama3-rope": {"rope_parameters": _LLAMA3},
        "yarn": {"rope_parameters": _YARN},
        "dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    },
    "mistral": {"whole": {"sliding_window": None}},
    "mixtral": {"router": {"output_router_logits": True}},
    "opt": {"350m": {"word_embed_proj_dim": 32, "do_layer_norm_before": False}},
    "phi": {"norms": {"qk_layernorm": True}},
    "phi3": {"longrope": {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 64}},
    "qwen2": {"sliding": {"use_sliding_window": True, "max_window_layers": 1}},
    "qwen2_moe": {"router": {"output_router_logits": True}},
    "stablelm": {"parallel": {"use_parallel_residual": True, "qk_layernorm": True}},
    "zamba2": {"adapters": {"use_shared_attention_adapter": True, "adapter_rank": 8}},
}
"""Type to what else of it there is, by name."""


def architectures() -> list[str]:
    """Return the types of causal language models that transformers knows, in order."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small_config(kind: str, variant: str = "") -> Any:
    """Return a small configuration of a type.

    Args:
        kind: Its type, as `architectures` has it.
        variant: One of `VARIANTS`; empty for the usual one.
    """
    from transformers import CONFIG_MAPPING

    usual = _plain(CONFIG_MAPPING[kind]())
    changes = {**FITTED.get(kind, {}), **VARIANTS.get(kind, {}).get(variant, {})}
    return CONFIG_MAPPING[kind](**_changed(_small(usual), changes))


def make_base(kind: str, variant: str = "", seed: int = 0) -> Any:
    """Return a small random model of a type."""
    import torch
    from transformers import AutoModelForCausalLM

    config = small_config(kind, variant)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        if base.config is not config and (whole := _composite(config)) is not None:
            base = whole
        _spread(base)
    return base.eval()


def _composite(config: Any) -> Any:
    """Return the whole of a base for images and text, as its checkpoints hold it; None where there is no such thing."""
    from transformers import AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return None
    try:
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    except Exception:  # noqa: BLE001  it wants more than sizes; the language model is what is looked at
        return None


def write_base_of(kind: str, variant: str, tokenizer: Path, folder: Path) -> None:
    """Write a small random model of a type, beside a tokenizer that is in another folder."""
    make_base(kind, variant).save_pretrained(folder)
    for file in tokenizer.iterdir():
        if "token" in file.name:
            shutil.copy(file, folder)


def _spread(base: Any) -> None:
    """Give the matrices numbers that make a difference: as they are begun, many a model says the same of every token."""
    import torch

    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape) * 1.5 / parameter.shape[-1] ** 0.5)
            elif parameter.is_floating_point() and not bool(parameter.any()):
                parameter.copy_(torch.randn(parameter.shape) * 0.1)


def _plain(config: Any) -> dict[str, Any]:
    """Return what a configuration is made with, and those within it."""
    values = {name: value for name, value in vars(config).items() if name not in NOT_GIVEN}
    return {name: _plain(value) if hasattr(value, "to_diff_dict") else value for name, value in values.items()}


def _small(values: Mapping[str, Any]) -> dict[str, Any]:
    small = {name: _value(name, value) for name, value in values.items()}
    if values.get("num_key_value_heads") == values.get("num_attention_heads") and "num_key_value_heads" in values:
        small["num_key_value_heads"] = HEADS
    if "qk_rope_head_dim" in values and values.get("head_dim") == values["qk_rope_head_dim"]:
        small["head_dim"] = SIZES["qk_rope_head_dim"]
    if "is_decoder" in values:
        small["is_decoder"] = True
    if values.get("qk_head_dim"):
        small["qk_head_dim"] = SIZES["qk_rope_head_dim"] + SIZES["qk_nope_head_dim"]
    _keep_layers(values, small)
    return small


def _value(name: str, value: Any) -> Any:
    if isinstance(value, Mapping) and ("model_type" in value or name.endswith("_config")):
        return _small(value)
    if isinstance(value, bool) or value is None or (name not in SIZES and not _is_token(name)):
        return value
    if _is_token(name) and isinstance(value, (int, list, tuple)):
        return _token(name, value)
    return min(SIZES[name], value) if isinstance(value, int) and value > 0 else value


def _is_token(name: str) -> bool:
    return name.endswith(("token_id", "token_index", "tokens")) and name != "num_image_tokens"


def _token(name: str, value: Any) -> Any:
    """Return the end of text for what begins and ends it, and a token that no row has for all others."""
    if name in ("eos_token_id", "bos_token_id", "decoder_start_token_id", "forced_eos_token_id"):
        return 0
    if name == "pad_token_id":
        return 1
    if isinstance(value, int):
        return 240 + value % 16
    return [240 + one % 16 for one in value if isinstance(one, int)]


def _keep_layers(values: Mapping[str, Any], small: dict[str, Any]) -> None:
    """Keep layers of every kind: those that lists, an entry a layer, tell apart."""
    count = next((values[name] for name in LAYERS if isinstance(values.get(name), int)), None)
    lists = {
        name: list(value)
        for name, value in values.items()
        if isinstance(value, (list, tuple)) and len(value) == count and count > 2
    }
    if not lists:
        return
    seen: dict[str, int] = {}
    for layer, kinds in enumerate(zip(*lists.values(), strict=True)):
        for name, kind in zip(lists, kinds, strict=True):
            seen.setdefault(f"{name} {kind}", layer)
    kept = sorted(set(seen.values()) | {0, 1})[:6]
    small |= {name: [value[layer] for layer in kept] for name, value in lists.items()}
    small |= {name: len(kept) for name in LAYERS if isinstance(values.get(name), int)}


def _changed(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with others in their place; within a section they are laid over what is there."""
    both = {
        name: _changed(values[name], change)
        if isinstance(change, Mapping) and isinstance(values.get(name), Mapping) and not name.startswith("rope")
        else change
        for name, change in changes.items()
    }
    return {**values, **both}


def kinds_and_variants(kinds: Sequence[str]) -> list[tuple[str, str]]:
    """Return each type with each of its variants."""
    return [(kind, variant) for kind in kinds for variant in ("", *VARIANTS.get(kind, {}))]
