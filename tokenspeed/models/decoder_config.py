# SPDX-License-Identifier: MIT
"""What every decoder-only model shares in `config.json`: sizes, rope, and what is not supported.

Refuses to know attention and expert layouts; each model's file reads its own keys.
"""

from dataclasses import dataclass

from tokenspeed.layers.rope import RopeConfig
from tokenspeed.models.hf_config import MAX_INTEGER, HfConfig

MAX_LAYERS = 1024
MAX_ROPE_TABLE = 2**29  # numbers: 4 million positions of 128
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes that do not depend on the kind of attention."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    norm_eps: float
    max_position: int  # positions that can be served: max_model_len if given
    tied: bool  # the head shares the embedding's weight
    rope: RopeConfig


def read_decoder(
    config: HfConfig, *, rope_dim: int, max_model_len: int | None, tied_default: bool = False
) -> DecoderConfig:
    """The shared part. `ModelLoadError` names the key that is wrong or not supported."""
    config.word("hidden_act", ("silu",), "silu")
    _refuse_sliding_window(config)
    if rope_dim % 2:
        raise config.error("head_dim", f"rotary embedding needs an even size, has {rope_dim}")
    rope, max_position = _read_rope(config, rope_dim, max_model_len)
    return DecoderConfig(
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        num_layers=config.integer("num_hidden_layers", maximum=MAX_LAYERS),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        max_position=max_position,
        tied=config.boolean("tie_word_embeddings", tied_default),
        rope=rope,
    )


def read_heads(config: HfConfig, *, default_head_dim: int | None = None) -> tuple[int, int, int]:
    """(query heads, key-value heads, head size) of grouped-query attention."""
    heads = config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise config.error("num_key_value_heads", f"{kv_heads} does not divide {heads} heads")
    hidden = config.integer("hidden_size")
    if not config.has("head_dim") and default_head_dim is None and hidden % heads:
        raise config.error("num_attention_heads", f"{heads} does not divide hidden_size {hidden}")
    head_dim = config.integer("head_dim", default_head_dim or hidden // heads)
    return heads, kv_heads, head_dim


def read_rotary_factor(config: HfConfig) -> float:
    """Which part of each head turns, by the configuration."""
    scaling = _rope_section(config)
    return scaling.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))


def _rope_section(config: HfConfig) -> HfConfig:
    found = config.section("rope_parameters") or config.section("rope_scaling")
    return found or HfConfig({}, f"{config.where}: rope_parameters")


def _refuse_sliding_window(config: HfConfig) -> None:
    if config.has("sliding_window") and config.boolean("use_sliding_window", True):
        raise config.error("sliding_window", "sliding-window attention is not supported")
    types = config.values.get("layer_types") or []
    if not isinstance(types, list) or any(kind != "full_attention" for kind in types):
        raise config.error("layer_types", "only full_attention layers are supported")


def _read_rope(config: HfConfig, dim: int, max_model_len: int | None) -> tuple[RopeConfig, int]:
    """The rotary embedding and the number of positions served.

    Older files keep `rope_theta` beside `rope_scaling`; newer ones keep all in `rope_parameters`.
    """
    limit = config.integer("max_position_embeddings")
    scaling = _rope_section(config)
    theta = config.number("rope_theta", 10000.0)
    theta = scaling.number("rope_theta", theta, above=1.0)
    part = read_rotary_factor(config)
    if part != 1 and part * config.integer("head_dim", dim) != dim:
        why = f"{part} of a head is not supported; {dim} features turn in this model"
        raise config.error("partial_rotary_factor", why)
    key = "rope_type" if scaling.has("rope_type") else "type"
    kind = scaling.word(key, ROPE_TYPES, "default")
    if kind == "yarn":
        rope, limit = _read_yarn(config, scaling, dim, theta, limit)
    elif kind == "llama3":
        rope = _read_llama3(config, scaling, dim, theta, limit)
    elif kind == "linear":
        rope = RopeConfig(dim, theta, "linear", factor=scaling.number("factor"))
    else:
        # Dynamic scaling starts beyond max_position_embeddings. Keys in a paged cache cannot be
        # turned again when the context outgrows it, so those positions are not served.
        rope = RopeConfig(dim, theta)
    if max_model_len is not None and max_model_len > limit:
        raise config.error(
            "max_position_embeddings",
            f"max_model_len {max_model_len} is more than the {limit} positions of this model",
        )
    served = max_model_len or limit
    if served * dim > MAX_ROPE_TABLE:
        raise config.error("max_position_embeddings", f"{served} are too many; set max_model_len")
    return rope, served


def _original_positions(config: HfConfig, scaling: HfConfig, limit: int) -> int:
    name = "original_max_position_embeddings"
    return config.integer(name, scaling.integer(name, limit))


def _read_llama3(
    config: HfConfig, scaling: HfConfig, dim: int, theta: float, limit: int
) -> RopeConfig:
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if high <= low:
        raise scaling.error("high_freq_factor", f"{high} must be above low_freq_factor {low}")
    return RopeConfig(
        dim,
        theta,
        "llama3",
        factor=scaling.number("factor"),
        original_max_position=_original_positions(config, scaling, limit),
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _read_yarn(
    config: HfConfig, scaling: HfConfig, dim: int, theta: float, limit: int
) -> tuple[RopeConfig, int]:
    original = _original_positions(config, scaling, limit)
    factor = scaling.number("factor", limit / original)
    given = scaling.number("attention_factor") if scaling.has("attention_factor") else None
    rope = RopeConfig(
        dim,
        theta,
        "yarn",
        factor=factor,
        original_max_position=original,
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        attention_factor=given,
        mscale=scaling.number("mscale", 0.0, above=-1.0),
        mscale_all_dim=scaling.number("mscale_all_dim", 0.0, above=-1.0),
        truncate=scaling.boolean("truncate", True),
    )
    return rope, max(limit, int(min(original * factor, MAX_INTEGER)))
