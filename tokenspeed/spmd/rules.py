# SPDX-License-Identifier: MIT
"""Typing rules: what a leaf module's weights and input say of its output, atom by atom.

Knows the kinds of modules by their names; refuses to know how a module computes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tokenspeed.spmd.placement import Partial, Placement, Replicate, Shard

WHOLE, ROWS, COLUMNS, PARTIAL = Replicate(), Shard(0), Shard(1), Partial()
TOKENS, FEATURES = Shard(0), Shard(1)  # of hidden states [tokens, features]


@dataclass(frozen=True)
class Types:
    """The placements of one module on one atom."""

    inputs: Placement
    outputs: Placement
    weights: Mapping[str, Placement]


Rule = Callable[[Types], str | None]  # what is wrong, or None


def _expect(
    t: Types, inputs: tuple[Placement, ...], outputs: Placement, because: str
) -> str | None:
    if t.inputs not in inputs:
        needed = " or ".join(repr(p) for p in inputs)
        return f"{because}: needs its input {needed}, declares {t.inputs!r}"
    if t.outputs != outputs:
        return f"{because}: its output is {outputs!r}, declares {t.outputs!r}"
    return None


def _unknown(t: Types, name: str) -> str:
    return f"{name} cannot be {t.weights[name]!r}"


def linear(t: Types) -> str | None:
    """y = x W^T + b with W [out, in]: rows make features, columns make sums, b goes with W."""
    weight, bias = t.weights["weight"], t.weights.get("bias")
    needed: Placement
    if weight == ROWS:
        wrong = _expect(t, (WHOLE,), FEATURES, "its weight is divided by output features")
        needed = ROWS
    elif weight == COLUMNS:
        wrong = _expect(t, (FEATURES,), PARTIAL, "its weight is divided by input features")
        needed = PARTIAL
    elif weight == WHOLE:
        may = (WHOLE, TOKENS) if bias is not None else (WHOLE, TOKENS, PARTIAL)
        wrong = _expect(t, may, t.inputs, "its weight is whole")
        needed = PARTIAL if t.inputs == PARTIAL else WHOLE
    else:
        return _unknown(t, "weight")
    if wrong is None and bias is not None and bias != needed:
        return f"its bias must be {needed!r} beside a weight that is {weight!r}, is {bias!r}"
    return wrong


def head_linear(t: Types) -> str | None:
    """A product per head with W [heads, ...]: divided by heads, input and output are too."""
    return _each_weight(t, FEATURES, "heads")


def embedding(t: Types) -> str | None:
    """Rows of W [vocab, features] by id: a divided vocabulary makes sums."""
    weight = t.weights["weight"]
    if weight == ROWS:
        return _expect(t, (WHOLE,), PARTIAL, "its vocabulary is divided")
    if weight == COLUMNS:
        return _expect(t, (WHOLE,), FEATURES, "its features are divided")
    if weight == WHOLE:
        return _expect(t, (WHOLE, TOKENS), t.inputs, "its weight is whole")
    return _unknown(t, "weight")


def norm(t: Types) -> str | None:
    """Over all features of a token: neither sums nor divided features will do."""
    return _whole_weights(t) or _expect(t, (WHOLE, TOKENS), t.inputs, "it norms whole tokens")


def head_norm(t: Types) -> str | None:
    """Over the features of one head: heads may be divided, sums will not do."""
    may = (WHOLE, TOKENS, FEATURES)
    return _whole_weights(t) or _expect(t, may, t.inputs, "it norms whole heads")


def mean_square(t: Types) -> str | None:
    """Of a token's features: who has some of them has a summand."""
    if t.inputs == FEATURES:
        return _expect(t, (FEATURES,), PARTIAL, "it sees some of the features")
    return _expect(t, (WHOLE, TOKENS), t.inputs, "it sees whole tokens")


def scale(t: Types) -> str | None:
    """Features times numbers of their token, the input: weights divided as features come out."""
    return _each_weight(t, WHOLE, "features")


def router(t: Types) -> str | None:
    """Chooses among all experts: whole tokens, whole weights."""
    return _whole_weights(t) or _expect(t, (WHOLE, TOKENS), t.inputs, "it scores whole tokens")


def experts(t: Types) -> str | None:
    """W13 [experts, 2 inner, hidden], W2 [experts, hidden, inner]; every rank has its own sum."""
    pair = t.weights["w13"], t.weights["w2"]
    if pair == (Shard(0), Shard(0)):
        return _expect(t, (WHOLE,), PARTIAL, "its experts are divided")
    if pair == (Shard(1), Shard(2)):
        return _expect(t, (WHOLE,), PARTIAL, "each of its experts is divided")
    if pair == (WHOLE, WHOLE):
        return _expect(t, (WHOLE, TOKENS), t.inputs, "its experts are whole")
    return f"w13 {pair[0]!r} and w2 {pair[1]!r} do not fit together"


def _each_weight(t: Types, inputs: Placement, what: str) -> str | None:
    """Rows of every weight divided by `what`, which takes `inputs`; or every weight whole."""
    for name, weight in t.weights.items():
        if weight == ROWS:
            wrong = _expect(t, (inputs,), FEATURES, f"its {name} is divided by {what}")
        elif weight == WHOLE:
            wrong = _expect(t, (WHOLE, TOKENS), t.inputs, f"its {name} is whole")
        else:
            return _unknown(t, name)
        if wrong:
            return wrong
    return None


def _whole_weights(t: Types) -> str | None:
    for name, weight in t.weights.items():
        if weight != WHOLE:
            return f"its {name} must be whole, is {weight!r}"
    return None


RULES: dict[str, Rule] = {
    "linear": linear,
    "head_linear": head_linear,
    "embedding": embedding,
    "norm": norm,
    "residual_norm": norm,
    "head_norm": head_norm,
    "mean_square": mean_square,
    "scale": scale,
    "router": router,
    "experts": experts,
}
