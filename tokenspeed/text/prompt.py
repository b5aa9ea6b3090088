# SPDX-License-Identifier: MIT
"""`Prompts`: conversations to ids, with what was sampled before taken as it was. Knows no engine.

canonical form -> keys -> the last turn known + the text after it, or all of it rendered
"""

import json
import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

from tokenspeed.errors import ContextLengthError, RequestError
from tokenspeed.text.canonical import Canonical, chosen_rules
from tokenspeed.text.canonical_probe import Render, Systems, probe_systems
from tokenspeed.text.channels import Channel, Format
from tokenspeed.text.conversation import Conversation
from tokenspeed.text.history import History, Known, first_difference
from tokenspeed.text.history_keys import (
    ConversationKeys,
    Spoken,
    plain_text,
    thought_digest,
    thought_of,
)
from tokenspeed.text.history_tail import Tail, Tails
from tokenspeed.text.prompt_regions import region_of
from tokenspeed.text.tokenizer import Tokenizer

_MARK = "\ue000 to be continued \ue000"
_PROMPT_END = 512  # characters that say in which channel an answer begins
_MAX_TOLD = 1 << 14  # sessions of which it is remembered what was logged

log = logging.getLogger("tokenspeed.text")


@dataclass(frozen=True, slots=True)
class Origin:
    """What a later turn must know of this one."""

    key: bytes  # of the conversation
    session: bytes | None
    known: Known | None  # the turn whose ids the prompt begins with


@dataclass(frozen=True, slots=True)
class Prompt:
    """Ids of a rendered conversation; an answer to it begins in `starts_in`.

    `num_known`: leading ids that were taken from earlier turns as they were sampled.
    """

    ids: list[int]
    starts_in: Channel = "content"
    num_known: int = 0
    origin: Origin | None = None
    rules: Counter[str] = field(default_factory=Counter)  # canonical rules, how often each
    conversation: Conversation | None = None

    def region_of(self, index: int, tokenizer: Tokenizer) -> str:
        """Where the token stands: "tools", "system", "message 7" (from 0) or "prompt"."""
        if self.conversation is None:
            return "prompt"
        return region_of(self.ids, index, self.conversation, tokenizer)


class Prompts:
    """Thread-safe. The template is tried out with the first conversation, or by `prepare`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        render: Render,
        answers: Format,
        rules: Sequence[str] = ("all",),
        history_bytes: int = 256 << 20,
    ) -> None:
        self.history = History(history_bytes)
        self.rules: Counter[str] = Counter()  # how often each rule has changed something
        self._tokenizer, self._render, self._format = tokenizer, render, answers
        self._rules = chosen_rules(rules)
        self._keys = ConversationKeys()
        added = tokenizer.added_tokens
        ends = [added[i] for i in tokenizer.eos_ids if i in added]
        self._tails = Tails(render, added.values(), ends)
        self._shared = list(range(tokenizer.vocab_size))  # one integer object for each id
        self._canonical: Canonical | None = None
        self._lock = threading.Lock()
        self._told: OrderedDict[bytes, None] = OrderedDict()

    def prepare(self) -> Canonical:
        """Tries out the template."""
        with self._lock:
            if self._canonical is None:
                wanted = "inline_system" in self._rules
                systems = probe_systems(self._render) if wanted else Systems()
                if self.history.max_bytes:
                    for tools in (False, True):
                        self._tails.is_local(tools=tools)
                self._canonical = Canonical(self._rules, systems)
            return self._canonical

    def make(
        self,
        conversation: Conversation,
        salt: bytes = b"",
        session: str | None = None,
        max_model_len: int | None = None,
    ) -> Prompt:
        """The prompt. Raises `RequestError` for what cannot be rendered, or cannot fit.

        `salt` keeps apart what was sampled for different tenants.
        """
        canonical = self._canonical or self.prepare()
        conversation, rules, tools_key = canonical.apply(conversation)
        made = Prompt([], rules=rules, conversation=conversation)
        plain = conversation.add_special_tokens or conversation.continue_final
        if plain or not self.history.max_bytes:
            return self._whole(made, max_model_len)
        messages = conversation.messages
        keys = self._keys.chain(_root(tools_key, conversation, salt), messages)
        name = session.encode(errors="replace") if session else _opening_key(messages, keys)
        name = blake2b(name, digest_size=16, salt=_salt(salt)).digest()
        self._tell(name, rules)
        found = self.history.find(_turns(messages, keys))
        if found is not None:
            at, known = found
            known_prompt = replace(made, origin=Origin(keys[-1], name, known))
            if (done := self._go_on(known_prompt, at, known, max_model_len)) is not None:
                return done
        return self._whole(replace(made, origin=Origin(keys[-1], name, None)), max_model_len)

    def record(self, prompt: Prompt, spoken: Spoken, output: list[int], stop: int | None) -> None:
        """Remembers a finished answer. `stop` is the token that ended it, the last of `output`."""
        origin = prompt.origin
        if origin is None or not self.history.max_bytes:
            return
        if prompt.conversation is not None and not prompt.conversation.add_generation_prompt:
            return
        keys = {self._keys.follow(origin.key, message) for message in spoken.messages()}
        words = output if stop is None else output[:-1]
        ids = prompt.ids + self._share(words)
        thought = thought_digest(spoken.thought)
        self.history.record(keys, ids, origin.known, stop, thought, origin.session)

    def expected(self, prompt: Prompt) -> tuple[int, int | None]:
        """How many leading ids an earlier turn had, and the first that the session's last turn
        had otherwise (None: it is continued, or not known)."""
        origin = prompt.origin
        last = None
        if origin is not None and origin.session is not None:
            last = self.history.last(origin.session)
        if last is None:
            return prompt.num_known, None
        same = first_difference(last, prompt.ids)
        differs = same < min(len(last), len(prompt.ids))
        return max(prompt.num_known, same), same if differs else None

    def _go_on(
        self, made: Prompt, at: int, known: Known, max_model_len: int | None
    ) -> Prompt | None:
        """From the end of a known turn, if what follows it can be told."""
        conversation = made.conversation
        if conversation is None:
            return None
        added = self._tokenizer.added_tokens
        stop = added.get(known.stop) if known.stop is not None else None
        tail = self._tails.tail(conversation, at, stop)
        if tail is None:
            return None
        check_length(tail.text, self._tokenizer, max_model_len, "messages")
        ids = known.ids()
        ids += self._tail_ids(tail, known.stop, stop)
        starts_in = self._format.starts_in(tail.text[-_PROMPT_END:])
        num_known = known.length + tail.after_stop
        return replace(made, ids=ids, starts_in=starts_in, num_known=num_known)

    def _tail_ids(self, tail: Tail, stop_id: int | None, stop: str | None) -> list[int]:
        """Ids of the tail, with the token that ended the turn in front if it stays.

        Encoded behind that token, which may take white space after it; nothing merges with it.
        """
        if not tail.after_stop or stop is None or stop_id is None:
            return self._encode(tail.text)
        ids = self._encode(stop + tail.text)
        if ids[:1] == [stop_id]:
            return ids
        return [stop_id, *self._encode(tail.text)]

    def _whole(self, made: Prompt, max_model_len: int | None) -> Prompt:
        """Everything rendered and encoded."""
        conversation = made.conversation
        if conversation is None:
            raise ValueError("a prompt is made of a conversation")
        text = self._text(conversation)
        check_length(text, self._tokenizer, max_model_len, "messages")
        ids = self._encode(text, conversation.add_special_tokens)
        return replace(made, ids=ids, starts_in=self._format.starts_in(text[-_PROMPT_END:]))

    def _text(self, conversation: Conversation) -> str:
        """All of it rendered. A last message to go on with is rendered as a mark, and then put
        where the mark stands: templates close it, and some change it."""
        messages, final = conversation.messages, None
        if conversation.continue_final:
            final = plain_text(messages[-1].get("content"))
            messages = [*messages[:-1], messages[-1] | {"content": _MARK}]
        text = self._render(
            messages,
            tools=[tool.definition() for tool in conversation.tools] or None,
            add_generation_prompt=conversation.add_generation_prompt and final is None,
            **conversation.options,
        )
        if final is None:
            return text
        before, mark, _ = text.rpartition(_MARK)
        if not mark:
            why = "messages: this model's template cannot go on with an assistant's message"
            raise RequestError(why, field="messages")
        return before + final

    def _encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return self._share(self._tokenizer.encode(text, add_special_tokens))

    def _share(self, ids: list[int]) -> list[int]:
        """The same ids by integer objects that all tapes share; a list of them is 8 bytes an id."""
        try:
            return list(map(self._shared.__getitem__, ids))
        except IndexError:
            return ids  # a model may have more ids than its tokenizer

    def _tell(self, session: bytes, rules: Counter[str]) -> None:
        """Counts what was changed, and logs it once in a session."""
        if not rules:
            return
        with self._lock:
            self.rules += rules
            if session in self._told:
                return
            self._told[session] = None
            if len(self._told) > _MAX_TOLD:
                self._told.popitem(last=False)
        changes = ", ".join(f"{name} {count}" for name, count in sorted(rules.items()))
        log.info("canonical form of session %s: %s", session.hex()[:8], changes)


def _root(tools_key: bytes, conversation: Conversation, salt: bytes) -> bytes:
    """The key before the first message."""
    options = json.dumps(conversation.options, sort_keys=True, default=str)
    root = blake2b(tools_key, digest_size=16, salt=_salt(salt))
    root.update(options.encode())
    return root.digest()


def _turns(
    messages: Sequence[dict[str, Any]], keys: Sequence[bytes]
) -> list[tuple[int, bytes, bytes | None]]:
    """The assistant's messages, as `History.find` takes them."""
    return [
        (i, keys[i], thought_of(message))
        for i, message in enumerate(messages)
        if message.get("role") == "assistant"
    ]


def _opening_key(messages: Sequence[dict[str, Any]], keys: Sequence[bytes]) -> bytes:
    """Stands for a session that has no name: what came up to the first word of the user."""
    users = (i for i, message in enumerate(messages) if message.get("role") == "user")
    return keys[next(users, 0)]


def _salt(salt: bytes) -> bytes:
    return blake2b(salt, digest_size=16).digest()


def check_length(
    text: str, tokenizer: Tokenizer, max_model_len: int | None, field_name: str
) -> None:
    """Refuses a text that cannot fit the context before it is encoded."""
    if max_model_len and len(text) > max_model_len * tokenizer.max_chars_per_token:
        raise ContextLengthError(
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt"
            f" has {len(text)} characters, which cannot fit.",
            -(-len(text) // tokenizer.max_chars_per_token),
            max_model_len,
            field=field_name,
        )
