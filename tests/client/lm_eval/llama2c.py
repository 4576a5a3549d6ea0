"""stories260K in numpy, from llama2.c's files: an implementation that shares nothing with innerq's.

Reads another file format, computes in F64 without a cache, and splits text by its own loops.
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
        """x: [T, heads, channels]; channels 2i and 2i+1 turn by position / 10000^(2i/channels)."""
        tokens, _, size = x.shape
        angle = np.outer(np.arange(tokens), 10000.0 ** (-np.arange(0, size, 2) / size))[:, None]
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = np.stack([even * np.cos(angle) - odd * np.sin(angle),
                           even * np.sin(angle) + odd * np.cos(angle)], axis=-1)
        return turned.reshape(x.shape)

    def logits(self, ids, half_cache=False, noise=None):
        """Logits of the token after each, [T, V]. `half_cache`: keys and values are rounded to
        F16, as in a server's cache of 16 bits. `noise`: a generator; before that they
        are off by as much as sums in F32 are, so that what lies near the middle of two F16 numbers
        goes either way."""
        def stored(a):
            if noise is not None:
                a = a + noise.uniform(-1, 1, a.shape) * np.abs(a).max() * F32_SUM_ERROR
            return a.astype(np.float16).astype(np.float64) if half_cache else a

        tokens = len(ids)
        x = self.embedding[ids]
        future = np.triu(np.full((tokens, tokens), -np.inf), 1)
        for layer, query in enumerate(self.query):
            y = self._normalize(x, self.attention_norm[layer])
            q = self._rotate((y @ query.T).reshape(tokens, self.heads, -1))
            k = stored(self._rotate((y @ self.key[layer].T).reshape(tokens, self.kv_heads, -1)))
            v = stored((y @ self.value[layer].T).reshape(tokens, self.kv_heads, -1))
            k, v = (np.repeat(a, self.heads // self.kv_heads, axis=1) for a in (k, v))
            scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1]) + future
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            x = x + np.einsum("hts,shd->thd", weights, v).reshape(tokens, -1) @ self.output[layer].T
            y = self._normalize(x, self.mlp_norm[layer])
            gate = y @ self.gate[layer].T
            x = x + (gate / (1 + np.exp(-gate)) * (y @ self.up[layer].T)) @ self.down[layer].T
        return self._normalize(x, self.norm) @ self.embedding.T

    def logprobs(self, ids, **how):
        """Log-probabilities of the token after each, [T, V]; `how` as of logits."""
        logits = self.logits(ids, **how)
        logits -= logits.max(axis=-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    def score(self, ids, **how):
        """The log-probability of each token after the first, [T - 1]."""
        return self.logprobs(ids, **how)[np.arange(len(ids) - 1), ids[1:]]

    def score_as_stored(self, ids, runs=16):
        """Scores with keys and values in F16, and by how much the roundings that an F32
        computation may do otherwise move each of them, [T - 1] both."""
        noise = np.random.default_rng(1)
        scores = self.score(ids, half_cache=True)
        others = [self.score(ids, half_cache=True, noise=noise) for _ in range(runs)]
        return scores, np.abs(np.array(others) - scores).max(axis=0)

    def continue_greedily(self, ids, count, end=2):
        answer = []
        while len(answer) < count:
            answer.append(int(self.logprobs(ids + answer)[-1].argmax()))
            if answer[-1] == end:
                return answer[:-1]
        return answer
