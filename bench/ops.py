"""Each op alone, ours beside PyTorch on the CPU, interleaved in one run.

    python bench/ops.py target/release/anyformer [--rounds 7] [--only gelu,attention]

A round runs `anyformer bench --ops --kernels` on some ops and then PyTorch's best form of the same work on tensors of the same
shapes: fused operators, scaled_dot_product_attention, 2 threads, f32 (and bf16 where ours is bf16: bf16 tensors, which
saves PyTorch the rounding that ours does). Forward and backward unless the table says forward. Prints the median over
rounds of each side and of the ratios ours/theirs (below 1: ours is faster). Unset OPENBLAS_* first. Recurrences and scans
have no PyTorch operator: bench/mixers.py runs them beside fla, mambapy and transformers; here they are told alone.
"""

import argparse
import json
import statistics
import subprocess
import time

import torch
import torch.nn.functional as F

torch.set_num_threads(2)
CONTEXTS = [4096, 8192, 16384, 32768, 65536, 131072]


def leaf(*shape, dtype=torch.float32):
    return torch.rand(*shape).mul_(2).sub_(1).to(dtype).requires_grad_()


def both(work, leaves):
    """The gradient to start from is made within the measured time, as ours is."""

    def run():
        for x in leaves:
            x.grad = None
        y = work()
        y.backward(torch.ones_like(y))

    return run


def pointwise(work, inputs):
    def make(size):
        leaves = [leaf(*size) for _ in range(inputs)]
        return both(lambda: work(*leaves), leaves)

    return make


def rows(work, weights):
    def make(size):
        leaves = [leaf(*size)] + [leaf(size[1]) for _ in range(weights)]
        return both(lambda: work(*leaves), leaves)

    return make


def entropy(size):
    x, target = leaf(*size), torch.arange(size[0]) % size[1]
    return both(lambda: F.cross_entropy(x, target), [x])


def matmul(dtype):
    def make(size):
        m, k, n = size
        a, b = leaf(m, k, dtype=dtype), leaf(n, k, dtype=dtype)
        return both(lambda: F.linear(a, b), [a, b])

    return make


def attention(dtype):
    def make(size):
        b, t, h, d = size
        leaves = [leaf(b, t, h, d, dtype=dtype) for _ in range(3)]
        work = lambda: F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves), is_causal=True).transpose(1, 2)
        return both(work, leaves)

    return make


def decode(dtype):
    """PyTorch has no ragged form on the CPU: one call for each context, which wastes nothing on padding."""

    def make(size):
        heads, kv_heads, d = size
        queries = [torch.randn(1, heads, 1, d, dtype=dtype) for _ in CONTEXTS]
        keys = [torch.randn(1, kv_heads, t, d, dtype=dtype) for t in CONTEXTS]
        values = [torch.randn(1, kv_heads, t, d, dtype=dtype) for t in CONTEXTS]

        def run():
            with torch.no_grad():
                for q, k, v in zip(queries, keys, values):
                    F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        return run

    return make


def conv(size):
    b, t, c, w = size
    x, weight = leaf(b, t, c), leaf(c, w)
    work = lambda: F.silu(F.conv1d(F.pad(x.transpose(1, 2), (w - 1, 0)), weight[:, None], groups=c)).transpose(1, 2)
    return both(work, [x, weight])


THEIRS = {
    "gelu": pointwise(F.gelu, 1),
    "silu": pointwise(F.silu, 1),
    "swiglu": pointwise(lambda a, b: F.silu(a) * b, 2),
    "rms_norm": rows(lambda x, w: F.rms_norm(x, w.shape, w, 1e-5), 1),
    "layer_norm": rows(lambda x, w, b: F.layer_norm(x, w.shape, w, b, 1e-5), 2),
    "softmax": rows(lambda x: x.softmax(-1), 0),
    "cross_entropy": entropy,
    "matmul f32": matmul(torch.float32),
    "matmul bf16": matmul(torch.bfloat16),
    "attention": attention(torch.float32),
    "decode": decode(torch.float32),
    "decode bf16": decode(torch.bfloat16),
    "conv": conv,
}
ALONE = ["gla", "delta", "gated_delta", "ssd", "scan", "gla step", "delta step", "gated_delta step", "ssd step", "scan step"]


def main():
    flags = argparse.ArgumentParser()
    flags.add_argument("binary")
    flags.add_argument("--rounds", type=int, default=7)
    flags.add_argument("--only", default="")
    flags = flags.parse_args()
    names = flags.only.split(",") if flags.only else list(THEIRS) + ALONE
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    print("| op | size | passes | ours, ms | PyTorch, ms | ours / theirs | ours, GFLOP/s | ours, GB/s |\n|---|---|---|---|---|---|---|---|")
    peaks = None
    for name in names:
        rounds, theirs = [], {}
        for _ in range(flags.rounds):
            words = [flags.binary, "bench", "--ops", "--kernels", "--only", name, "--runs", "3", "--threads", "2", "--json", "--quiet"]
            said = json.loads(subprocess.run(words, capture_output=True, check=True, text=True).stdout)
            peaks = said["peaks"]
            times = []
            for row in said["ops"]:
                key = tuple(row["size"])
                if name in THEIRS and key not in theirs:
                    theirs[key] = THEIRS[name](row["size"])
                    theirs[key]()
                taken = []
                for _ in range(3 if name in THEIRS else 0):
                    began = time.perf_counter()
                    theirs[key]()
                    taken.append(time.perf_counter() - began)
                times.append((row, statistics.median(taken) if taken else None))
            rounds.append(times)
        for cells in zip(*rounds):
            row = cells[0][0]
            ours = statistics.median(mine["kernel_s"] for mine, _ in cells)
            other = ratio = "-"
            if cells[0][1] is not None:
                other = f"{statistics.median(their for _, their in cells) * 1e3:.2f}"
                ratio = f"{statistics.median(mine['kernel_s'] / their for mine, their in cells):.2f}"
            rate = lambda key: statistics.median(mine[key] for mine, _ in cells) / 1e9
            flops = f"{rate('flops_per_s'):.0f}" if row["flops_per_s"] else "-"
            size = " x ".join(map(str, row["size"]))
            passes = "both" if row["backward"] else "forward"
            print(f"| {name} | {size} | {passes} | {ours * 1e3:.2f} | {other} | {ratio} | {flops} | {rate('bytes_per_s'):.1f} |", flush=True)
    print(
        f"\nthis machine: product of 1,024 x 1,024 matrices {peaks['f32_flops_per_s'] / 1e9:.0f} GFLOP/s in f32, "
        f"{peaks['bf16_flops_per_s'] / 1e9:.0f} in bf16; triad {peaks['triad_bytes_per_s'] / 1e9:.0f} GB/s"
    )


if __name__ == "__main__":
    main()
