# SPDX-License-Identifier: MIT
"""The `openai` client and the command-line chat against a real gateway process."""

import asyncio

import openai
import pytest

from tests.gateway.test_processes import server


async def test_chat_and_completion_streams():
    with server("--api-key", "secret") as s:
        async with openai.AsyncOpenAI(base_url=f"{s.url}/v1", api_key="secret") as client:
            assert [m.id async for m in client.models.list()] == ["null"]
            chat = await client.chat.completions.create(
                model="null",
                messages=[{"role": "user", "content": "hello"}],
                max_tokens=8,
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = [chunk async for chunk in chat]
            assert chunks[0].choices[0].delta.role == "assistant"
            assert "hello" in "".join(c.choices[0].delta.content or "" for c in chunks[:-1])
            assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 0
            text = await client.completions.create(
                model="null", prompt="hello", max_tokens=4, stream=True
            )
            assert "".join([c.choices[0].text async for c in text]) == "hellohello"
            whole = await client.chat.completions.create(
                model="null", messages=[{"role": "user", "content": "hello"}], logprobs=True
            )
            assert whole.choices[0].finish_reason == "stop"
            assert whole.choices[0].logprobs.content[0].bytes is not None


async def test_typed_errors():
    with server("--api-key", "secret") as s:
        options = {"base_url": f"{s.url}/v1", "max_retries": 0}
        message = [{"role": "user", "content": "hello"}]
        async with openai.AsyncOpenAI(**options, api_key="wrong") as client:
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()
        async with openai.AsyncOpenAI(**options, api_key="secret") as client:
            with pytest.raises(openai.NotFoundError) as missing:
                await client.chat.completions.create(model="gpt", messages=message)
            assert missing.value.code == "model_not_found"
            with pytest.raises(openai.BadRequestError) as long:
                await client.completions.create(model="null", prompt=[5] * 5000)
            assert long.value.code == "context_length_exceeded"
            with pytest.raises(openai.BadRequestError) as wrong:
                await client.chat.completions.create(model="null", messages=message, temperature=-1)
            assert wrong.value.param == "temperature"
            s.engine().kill()
            await asyncio.sleep(0.5)
            with pytest.raises(openai.InternalServerError) as dead:
                await client.chat.completions.create(model="null", messages=message)
            assert dead.value.status_code == 503
