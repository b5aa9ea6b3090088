# SPDX-License-Identifier: MIT
"""Makes tiny random checkpoints with transformers, the oracle of the parity tests. Knows no engine.

Weights are larger than a fresh initialisation's and norms are not ones, so that a forgotten norm,
bias or scale shows.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

VOCAB_SIZE = 512
MAX_POSITION = 512

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITION,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
_MLA: dict[str, Any] = _COMMON | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
}


def _deepseek_v2(**changes: Any) -> Any:
    values = _MLA | {"n_routed_experts": 8, "q_lora_rank": None, "topk_method": "greedy"}
    return transformers.DeepseekV2Config(**(values | changes))


def _deepseek_v3(**changes: Any) -> Any:
    values = _MLA | {
        "n_routed_experts": 16,
        "q_lora_rank": 24,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "rope_scaling": _YARN,
    }
    return transformers.DeepseekV3Config(**(values | changes))


def _qwen2(**changes: Any) -> Any:
    return transformers.Qwen2Config(**(_COMMON | changes))


def _qwen3(**changes: Any) -> Any:
    return transformers.Qwen3Config(**(_COMMON | {"head_dim": 32} | changes))


def _qwen3_moe(**changes: Any) -> Any:
    values = _COMMON | {
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    }
    return transformers.Qwen3MoeConfig(**(values | changes))


def _minimax_m2(**changes: Any) -> Any:
    values = _COMMON | {
        "head_dim": 16,
        "intermediate_size": 24,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5000000.0,
            "partial_rotary_factor": 0.5,
        },
    }
    return transformers.MiniMaxM2Config(**(values | changes))


def _llama(**changes: Any) -> Any:
    values = _COMMON | {
        "attention_bias": True,
        "mlp_bias": True,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    }
    return transformers.LlamaConfig(**(values | changes))


FAMILIES: dict[str, Callable[..., Any]] = {
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "minimax_m2": _minimax_m2,
    "llama": _llama,
}


def make_checkpoint(
    folder: Path,
    family: str,
    *,
    max_shard_size: str = "1GB",
    mtp: bool = True,
    tokenizer: bool = False,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Writes a random fp32 checkpoint of `family` into `folder`; `changes` are config values.

    DeepSeek V3 gets one MTP layer unless `mtp` is off. `tokenizer` adds one
    whose ids 0 to 255 are bytes, with a chat template.
    """
    config = FAMILIES[family](**changes)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("norm.weight"):
                tensor.uniform_(0.5, 1.5)
            elif "inv_freq" not in name:
                tensor.normal_(std=0.1)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if family == "deepseek_v3" and mtp:
        _add_mtp(folder, config)
    if tokenizer:
        _add_tokenizer(folder)
    return folder


def reference_model(folder: Path) -> Any:
    """The same checkpoint in transformers, in fp32 with its plainest attention."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


CHAT_TEMPLATE = """{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
SPECIAL_TOKENS = ["<bos>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]


def _add_tokenizer(folder: Path) -> None:
    """One token per byte (byte b has id b), then the special tokens from id 256 on."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=_byte_vocabulary(), merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(SPECIAL_TOKENS)
    inner.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _byte_vocabulary() -> dict[str, int]:
    """The byte-level alphabet: printable bytes stand for themselves, others from U+0100 on."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(0x100 + i) for i in range(256 - len(plain)))
    return {chr(byte) if byte in plain else next(others): byte for byte in range(256)}


def _add_mtp(folder: Path, config: Any) -> None:
    """Adds a random layer behind the last one, in a shard of its own or the one file.

    Its block has the shapes of the last layer.
    """
    last, size = f"model.layers.{config.num_hidden_layers - 1}.", config.hidden_size
    index, one = folder / "model.safetensors.index.json", folder / "model.safetensors"
    files = [one] if one.exists() else sorted(folder.glob("model-*.safetensors"))
    held = {name: tensor for file in files for name, tensor in load_file(file).items()}
    shapes = {name[len(last) :]: t.shape for name, t in held.items() if name.startswith(last)}
    shapes |= dict.fromkeys(("enorm.weight", "hnorm.weight", "shared_head.norm.weight"), (size,))
    shapes |= {"eh_proj.weight": (size, 2 * size), "embed_tokens.weight": (config.vocab_size, size)}
    at = f"model.layers.{config.num_hidden_layers}."
    extra = {
        at + name: torch.rand(shape) + 0.5 if "norm" in name else torch.randn(shape) * 0.1
        for name, shape in shapes.items()
    }
    if one.exists():
        save_file(held | extra, one, metadata={"format": "pt"})
        return
    save_file(extra, folder / "mtp.safetensors", metadata={"format": "pt"})
    content = json.loads(index.read_text())
    content["weight_map"] |= dict.fromkeys(extra, "mtp.safetensors")
    index.write_text(json.dumps(content))


def make_eagle3(
    folder: Path,
    *,
    hidden_size: int = 64,
    num_heard: int = 3,
    draft_vocab_size: int = VOCAB_SIZE // 2,
    embedding: bool = False,
    seed: int = 0,
    drop: tuple[str, ...] = (),
    **changes: Any,
) -> Path:
    """Writes a random fp32 EAGLE-3 head for a target of `hidden_size` features.

    Draft token j is the target's 2j + 1. `embedding`: it has one of its own. `drop` names tensors
    that are left out; `changes` are config values, of which `...` drops the key.
    """
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "draft_vocab_size": draft_vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 80,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]},
        "transformers_version": "4.51.0",
    } | changes
    d, inner, q, kv = hidden_size, 80, 4 * 16, 2 * 16
    vocab_size = config["vocab_size"]
    shapes = {
        "fc": (d, num_heard * d),
        "norm": (d,),
        "lm_head": (draft_vocab_size, d),
        "midlayer.hidden_norm": (d,),
        "midlayer.input_layernorm": (d,),
        "midlayer.post_attention_layernorm": (d,),
        "midlayer.self_attn.q_proj": (q, 2 * d),
        "midlayer.self_attn.k_proj": (kv, 2 * d),
        "midlayer.self_attn.v_proj": (kv, 2 * d),
        "midlayer.self_attn.o_proj": (d, q),
        "midlayer.mlp.gate_proj": (inner, d),
        "midlayer.mlp.up_proj": (inner, d),
        "midlayer.mlp.down_proj": (d, inner),
    }
    if embedding:
        shapes["embed_tokens"] = (vocab_size, d)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{name}.weight": torch.rand(shape, generator=generator) + 0.5
        if len(shape) == 1
        else torch.randn(shape, generator=generator) * 0.1
        for name, shape in shapes.items()
    }
    each = vocab_size // draft_vocab_size
    ids = torch.arange(draft_vocab_size) * each + each - 1
    tensors["d2t"] = ids - torch.arange(draft_vocab_size)
    tensors["t2d"] = torch.zeros(vocab_size, dtype=torch.bool).index_fill_(0, ids, True)
    folder.mkdir(exist_ok=True)
    kept = {name: tensor for name, tensor in tensors.items() if name not in drop}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    values = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(values))
    return folder
