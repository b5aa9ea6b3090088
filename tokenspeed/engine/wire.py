# SPDX-License-Identifier: MIT
"""Messages as bytes: a version byte, a type byte, then MessagePack checked against the dataclass.

Knows `engine/messages.py` and no sockets. A malformed message is dropped and counted: nothing that
arrives on a socket raises out of here. The position of a type in `_TYPES` is its tag on the wire;
append only, and raise `VERSION` when a message changes its meaning.
"""

from types import UnionType
from typing import Any, get_args

import msgspec

from tokenspeed.config import EngineConfig
from tokenspeed.engine import messages as m

VERSION = 1
_TYPES: tuple[type, ...] = (
    m.GenerateRequest,
    m.AbortRequest,
    m.FlushCache,
    m.Shutdown,
    m.Loading,
    m.Ready,
    m.Outputs,
    m.Rejected,
    m.StatsMessage,
    m.Heartbeat,
    m.Fatal,
    m.AddGrammar,
    m.DropGrammar,
    m.RetainPrefix,
    m.ReleasePrefix,
    m.PrefixPages,
    m.GatewayGone,
    m.GatewayStuck,
)
_PREFIX = {kind: bytes((VERSION, tag)) for tag, kind in enumerate(_TYPES)}
_ENCODER = msgspec.msgpack.Encoder()


def encode(message: m.Down | m.Up) -> bytes:
    """The message's bytes. `KeyError` if its type has no tag."""
    return _PREFIX[type(message)] + _ENCODER.encode(message)


class Decoder:
    """Decodes one direction (`messages.Down` or `messages.Up`); `num_dropped` counts the rest."""

    def __init__(self, direction: UnionType) -> None:
        self.num_dropped = 0
        self._decoders = {
            _PREFIX[kind]: msgspec.msgpack.Decoder(kind) for kind in get_args(direction)
        }

    def decode(self, data: bytes | memoryview) -> Any:
        """The message, or None (and one more dropped) if the bytes are not one."""
        decoder = self._decoders.get(bytes(data[:2]))
        if decoder is not None:
            try:
                return decoder.decode(data[2:])
            except Exception:  # whatever the bytes did to the decoder or to a field check
                pass
        self.num_dropped += 1
        return None


def encode_config(config: EngineConfig) -> str:
    """The configuration as the JSON that `tokenspeed.engine.server` takes."""
    return msgspec.json.encode(config).decode()


def decode_config(text: str) -> EngineConfig:
    """The inverse of `encode_config`. `ValueError` for anything else."""
    return msgspec.json.decode(text, type=EngineConfig)
