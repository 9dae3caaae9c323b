"""Each op alone, ours beside PyTorch on the CPU, interleaved in one run.

    python bench/ops.py target/release/anyformer [--rounds 7] [--only gelu,attention]

A round runs `anyformer bench --ops --kernels` on some ops and then PyTorch's best form of the same work on tensors of the same
shapes: fused operators, scaled_dot_product_attention, 2 threads, f32 (and bf16 where ours is bf16: bf16 tensors, which
saves PyTorch the rounding that ours does). Forward and backward unless the table says forward. Prints the median over
rounds of each side and of the ratios ours/theirs (below 1: ours is faster). Unset OPENBLAS_* first. The recurrences stand
beside fla's torch forms (fla-core): chunked where it has one (delta, gated_delta, and simple_gla for ssd), for gla its
recurrent one, up to --recurrent tokens; the scan beside mambapy's parallel one, up to --recurrent tokens (it holds
[time, channels, state] several times). --compile wraps PyTorch's side in torch.compile where that works. Steps of
one token and ops without a PyTorch form are told alone.
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


COMPILED = False


def both(work, leaves):
    """The gradient to start from is made within the measured time, as ours is."""
    if COMPILED:
        work = torch.compile(work)

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


def decay(x):
    return x * 0.05 - 0.06


def heads(extra, work):
    """A recurrence of three `[batch, time, heads, head_dim]` and `extra` more: "wide" ones of that shape, others one for each head."""

    def make(size):
        leaves = [leaf(*size) for _ in range(3)] + [leaf(*(size if kind == "wide" else size[:3])) for kind in extra]
        return both(lambda: work(*leaves), leaves)

    return make


def gla(q, k, v, g):
    from fla.ops.gla.naive import naive_recurrent_gla

    return naive_recurrent_gla(q, k, v, decay(g))[0]


def delta(q, k, v, b):
    from fla.ops.delta_rule.naive import delta_rule_chunkwise

    turned = (x.transpose(1, 2) for x in (q, k * k.shape[-1] ** -0.5, v, b * 0.4 + 0.5))
    return delta_rule_chunkwise(*turned)[0].transpose(1, 2)


def gated_delta(q, k, v, g, b):
    from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule

    return naive_chunk_gated_delta_rule(q, k * k.shape[-1] ** -0.5, v, decay(g), b * 0.4 + 0.5)[0]


def ssd(q, k, v, g):
    from fla.ops.simple_gla.naive import naive_chunk_simple_gla

    return naive_chunk_simple_gla(q, k, v, decay(g))[0]


def scan(size):
    from mambapy.pscan import pscan

    batch, time, channels, state = size
    u, delta, a, b, c = leaf(batch, time, channels), leaf(batch, time, channels), leaf(channels, state), leaf(batch, time, state), leaf(batch, time, state)
    bias, d = leaf(channels), leaf(channels)

    def work():
        step = F.softplus(delta + bias).unsqueeze(-1)
        held = pscan(torch.exp(step * -a.abs()), step * b.unsqueeze(2) * u.unsqueeze(-1))
        return (held @ c.unsqueeze(-1)).squeeze(3) + d * u

    return both(work, [u, delta, a, b, c, bias, d])


def summed(norm):
    def work(a, b, *weights):
        y = a + b
        return y + norm(y, *weights)

    return work


def long_conv(size):
    batch, time, channels = size
    x, k = leaf(batch, time, channels), leaf(channels, time)

    def work():
        length = 2 * time
        product = torch.fft.rfft(x.transpose(1, 2), length) * torch.fft.rfft(k, length)
        return torch.fft.irfft(product, length)[..., :time].transpose(1, 2)

    return both(work, [x, k])


def adamw(size):
    p = torch.rand(*size)
    p.grad = torch.rand(*size)
    return torch.optim.AdamW([p], lr=1e-3, weight_decay=0.1, fused=True).step


def embedding(size):
    table, ids = leaf(size[1], size[2]), torch.arange(size[0]) * 7 % size[1]
    return both(lambda: F.embedding(ids, table), [table])


def rope(size):
    b, t, h, d = size
    angle = torch.arange(t)[:, None] * 10000.0 ** (-torch.arange(d // 2) / (d // 2))
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def work(x):
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    x = leaf(*size)
    return both(lambda: work(x), [x])


def linear_attention(size):
    def work(q, k, v):
        q, k = F.elu(q) + 1, F.elu(k) + 1
        y = torch.einsum("bnhd,bhde->bnhe", q, torch.einsum("bnhd,bnhe->bhde", k, v))
        return y / torch.einsum("bnhd,bhd->bnh", q, k.sum(1))[..., None]

    leaves = [leaf(*size) for _ in range(3)]
    return both(lambda: work(*leaves), leaves)


RMS = lambda x, w: F.rms_norm(x, w.shape, w, 1e-5)
LAYER = lambda x, w, b: F.layer_norm(x, w.shape, w, b, 1e-5)


def sums(norm, weights):
    def make(size):
        leaves = [leaf(*size), leaf(*size)] + [leaf(size[1]) for _ in range(weights)]
        return both(lambda: summed(norm)(*leaves), leaves)

    return make


THEIRS = {
    "gelu": pointwise(F.gelu, 1),
    "silu": pointwise(F.silu, 1),
    "swiglu": pointwise(lambda a, b: F.silu(a) * b, 2),
    "rms_norm": rows(RMS, 1),
    "layer_norm": rows(LAYER, 2),
    "add_rms_norm": sums(RMS, 1),
    "add_layer_norm": sums(LAYER, 2),
    "softmax": rows(lambda x: x.softmax(-1), 0),
    "cross_entropy": entropy,
    "matmul f32": matmul(torch.float32),
    "matmul bf16": matmul(torch.bfloat16),
    "attention": attention(torch.float32),
    "attention bf16": attention(torch.bfloat16),
    "decode": decode(torch.float32),
    "decode bf16": decode(torch.bfloat16),
    "conv": conv,
    "dropout": pointwise(lambda x: F.dropout(x, 0.1), 1),
    "rope": rope,
    "embedding": embedding,
    "adamw": adamw,
    "long_conv": long_conv,
    "linear_attention": linear_attention,
    "gla": heads(["wide"], gla),
    "delta": heads(["head"], delta),
    "gated_delta": heads(["head", "head"], gated_delta),
    "ssd": heads(["head"], ssd),
    "scan": scan,
}
ALONE = ["diagonal", "inverse", "listed attention", "gla step", "delta step", "gated_delta step", "ssd step", "scan step"]
# These walk or hold every token: up to --recurrent of them.
RECURRENT = ["gla", "scan"]
ENGINES = ["gla", "delta", "gated_delta", "ssd", "scan"]


def main():
    flags = argparse.ArgumentParser()
    flags.add_argument("binary")
    flags.add_argument("--rounds", type=int, default=7)
    flags.add_argument("--only", default="")
    flags.add_argument("--recurrent", type=int, default=2048)
    flags.add_argument("--longest", type=int, default=16384, help="tokens up to which PyTorch runs the other recurrences")
    flags.add_argument("--compile", action="store_true")
    flags = flags.parse_args()
    global COMPILED
    COMPILED = flags.compile
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
                longest = flags.recurrent if name in RECURRENT else flags.longest
                runs = name in THEIRS and (name not in ENGINES or row["size"][1] <= longest)
                if runs and key not in theirs:
                    theirs[key] = THEIRS[name](row["size"])
                    theirs[key]()
                taken = []
                for _ in range(3 if runs else 0):
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
