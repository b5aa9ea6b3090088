# SPDX-License-Identifier: MIT
"""`BareParser`: calls that no marker opens but stand where content begins. Knows no syntax of them.

Such a call is told from content by the tools of the request; without tools there is none.
"""

from abc import ABC, abstractmethod

from tokenspeed.text.channels import Inputs
from tokenspeed.text.parsers.thinking import ThinkParser


class BareParser(ThinkParser, ABC):
    """A subclass gives `starts`, the characters that may begin a call, and `begins`."""

    starts = ""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        self.known = frozenset(tool.name for tool in inputs.tools)

    @abstractmethod
    def begins(self) -> None:
        """One of `starts` stands next and `raw` is empty: sets `state`."""

    def read_text(self) -> bool:
        if self.known and self.out.channel == "content" and self.out.blank:
            self.out.text(self.scan.skip_space())
            char = self.scan.peek()
            if not char:
                return False
            if char in self.starts:
                self.raw = []
                self.begins()
                return True
        return super().read_text()

    def cut(self) -> None:
        if not "".join(self.raw).strip(" \t\r\n,;"):
            self.raw = []  # what parts calls, and no further call
        super().cut()

    def skip(self, text: str) -> None:
        """Reads `text`, which stands next."""
        self.scan.seek(self.scan.view()[1] + len(text))
