"""A small Llama in plain PyTorch, with the module names and the semantics of Hugging Face.

Run as a script it prints training throughput for a few sizes:  python model.py
"""
import argparse
import math
import time
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Config:
    vocab_size: int = 1024
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 5
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 4096

    def to_dict(self):
        return asdict(self)


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight, self.eps)


def rope_tables(cfg, length, device=None):
    """cos and sin of shape (length, head_dim); both halves hold the same angles."""
    inv = cfg.rope_theta ** (-torch.arange(0, cfg.head_dim, 2, device=device).float()
                             / cfg.head_dim)
    angles = torch.outer(torch.arange(length, device=device).float(), inv)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotary embedding in the rotate-half convention; x is (batch, heads, length, head_dim)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.heads, self.kv_heads = cfg.num_attention_heads, cfg.num_key_value_heads
        self.head_dim = cfg.head_dim
        q, kv = self.heads * cfg.head_dim, self.kv_heads * cfg.head_dim
        self.q_proj = nn.Linear(cfg.hidden_size, q, bias=False)
        self.k_proj = nn.Linear(cfg.hidden_size, kv, bias=False)
        self.v_proj = nn.Linear(cfg.hidden_size, kv, bias=False)
        self.o_proj = nn.Linear(q, cfg.hidden_size, bias=False)

    def forward(self, x, cos, sin, cache=None):
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:  # cache: a list of [keys, values], grown in place
            if cache:
                k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
            cache[:] = [k, v]
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        y = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), is_causal=t > 1)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.self_attn = Attention(cfg)
        self.mlp = MLP(cfg)
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

    def forward(self, x, cos, sin, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)


class Llama(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.model = Body(cfg)
        cos, sin = rope_tables(cfg, cfg.max_position_embeddings)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        scaled = 0.02 / math.sqrt(2 * cfg.num_hidden_layers)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                out = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=scaled if out else
                                0.02 if "embed" in name else cfg.hidden_size ** -0.5 / 2)

    def hidden(self, ids, start=0, caches=None):
        """Final hidden states. `caches` is a list with one (initially empty) list per layer."""
        x = self.model.embed_tokens(ids)
        cos, sin = (t[start:start + ids.shape[1]].to(x.dtype) for t in (self.cos, self.sin))
        for i, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, None if caches is None else caches[i])
        return self.model.norm(x)

    def logits(self, hidden):
        return F.linear(hidden, self.model.embed_tokens.weight)  # tied

    def forward(self, ids):
        return self.logits(self.hidden(ids))

    @torch.no_grad()
    def generate(self, ids, max_new, stop_ids=(), stop=None):
        """Greedy continuation of one prompt; `stop(list of new ids)` may end it early."""
        caches = [[] for _ in self.model.layers]
        out, cur, start = [], torch.tensor([ids]), 0
        while len(out) < max_new:
            token = int(self.logits(self.hidden(cur, start, caches)[:, -1])[0].argmax())
            out.append(token)
            if token in stop_ids or (stop and stop(out)):
                break
            start += cur.shape[1]
            cur = torch.tensor([[token]])
        return out


def parameter_count(model):
    return sum(p.numel() for p in model.parameters())


def bench(cfg, batch, length, steps, compiled):
    model = Llama(cfg)
    run = torch.compile(model) if compiled else model
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(0, cfg.vocab_size, (batch, length))
    for step in range(steps + 2):
        if step == 2:
            begin = time.time()
        with torch.autocast("cpu", torch.bfloat16):
            out = run(ids)
        F.cross_entropy(out.flatten(0, 1).float(), ids.flatten()).backward()
        opt.step()
        opt.zero_grad(set_to_none=True)
    rate = steps * ids.numel() / (time.time() - begin)
    n = parameter_count(model)
    print(f"{n / 1e6:.2f} M parameters, {batch}x{length}, compiled={compiled}: {rate:.0f} tokens/s,"
          f" {6 * n * rate / 1e9:.0f} GFLOP/s", flush=True)


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--steps", type=int, default=4)
    ap.add_argument("--compile", action="store_true")
    args = ap.parse_args()
    a = torch.randn(2048, 1024, dtype=torch.bfloat16)
    b = torch.randn(1024, 1024, dtype=torch.bfloat16)
    a @ b
    begin = time.time()
    for _ in range(10):
        a @ b
    print(f"bf16 matmul: {10 * 2 * 2048 * 1024 * 1024 / (time.time() - begin) / 1e9:.0f} GFLOP/s")
    for layers, inter in ((4, 640), (5, 704), (6, 768)):
        cfg = Config(num_hidden_layers=layers, intermediate_size=inter)
        bench(cfg, 16, 512, args.steps, args.compile)
    bench(Config(), 4, 2048, args.steps, args.compile)


if __name__ == "__main__":
    main()
