"""llama.cpp itself, by the wheel xllamacpp: what it makes of a GGUF model, of an adapter and of a text."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["LlamaCpp", "write_gguf_model"]


class LlamaCpp:
    """A model in llama.cpp, without flash attention and with a cache in float32.

    Args:
        model: GGUF file of the model.
        adapter: GGUF file of a LoRA adapter.
    """

    def __init__(self, model: Path, adapter: Path | None = None) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 512, 1, False, -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.fit_params = False
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        if adapter is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self.server = xllamacpp.Server(params)

    def tokens(self, text: str, *, begin: bool = False) -> list[int]:
        """Return the tokens of a text, after the begin token where the file wants one."""
        request = urllib.request.Request(
            f"{self.server.listening_address}/tokenize",
            json.dumps({"content": text, "add_special": begin, "parse_special": True}).encode(),
            {"Content-Type": "application/json"},
        )
        here = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy others are reached through
        with here.open(request) as answer:
            return list(json.load(answer)["tokens"])

    def log_probabilities(self, ids: Sequence[int], vocabulary: int) -> Tensor:
        """Return the logarithm of each token's probability after these ones `[vocabulary]`; NaN if the answer ends at once."""
        asked = {"prompt": list(ids), "n_predict": 1, "n_probs": vocabulary, "temperature": -1, "cache_prompt": False}
        found = self.server.handle_completions(asked)["choices"][0]["logprobs"]
        if found is None:
            return torch.full((vocabulary,), torch.nan)
        [content] = found["content"]
        found = {one["id"]: one["logprob"] for one in content["top_logprobs"]}
        return torch.tensor([found[token] for token in range(vocabulary)])

    def answer(self, ids: Sequence[int], tokens: int) -> list[int]:
        """Return the greedy answer to these tokens."""
        asked = {"prompt": list(ids), "n_predict": tokens, "n_probs": 1, "temperature": -1}
        return [one["id"] for one in self.server.handle_completions(asked)["choices"][0]["logprobs"]["content"]]


def write_gguf_model(
    folder: Path, file: Path, *, pre: str, kind: str = "F32", begin: bool | None = False, control: str = ""
) -> None:
    """Write a folder of transformers with a byte-level tokenizer as a GGUF model, by the package gguf, names written out here.

    Args:
        folder: A Llama, Qwen2 or Qwen3.
        file: The file.
        pre: The name of how the tokenizer splits a text.
        kind: How the weights of linear modules are stored.
        begin: Whether texts begin with a token; None does not say.
        control: A control token in the place of the last word.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, quantize
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    name, heads, key_heads = config["model_type"], config["num_attention_heads"], config["num_key_value_heads"]
    writer = GGUFWriter(file, name)
    writer.add_type("model")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    size = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    special = [token["content"] for token in tokenizer["added_tokens"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    if control:
        vocabulary[-1], special = control, [*special, control]
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in special else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    if begin is not None:
        writer.add_add_bos_token(begin)
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    others = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for path, tensor in load_file(folder / "model.safetensors").items():
        module, _, which = path.rpartition(".")
        values = tensor.float().numpy()
        if name == "llama" and module.endswith(("q_proj", "k_proj")):
            of = heads if module.endswith("q_proj") else key_heads
            half = size // 2  # llama.cpp rotates neighbours: i and i + half of a head are put side by side
            order = [h * size + i + at for h in range(of) for i in range(half) for at in (0, half)]
            values = values[np.array(order)]
        if module in others:
            called = f"{others[module]}.{which}"
        else:
            _, _, layer, part = module.split(".", 3)
            called = f"blk.{layer}.{parts[part]}.{which}"
        stored = GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
        written: Any = values if stored.name == "F32" else quantize(values, stored)
        writer.add_tensor(called, written, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
