# SPDX-License-Identifier: MIT
"""`Sessions`: the conversations that clients name, as they are now. Knows counts and token ids, no
text and no HTTP.

Bounded for each tenant, the least recently seen go first. Each keeps the ids that its last turn has
left in the cache, so that they can be pinned and dropped: the lists of that turn as they are, which
costs a turn nothing. If all of them together are too long, those of the tenant that holds the most
go first. How much of them is still cached only the engine knows.
"""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tokenspeed.engine.messages import Retention
from tokenspeed.gateway.request_log import RequestRecord

MAX_SESSIONS = 1024  # of one tenant
MAX_IDS = 8 << 20  # of all tenants


@dataclass(slots=True)
class Session:
    """One conversation. Times are of `time.time`."""

    id: str  # ours: known to nobody who was not told, and good in a URL
    name: str  # the client's
    tenant: str
    first_seen: float
    last_seen: float = 0.0
    client: str = ""
    model: str = ""
    route: str = ""
    num_running: int = 0
    num_turns: int = 0
    num_context: int = 0  # tokens of the last prompt and its answer
    num_prompt: int = 0  # tokens of all turns
    num_cached: int = 0
    num_output: int = 0
    tps_last: float = 0.0
    decode_s: float = 0.0  # and what came in that time:
    num_decoded: float = 0.0
    pinned: bool = False
    salt: bytes = b""
    prompt_ids: Sequence[int] = ()  # of the last turn; empty if they are no longer known
    output_ids: Sequence[int] = ()

    @property
    def num_ids(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def token_ids(self) -> list[int]:
        """Of the last turn: prompt and answer. Empty if they are no longer known."""
        return [*self.prompt_ids, *self.output_ids]

    @property
    def hit_rate(self) -> float | None:
        """Share of all prompt tokens that the cache had; None before there were any."""
        return self.num_cached / self.num_prompt if self.num_prompt else None

    @property
    def tps_mean(self) -> float:
        return self.num_decoded / self.decode_s if self.decode_s else 0.0


_NOBODY: OrderedDict[str, Session] = OrderedDict()


class Sessions:
    """The live table. An observer of requests."""

    def __init__(
        self,
        pseudonym: Callable[..., str],
        *,
        max_sessions: int = MAX_SESSIONS,
        max_ids: int = MAX_IDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._pseudonym, self._clock = pseudonym, clock
        self._max_sessions, self._max_ids = max_sessions, max_ids
        self._tenants: dict[str, OrderedDict[str, Session]] = {}
        self._num_ids: Counter[str] = Counter()  # by tenant

    def begin(self, record: RequestRecord) -> None:
        """A request of a session has come. Tells the record what the session had before."""
        if record.session is None:
            return
        session = self._get(record.tenant, record.session)
        session.num_running += 1
        session.last_seen = self._clock()
        session.client = record.client or session.client
        session.model, session.route = record.model, record.route
        record.num_expected = session.num_context
        if session.pinned:
            record.retention = Retention(pinned=True)

    def finish(self, record: RequestRecord) -> None:
        """It is over. One that made no token is no turn."""
        session = self._find(record.tenant, record.session)
        if session is None or not record.identified:
            return
        session.num_running = max(0, session.num_running - 1)
        session.last_seen = self._clock()
        if not record.first:
            return
        session.num_turns += 1
        session.num_context = record.num_prompt + record.num_output
        session.num_prompt += record.num_prompt
        session.num_cached += record.num_cached
        session.num_output += record.num_output
        if record.tps:
            session.tps_last = record.tps
            session.decode_s += record.last - record.first
            session.num_decoded += record.tps * (record.last - record.first)
        self._keep(session, record)

    def of(self, tenant: str | None) -> list[Session]:
        """The tenant's sessions, or everybody's for None; the one seen last comes first."""
        names = list(self._tenants) if tenant is None else [tenant]
        found = [one for name in names for one in self._tenants.get(name, _NOBODY).values()]
        return sorted(found, key=lambda session: -session.last_seen)

    def find(self, tenant: str | None, key: str) -> Session | None:
        """A session by our id or, within a tenant, by the client's name."""
        named = self._find(tenant, key) if tenant is not None else None
        return named or next((one for one in self.of(tenant) if one.id == key), None)

    def drop(self, session: Session) -> None:
        """Forgets what the session had; the session too, unless a turn is on its way."""
        self._forget_ids(session)
        session.num_context = 0
        session.pinned = False
        if not session.num_running:
            self._tenants[session.tenant].pop(session.name, None)

    def _find(self, tenant: str, name: str | None) -> Session | None:
        return self._tenants.get(tenant, _NOBODY).get(name or "")

    def _get(self, tenant: str, name: str) -> Session:
        table = self._tenants.setdefault(tenant, OrderedDict())
        if name not in table:
            number = self._pseudonym("session", tenant, name)
            table[name] = Session(f"ses_{number}", name, tenant, self._clock())
            if len(table) > self._max_sessions:
                self._forget_ids(table.popitem(last=False)[1])
        table.move_to_end(name)
        return table[name]

    def _keep(self, session: Session, record: RequestRecord) -> None:
        """The ids of this turn in place of those of the one before."""
        self._forget_ids(session)
        session.salt = record.salt
        session.prompt_ids, session.output_ids = record.prompt_ids, record.output_ids
        self._num_ids[session.tenant] += session.num_ids
        while self._num_ids.total() > self._max_ids:
            tenant = max(self._num_ids, key=self._num_ids.__getitem__)
            self._forget_ids(next(self._holders(tenant)))

    def _holders(self, tenant: str) -> Iterator[Session]:
        return (session for session in self._tenants[tenant].values() if session.num_ids)

    def _forget_ids(self, session: Session) -> None:
        self._num_ids[session.tenant] -= session.num_ids
        session.prompt_ids = session.output_ids = ()
