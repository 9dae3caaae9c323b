"""Mixers of Long Range Arena: transformers where it has them, else the paper's equation written out as a dense matrix."""

import math

import torch
import torch.nn.functional as F
import transformers
from common import Draw, golden
from torch.func import functional_call
from transformers.models.fnet.modeling_fnet import FNetBasicFourierTransform
from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

BATCH = 2
HF = {"transformers": transformers.__version__}
DENSE = "equation written out in torch as a dense matrix (oracles/lra.py)"


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join(x):
    return x.transpose(1, 2).flatten(2)


def projections(d, dim, bias=True, names="qkvo"):
    p = {f"{n}_proj.weight": d.weight(dim, dim) for n in names}
    if bias:
        p |= {f"{n}_proj.bias": d.bias(dim) for n in names}
    return p


def linear(p, name, x):
    return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def renamed(p, names):
    """The parameters under the reference's names; the rest are left out."""
    return {theirs + n.removeprefix(ours): v for ours, theirs in names.items() for n, v in p.items() if n.startswith(ours + ".")}


def fnet(name, time, dim=32):
    d = Draw(name)
    config = transformers.FNetConfig(hidden_size=dim)
    golden(name, "fnet", {"ortho": False}, {}, {"x": d.normal(BATCH, time, dim)}, lambda m, p, i: (m(i["x"])[0], {}),
           lambda: FNetBasicFourierTransform(config), reference="transformers FNetBasicFourierTransform", versions=HF,
           note="torch.fft.fftn over time and features, real part", script="lra.py")


def nystromformer(name, time, landmarks, conv=5, dim=32, heads=4):
    d = Draw(name)
    p = projections(d, dim) | {"conv.weight": d.normal(heads, conv, std=0.4)}
    config = transformers.NystromformerConfig(hidden_size=dim, num_attention_heads=heads, num_landmarks=landmarks,
                                              segment_means_seq_len=time, conv_kernel_size=conv, attention_probs_dropout_prob=0.0)

    def make():
        module = NystromformerSelfAttention(config)
        module.init_option = "exact"
        return module.eval()

    def run(module, p, i):
        theirs = renamed(p, {"q_proj": "query", "k_proj": "key", "v_proj": "value"})
        theirs["conv.weight"] = p["conv.weight"][:, None, :, None]
        return linear(p, "o_proj", functional_call(module, theirs, (i["x"],))[0]), {}

    golden(name, "nystromformer", {"dim": dim, "heads": heads, "landmarks": landmarks, "conv": conv}, p,
           {"x": d.normal(BATCH, time, dim)}, run, make, reference="transformers NystromformerSelfAttention, torch linear after it",
           versions=HF, note="init_option exact: the start of the inverse is scaled per matrix", tolerance=3e-4,
           zero=["grad.w.k_proj.bias"], script="lra.py")


def cosformer(name, time, causal, max_time=64, dim=32, heads=4):
    d = Draw(name)
    p = projections(d, dim)

    def run(module, p, i):
        q, k, v = (split(linear(p, f"{n}_proj", i["x"]), heads) for n in "qkv")
        at = torch.arange(time, dtype=q.dtype)
        s = F.relu(q) @ F.relu(k).transpose(2, 3) * torch.cos(math.pi / 2 * (at[:, None] - at) / max_time)
        s = s.tril() if causal else s
        return linear(p, "o_proj", join(s @ v / s.sum(-1, keepdim=True).clamp_min(1e-6))), {}

    golden(name, "cosformer", {"dim": dim, "heads": heads, "max_time": max_time, "causal": causal}, p,
           {"x": d.normal(BATCH, time, dim)}, run, reference=DENSE, versions={}, note="divisor at least 1e-6", script="lra.py")


def synthesizer(name, variant, time, causal, rank=4, max_time=28, dim=32, heads=4):
    d = Draw(name)
    p = projections(d, dim, bias=False, names="vo")

    def scores(prefix, outputs):
        return {f"{prefix}.hidden.weight": d.weight(dim, dim), f"{prefix}.hidden.bias": d.bias(dim),
                f"{prefix}.weight": 2 * d.weight(heads, outputs, dim // heads) * outputs**0.5, f"{prefix}.bias": d.normal(heads, outputs)}

    p |= {"dense": lambda: scores("scores", max_time),
          "random": lambda: {"random": d.normal(heads, max_time, max_time)},
          "factorised_dense": lambda: scores("scores_a", rank) | scores("scores_c", max_time // rank),
          "factorised_random": lambda: {"random_a": d.normal(heads, max_time, rank), "random_c": d.normal(heads, max_time, rank)}}[variant]()

    def run(module, p, i):
        def scored(prefix):
            h = split(F.relu(linear(p, f"{prefix}.hidden", i["x"])), heads)
            return torch.einsum("bhtd,hod->bhto", h, p[f"{prefix}.weight"]) + p[f"{prefix}.bias"][:, None]
        b = {"dense": lambda: scored("scores"), "random": lambda: p["random"][:, :time],
             "factorised_dense": lambda: scored("scores_a").tile(max_time // rank) * scored("scores_c").repeat_interleave(rank, -1),
             "factorised_random": lambda: (p["random_a"] @ p["random_c"].mT)[:, :time]}[variant]()[..., :time]
        if causal:
            b = b.masked_fill(torch.ones(time, time, dtype=torch.bool).triu(1), -math.inf)
        return linear(p, "o_proj", join(b.softmax(-1) @ split(linear(p, "v_proj", i["x"]), heads))), {}

    golden(name, "synthesizer", {"dim": dim, "heads": heads, "variant": variant, "max_time": max_time, "rank": rank, "causal": causal},
           p, {"x": d.normal(BATCH, time, dim)}, run, reference=DENSE, versions={},
           note=f"uses {time} of {max_time} positions", script="lra.py")


if __name__ == "__main__":
    fnet("fnet", 36)
    fnet("fnet_prime", 37)
    nystromformer("nystromformer", 40, 8, conv=19)
    nystromformer("nystromformer_exact", 12, 12)
    cosformer("cosformer", 50, True)
    cosformer("cosformer_bidirectional", 37, False)
    synthesizer("synthesizer_dense", "dense", 25, True)
    synthesizer("synthesizer_random", "random", 25, False)
    synthesizer("synthesizer_factorised_dense", "factorised_dense", 25, False)
    synthesizer("synthesizer_factorised_random", "factorised_random", 25, True)
