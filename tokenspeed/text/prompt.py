# SPDX-License-Identifier: MIT
"""`Prompt`: a conversation as ids, and what was learnt on the way. Knows no engine."""

from dataclasses import dataclass

from tokenspeed.text.channels import Channel


@dataclass(frozen=True, slots=True)
class Prompt:
    """Ids of a rendered conversation; an answer to it begins in `starts_in`."""

    ids: list[int]
    starts_in: Channel = "content"
