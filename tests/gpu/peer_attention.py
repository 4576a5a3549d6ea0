"""PyTorch's scaled_dot_product_attention with FP16 keys and values, one token of each sequence: the
FP16 peer of attention_gpu_bench, over the same shapes.

    python3 tests/gpu/peer_attention.py [--tokens 1024 32768] [--batch 1 8] [--backends flash cudnn]

Prints one line per case: the backend's time, with query heads that share a key/value head as rows of
one query ("rows") and with enable_gqa ("gqa"). Calls are captured in a CUDA graph over several copies
of the cache, together larger than the L2, and timed by events; medians of several replays.
"""
import argparse
import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
LEAST_BYTES = 512 << 20


def measure(call, num_calls):
    """Microseconds of one of `num_calls` calls: call(0), call(1), ..."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(num_calls):
            call(i)
    times = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / num_calls)
    return statistics.median(times[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384, 32768, 65536])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=["flash", "cudnn"])
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    print(f"{'model':10} {'backend':14} {'tokens':>8} {'batch':>6} {'us':>10} {'GB/s':>8}")
    for name, heads, kv_heads, dim in [("32x8x128", 32, 8, 128), ("32x32x128", 32, 32, 128)]:
        group = heads // kv_heads
        for tokens in args.tokens:
            for batch in args.batch:
                cache_bytes = 2 * batch * kv_heads * tokens * dim * 2
                copies = min(64, max(2, -(-LEAST_BYTES // cache_bytes)))
                if copies * cache_bytes > 0.8 * torch.cuda.mem_get_info()[0]:
                    print(f"{name:10} {'all':14} {tokens:8} {batch:6} does not fit in memory")
                    continue
                shape = (copies, batch, kv_heads, tokens, dim)
                keys = torch.randn(shape, device="cuda", dtype=torch.float16)
                values = torch.randn(shape, device="cuda", dtype=torch.float16)
                q = torch.randn(batch, heads, 1, dim, device="cuda", dtype=torch.float16)
                rows = q.view(batch, kv_heads, group, dim)
                attention = torch.nn.functional.scaled_dot_product_attention
                forms = {"rows": lambda i: attention(rows, keys[i], values[i])}
                if group > 1:
                    forms["gqa"] = lambda i: attention(q, keys[i], values[i], enable_gqa=True)
                for backend in args.backends:
                    for form, call in forms.items():
                        label = f"{backend}/{form}"
                        try:
                            with sdpa_kernel(BACKENDS[backend]):
                                us = measure(call, copies)
                        except RuntimeError as error:
                            reason = str(error).strip().splitlines()[0][:60]
                            print(f"{name:10} {label:14} {tokens:8} {batch:6} refused: {reason}")
                            continue
                        speed = cache_bytes / us / 1e3
                        print(f"{name:10} {label:14} {tokens:8} {batch:6} {us:10.1f} {speed:8.0f}",
                              flush=True)
                del keys, values


if __name__ == "__main__":
    main()
