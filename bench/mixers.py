"""One block forward and backward, ours beside PyTorch forms on the CPU, interleaved in one run.

    python bench/mixers.py target/release/anyformer [--lengths 512,2048] [--rounds 7]

Needs torch, fla-core, transformers and mambapy (see oracles/README.md for versions); unset OPENBLAS_* first. Both sides run the
same model: embedding of 256, one block of width 512 (norm, mixer, norm, SwiGLU), norm, tied head, cross entropy, gradients of
every parameter, f32, batch 1, 2 threads. PyTorch's mixers: SDPA for attention; fla's chunked torch form where it has one (delta
rule, gated delta rule), else its recurrent one (GLA: run up to --recurrent tokens only); for Mamba-2 transformers' layer, for
Mamba mambapy with its parallel scan. Prints the median over rounds of each side and the median of the ratios ours/theirs (below 1:
ours is faster).
"""

import argparse
import json
import statistics
import subprocess
import time

import torch
import torch.nn.functional as F
from torch import nn

torch.set_num_threads(2)
DIM, HEADS = 512, 4


class Conv(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv1d(width, width, 4, groups=width, padding=3, bias=False)

    def forward(self, x):
        return F.silu(self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))


def linear(output):
    return nn.Linear(DIM, output, bias=False)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (linear(DIM) for _ in range(4))
        half = torch.arange(DIM // HEADS // 2) / (DIM // HEADS // 2)
        self.register_buffer("freq", 10000.0 ** -half)

    def rope(self, x):
        angle = torch.arange(x.shape[2])[:, None] * self.freq
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def forward(self, x):
        split = lambda y: y.view(*y.shape[:2], HEADS, -1).transpose(1, 2)
        q, k, v = self.rope(split(self.q(x))), self.rope(split(self.k(x))), split(self.v(x))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Gla(nn.Module):
    def __init__(self):
        super().__init__()
        from fla.ops.gla.naive import naive_recurrent_gla

        self.op = naive_recurrent_gla
        self.q, self.k, self.v, self.g = linear(DIM // 2), linear(DIM // 2), linear(DIM), linear(DIM)
        self.down, self.up, self.o = linear(16), nn.Linear(16, DIM // 2), linear(DIM)
        self.norm = nn.RMSNorm(DIM // HEADS, 1e-5)

    def forward(self, x):
        split = lambda y: y.view(*y.shape[:2], HEADS, -1)
        gate = F.logsigmoid(self.up(self.down(x))) / 16
        o = self.op(split(self.q(x)), split(self.k(x)), split(self.v(x)), split(gate))
        o = o[0] if isinstance(o, tuple) else o
        return self.o((self.norm(o) * F.silu(split(self.g(x)))).flatten(2))


class DeltaNet(nn.Module):
    def __init__(self):
        super().__init__()
        from fla.ops.delta_rule.naive import delta_rule_chunkwise

        self.op = delta_rule_chunkwise
        self.q, self.k, self.v, self.o, self.b = (*(linear(DIM) for _ in range(4)), linear(HEADS))
        self.cq, self.ck, self.cv = (Conv(DIM) for _ in range(3))
        self.norm = nn.RMSNorm(DIM // HEADS, 1e-5)

    def forward(self, x):
        split = lambda y: y.view(*y.shape[:2], HEADS, -1).transpose(1, 2)
        q, k = (F.normalize(split(c(p(x))), dim=-1) for c, p in ((self.cq, self.q), (self.ck, self.k)))
        v = split(self.cv(self.v(x)))
        o = self.op(q, k, v, self.b(x).sigmoid().transpose(1, 2))
        o = o[0] if isinstance(o, tuple) else o
        return self.o(self.norm(o.transpose(1, 2)).flatten(2))


class Mamba(nn.Module):
    def __init__(self):
        super().__init__()
        from mambapy.mamba import MambaBlock, MambaConfig

        self.block = MambaBlock(MambaConfig(d_model=DIM, n_layers=1, pscan=True))

    def forward(self, x):
        return self.block(x)


class GatedDeltaNet(nn.Module):
    def __init__(self):
        super().__init__()
        from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule

        self.op = naive_chunk_gated_delta_rule
        self.q, self.k, self.v, self.g = linear(DIM), linear(DIM), linear(2 * DIM), linear(2 * DIM)
        self.a, self.b, self.o = linear(HEADS), linear(HEADS), nn.Linear(2 * DIM, DIM, bias=False)
        self.cq, self.ck, self.cv = Conv(DIM), Conv(DIM), Conv(2 * DIM)
        self.a_log, self.dt_bias = nn.Parameter(torch.zeros(HEADS)), nn.Parameter(torch.full((HEADS,), -4.0))
        self.norm = nn.RMSNorm(2 * DIM // HEADS, 1e-5)

    def forward(self, x):
        split = lambda y: y.view(*y.shape[:2], HEADS, -1)
        q, k = (F.normalize(split(c(p(x))), dim=-1) for c, p in ((self.cq, self.q), (self.ck, self.k)))
        decay = -self.a_log.exp() * F.softplus(self.a(x) + self.dt_bias)
        o, _ = self.op(q, k, split(self.cv(self.v(x))), decay, self.b(x).sigmoid())
        return self.o((self.norm(o) * F.silu(split(self.g(x)))).flatten(2))


class Mamba2(nn.Module):
    def __init__(self):
        super().__init__()
        from transformers import Mamba2Config
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

        sizes = {"hidden_size": DIM, "expand": 2, "head_dim": 64, "num_heads": 2 * DIM // 64, "state_size": 128, "n_groups": 1}
        self.block = Mamba2Mixer(Mamba2Config(chunk_size=64, num_hidden_layers=1, **sizes), layer_idx=0)

    def forward(self, x):
        return self.block(x)


class Model(nn.Module):
    def __init__(self, mixer):
        super().__init__()
        hidden = (DIM * 8 // 3 + 7) // 8 * 8
        self.embed = nn.Embedding(256, DIM)
        self.n1, self.n2, self.n3 = (nn.RMSNorm(DIM, 1e-5) for _ in range(3))
        self.mixer = mixer
        self.gate, self.up = linear(hidden), linear(hidden)
        self.down = nn.Linear(hidden, DIM, bias=False)

    def forward(self, ids, targets):
        x = self.embed(ids)
        x = x + self.mixer(self.n1(x))
        y = self.n2(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        logits = self.n3(x) @ self.embed.weight.T
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


MIXERS = {
    "attention": Attention,
    "gla": Gla,
    "delta_net": DeltaNet,
    "gated_delta_net": GatedDeltaNet,
    "mamba2": Mamba2,
    "mamba": Mamba,
}


def main():
    flags = argparse.ArgumentParser()
    flags.add_argument("binary")
    flags.add_argument("--mixers", default=",".join(MIXERS))
    flags.add_argument("--lengths", default="512,2048,8192")
    flags.add_argument("--rounds", type=int, default=7)
    flags.add_argument("--recurrent", type=int, default=2048)
    flags = flags.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    print("| mixer | length | ours, ms | PyTorch, ms | ours / theirs |\n|---|---|---|---|---|")
    for name in flags.mixers.split(","):
        for length in map(int, flags.lengths.split(",")):
            skip = name == "gla" and length > flags.recurrent
            model = None if skip else Model(MIXERS[name]())
            ids = torch.randint(256, (1, length + 1), generator=torch.Generator().manual_seed(0))

            def theirs():
                began = time.perf_counter()
                model(ids[:, :-1], ids[:, 1:]).backward()
                model.zero_grad()
                return time.perf_counter() - began

            def ours():
                words = [flags.binary, "bench", "--mixers", name, "--lengths", str(length), "--dim", str(DIM), "--layers", "1",
                         "--runs", "1", "--json", "--quiet", "--threads", "2"]
                said = subprocess.run(words, capture_output=True, check=True, text=True).stdout
                return json.loads(said)["rows"][0]["forward_backward_s"]

            pairs = []
            if not skip:
                theirs()
            for _ in range(flags.rounds):
                pairs.append((ours(), theirs() if not skip else float("nan")))
            mine = statistics.median(a for a, _ in pairs)
            other = statistics.median(b for _, b in pairs)
            ratio = statistics.median(a / b for a, b in pairs)
            shown = ("-", "-") if skip else (f"{other * 1e3:.1f}", f"{ratio:.2f}")
            print(f"| {name} | {length} | {mine * 1e3:.1f} | {shown[0]} | {shown[1]} |", flush=True)


if __name__ == "__main__":
    main()
