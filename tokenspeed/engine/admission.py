# SPDX-License-Identifier: MIT
"""The checks that a request passes before the scheduler sees it. Knows limits, no state."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenspeed.engine.messages import GenerateRequest
from tokenspeed.errors import RequestError

TOO_LONG = "context_length_exceeded"


@dataclass(frozen=True)
class Limits:
    """What this engine can serve."""

    max_model_len: int
    vocab_size: int
    max_logprobs: int


def check(request: GenerateRequest, limits: Limits) -> NDArray[np.int32]:
    """The prompt as an array. `RequestError` names the first field that cannot be served."""
    params = request.params
    if params.n != 1:
        raise RequestError("n: the engine takes one answer a request", field="n")
    prompt = _ids("prompt", request.prompt_ids, limits)
    if not len(prompt):
        raise RequestError("prompt: must not be empty", field="prompt", code="empty_prompt")
    _check_length(len(prompt), params.max_tokens, limits.max_model_len)
    for name, ids in params.token_ids().items():
        _ids(name, ids, limits)
    _check_choice(request, limits.vocab_size)
    for name in ("logprobs", "prompt_logprobs"):
        asked = getattr(params, name)
        if asked is not None and asked > limits.max_logprobs:
            raise RequestError(
                f"{name}: at most {limits.max_logprobs} are served, got {asked}", field=name
            )
    return prompt


def known_ids(ids: list[int], limits: Limits) -> NDArray[np.int32]:
    """The ids up to the first that the model does not know."""
    end = next((i for i, token in enumerate(ids) if not 0 <= token < limits.vocab_size), len(ids))
    return np.array(ids[:end], np.int32)


def _ids(name: str, ids: list[int], limits: Limits) -> NDArray[np.int32]:
    if not len(ids):
        return np.empty(0, np.int32)
    try:
        array = np.asarray(ids)
    except (ValueError, OverflowError):
        raise _not_ids(name, limits) from None
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise _not_ids(name, limits)
    if array.min() < 0 or array.max() >= limits.vocab_size:
        raise _not_ids(name, limits)
    return array.astype(np.int32)


def _not_ids(name: str, limits: Limits) -> RequestError:
    message = f"{name}: token ids must be integers in [0, {limits.vocab_size})"
    return RequestError(message, field=name)


def _check_choice(request: GenerateRequest, vocab_size: int) -> None:
    """The first token must have a choice: not all that is allowed may be banned."""
    params = request.params
    banned = {word[0] for word in params.bad_words_token_ids or () if len(word) == 1}
    if params.min_tokens:
        banned.update(request.stop_ids)
    if not banned:
        return
    field = "min_tokens" if params.min_tokens else "bad_words"
    if params.allowed_token_ids is not None:
        field = "allowed_token_ids"
    if banned.issuperset(params.allowed_token_ids or range(vocab_size)):
        raise RequestError(
            f"{field}: bad_words and the stop tokens that min_tokens forbids leave no token to "
            "choose",
            field=field,
        )


def _check_length(num_prompt: int, max_tokens: int | None, max_model_len: int) -> None:
    asked = num_prompt + (max_tokens or 1)
    if asked > max_model_len:
        raise RequestError(
            f"This model's maximum context length is {max_model_len} tokens. However, you "
            f"requested {asked} tokens ({num_prompt} in the prompt, {max_tokens or 1} in the "
            "completion). Please reduce the length of the prompt or the completion.",
            field="prompt" if num_prompt >= max_model_len else "max_tokens",
            code=TOO_LONG,
        )
