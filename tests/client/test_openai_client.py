#!/usr/bin/env python3
"""Drives a server with OpenAI's own Python client, unmodified.

Usage: test_openai_client.py BINARY CONFIG
Needs the package "openai" (pip install openai). Prints each test's name; exits 1 if one fails.
"""

import sys

import openai

from server_process import model_id, run_tests, serve

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
    raises(bad, complete(n=2), param="n", code="unsupported_parameter")
    raises(bad, complete(extra_body={"typical_p": 0.5}), param="typical_p",
           code="unsupported_parameter")
    raises(bad, complete(max_tokens=10**7), code="context_length_exceeded")
    raises(openai.NotFoundError, complete(model="none"), code="model_not_found")
    raises(bad, lambda: client.chat.completions.create(
        model=model, messages=MESSAGES, tools=[{"type": "function"}]), param="tools")


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
