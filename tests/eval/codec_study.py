#!/usr/bin/env python3
"""What a codec of the KV cache costs, simulated in NumPy: the study behind the defaults.

  python3 -m venv build/study-venv
  build/study-venv/bin/pip install numpy sentencepiece
  build/study-venv/bin/python tests/eval/codec_study.py models/demo --recall models/demo/eval/recall.jsonl \
      --problems models/demo/eval/problems.jsonl
  build/study-venv/bin/python tests/eval/codec_study.py STORIES260K --text tinystories.txt --group-size 8

Runs a Llama over whole documents with the cache's visibility by position (pages of 32, F16 sink and recent
pages), so that a query sees old pages as the codec leaves them. It shares no code with the server: `innerq eval
kl` measures the codecs that the server has, this also those that it could have had. Every variant of a table
stores the same bits per element unless its name says otherwise.

Columns: KL divergence of the next token's distribution from that of an F16 cache, in nats, over positions from
160 on (mean, 99th percentile), agreement of the likeliest token, and the relative squared error of scores
(q . k over all pairs that see a sealed page) or of the values themselves, on the F16 run's tensors.
"""
import argparse
import json
import struct
from pathlib import Path

import numpy as np
import sentencepiece

F32 = np.float32
PAGE, SINK_PAGES, RECENT_PAGES = 32, 1, 3
FIRST_SEALED_QUERY = 160  # positions before it see F16 alone
SMALLEST_SCALE = 2.0**-14


def f16(x):
    return x.astype(np.float16).astype(F32)


def inverse(scale):
    return np.where(scale == 0, 0, 1 / np.where(scale == 0, 1, scale))[:, None]


def stored(scale):
    size = np.abs(scale)
    return np.where(size == 0, 0, np.sign(scale) * f16(np.clip(size, SMALLEST_SCALE, 8000))).astype(F32)


# Codecs: x [N, n] groups, weights [N, n] of squared errors -> what they decode to [N, n] and its error [N].
def fitted_symmetric(x, bits, weights):
    half = 2**(bits - 1)
    low, high = x.min(1), x.max(1)
    base = -np.where(-low > high, low, high) / half
    first, step = {2: (.60, .06), 3: (.72, .045), 4: (.84, .02), 8: (.98, .004)}[bits]
    best = (np.zeros(len(x), F32), np.full(len(x), np.inf))

    def codes(scale):
        return np.clip(np.rint(x * inverse(scale)), -half, half - 1)

    def keep_better(scale):
        nonlocal best
        error = (weights * (x - scale[:, None] * codes(scale))**2).sum(1)
        better = error < best[1]
        best = (np.where(better, scale, best[0]), np.where(better, error, best[1]))

    for sign in (1, -1):
        for i in range(12):
            keep_better(stored(base * (first + step * i) * sign))
    keep_better(stored(base * half / (half - 1)))
    q = codes(best[0])
    qq = (weights * q * q).sum(1)
    keep_better(stored(np.where(qq > 0, (weights * x * q).sum(1) / np.where(qq > 0, qq, 1), best[0])))
    return best[0][:, None] * codes(best[0]), best[1]


def fitted_asymmetric(x, bits, weights):
    top = 2**bits - 1
    low, high = x.min(1), x.max(1)
    best = (np.zeros(len(x), F32), np.zeros(len(x), F32), np.full(len(x), np.inf))
    total = weights.sum(1)

    def codes(scale, zero):
        return np.clip(np.rint((x - zero[:, None]) * inverse(scale)), 0, top)

    def keep_better(scale, zero):
        nonlocal best
        q = codes(scale, zero)
        error = (weights * (x - scale[:, None] * q - zero[:, None])**2).sum(1)
        better = error < best[2]
        best = tuple(np.where(better, new, old) for new, old in zip((scale, zero, error), best))
        return q

    for i in range(12):
        reach = .5 * (high - low) * (1 - {2: .04, 3: .025, 4: .012, 8: .002}[bits] * i)
        scale, zero = stored(2 * reach / top), f16(.5 * (low + high) - reach)
        q = keep_better(scale, zero)
        sums = {name: (weights * value).sum(1) for name, value in
                {"q": q, "qq": q * q, "xq": x * q, "x": x}.items()}
        determinant = total * sums["qq"] - sums["q"]**2
        slope = np.where(determinant > 0, (total * sums["xq"] - sums["q"] * sums["x"]) /
                         np.where(determinant > 0, determinant, 1), 0)
        usable = slope > 0
        keep_better(np.where(usable, stored(slope), scale).astype(F32),
                    np.where(usable, f16((sums["x"] - slope * sums["q"]) / total), zero).astype(F32))
    return best[0][:, None] * codes(best[0], best[1]) + best[1][:, None], best[2]


def paper_symmetric(x, bits, _):
    top = 2**(bits - 1) - 1
    scale = np.abs(x).max(1) / top
    decoded = f16(scale)[:, None] * np.clip(np.rint(x * inverse(scale)), -top, top)
    return decoded, np.abs(x - decoded).sum(1)


def paper_asymmetric(x, bits, _):
    top = 2**bits - 1
    scale = (x.max(1) - x.min(1)) / top
    q = np.clip(np.rint((x - x.min(1)[:, None]) * inverse(scale)), 0, top)
    decoded = f16(scale)[:, None] * q + f16(x.min(1))[:, None]
    return decoded, np.abs(x - decoded).sum(1)


def code_groups(x, side, weights):
    bits, mode = side["bits"], side.get("mode", "symmetric")
    paper = side.get("codec") == "paper"
    symmetric, asymmetric = ((paper_symmetric, paper_asymmetric) if paper else
                             (fitted_symmetric, fitted_asymmetric))
    if mode == "symmetric":
        return symmetric(x, bits, weights)[0]
    if mode == "asymmetric":
        return asymmetric(x, bits, weights)[0]
    a, b = symmetric(x, bits, weights), asymmetric(x, bits - 1 if paper else bits, weights)
    take = b[1] <= a[1] if paper else b[1] < a[1]
    return np.where(take[:, None], b[0], a[0])


def hadamard(n):
    h = np.ones((1, 1), F32)
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return (h / np.sqrt(n)).astype(F32)


def code_keys(keys, side, span):
    """keys [T, G, D] of the sealed pages, span [160 - 32, G, D] that defines norm and mean."""
    tokens, heads, dim = keys.shape
    size = side["group_size"]
    mean = span.mean(0, keepdims=True) if side.get("centre") else F32(0)
    norm = np.ones((1, heads, dim), F32)
    if side.get("normalize", True):
        norm = np.sqrt(np.abs(span - mean).max(0, keepdims=True))
        norm = np.where(norm > 0, norm, 1)
    x = (keys - mean) / norm
    rotation = hadamard(dim) if side.get("rotate") else None
    if rotation is not None:
        x = x @ rotation
    weights = np.ones_like(x)
    if side.get("weighted", True) and rotation is None:
        weights = np.broadcast_to(norm**2, x.shape)
    if side.get("axis") == "outer":
        def split(a): return a.reshape(-1, size, heads, dim).transpose(0, 2, 3, 1).reshape(-1, size)
        x = code_groups(split(x), side, split(weights))
        x = x.reshape(-1, heads, dim, size).transpose(0, 3, 1, 2).reshape(keys.shape)
    else:
        x = code_groups(x.reshape(-1, size), side, weights.reshape(-1, size)).reshape(keys.shape)
    if rotation is not None:
        x = x @ rotation.T
    return x * norm + mean


def code_values(values, side):
    _, heads, dim = values.shape
    size = side["group_size"]
    if side.get("axis") == "outer":
        x = values.reshape(-1, size)
        return code_groups(x, side, np.ones_like(x)).reshape(values.shape)
    x = values.reshape(-1, size, heads, dim).transpose(0, 2, 3, 1).reshape(-1, size)
    x = code_groups(x, side, np.ones_like(x))
    return x.reshape(-1, heads, dim, size).transpose(0, 3, 1, 2).reshape(values.shape)


class Model:
    def __init__(self, directory):
        directory = Path(directory)
        config = json.loads((directory / "config.json").read_text())
        data = (directory / "model.safetensors").read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        self.weights = {}
        for name, entry in json.loads(data[8:8 + size]).items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            raw = data[8 + size + begin:8 + size + end]
            if entry["dtype"] == "BF16":
                tensor = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(F32)
            else:
                tensor = np.frombuffer(raw, {"F16": np.float16, "F32": F32}[entry["dtype"]]).astype(F32)
            self.weights[name] = tensor.reshape(entry["shape"])
        self.embedding = self.weights.get("model.embed_tokens.weight", self.weights.get("lm_head.weight"))
        self.layers, self.epsilon = config["num_hidden_layers"], config["rms_norm_eps"]
        self.heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads", self.heads)
        self.dim = config.get("head_dim", config["hidden_size"] // self.heads)
        frequency = config.get("rope_theta", 10000.0)**(-np.arange(0, self.dim, 2) / self.dim)
        angles = np.outer(np.arange(config["max_position_embeddings"]), frequency)
        angles = np.concatenate([angles, angles], 1)[:, None]
        self.cos, self.sin = np.cos(angles).astype(F32), np.sin(angles).astype(F32)
        self.context = config["max_position_embeddings"]
        self.tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))

    def norm(self, x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.epsilon) * self.weights[name]

    def project(self, x, layer, name):
        return x @ self.weights[f"model.layers.{layer}.{name}.weight"].T

    def rotate(self, x):
        a, b = np.split(x, 2, -1)
        return x * self.cos[:len(x)] + np.concatenate([-b, a], -1) * self.sin[:len(x)]

    def forward(self, ids, cache, tensors=None):
        """Log-probabilities [T, V]. `cache` None: F16. Appends each layer's (q, k, v) to `tensors`."""
        count = len(ids)
        page = np.arange(count) // PAGE
        causal = np.arange(count)[:, None] >= np.arange(count)
        sink = cache["sink_pages"] if cache else 0
        recent = cache["recent_pages"] if cache else 0
        sealed = (page >= sink) & (page < page[:, None] - recent) if cache else np.zeros_like(causal)
        rows = slice(sink * PAGE, max(sink, page[-1] - recent) * PAGE)
        x = self.embedding[ids]
        for layer in range(self.layers):
            h = self.norm(x, f"model.layers.{layer}.input_layernorm.weight")
            q, k, v = (self.project(h, layer, f"self_attn.{name}_proj").reshape(count, -1, self.dim) for name in "qkv")
            q, k, v = self.rotate(q), f16(self.rotate(k)), f16(v)
            if tensors is not None:
                tensors.append((q, k, v))
            coded_k, coded_v = k.copy(), v.copy()
            if cache and rows.stop > rows.start:
                if cache["key"]:
                    span = k[rows.start:rows.start + (recent + 1) * PAGE]
                    coded_k[rows] = code_keys(k[rows], cache["key"], span)
                if cache["value"]:
                    coded_v[rows] = code_values(v[rows], cache["value"])
            out = np.empty((count, self.heads, self.dim), F32)
            for head in range(self.heads):
                g = head // (self.heads // self.kv_heads)
                scores = np.where(sealed, q[:, head] @ coded_k[:, g].T, q[:, head] @ k[:, g].T)
                scores = np.where(causal, scores / np.sqrt(self.dim), -np.inf)
                p = np.exp(scores - scores.max(1, keepdims=True))
                p /= p.sum(1, keepdims=True)
                out[:, head] = (p * sealed) @ coded_v[:, g] + (p * ~sealed) @ v[:, g]
            x = x + self.project(out.reshape(count, -1), layer, "self_attn.o_proj")
            h = self.norm(x, f"model.layers.{layer}.post_attention_layernorm.weight")
            gate = self.project(h, layer, "mlp.gate_proj")
            x = x + self.project(gate / (1 + np.exp(-gate)) * self.project(h, layer, "mlp.up_proj"), layer, "mlp.down_proj")
        logits = self.norm(x, "model.norm.weight") @ self.weights.get("lm_head.weight", self.embedding).T
        logits = logits.astype(np.float64)
        logits -= logits.max(1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def tensor_error(tensors, cache, heads_per_kv):
    """Relative squared error of scores if keys are coded, else of values, over sealed rows."""
    error = total = 0.0
    for q, k, v in tensors:
        rows = slice(cache["sink_pages"] * PAGE, (len(k) // PAGE - cache["recent_pages"]) * PAGE)
        if cache["key"]:
            span = k[rows.start:rows.start + (cache["recent_pages"] + 1) * PAGE]
            exact, coded = k[rows], code_keys(k[rows], cache["key"], span)
            for head in range(q.shape[1]):
                g = head // heads_per_kv
                queries = q[rows.stop:, head]
                error += ((queries @ (coded - exact)[:, g].T)**2).sum()
                total += ((queries @ exact[:, g].T)**2).sum()
        else:
            error += ((code_values(v[rows], cache["value"]) - v[rows])**2).sum()
            total += (v[rows]**2).sum()
    return error / total


def variants(size, dim):
    """Name -> (key, value); None keeps F16."""
    inner = {"bits": 3, "group_size": size}
    values = {"bits": 3, "group_size": PAGE}

    def key(**more): return {**inner, **more}
    def value(**more): return {**values, **more}
    kivi = ({"bits": 2, "group_size": PAGE, "axis": "outer", "mode": "asymmetric", "codec": "paper", "normalize": False},
            {"bits": 2, "group_size": min(32, dim), "axis": "outer", "mode": "asymmetric", "codec": "paper"})
    return {
        "keys: paper": (key(codec="paper"), None),
        "keys: paper, no norm": (key(codec="paper", normalize=False), None),
        "keys: fitted, norm, weighted": (key(), None),
        "keys: fitted, norm, not weighted": (key(weighted=False), None),
        "keys: fitted, no norm": (key(normalize=False), None),
        "keys: fitted, norm, weighted, centred": (key(centre=True), None),
        "keys: fitted, no norm, centred": (key(normalize=False, centre=True), None),
        "keys: fitted, norm, rotated": (key(rotate=True), None),
        "keys: fitted, no norm, rotated": (key(normalize=False, rotate=True), None),
        "keys: fitted, weighted, asymmetric (+0.5)": (key(mode="asymmetric"), None),
        "keys: fitted, weighted, hybrid (+0.5)": (key(mode="hybrid"), None),
        "values: paper 3": (None, value(codec="paper")),
        "values: fitted 3": (None, value()),
        "values: paper 2": (None, value(codec="paper", bits=2)),
        "values: fitted 2": (None, value(bits=2)),
        "values: paper 2 hybrid": (None, value(codec="paper", bits=2, mode="hybrid")),
        "values: fitted 2 hybrid": (None, value(bits=2, mode="hybrid")),
        "values: fitted 2 asymmetric": (None, value(bits=2, mode="asymmetric")),
        "both: paper K3 V3": (key(codec="paper"), value(codec="paper")),
        "both: fitted K3 V3": (key(), value()),
        "both: fitted K3 V2": (key(), value(bits=2)),
        "both: fitted K3 V2 hybrid": (key(), value(bits=2, mode="hybrid")),
        "both: KIVI": kivi,
        "both: KIVI with sink": kivi,
    }


def documents(args, model):
    texts = []
    for path in args.recall:
        for line in Path(path).read_text().splitlines():
            case = json.loads(line)
            texts.append(case["prompt"])
    for path in args.problems:
        lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
        for i in range(0, len(lines) - 19, 20):
            texts.append("\n\n".join(f"Question: {p['question']}\nAnswer: {p['answer']}" for p in lines[i:i + 20]))
    context = min(args.context, model.context)
    for path in args.text:
        joined = []
        for story in Path(path).read_text().split("<|endoftext|>"):
            joined += [1] + model.tokenizer.encode(story.strip())
        texts += [joined[i:i + context] for i in range(0, len(joined) - context, context)]
    found = []
    for text in texts:
        ids = ([1] + model.tokenizer.encode(text) if isinstance(text, str) else text)[:context]
        if len(ids) >= args.shortest:
            found.append(np.array(ids))
    step = max(1, len(found) // args.limit)
    return found[::step][:args.limit]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--recall", action="append", default=[], help="JSONL with prompt")
    parser.add_argument("--problems", action="append", default=[], help="JSONL with question and answer; 20 a document")
    parser.add_argument("--text", action="append", default=[], help="plain text, cut into windows of --context")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--shortest", type=int, default=400, help="tokens; shorter documents are left out")
    parser.add_argument("--limit", type=int, default=16, help="documents")
    parser.add_argument("--group-size", type=int, default=32, help="of keys")
    parser.add_argument("--only", default="", help="variants whose names contain this")
    args = parser.parse_args()
    model = Model(args.model)
    docs = documents(args, model)
    exact, tensors = [], []
    for ids in docs:
        kept = []
        exact.append(model.forward(ids, None, kept))
        tensors.append(kept)
    print(f"{len(docs)} documents, {sum(map(len, docs))} tokens")
    print(f"{'variant':44}{'KL mean':>10}{'KL p99':>10}{'top-1 %':>9}{'error':>10}")
    for name, (key, value) in variants(args.group_size, model.dim).items():
        if args.only not in name:
            continue
        cache = {"key": key, "value": value, "sink_pages": 0 if name == "both: KIVI" else SINK_PAGES,
                 "recent_pages": 4 if name == "both: KIVI" else RECENT_PAGES}
        divergence, agree = [], []
        for ids, want in zip(docs, exact):
            got = model.forward(ids, cache)
            divergence.append((np.exp(want) * (want - got)).sum(1)[FIRST_SEALED_QUERY:])
            agree.append((want.argmax(1) == got.argmax(1))[FIRST_SEALED_QUERY:])
        divergence, agree = np.concatenate(divergence), np.concatenate(agree)
        error = np.mean([tensor_error(kept, cache, model.heads // model.kv_heads) for kept in tensors])
        print(f"{name:44}{divergence.mean():10.5f}{np.quantile(divergence, .99):10.4f}{100 * agree.mean():9.2f}"
              f"{error:10.5f}", flush=True)


if __name__ == "__main__":
    main()
