# SPDX-License-Identifier: MIT
"""`ResponseStore`: responses that clients may ask for again, bounded by bytes and by count.

Each tenant has bounds of its own and sees nothing of another's. What is used least goes first. A
response that continues another one holds on to it: a parent is never older in the order than its
children, so that it is dropped after them and what is counted is all there is.
"""

import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from tokenspeed.errors import RequestError
from tokenspeed.gateway.app import encode_json
from tokenspeed.gateway.responses_background import Running

MAX_BYTES = 64 << 20  # as kept, which is compressed
MAX_COUNT = 4096
MAX_PLAIN = 64 << 20  # bytes of items, not compressed, that one request may bring back
Item = dict[str, Any]


@dataclass(slots=True)
class Kept:
    """A finished response, its JSON compressed."""

    tenant: str
    id: str
    response: bytes  # the object
    items: bytes  # its own input, then its output
    num_given: int  # items of the input
    parent: "Kept | None" = None
    events: bytes | None = None  # of a stream that can be asked for again
    hidden: bool = False  # deleted, but a child needs its items
    num_plain: int = 0  # bytes of the items, not compressed

    @property
    def size(self) -> int:
        return len(self.response) + len(self.items) + len(self.events or b"")

    def own_items(self) -> list[Item]:
        """What was said in this turn."""
        return _decode(unpack(self.items))

    def all_items(self) -> list[Item]:
        """The conversation up to the end of this response. `RequestError` if that is too much."""
        chain: list[Kept] = []
        at: Kept | None = self
        while at is not None:
            chain.append(at)
            at = at.parent
        if sum(kept.num_plain for kept in chain) > MAX_PLAIN:
            raise _too_much("previous_response_id")
        return [item for kept in reversed(chain) for item in kept.own_items()]


def keep(
    tenant: str,
    response: dict[str, Any],
    given: Sequence[Item],
    parent: Kept | None = None,
    events: Sequence[bytes] | None = None,
) -> Kept:
    """A response object and its input, ready for the store."""
    items = encode_json([*given, *response["output"]])
    packed = None if events is None else _pack(b"".join(events))
    return Kept(
        tenant,
        response["id"],
        _pack(encode_json(response)),
        _pack(items),
        len(given),
        parent,
        packed,
        num_plain=len(items),
    )


def _too_much(field: str) -> RequestError:
    why = f"{field}: at most {MAX_PLAIN} bytes of earlier items"
    return RequestError(why, field=field, code="context_length_exceeded")


def unpack(packed: bytes) -> bytes:
    """The JSON, or the text of events."""
    return zlib.decompress(packed)


def _pack(data: bytes) -> bytes:
    return zlib.compress(data, 1)


_decode = msgspec.json.Decoder(list[dict[str, Any]]).decode


class _Shelf:
    """One tenant's, the least used first. `items`: which response has the item of an id."""

    def __init__(self) -> None:
        self.kept: OrderedDict[str, Kept] = OrderedDict()
        self.items: dict[str, Kept] = {}
        self.num_bytes = 0

    def touch(self, kept: Kept | None) -> None:
        while kept is not None:  # a child before its parent
            self.kept.move_to_end(kept.id)
            kept = kept.parent

    def add(self, kept: Kept) -> None:
        self.kept[kept.id] = kept
        self.num_bytes += kept.size
        self.items |= {i: kept for item in kept.own_items() if isinstance(i := item.get("id"), str)}
        self.touch(kept)

    def remove(self, kept: Kept) -> None:
        del self.kept[kept.id]
        self.num_bytes -= kept.size
        for item in kept.own_items():
            if self.items.get(str(item.get("id"))) is kept:
                del self.items[str(item["id"])]


class ResponseStore:
    """`max_bytes` and `max_count` hold for each tenant."""

    def __init__(self, max_bytes: int = MAX_BYTES, max_count: int = MAX_COUNT) -> None:
        self._max_bytes, self._max_count = max_bytes, max_count
        self._shelves: dict[str, _Shelf] = {}
        self.running: dict[tuple[str, str], Running] = {}  # in the background

    def put(self, kept: Kept) -> None:
        """Keeps it, and drops what there is no room for; itself, if it has no room alone."""
        shelf = self._shelves.setdefault(kept.tenant, _Shelf())
        shelf.add(kept)
        while len(shelf.kept) > self._max_count or shelf.num_bytes > self._max_bytes:
            shelf.remove(next(iter(shelf.kept.values())))

    def get(self, tenant: str, response_id: str) -> Kept | None:
        """The tenant's response of that id, which counts as used."""
        shelf = self._shelves.get(tenant)
        kept = shelf.kept.get(response_id) if shelf is not None else None
        if shelf is None or kept is None or kept.hidden:
            return None
        shelf.touch(kept)
        return kept

    def delete(self, kept: Kept) -> None:
        """It cannot be asked for any more; its items stay as long as a child has use for them."""
        shelf = self._shelves[kept.tenant]
        kept.hidden = True
        if not any(other.parent is kept for other in shelf.kept.values()):
            shelf.remove(kept)

    def find_item(self, tenant: str, item_id: str) -> Item | None:
        """The item of that id, if a response of the tenant has it."""
        shelf = self._shelves.get(tenant)
        kept = shelf.items.get(item_id) if shelf is not None else None
        if kept is None or kept.hidden:
            return None
        return next((item for item in kept.own_items() if item.get("id") == item_id), None)

    def finder(self, tenant: str) -> Callable[[str], Item | None]:
        """`find_item` for the many references of one request, which unpacks a response once.

        It raises `RequestError` if all of these responses are too much.
        """
        opened: dict[str, dict[str, Item]] = {}
        shelf = self._shelves.get(tenant) or _Shelf()
        num_plain = 0

        def find(item_id: str) -> Item | None:
            nonlocal num_plain
            kept = shelf.items.get(item_id)
            if kept is None or kept.hidden:
                return None
            if kept.id not in opened:
                num_plain += kept.num_plain
                if num_plain > MAX_PLAIN:
                    raise _too_much("input")
                items = reversed(kept.own_items())  # the first of an id counts
                opened[kept.id] = {str(item.get("id")): item for item in items}
            return opened[kept.id].get(item_id)

        return find

    @property
    def num_bytes(self) -> int:
        """Of all tenants."""
        return sum(shelf.num_bytes for shelf in self._shelves.values())

    def close(self) -> None:
        """Ends what runs in the background."""
        for running in self.running.values():
            running.cancel()
