# SPDX-License-Identifier: MIT
"""Two checkpoints of random weights in Hugging Face layout, and the tokenizer they share.

Weights are drawn like those of a model that has been initialised well: normal, 0.02 wide, norms
near one, and a head wide enough that logits spread like a trained model's. Knows no engine.
"""

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB = 32768
STD, HEAD_STD, NORM_STD = 0.02, 0.08, 0.05
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 1024,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "num_attention_heads": 16,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": STD,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "dense": _COMMON
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": 28,
        "intermediate_size": 3072,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 28,
    },
    "mla-moe": _COMMON
    | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_hidden_layers": 12,
        "intermediate_size": 2816,
        "num_key_value_heads": 16,
        "q_lora_rank": 384,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_theta": 10000.0,
        "rope_interleave": True,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 512,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 0,
    },
}


def build(name: str, folder: Path) -> None:
    """Writes config, weights and tokenizer into `folder`, unless they are there."""
    if (folder / "complete").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIGS[name]
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    generation = {"bos_token_id": 0, "eos_token_id": 0, "transformers_version": "5.0.0"}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    generator = torch.Generator().manual_seed(20_000 + sorted(CONFIGS).index(name))
    tensors = {key: _draw(key, shape, generator) for key, shape in shapes(config)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder)
    (folder / "complete").touch()


def shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the checkpoint: its name and shape."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        latent = "kv_lora_rank" in config
        attention = _latent_attention(config) if latent else _grouped_attention(config)
        yield from ((f"{prefix}self_attn.{key}.weight", shape) for key, shape in attention)
        experts = latent and index >= config["first_k_dense_replace"]
        feed = _experts(config) if experts else _mlp("", hidden, config["intermediate_size"])
        yield from ((f"{prefix}mlp.{key}", shape) for key, shape in feed)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def _grouped_attention(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, size = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    yield "q_proj", (heads * size, hidden)
    yield "k_proj", (kv_heads * size, hidden)
    yield "v_proj", (kv_heads * size, hidden)
    yield "o_proj", (hidden, heads * size)
    yield from (("q_norm", (size,)), ("k_norm", (size,)))


def _latent_attention(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    rank, latent = config["q_lora_rank"], config["kv_lora_rank"]
    nope, rope, value = (config[f"{k}_head_dim"] for k in ("qk_nope", "qk_rope", "v"))
    yield "q_a_proj", (rank, hidden)
    yield "q_a_layernorm", (rank,)
    yield "q_b_proj", (heads * (nope + rope), rank)
    yield "kv_a_proj_with_mqa", (latent + rope, hidden)
    yield "kv_a_layernorm", (latent,)
    yield "kv_b_proj", (heads * (nope + value), latent)
    yield "o_proj", (hidden, heads * value)


def _mlp(prefix: str, hidden: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield prefix + "gate_proj.weight", (inner, hidden)
    yield prefix + "up_proj.weight", (inner, hidden)
    yield prefix + "down_proj.weight", (hidden, inner)


def _experts(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    yield "gate.weight", (config["n_routed_experts"], hidden)
    yield "gate.e_score_correction_bias", (config["n_routed_experts"],)
    for index in range(config["n_routed_experts"]):
        yield from _mlp(f"experts.{index}.", hidden, inner)
    yield from _mlp("shared_experts.", hidden, inner * config["n_shared_experts"])


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator)
    if name.endswith("e_score_correction_bias"):
        return noise * STD  # float32, as published checkpoints have it
    if "norm" in name:
        return (1 + noise * NORM_STD).bfloat16()
    return (noise * (HEAD_STD if name == "lm_head.weight" else STD)).bfloat16()


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of `VOCAB` tokens, trained on the standard library's sources."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*/*.py"))
    texts = (path.read_text("utf-8", "replace") for path in sources if "test" not in str(path))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB:
        raise RuntimeError(f"the tokenizer came out with {tokenizer.get_vocab_size()} tokens")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "bos_token": "<|endoftext|>",
        "model_max_length": 40960,
        "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
