# SPDX-License-Identifier: MIT
"""The `config.json` of an EAGLE-3 head, as an untrusted form beside its target's.

A key that is not known is refused unless it is off: it may change what the head computes. Reads no
weights.
"""

from dataclasses import dataclass

from tokenspeed.models.decoder_config import DecoderConfig, read_decoder, read_heads
from tokenspeed.models.hf_config import HfConfig, architecture

ARCHITECTURE = "LlamaForCausalLMEagle3"
AUX_IDS = "eagle_aux_hidden_state_layer_ids"
READ = frozenset(
    (
        f"architectures attention_bias draft_vocab_size eagle_config {AUX_IDS} head_dim hidden_act "
        "hidden_size intermediate_size layer_types max_position_embeddings mlp_bias "
        "norm_before_residual num_attention_heads num_hidden_layers num_key_value_heads "
        "original_max_position_embeddings partial_rotary_factor rms_norm_eps rope_parameters "
        "rope_scaling rope_theta sliding_window target_hidden_size tie_word_embeddings "
        "use_sliding_window vocab_size"
    ).split()
)
NO_NUMBERS = frozenset(  # they change nothing that is computed here
    (
        "_name_or_path attention_dropout bos_token_id dtype eos_token_id initializer_range "
        "max_window_layers model_type pad_token_id pretraining_tp torch_dtype "
        "transformers_version use_cache"
    ).split()
)


@dataclass(frozen=True)
class Eagle3Config:
    """A head's sizes. `aux_layers`: the target's layers whose residual streams it reads."""

    decoder: DecoderConfig
    heads: tuple[int, int, int]  # query heads, key-value heads, features of each
    intermediate_size: int
    target_hidden_size: int
    draft_vocab_size: int
    attention_bias: bool
    mlp_bias: bool
    norm_before_residual: bool
    aux_layers: tuple[int, ...]


def read_eagle3(config: HfConfig, target: DecoderConfig) -> Eagle3Config:
    """`ModelLoadError` names the key that is wrong, unknown, or does not fit the target."""
    name = architecture(config)
    if name != ARCHITECTURE:
        raise config.error("architectures", f"{name} is no EAGLE-3 head; supported: {ARCHITECTURE}")
    _refuse_unknown(config, READ | NO_NUMBERS)
    if config.integer("num_hidden_layers", 1) != 1:
        raise config.error("num_hidden_layers", "an EAGLE-3 head has one layer")
    heads = read_heads(config)
    decoder = read_decoder(
        _reaching(config, target.max_position),
        rope_dim=heads[2],
        max_model_len=target.max_position,
    )
    if decoder.vocab_size != target.vocab_size:
        why = f"{decoder.vocab_size} tokens, and the target has {target.vocab_size}"
        raise config.error("vocab_size", why)
    hidden = config.integer("target_hidden_size", decoder.hidden_size)
    if hidden != target.hidden_size:
        key = "target_hidden_size" if config.has("target_hidden_size") else "hidden_size"
        raise config.error(key, f"{hidden}, and the target has {target.hidden_size}")
    if decoder.tied:
        raise config.error("tie_word_embeddings", "an EAGLE-3 head has an lm_head of its own")
    return Eagle3Config(
        decoder,
        heads,
        intermediate_size=config.integer("intermediate_size"),
        target_hidden_size=hidden,
        draft_vocab_size=config.integer(
            "draft_vocab_size", decoder.vocab_size, maximum=decoder.vocab_size
        ),
        attention_bias=config.boolean("attention_bias", False),
        mlp_bias=config.boolean("mlp_bias", False),
        norm_before_residual=config.boolean("norm_before_residual", False),
        aux_layers=_read_aux_layers(config, target.num_layers),
    )


def _refuse_unknown(config: HfConfig, known: frozenset[str]) -> None:
    for key, value in config.values.items():
        if key not in known and value is not None and value is not False:
            raise config.error(key, f"{value!r}: this key of an EAGLE-3 head is not supported")


def _reaching(config: HfConfig, num_positions: int) -> HfConfig:
    """The same with as many positions as the target serves: heads are trained on short texts.

    Beyond what it was trained on a head drafts worse, and the target goes on as ever.
    """
    own = config.integer("max_position_embeddings")
    key = "original_max_position_embeddings"
    scaling = config.section("rope_scaling") or config.section("rope_parameters")
    stated = config.has(key) or (scaling is not None and scaling.has(key))
    kept = {} if stated or scaling is None else {key: own}
    longer = {"max_position_embeddings": max(own, num_positions)}
    return HfConfig({**config.values, **kept, **longer}, config.where)


def _read_aux_layers(config: HfConfig, num_layers: int) -> tuple[int, ...]:
    """Layers by index, which rise.

    Releases count in two ways: ids that begin with 1 name layers whose output is read, others the
    place in the list [embedding, output of layer 0, ...], as does the default, 2, L // 2, L - 3.
    """
    where = config.section("eagle_config") or config
    if where is not config:
        _refuse_unknown(where, frozenset({AUX_IDS, "use_aux_hidden_state"}))
        if not where.boolean("use_aux_hidden_state", True):
            raise where.error("use_aux_hidden_state", "EAGLE-3 reads hidden states of the target")
    where = where if where.has(AUX_IDS) else config
    ids = where.integers(AUX_IDS) or [2, num_layers // 2, num_layers - 3]
    layers = tuple(ids if ids[0] == 1 else [i - 1 for i in ids])
    if list(layers) != sorted(set(layers) & set(range(num_layers))):
        stated = ids if where.has(AUX_IDS) else f"not given, and the default {ids}"
        raise where.error(AUX_IDS, f"{stated} does not name rising layers of {num_layers}")
    return layers
