#!/usr/bin/env python3
"""Tests the API against a description of it with Schemathesis.

Usage: test_schemathesis.py BINARY CONFIG [OPENAI_YAML]
Needs the packages of requirements-schemathesis.txt. Without OPENAI_YAML the description is the
server's own /openapi.json: no answer may be a 5xx, have an undocumented status, header or content
type, or differ from its schema, streams included; and bodies that the schema excludes must be
refused. With it, the description is OpenAI's, reduced to the operations that are served and to the
parameters that are honoured; README.md in this directory says what does not hold there, and why.
"""

import copy
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import urllib.request

import jsonschema_rs
import yaml
from server_process import metrics, model_id, serve

SERVED = {"/completions": "post", "/chat/completions": "post", "/models": "get",
          "/models/{model}": "get"}
# OpenAI's parameters that are honoured only with the value that asks for nothing.
FOR_SHOW = {"metadata", "modalities", "response_format", "service_tier", "store", "suffix",
            "tool_choice", "tools"}
CHECKS = ["not_a_server_error", "content_type_conformance", "response_headers_conformance",
          "response_schema_conformance", "negative_data_rejection"]
OWN_CHECKS = CHECKS + ["status_code_conformance", "unsupported_method", "allow_header_conformance"]


def get(url):
    with urllib.request.urlopen(url, timeout=10) as reply:
        return json.load(reply)


def own_description(url):
    """The server's description, narrowed to the model and the vocabulary that it serves: with
    others, requests end before anything else about them is looked at."""
    description = get(url + "/openapi.json")
    schemas = description["components"]["schemas"]
    schemas["ModelId"]["enum"] = [model_id(url)]
    schemas["TokenId"]["maximum"] = get(url + "/tokenizer_info")["vocab_size"] - 1
    return description


def honoured(description, path):
    """The names of an endpoint's parameters that have an effect."""
    schema = description["paths"]["/v1" + path]["post"]["requestBody"]["content"][
        "application/json"]["schema"]
    properties = description["components"]["schemas"][schema["$ref"].split("/")[-1]]["properties"]
    return {name for name, value in properties.items() if name not in FOR_SHOW
            and value.get("$ref") != "#/components/schemas/Unsupported"}


def references(node):
    """All components that a part of a description refers to."""
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"].removeprefix("#/components/").split("/")
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from references(child)


def flatten(schema, components):
    """An object schema whose allOf parts are merged into one."""
    if "$ref" in schema:
        schema = components["schemas"][schema["$ref"].split("/")[-1]]
    merged = {key: value for key, value in schema.items() if key != "allOf"}
    merged["type"] = "object"
    merged["properties"] = dict(merged.get("properties", {}))
    merged["required"] = list(merged.get("required", []))
    for part in schema.get("allOf", []):
        part = flatten(part, components)
        merged["properties"] |= part["properties"]
        merged["required"] += part["required"]
    return merged


def openai_description(url, path):
    """OpenAI's description of what is served here; prints the parameters that it leaves out."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with open(path, encoding="utf-8") as file:
        whole = yaml.load(file, Loader=loader)
    own = own_description(url)
    paths = {}
    for name, method in SERVED.items():
        operation = whole["paths"][name][method]
        if method == "post":
            content = operation["requestBody"]["content"]["application/json"]
            schema = flatten(content["schema"], whole["components"])
            left_out = sorted(set(schema["properties"]) - honoured(own, name))
            print(f"{name}: not honoured here: {', '.join(left_out)}")
            schema["properties"] = {key: value for key, value in schema["properties"].items()
                                    if key not in left_out}
            schema["properties"]["model"] = {"enum": [model_id(url)]}
            content["schema"] = schema
            stream = operation["responses"]["200"]["content"].get("text/event-stream")
            if stream:
                # OpenAI's schema is that of an event's text; Schemathesis looks for an event's.
                text = {"contentMediaType": "application/json", "contentSchema": stream["schema"]}
                stream["schema"] = {"properties": {
                    "data": {"anyOf": [{"const": "[DONE]"}, text]}}}
        paths["/v1" + name] = {method: operation}
    components = {}
    pending = list(references(paths))
    while pending:
        kind, name = pending.pop()
        if name not in components.setdefault(kind, {}):
            components[kind][name] = whole["components"][kind][name]
            pending += references(components[kind][name])
    return {"openapi": whole["openapi"], "info": whole["info"], "paths": paths,
            "components": components}


def check_streams(url, description):
    """Every chunk of long streams, and /slots meanwhile, are as described."""
    def validator(schema):
        return jsonschema_rs.Draft202012Validator(
            {**schema, "components": description["components"]})

    slots = validator(description["paths"]["/slots"]["get"]["responses"]["200"]["content"][
        "application/json"]["schema"])
    for path, name, body in (
            ("/v1/completions", "CompletionChunk", {"prompt": "Hello", "logprobs": 2}),
            ("/v1/chat/completions", "ChatChunk", {
                "messages": [{"role": "user", "content": "Hello"}], "logprobs": True,
                "top_logprobs": 2})):
        chunk = validator({"$ref": f"#/components/schemas/{name}"})
        body |= {"model": model_id(url), "max_tokens": 60, "ignore_eos": True, "stream": True,
                 "stream_options": {"include_usage": True}}
        request = urllib.request.Request(url + path, json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        seen = 0
        with urllib.request.urlopen(request, timeout=30) as reply:
            events = (line.decode().strip().removeprefix("data: ") for line in reply)
            events = (event for event in events if event)
            for event in events:
                if event == "[DONE]":
                    break
                chunk.validate(json.loads(event))
                seen += 1
                if seen == 1:
                    slots.validate(get(url + "/slots"))
            assert event == "[DONE]" and next(events, None) is None, event
        print(f"{path}: {seen} chunks are {name}s")


def of_users(description):
    """The endpoints that take messages, with a role that every chat template knows."""
    narrowed = copy.deepcopy(description)
    narrowed["components"]["schemas"]["Message"]["properties"]["role"] = {"enum": ["user"]}
    narrowed["paths"] = {path: narrowed["paths"][path]
                         for path in ("/v1/chat/completions", "/tokenize", "/apply-template")}
    return narrowed


def run(url, description, checks, max_examples, mode="all"):
    """Runs Schemathesis with valid requests (mode positive), invalid ones, or all; returns its
    exit code. One worker: Python 3.11 cannot parse in two threads (SystemError, AST constructor
    recursion depth mismatch), which Hypothesis does."""
    with tempfile.TemporaryDirectory() as directory:
        file = pathlib.Path(directory) / "description.json"
        file.write_text(json.dumps(description), encoding="utf-8")
        command = [pathlib.Path(sys.executable).with_name("st"), "run", file, "--url", url,
                   "--checks", ",".join(checks), "--max-examples", str(max_examples), "--mode", mode,
                   "--phases", "examples,coverage,fuzzing", "--seed", "1",
                   "--request-timeout", "60", "--suppress-health-check", "all",
                   "--generation-database", "none", "--warnings", "off", "--no-shrink"]
        command += os.environ.get("SCHEMATHESIS_OPTIONS", "").split()
        return subprocess.run(command, cwd=directory, check=False).returncode


def main():
    binary, config = sys.argv[1:3]
    # A short context keeps answers short; a client's request may ask for all of it.
    with serve(binary, config, "scheduler.max_context=96", "log.level=warn") as server:
        url = server.url
        if len(sys.argv) > 3:
            code = run(url, openai_description(url, sys.argv[3]), CHECKS, 60)
        else:
            description = own_description(url)
            check_streams(url, description)
            code = run(url, description, OWN_CHECKS, 60)
            code = run(url, of_users(description), OWN_CHECKS, 60, mode="positive") or code
        after = metrics(url)
        assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0, after
        print(f"{after['innerq:requests_accepted_total']:.0f} requests reached the engine")
    return code


if __name__ == "__main__":
    sys.exit(main())
