# SPDX-License-Identifier: MIT
"""Made-up coding agents: sessions of the shape, the sharing and the rhythm of recorded ones.

A prompt is layers: the client's tools and system prompt (shared by all who run that version), the
repository's rules (shared by who works there), the session's first context, then history. What a
test of prefixes cannot see is left out: reminders inside a message, several calls in one turn.
Source of the distributions: `habits`.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from tokenspeed.bench.session import Session, Turn, Workload
from tokenspeed.bench.timeline import turn_times
from tokenspeed.bench.workloads import checks
from tokenspeed.bench.workloads.chains import Segment, Texts
from tokenspeed.bench.workloads.habits import CLIENTS, FITTED, SUBAGENT, Client, Habits
from tokenspeed.bench.workloads.sampling import LogNormal
from tokenspeed.bench.workloads.scaling import scaled

BLOCK_SIZE = 64
_TRIES, _LARGEST = 16, 66_000
_AGENT_STEPS = LogNormal(math.log(10), 0.4, 3, 40)
_AGENT_CONTEXT = LogNormal(math.log(1500), 0.6, 200, 20_000)


def make(
    *,
    sessions: int = 100,
    seed: int = 0,
    scale: float = 1.0,
    span_s: float = 0.0,
    habits: Habits = FITTED,
    clients: Mapping[str, float] | None = None,
    subagents: float = 0.05,
    block_size: int = BLOCK_SIZE,
) -> Workload:
    """So many sessions of people (subagents and side calls come on top), started within `span_s`.

    `clients` are shares of `habits.CLIENTS` (default: claude alone); `subagents` is the share of
    sessions that fan out. Raises ValueError for senseless arguments.
    """
    checks.at_least("sessions", sessions, 1)
    checks.at_least("block_size", block_size, 1)
    if not 0 <= subagents <= 1:
        raise ValueError(f"subagents must be in [0, 1], not {subagents}")
    names, shares = _shares(clients or {"claude": 1.0})
    rng, texts = np.random.default_rng(seed), Texts(block_size)
    found: list[Session] = []
    people = _people(rng, sessions)
    starts = checks.starts(rng, max(people) + 1, span_s)
    for number, person in enumerate(people):
        mine = np.random.default_rng([seed, number])
        client = CLIENTS[names[int(mine.choice(len(names), p=shares))]]
        start_s = starts[person] + float(mine.uniform(0, min(600.0, span_s)))
        head = layers(texts, client, int(mine.integers(len(client.system))))
        head.append(_rules(texts, habits, seed, person))
        agent = Agent(texts, mine, habits, head)
        name = f"{client.name}-{number}"
        main = Session(name, agent.turns(), block_size, start_s, f"user-{person}", None)
        found += _with_children(agent, main, subagents)
    found.sort(key=lambda session: session.start_s)
    return scaled(Workload("generated", tuple(found), seed, 1.0), scale)


def _shares(clients: Mapping[str, float]) -> tuple[list[str], list[float]]:
    for name, share in clients.items():
        if name not in CLIENTS:
            raise ValueError(f"clients: {name!r} is none of {', '.join(CLIENTS)}")
        checks.at_least(f"clients: {name}", share, 0)
    total = sum(clients.values())
    if total <= 0:
        raise ValueError("clients: all shares are 0")
    return list(clients), [share / total for share in clients.values()]


def _people(rng: np.random.Generator, sessions: int) -> list[int]:
    """Whose session each is: one to five of a person's run side by side."""
    found: list[int] = []
    while len(found) < sessions:
        found += [found[-1] + 1 if found else 0] * int(rng.integers(1, 6))
    return found[:sessions]


class Agent:
    """The prompt of one session while it grows. `history` is behind the shared layers `head`."""

    def __init__(
        self, texts: Texts, rng: np.random.Generator, habits: Habits, head: list[Segment]
    ) -> None:
        self.texts, self.rng, self.habits = texts, rng, habits
        self.head = head
        self.history: list[Segment] = []
        self.pace = 1.0  # of what a step appends
        self.blocks: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(segment.tokens for segment in (*self.head, *self.history))

    def turns(self) -> tuple[Turn, ...]:
        habits, rng = self.habits, self.rng
        first = habits.first_context.draw(rng)
        resumed = first >= habits.resumed_tokens
        window = habits.window.draw(rng)
        if first + 20_000 > window or (not resumed and rng.random() < habits.large_windows):
            window = habits.large_window
        rules = self.head[-1].tokens
        self.begin(max(64, round(first) - rules))
        found: list[Turn] = []
        messages = self._steps(resumed)
        self.pace = (habits.typical_requests / sum(messages)) ** habits.haste
        for steps in messages:
            for step in range(steps):
                self._step(found, "tool" if step else "user", window)
        return tuple(found)

    def _steps(self, resumed: bool) -> list[int]:
        """Of each message. Few messages have long runs of steps: of several draws the nearest."""
        habits, rng = self.habits, self.rng
        messages = max(1, round(habits.messages.draw(rng)))
        wanted = (habits.resumed_requests if resumed else habits.requests).draw(rng)
        drawn = ([int(habits.steps.draw(rng)) for _ in range(messages)] for _ in range(_TRIES))
        return min(drawn, key=lambda steps: abs(math.log(sum(steps) / max(wanted, messages))))

    def steps(self, number: int, context: int) -> tuple[Turn, ...]:
        """A subagent's: one task, then tools."""
        self.begin(context)
        found: list[Turn] = []
        for step in range(number):
            self._step(found, "tool" if step else "user", self.habits.large_window)
        return tuple(found)

    def begin(self, context: int) -> None:
        self.history = [self.texts.own(context)]
        self.blocks = self.texts.blocks([*self.head, *self.history])

    def _step(self, found: list[Turn], kind: str, window: float) -> None:
        habits, rng = self.habits, self.rng
        gap = 0.0
        if found:
            gap = (habits.tool_gap if kind == "tool" else habits.user_gap).draw(rng)
            self._grow(found[-1], window)
        output = round(habits.output.draw(rng))
        cancelled = int(rng.integers(1, output + 1)) if rng.random() < habits.cancel else None
        tail = self.tokens - len(self.blocks) * self.texts.block_size
        turn = Turn(self.blocks, self.tokens, output, gap, kind, tail, cancelled)
        found.append(turn)
        if rng.random() < habits.retry:
            found.append(replace(turn, gap_s=1.0, cancel_after=None))

    def _grow(self, before: Turn, window: float) -> None:
        """To the next prompt: by what was answered and what came back, or after an event.

        What of the answer is longer than all that is new was thinking, which is not sent back.
        """
        habits, own = self.habits, self.texts.own
        drawn = min(_LARGEST, self.pace * habits.append.draw(self.rng))
        new = max(2, round(drawn) - before.tail_tokens)
        answer = min(before.cancel_after or before.output_tokens, new - 1)
        added = [own(answer), own(new - answer)]
        event, kept = self.rng.random(), len(self.blocks)
        events = np.cumsum([habits.compaction, habits.rerender, habits.tools_change])
        if event < events[0] or self.tokens + new > window:
            self.history = [own(round(habits.summary.draw(self.rng)))]
            kept = self._head_blocks()
        elif event < events[1]:
            self.history = [own(sum(segment.tokens for segment in self.history))]
            kept = self._head_blocks()
        elif event < events[2]:
            tools, *rest = self.head
            self.head, kept = [own(tools.tokens + 500), *rest], 0
        self.history += added
        self.blocks = self.texts.blocks([*self.head, *self.history], self.blocks[:kept])

    def _head_blocks(self) -> int:
        return sum(segment.tokens for segment in self.head) // self.texts.block_size


def layers(texts: Texts, client: Client, version: int) -> list[Segment]:
    """What all who run this version of a client send first: tools, then the system prompt."""
    name = client.name
    return [
        texts.shared(client.tools[version], name, "tools", version),
        texts.shared(client.system[version], name, "system", version),
    ]


def _rules(texts: Texts, habits: Habits, seed: int, person: int) -> Segment:
    """Of the repository that a person works in: who works where follows Zipf's law."""
    ranks = 1 / np.arange(1, habits.repositories + 1)
    rng = np.random.default_rng([seed, person, 1])
    repository = int(rng.choice(len(ranks), p=ranks / ranks.sum()))
    tokens = habits.rules.draw(np.random.default_rng([seed, repository, 2]))
    return texts.shared(round(tokens), "rules", repository)


def _with_children(agent: Agent, main: Session, subagents: float) -> list[Session]:
    """The session, its side calls, and the agents that it waits for once."""
    found = [main]
    rng, texts = agent.rng, agent.texts
    if rng.random() < agent.habits.side_calls:
        head = texts.shared(300, "title")
        body = texts.own(int(rng.integers(700, 1700)))
        size = head.tokens + body.tokens
        blocks = texts.blocks([head, body])
        turn = Turn(blocks, size, 30, 0.0, "user", size - len(blocks) * texts.block_size)
        found.append(
            replace(
                main, session_id=f"{main.session_id}/side", turns=(turn,), parent=main.session_id
            )
        )
    tools = [i for i, turn in enumerate(main.turns) if turn.kind == "tool"]
    if not tools or rng.random() >= subagents:
        return found
    waits = tools[int(rng.integers(len(tools)))]
    begun = turn_times(main)[waits - 1][1]
    longest = 0.0
    for number in range(min(8, int(rng.geometric(0.4)))):
        child = Agent(texts, rng, agent.habits, layers(texts, SUBAGENT, 0))
        steps = round(_AGENT_STEPS.draw(rng))
        turns = child.steps(steps, round(_AGENT_CONTEXT.draw(rng)))
        name = f"{main.session_id}/agent-{number}"
        made = Session(name, turns, main.block_size, begun, main.user, main.session_id)
        found.append(made)
        longest = max(longest, turn_times(made)[-1][1] - begun)
    waiting = replace(main.turns[waits], gap_s=longest)
    found[0] = replace(main, turns=(*main.turns[:waits], waiting, *main.turns[waits + 1 :]))
    return found
