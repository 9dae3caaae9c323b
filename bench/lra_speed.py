"""Time and memory of a training step at 1K to 16K tokens, ours beside PyTorch implementations of the same mixers.

    python bench/lra_speed.py target/release/anyformer [--lengths 1024,2048,4096,8192,16384] [--models attention,...] [--rounds 2]

Needs torch, transformers, mambapy, linformer, performer-pytorch, reformer-pytorch, sinkhorn-transformer, routing-transformer and
local-attention (versions: oracles/README.md); unset OPENBLAS_*
first. Both sides run the text model of `anyformer lra --preset small`: embedding of 256 tokens and sinusoids at width 64, two
pre-norm blocks (mixer with 4 heads, MLP of 128 with GELU), norm, mean, a head of 128 and 2 classes; cross entropy and the
gradients of every parameter of one sequence, f32, 2 threads. Each measurement is a process of its own, ours and theirs in turn;
a process steps once for warming up, then at most three times, and their median counts, of processes the least. Memory is what the resident size
grows by: ours the largest of the process (getrusage) less that of one at 64 tokens (more where a mixer needs more); theirs, whose
libraries take hundreds of megabytes while they load, the peak after a step at that length, reset by /proc/self/clear_refs (Linux).
A length is left out after one that took longer than --limit seconds.

The mixers: attention: scaled_dot_product_attention; linformer: package linformer, k = 64; performer: performer-pytorch's
FastAttention, its own number of features; reformer: reformer-pytorch's LSHSelfAttention, bucket 32, 2 rounds; longformer, bigbird,
nystromformer: transformers' layers, window 64 to each side (one global token), block 64 and 3 random, 64 landmarks;
sinkhorn: package sinkhorn-transformer, buckets of 64, 7 steps; routing: routing-transformer's KmeansAttention, clusters of 64 by
one pass; local: package local-attention, windows of 64 that see both neighbours whole (192 keys; ours the 127 nearest); mamba: mambapy
with its parallel scan; fnet: torch.fft.fft2; linear_attention: elu + 1 as two torch.einsum, there being no package for it without
others of its own.
"""

import argparse
import gc
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time

DIM, HEADS, LAYERS, HIDDEN, VOCAB = 64, 4, 2, 128, 256
MODELS = {
    "attention": ["causal=false", 'position="none"'],
    "linear_attention": ["causal=false"],
    "performer": ["causal=false"],
    "linformer": ["k=64"],
    "nystromformer": [],
    "longformer": [],
    "bigbird": [],
    "reformer": [],
    "sinkhorn": ["block=64"],
    "routing": ["clusters={windows}", "iterations=0"],
    "local": ["causal=false", 'position="none"', "window=64"],
    "fnet": [],
    "mamba": [],
}
WITHOUT_HEADS = ["fnet", "mamba"]
LEAST = {"bigbird": 1024, "longformer": 256, "nystromformer": 256}


def ours(binary, name, length, steps):
    knobs = [knob.format(windows=length // 64) for knob in MODELS[name]]
    knobs += [f"max_time={length}"] if name == "linformer" else []
    knobs += [] if name in WITHOUT_HEADS else ["heads=4"]
    spec = ", ".join([f'name="{name}"', *knobs])
    command = [binary, "--json", "--quiet", "--threads", "2", "bench", "--mixers", name, "--lengths", str(length), "--dim", str(DIM),
               "--layers", str(LAYERS), "--runs", str(steps), f"model.mixers=[{{{spec}}}]", f'model.channel={{name="mlp", hidden={HIDDEN}}}',
               'model.norm="layer"', 'model.positions="sinusoid"', f"model.max_time={length}",
               f'model.gives={{class={{classes=2, pool="mean", hidden={HIDDEN}}}}}']
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        sys.exit(f"{name} at {length}: {run.stderr.strip()}")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return json.loads(run.stdout)["rows"][0]["forward_backward_s"], peak


def child(side, binary, name, length, steps):
    """Runs in a process of its own, so that its children's peak is this measurement's only."""
    if side == "ours":
        seconds, peak = ours(binary, name, length, steps)
    else:
        seconds, peak = theirs(name, length, steps)
    print(json.dumps({"seconds": seconds, "kib": peak}))


def theirs(name, length, steps):
    import torch
    import torch.nn.functional as F
    from torch import nn

    torch.set_num_threads(2)
    torch.manual_seed(0)

    class Heads(nn.Module):
        def __init__(self, inner=None):
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))
            self.inner = inner

        def forward(self, x):
            q, k, v = (w(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for w in (self.q, self.k, self.v))
            return self.o(self.mix(q, k, v).transpose(1, 2).flatten(2))

        def mix(self, q, k, v):
            if self.inner is not None:
                return self.inner(q, k, v)
            return F.scaled_dot_product_attention(q, k, v)

    class Linear(Heads):
        def mix(self, q, k, v):
            q, k = F.elu(q) + 1, F.elu(k) + 1
            y = torch.einsum("bhnd,bhde->bhne", q, torch.einsum("bhnd,bhne->bhde", k, v))
            return y / torch.einsum("bhnd,bhd->bhn", q, k.sum(2))[..., None]

    class Theirs(nn.Module):
        """A layer of transformers, with the output layer that it leaves to its caller."""

        def __init__(self, layer, **arguments):
            super().__init__()
            self.layer, self.o, self.arguments = layer, nn.Linear(DIM, DIM), arguments

        def forward(self, x):
            y = self.layer(x, **self.arguments)
            return self.o(y[0] if isinstance(y, tuple) else y)

    class Fourier(nn.Module):
        def forward(self, x):
            return torch.fft.fft2(x).real

    def mixer(layer):
        if name == "attention":
            return Heads()
        if name == "linear_attention":
            return Linear()
        if name == "performer":
            from performer_pytorch import FastAttention
            return Heads(FastAttention(dim_heads=DIM // HEADS))
        if name == "linformer":
            from linformer import LinformerSelfAttention
            return LinformerSelfAttention(DIM, seq_len=length, k=64, heads=HEADS)
        if name == "reformer":
            from reformer_pytorch import LSHSelfAttention
            return LSHSelfAttention(DIM, heads=HEADS, bucket_size=32, n_hashes=2)
        if name == "sinkhorn":
            from sinkhorn_transformer import SinkhornSelfAttention
            return SinkhornSelfAttention(DIM, bucket_size=64, max_seq_len=length, heads=HEADS, sinkhorn_iter=7)
        if name == "routing":
            from routing_transformer.routing_transformer import KmeansAttention
            inner = KmeansAttention(length // 64, 64, HEADS, DIM // HEADS)
            both = Heads(lambda q, k, v: inner(q, k, v)[0])
            both.clusters = inner
            return both
        if name == "local":
            from local_attention import LocalAttention
            return Heads(LocalAttention(64, causal=False, look_backward=1, look_forward=1, use_rotary_pos_emb=False))
        if name == "fnet":
            return Fourier()
        if name == "mamba":
            from mambapy.mamba import MambaBlock, MambaConfig
            return MambaBlock(MambaConfig(d_model=DIM, n_layers=1, pscan=True))
        import transformers
        if name == "nystromformer":
            from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention as Layer
            config = transformers.NystromformerConfig(hidden_size=DIM, num_attention_heads=HEADS, num_landmarks=64, segment_means_seq_len=length,
                                                      conv_kernel_size=35, attention_probs_dropout_prob=0.0)
            return Theirs(Layer(config))
        if name == "longformer":
            from transformers.models.longformer.modeling_longformer import LongformerSelfAttention as Layer
            config = transformers.LongformerConfig(hidden_size=DIM, num_attention_heads=HEADS, attention_window=[128] * LAYERS,
                                                   attention_probs_dropout_prob=0.0)
            mask = torch.zeros(1, length)
            mask[0, 0] = 10000.0
            return Theirs(Layer(config, layer), attention_mask=mask, is_index_masked=mask < 0, is_index_global_attn=mask > 0,
                          is_global_attn=True)
        from transformers.models.big_bird import modeling_big_bird as big_bird
        config = transformers.BigBirdConfig(hidden_size=DIM, num_attention_heads=HEADS, block_size=64, num_random_blocks=3,
                                            max_position_embeddings=length, attention_probs_dropout_prob=0.0)
        masks = big_bird.BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(1, length), 64)
        blocked, band, from_mask, to_mask = masks
        return Theirs(big_bird.BigBirdBlockSparseAttention(config, seed=layer), band_mask=band, from_mask=from_mask, to_mask=to_mask,
                      from_blocked_mask=blocked, to_blocked_mask=blocked)

    class Block(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.n1, self.n2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
            self.mixer = mixer(layer)
            self.up, self.down = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)

        def forward(self, x):
            x = x + self.mixer(self.n1(x))
            return x + self.down(F.gelu(self.up(self.n2(x))))

    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(VOCAB, DIM)
            angle = torch.arange(length)[:, None] * torch.exp(-torch.arange(0, DIM, 2) / DIM * 9.210340371976184)
            self.register_buffer("place", torch.stack([angle.sin(), angle.cos()], -1).flatten(1))
            self.blocks = nn.Sequential(*(Block(layer) for layer in range(LAYERS)))
            self.norm = nn.LayerNorm(DIM)
            self.head = nn.Sequential(nn.Linear(DIM, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2))

        def forward(self, ids):
            return self.head(self.norm(self.blocks(self.embed(ids) + self.place)).mean(1))

    def median(steps):
        model = Text()
        ids, wanted = torch.randint(VOCAB, (1, length)), torch.tensor([1])
        taken = []
        for step in range(steps + 1):
            model.zero_grad(set_to_none=True)
            began = time.perf_counter()
            F.cross_entropy(model(ids), wanted).backward()
            seconds = time.perf_counter() - began
            # The first step warms up, unless it is so long that it does not matter.
            if step > 0 or seconds > 5:
                taken.append(seconds)
            if seconds > 5:
                break
        return statistics.median(taken)

    # The libraries make what they keep at a short length; `length` is what the classes above read.
    asked, length = length, LEAST.get(name, 64)
    median(1)
    length = asked
    gc.collect()
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    taken = median(steps)
    return taken, status("VmHWM") - before


def status(key):
    """A size of this process in KiB."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def measure(side, binary, name, length, steps=3):
    command = [sys.executable, __file__, binary, "--child", side, name, str(length), str(steps)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        return None, (run.stderr.strip().splitlines() or ["killed"])[-1]
    return json.loads(run.stdout.strip().splitlines()[-1]), None


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("binary")
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit", type=float, default=8.0, help="seconds of a step after which longer ones are left out")
    parser.add_argument("--json", help="a file for the figures")
    parser.add_argument("--child", nargs=4)
    args = parser.parse_args()
    if args.child:
        side, name, length, steps = args.child
        return child(side, args.binary, name, int(length), int(steps))
    lengths = [int(length) for length in args.lengths.split(",")]
    print("load", *("%.1f" % load for load in os.getloadavg()))
    print("| mixer | tokens | ours | theirs | time | ours, MiB | theirs, MiB | memory |\n|---|---:|---:|---:|---:|---:|---:|---:|")
    rows = []
    for name in args.models.split(","):
        short, broken = measure("ours", args.binary, name, LEAST.get(name, 64), 1)
        if broken:
            print(f"| {name} | – | {broken} |")
            continue
        base = {"ours": short["kib"], "theirs": 0}
        for length in lengths:
            best = {"ours": [float("inf")] * 2, "theirs": [float("inf")] * 2}
            why = None
            for _ in range(args.rounds):
                for side, held in best.items():
                    found, why = measure(side, args.binary, name, length)
                    if found is None:
                        break
                    held[0] = min(held[0], found["seconds"])
                    held[1] = min(held[1], (found["kib"] - base[side]) / 1024)
                if why or max(held[0] for held in best.values()) > args.limit / 2:
                    break
            if why:
                print(f"| {name} | {length} | {why} |")
                break
            (a, b), (c, d) = best["ours"], best["theirs"]
            rows.append({"mixer": name, "tokens": length, "ours_s": a, "theirs_s": c, "ours_mib": b, "theirs_mib": d})
            print(f"| {name} | {length} | {a:.4f} s | {c:.4f} s | {a / c:.2f} | {b:.0f} | {d:.0f} | {b / max(d, 1):.2f} |", flush=True)
            if max(a, c) > args.limit:
                break
    print("load", *("%.1f" % load for load in os.getloadavg()))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file)


if __name__ == "__main__":
    main()
