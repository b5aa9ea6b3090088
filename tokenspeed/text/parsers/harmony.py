# SPDX-License-Identifier: MIT
"""`harmony`: the messages of gpt-oss, each with a header that says its channel and recipient.

    <|channel|>analysis<|message|>..<|end|><|start|>assistant<|channel|>final<|message|>..<|return|>

A call is a message to `functions.NAME`, said in the channel's part of the header or in the role's:
`<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{..}<|call|>`. Analysis is
reasoning; messages of other channels are content. Source: OpenAI's harmony response format.
"""

import re

from tokenspeed.text.channels import Channel, Format, Inputs
from tokenspeed.text.parsers.marked_json import MarkedJsonParser

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
CONSTRAIN = "<|constrain|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
ANALYSIS = "analysis"

_MARKER = re.compile("|".join(map(re.escape, (START, CHANNEL, CONSTRAIN))))
_RECIPIENT = re.compile(r"(?:^|\s|>)to=(\S+)")
_WORDS = ("assistant", ANALYSIS, "commentary", "final", "json", "code")
_LONGEST_ROLE = 256


class _HarmonyParser(MarkedJsonParser):
    """`read_text` reads a message, `_read_header` what stands before it."""

    ends = (CALL, END, RETURN, START, CHANNEL)

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        self._known = {tool.name for tool in inputs.tools}
        self._bare = True  # no marker has said yet that this is a header
        if inputs.starts_in == "content":
            self.state = self._read_header

    def read_text(self) -> bool:
        text, marker = self.scan.take(*self.ends)
        if text:
            self.out.text(text)
        if marker is not None:
            self._begin_header(marker)
        return marker is not None

    def cut(self) -> None:
        if self.state == self._read_header:
            self._drop_header()
            self.state = self.read_text
        else:
            super().cut()

    def _begin_header(self, marker: str) -> None:
        self.raw = [marker] if marker in (START, CHANNEL) else []
        self._bare = False
        self.state = self._read_header

    def _read_header(self) -> bool:
        text, marker = self.scan.take(MESSAGE, CONSTRAIN, *self.ends, keep=True)
        self.raw.append(text)
        if self._bare and not _may_be_role("".join(self.raw)):
            return self.give_up()  # an answer without headers
        if marker is None:
            return False
        self.scan.expect(marker)
        if marker == MESSAGE:
            self._begin_message()
        elif marker in (CHANNEL, CONSTRAIN):
            self._bare = False
            self.raw.append(marker)
        else:
            self._drop_header()
            self._begin_header(marker)
        return True

    def _begin_message(self) -> None:
        header = "".join(self.raw)
        channel = header.rpartition(CHANNEL)[2].split()
        to: Channel = "reasoning" if (channel or [""])[0].startswith(ANALYSIS) else "content"
        self.raw, self.state = [], self.read_text
        if to == self.out.channel and not self.out.blank:
            self.out.text("\n\n")  # a further message
        else:
            self.out.end_block(to)
        recipient = _RECIPIENT.findall(_MARKER.sub(" ", header))
        name = recipient[-1] if recipient else ""
        if name.startswith("functions.") or name in self._known:
            self.begin_arguments(name.removeprefix("functions."), None)

    def _drop_header(self) -> None:
        """A header without a message. What no header says is text."""
        header, self.raw = "".join(self.raw), []
        words = _MARKER.sub(" ", header).split()
        if not all(w.startswith("to=") or any(k.startswith(w) for k in _WORDS) for w in words):
            self.out.end_block("content")
            self.out.text(header)


def _may_be_role(text: str) -> bool:
    """Whether the text may be the start of "assistant to=NAME"."""
    if len(text) > _LONGEST_ROLE:
        return False
    return all(w.startswith("to=") or "to=assistant".find(w) in (0, 3) for w in text.split())


def _speaks(source: str) -> bool:
    return CHANNEL in source and MESSAGE in source


def _starts_in(prompt_end: str) -> Channel:
    end = prompt_end.rstrip()
    if not end.endswith(MESSAGE):
        return "content"
    header = end.rpartition(CHANNEL)[2]
    return "reasoning" if header.strip().startswith(ANALYSIS) else "content"


HARMONY = Format(
    "harmony",
    (START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN),
    _HarmonyParser,
    _speaks,
    _starts_in,
    channels_by_calls=True,
)
