#!/usr/bin/env python3
"""Drives a server with OpenAI's own Python client, unmodified.

Usage: test_openai_client.py BINARY CONFIG
Needs the package "openai" (pip install openai). Prints each test's name; exits 1 if one fails.
"""

import asyncio
import sys
import time

import openai

from server_process import metrics, model_id, run_tests, serve

MESSAGES = [{"role": "user", "content": "Tom has 3 apples and buys 4 more. How many?"}]
PROMPT = "Tom has 3 apples."


def raises(error_type, call, param=None, code=None):
    try:
        call()
    except error_type as error:
        assert param is None or error.param == param, (error.param, param)
        assert code is None or error.code == code, (error.code, code)
        return error
    raise AssertionError(f"{error_type.__name__} was not raised")


def test_models(client, model):
    listed = list(client.models.list())
    assert [m.id for m in listed] == [model]
    assert client.models.retrieve(model).object == "model"
    raises(openai.NotFoundError, lambda: client.models.retrieve("none"), code="model_not_found")


def test_completion(client, model):
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.choices[0].text
    usage = answer.usage
    assert 1 <= usage.completion_tokens <= 12
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == 0
    again = client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0)
    assert again.choices[0].text == answer.choices[0].text


def test_completion_logprobs(client, model):
    choice = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=8, temperature=0, logprobs=3).choices[0]
    block = choice.logprobs
    assert len(block.tokens) == len(block.token_logprobs) == len(block.top_logprobs)
    assert len(block.tokens) == len(block.text_offset) > 0
    for token, logprob, top in zip(block.tokens, block.token_logprobs, block.top_logprobs):
        assert logprob <= 0 and top[token] == logprob == max(top.values())  # greedy


def test_completion_stream(client, model):
    plain = client.completions.create(model=model, prompt=PROMPT, max_tokens=20, temperature=0)
    chunks = list(client.completions.create(
        model=model, prompt=PROMPT, max_tokens=20, temperature=0, stream=True))
    assert len({chunk.id for chunk in chunks}) == 1
    assert "".join(chunk.choices[0].text for chunk in chunks) == plain.choices[0].text
    assert chunks[-1].choices[0].finish_reason == plain.choices[0].finish_reason


def test_chat(client, model):
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, max_completion_tokens=20, temperature=0)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    message = answer.choices[0].message
    assert message.role == "assistant" and message.content
    # The client's own object goes back in as the conversation's history.
    history = MESSAGES + [message.model_dump(), {"role": "user", "content": [
        {"type": "text", "text": "And "}, {"type": "text", "text": "then?"}]}]
    more = client.chat.completions.create(model=model, messages=history, max_tokens=5)
    assert more.usage.prompt_tokens > answer.usage.prompt_tokens


def test_applied_template(client, model):
    chat = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=20, temperature=0)
    root = client.with_options(base_url=str(client.base_url).removesuffix("/v1/"))
    prompt = root.post("/apply-template", cast_to=object, body={"messages": MESSAGES})["prompt"]

    def complete(**more):
        return client.completions.create(model=model, prompt=prompt, max_tokens=20, temperature=0,
                                         extra_body=more)
    answer = complete(parse_special=True)
    assert answer.choices[0].text == chat.choices[0].message.content
    assert answer.usage.prompt_tokens == chat.usage.prompt_tokens
    assert complete().usage.prompt_tokens > chat.usage.prompt_tokens  # plain text


def test_chat_stream_with_usage(client, model):
    chunks = list(client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=20, temperature=0, stream=True,
        stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0
    assert all(chunk.usage is None for chunk in chunks[:-1])
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    plain = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=20, temperature=0)
    assert text == plain.choices[0].message.content


def test_chat_logprobs(client, model):
    content = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=6, temperature=0, logprobs=True,
        top_logprobs=2).choices[0].logprobs.content
    assert content
    for entry in content:
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].logprob == entry.logprob >= entry.top_logprobs[1].logprob
        assert bytes(entry.bytes).decode(errors="replace") == entry.token


def test_stop_and_seed(client, model):
    def text(**more):
        return client.completions.create(
            model=model, prompt=PROMPT, max_tokens=24, **more).choices[0].text

    greedy = text(temperature=0)
    stop = greedy[5:7]
    assert text(temperature=0, stop=[stop]) == greedy[:greedy.index(stop)]
    assert text(temperature=1.5, seed=1) == text(temperature=1.5, seed=1)
    assert len({text(temperature=1.5, seed=seed) for seed in range(4)}) > 1


def test_typed_errors(client, model):
    def complete(**arguments):
        return lambda: client.completions.create(**{"model": model, "prompt": PROMPT, **arguments})

    bad = openai.BadRequestError
    raises(bad, complete(temperature=3), param="temperature", code="invalid_value")
    raises(bad, complete(suffix="."), param="suffix", code="unsupported_parameter")
    raises(bad, complete(extra_body={"typical_p": 0.5}), param="typical_p",
           code="unsupported_parameter")
    raises(bad, complete(max_tokens=10**7), code="context_length_exceeded")
    raises(openai.NotFoundError, complete(model="none"), code="model_not_found")
    raises(bad, lambda: client.chat.completions.create(
        model=model, messages=MESSAGES, tools=[{"type": "function"}]), param="tools")


def test_logprobs_of_streams(client, model):
    def legacy(**more):
        return client.completions.create(model=model, prompt=PROMPT, max_tokens=8, seed=1,
                                         logprobs=2, **more)

    plain = legacy().choices[0].logprobs
    chunks = [chunk.choices[0].logprobs for chunk in legacy(stream=True)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        streamed = [value for block in chunks if block for value in getattr(block, name)]
        assert streamed == getattr(plain, name) and streamed, name

    def chat(**more):
        return client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=8, seed=1,
                                              logprobs=True, top_logprobs=3, **more)

    plain = chat().choices[0].logprobs.content
    chunks = [chunk.choices[0].logprobs for chunk in chat(stream=True)]
    assert [entry for block in chunks if block for entry in block.content] == plain and plain


def test_fifty_streams_at_once(client, model):
    def arguments(number):
        return {"model": model, "prompt": f"{number} is", "max_tokens": 24, "seed": number,
                "extra_body": {"ignore_eos": True}}

    async def stream(asynchronous, number):
        text = ""
        async for chunk in await asynchronous.completions.create(**arguments(number), stream=True):
            text += chunk.choices[0].text
        return text

    async def all_at_once():
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key=client.api_key,
                                      max_retries=0, timeout=60) as asynchronous:
            return await asyncio.gather(*(stream(asynchronous, number) for number in range(50)))

    for number, text in enumerate(asyncio.run(all_at_once())):
        alone = client.completions.create(**arguments(number)).choices[0].text
        assert text == alone and text, (number, text, alone)


def test_a_closed_stream_ends_its_work(client, model):
    url = str(client.base_url).removesuffix("/v1/")
    aborts = 'vllm:request_success_total{finished_reason="abort"}'
    before = metrics(url)
    stream = client.completions.create(model=model, prompt=PROMPT, max_tokens=3900, stream=True,
                                       extra_body={"ignore_eos": True})
    next(stream)
    assert metrics(url)["vllm:num_requests_running"] == 1
    stream.close()
    deadline = time.monotonic() + 10
    while (now := metrics(url))[aborts] == before[aborts] or now["vllm:num_requests_running"]:
        assert time.monotonic() < deadline, now
        time.sleep(0.02)
    assert now['innerq:kv_pages_used{kind="open"}'] == 0
    generated = now["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"]
    assert generated < 3900, "it was generated to its end"


def test_a_full_server_is_a_typed_error(_, model):
    async def check(url):
        async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="any", max_retries=0,
                                      timeout=60) as client:
            running = await client.completions.create(
                model=model, prompt=PROMPT, max_tokens=3900, stream=True,
                extra_body={"ignore_eos": True})
            await anext(aiter(running))
            calls = {asyncio.create_task(client.completions.create(
                model=model, prompt=PROMPT, max_tokens=1,
                extra_body={"ignore_eos": True})) for _ in range(2)}
            (refused,), (waiting,) = await asyncio.wait(
                calls, return_when=asyncio.FIRST_COMPLETED)
            error = refused.exception()
            assert isinstance(error, openai.InternalServerError), error
            assert error.status_code == 503 and error.code == "server_is_overloaded"
            assert int(error.response.headers["retry-after"]) >= 1
            await running.close()
            assert (await waiting).choices[0].finish_reason == "length"

    with serve(*sys.argv[1:3], "scheduler.max_sequences=1", "scheduler.max_queue=1") as server:
        asyncio.run(check(server.url))


def test_keys(client, model):
    wrong = client.with_options(api_key="wrong")
    raises(openai.AuthenticationError, lambda: wrong.completions.create(
        model=model, prompt=PROMPT), code="invalid_api_key")
    assert list(wrong.models.list())


def main():
    binary, config = sys.argv[1:]
    with serve(binary, config, "server.api_keys.0=sesame") as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="sesame", max_retries=0,
                               timeout=60)
        return run_tests(globals(), client, model_id(server.url))


if __name__ == "__main__":
    sys.exit(main())
