"""stories260K in numpy, from llama2.c's files: an implementation that shares nothing with innerq's.

Reads another file format, computes without a cache, sums in F64, and splits text by its own loops.
"""

import pathlib
import struct

import numpy as np


# Of a sum of some hundred products in F32, relative to the largest: sqrt(172) roundings of 2^-24.
F32_SUM_ERROR = 13 * 2.0 ** -24


class Tokenizer:
    """tok512.bin: SentencePiece BPE with byte fallback."""

    def __init__(self, path, vocab_size):
        data = pathlib.Path(path).read_bytes()
        at = 4  # after the longest piece's length
        self.pieces, self.scores = [], []
        for _ in range(vocab_size):
            score, size = struct.unpack_from("<fi", data, at)
            self.pieces.append(data[at + 8:at + 8 + size])
            self.scores.append(score)
            at += 8 + size
        self.ids = {piece: i for i, piece in reversed(list(enumerate(self.pieces)))}

    def encode(self, text, bos):
        ids = []
        for character in " " + text if text else "":
            encoded = character.encode()
            known = self.ids.get(encoded)
            ids += [known] if known is not None else [byte + 3 for byte in encoded]
        while True:  # joins the pair whose piece has the best score, the leftmost of equals
            best, where = -np.inf, None
            for i, (left, right) in enumerate(zip(ids, ids[1:])):
                joined = self.ids.get(self.pieces[left] + self.pieces[right])
                if joined is not None and self.scores[joined] > best:
                    best, where = self.scores[joined], i
            if where is None:
                return [1] * bos + ids
            ids[where:where + 2] = [self.ids[self.pieces[ids[where]] + self.pieces[ids[where + 1]]]]

    def decode(self, ids):
        """Ids that continue a text; of bytes, only whole characters."""
        return b"".join(bytes([i - 3]) if 3 <= i < 259 else self.pieces[i] for i in ids).decode(
            errors="ignore")


class Model:
    """Llama with interleaved rotary pairs and tied embeddings. [T tokens, V vocabulary]"""

    def __init__(self, path):
        data = pathlib.Path(path).read_bytes()
        dim, hidden, layers, heads, kv_heads, vocab, self.context = struct.unpack_from("<7i", data)
        assert vocab > 0, "untied heads are not read"
        numbers = np.frombuffer(data, "<f4", offset=28).astype(np.float64)
        self.heads, self.kv_heads, self.vocab_size = heads, kv_heads, vocab
        size = dim // heads
        at = 0

        def take(*shape):
            nonlocal at
            at += int(np.prod(shape))
            return numbers[at - int(np.prod(shape)):at].reshape(shape)

        self.embedding = take(vocab, dim)
        self.attention_norm = take(layers, dim)
        self.query = take(layers, dim, dim)
        self.key = take(layers, kv_heads * size, dim)
        self.value = take(layers, kv_heads * size, dim)
        self.output = take(layers, dim, dim)
        self.mlp_norm = take(layers, dim)
        self.gate = take(layers, hidden, dim)
        self.down = take(layers, dim, hidden)
        self.up = take(layers, hidden, dim)
        self.norm = take(dim)

    @staticmethod
    def _normalize(x, weight):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * weight

    @staticmethod
    def _rotate(x):
        """x: [T, heads, channels]; channels 2i and 2i+1 turn by position / 10000^(2i/channels), of
        which angles, cosines and sines are F32, as everywhere."""
        tokens, _, size = x.shape
        powers = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
        angle = np.outer(np.arange(tokens), 1 / np.float32(10000) ** powers).astype(np.float32)
        sine, cosine = (f(angle.astype(np.float64)).astype(np.float32)[:, None]
                        for f in (np.sin, np.cos))
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = np.stack([even * cosine - odd * sine, even * sine + odd * cosine], axis=-1)
        return turned.reshape(x.shape)

    def logits(self, ids, half_cache=False, noise=None):
        """Logits of the token after each, [T, V]. `half_cache`: what operations give to each
        other is rounded to F32, keys and values to F16, as in a server with a cache of 16 bits.
        `noise`: a generator; before that keys and values are off by as much as sums in F32 are, so
        that what lies near the middle of two F16 numbers goes either way."""
        def given(a):
            return a.astype(np.float32).astype(np.float64) if half_cache else a

        def stored(a):
            if noise is not None:
                a = a + noise.uniform(-1, 1, a.shape) * np.abs(a).max() * F32_SUM_ERROR
            return given(a).astype(np.float16).astype(np.float64) if half_cache else a

        tokens = len(ids)
        x = self.embedding[ids]
        future = np.triu(np.full((tokens, tokens), -np.inf), 1)
        for layer, query in enumerate(self.query):
            y = given(self._normalize(x, self.attention_norm[layer]))
            q, k, v = (given(y @ weight.T) for weight in (query, self.key[layer], self.value[layer]))
            q = given(self._rotate(q.reshape(tokens, self.heads, -1)))
            k = stored(self._rotate(k.reshape(tokens, self.kv_heads, -1)))
            v = stored(v.reshape(tokens, self.kv_heads, -1))
            k, v = (np.repeat(a, self.heads // self.kv_heads, axis=1) for a in (k, v))
            scale = float(1 / np.sqrt(np.float32(q.shape[-1])))
            scores = np.einsum("thd,shd->hts", q, k) * scale + future
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            y = given(np.einsum("hts,shd->thd", weights, v).reshape(tokens, -1))
            x = given(x + y @ self.output[layer].T)
            y = given(self._normalize(x, self.mlp_norm[layer]))
            gate, up = given(y @ self.gate[layer].T), given(y @ self.up[layer].T)
            x = given(x + given(gate / (1 + np.exp(-gate)) * up) @ self.down[layer].T)
        return given(self._normalize(x, self.norm)) @ self.embedding.T

    def logprobs(self, ids, **how):
        """Log-probabilities of the token after each, [T, V]; `how` as of logits."""
        logits = self.logits(ids, **how)
        logits -= logits.max(axis=-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    def score(self, ids, **how):
        """The log-probability of each token after the first, [T - 1]."""
        return self.logprobs(ids, **how)[np.arange(len(ids) - 1), ids[1:]]

    def score_as_stored(self, ids, runs):
        """Scores with keys and values in F16, and by how much the roundings that an F32
        computation may do otherwise move each of them, in so many runs; [T - 1] both."""
        noise = np.random.default_rng(1)
        scores = self.score(ids, half_cache=True)
        others = [self.score(ids, half_cache=True, noise=noise) for _ in range(runs)]
        return scores, np.abs(np.array([scores, *others]) - scores).max(axis=0)

    def continue_greedily(self, ids, count, end=2):
        answer = []
        while len(answer) < count:
            answer.append(int(self.logprobs(ids + answer)[-1].argmax()))
            if answer[-1] == end:
                return answer[:-1]
        return answer
