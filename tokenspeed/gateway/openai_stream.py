# SPDX-License-Identifier: MIT
"""What OpenAI's chat and completions have in common: how streams end, and usage. No requests."""

from typing import Any

from tokenspeed.gateway.api_error import ApiError
from tokenspeed.gateway.generation import Generation

DONE = b"data: [DONE]\n\n"


class OpenAIStream:
    """How a stream ends that fails, and what it says while nothing comes."""

    def failure(self, error: ApiError) -> bytes:
        return b"data: " + error.body() + b"\n\n" + DONE

    def keep_alive(self) -> bytes:
        return b": keep-alive\n\n"


def usage_of(generation: Generation) -> dict[str, Any]:
    """Tokens so far. A prompt counts once, whatever `n` is."""
    firsts, choices = generation.firsts, generation.choices
    prompt = sum(len(choice.prompt_ids) for choice in firsts)
    completion = sum(choice.num_tokens for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(c.num_cached for c in firsts)},
        "completion_tokens_details": {"reasoning_tokens": sum(c.num_reasoning for c in choices)},
    }
