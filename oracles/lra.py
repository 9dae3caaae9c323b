"""Mixers of Long Range Arena: transformers where it has them, else the paper's equation written out as a dense matrix."""

import math

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from common import Draw, golden
from torch.func import functional_call
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel
from transformers.models.fnet.modeling_fnet import FNetBasicFourierTransform
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention
from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

BATCH = 2
HF = {"transformers": transformers.__version__}
DENSE = "torch dense matrix written from the equation, no packaged implementation"


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


def synthesizer(name, variant, time, causal, rank=4, max_time=28, dim=32, heads=4, mix=None, mix_sum=False):
    d = Draw(name)
    p = projections(d, dim, bias=False, names="vo")

    def scores(prefix, outputs):
        return {f"{prefix}.hidden.weight": d.weight(dim, dim), f"{prefix}.hidden.bias": d.bias(dim),
                f"{prefix}.weight": 2 * d.weight(heads, outputs, dim // heads) * outputs**0.5, f"{prefix}.bias": d.normal(heads, outputs)}

    def weights(variant, at):
        return {"dense": lambda: scores(f"{at}scores", max_time),
                "random": lambda: {f"{at}random": d.normal(heads, max_time, max_time)},
                "factorised_dense": lambda: scores(f"{at}scores_a", rank) | scores(f"{at}scores_c", max_time // rank),
                "factorised_random": lambda: {f"{at}random_a": d.normal(heads, max_time, rank), f"{at}random_c": d.normal(heads, max_time, rank)},
                "dot_product": lambda: {f"{at}{n}.weight": d.weight(dim, dim) for n in ("q_proj", "k_proj")}}[variant]()

    p |= weights(variant, "")
    if mix:
        p |= weights(mix, "mix.")
        p |= {} if mix_sum else {"shares": d.normal(2)}

    def run(module, p, i):
        def scored(prefix):
            h = split(F.relu(linear(p, f"{prefix}.hidden", i["x"])), heads)
            return torch.einsum("bhtd,hod->bhto", h, p[f"{prefix}.weight"]) + p[f"{prefix}.bias"][:, None]

        def logits(variant, at):
            q, k = f"{at}q_proj", f"{at}k_proj"
            return {"dense": lambda: scored(f"{at}scores"), "random": lambda: p[f"{at}random"][:, :time],
                    "factorised_dense": lambda: scored(f"{at}scores_a").tile(max_time // rank) * scored(f"{at}scores_c").repeat_interleave(rank, -1),
                    "factorised_random": lambda: (p[f"{at}random_a"] @ p[f"{at}random_c"].mT)[:, :time],
                    "dot_product": lambda: split(linear(p, q, i["x"]), heads) @ split(linear(p, k, i["x"]), heads).mT / (dim // heads) ** 0.5,
                    }[variant]()[..., :time]

        b = logits(variant, "")
        if mix:
            shares = [1, 1] if mix_sum else p["shares"].softmax(0)
            b = shares[0] * b + shares[1] * logits(mix, "mix.")
        if causal:
            b = b.masked_fill(torch.ones(time, time, dtype=torch.bool).triu(1), -math.inf)
        return linear(p, "o_proj", join(b.softmax(-1) @ split(linear(p, "v_proj", i["x"]), heads))), {}

    mixture = {"mix": mix, "mix_sum": mix_sum} if mix else {}
    golden(name, "synthesizer", {"dim": dim, "heads": heads, "variant": variant, "max_time": max_time, "rank": rank, "causal": causal} | mixture,
           p, {"x": d.normal(BATCH, time, dim)}, run, reference=DENSE, versions={},
           note=f"uses {time} of {max_time} positions", script="lra.py")


def longformer(name, time, window, globals, dim=32, heads=4):
    d = Draw(name)
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
    names |= {f"{n[0]}_global": f"{theirs}_global" for n, theirs in names.items()}
    p = projections(d, dim)
    p |= {f"{n}_global.{part}": d.weight(dim, dim) if part == "weight" else d.bias(dim) for n in "qkv" for part in ("weight", "bias")}
    config = transformers.LongformerConfig(hidden_size=dim, num_attention_heads=heads, attention_window=[2 * window],
                                           attention_probs_dropout_prob=0.0)

    def run(module, p, i):
        at_global = (torch.arange(time) < globals).expand(BATCH, -1)
        o = functional_call(module, renamed(p, names), (i["x"],), {
            "attention_mask": at_global.to(i["x"].dtype) * 10000, "is_index_masked": torch.zeros(BATCH, time, dtype=torch.bool),
            "is_index_global_attn": at_global, "is_global_attn": True})[0]
        return linear(p, "o_proj", o), {}

    golden(name, "longformer", {"dim": dim, "heads": heads, "window": window, "globals": globals}, p,
           {"x": d.normal(BATCH, time, dim)}, run, lambda: LongformerSelfAttention(config, 0).eval(),
           zero=["grad.w.k_proj.bias", "grad.w.k_global.bias"], versions=HF,
           reference="transformers LongformerSelfAttention, torch linear after it", note=f"attention_window {2 * window}", script="lra.py")


def splitmix(seed, head, query, key):
    m = 2**64 - 1
    z = ((seed << 48 ^ head << 42 ^ query << 21 ^ key) * 0x9E3779B97F4A7C15) & m
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & m
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & m
    return z ^ z >> 31


def bigbird(name, blocks, block=4, random=2, seed=7, dim=32, heads=4):
    d = Draw(name)
    p = projections(d, dim)
    time = blocks * block
    config = transformers.BigBirdConfig(hidden_size=dim, num_attention_heads=heads, block_size=block, num_random_blocks=random,
                                        max_position_embeddings=time, attention_probs_dropout_prob=0.0)

    def chosen(head, query):
        others = [key for key in range(1, blocks - 1) if abs(key - query) > 1]
        return sorted(others, key=lambda key: splitmix(seed, head, query, key))[:random]

    def make():
        module = BigBirdBlockSparseAttention(config).eval()
        plan = [np.array([chosen(head, query) for query in range(1, blocks - 1)]) for head in range(heads)]
        module._bigbird_block_rand_mask_with_head = lambda **_: plan
        return module

    def run(module, p, i):
        ones = torch.ones(BATCH, time, dtype=i["x"].dtype)
        blocked, band, source, target = BigBirdModel.create_masks_for_block_sparse_attn(ones, block)
        theirs = renamed(p, {"q_proj": "query", "k_proj": "key", "v_proj": "value"})
        return linear(p, "o_proj", functional_call(module, theirs, (i["x"], band, source, target, blocked, blocked))[0]), {}

    golden(name, "bigbird", {"dim": dim, "heads": heads, "block": block, "random": random, "seed": seed}, p,
           {"x": d.normal(BATCH, time, dim)}, run, make, zero=["grad.w.k_proj.bias"], versions=HF,
           reference="transformers BigBirdBlockSparseAttention, torch linear after it",
           note="its random blocks are replaced by ours, a hash of seed, head and blocks", script="lra.py")


def masked(name, mixer, config, time, allowed, note, dim=32, heads=4):
    """Softmax attention over the pairs for which `allowed(i, j)` holds."""
    d = Draw(name)
    p = projections(d, dim, bias=False)
    mask = torch.tensor([[allowed(i, j) for j in range(time)] for i in range(time)])

    def run(module, p, i):
        q, k, v = (split(linear(p, f"{n}_proj", i["x"]), heads) for n in "qkv")
        return linear(p, "o_proj", join(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))), {}

    golden(name, mixer, {"dim": dim, "heads": heads} | config, p, {"x": d.normal(BATCH, time, dim)}, run,
           reference="torch scaled_dot_product_attention with a dense mask written from the equation", versions={}, note=note, script="lra.py")


def sparse(name, pattern, time, stride, summary, released=False, class_token=False):
    allowed = {"strided": lambda i, j: j <= i and (i - j <= stride or (i - j) % stride == 0),
               "fixed": lambda i, j: j <= i and (j // stride == i // stride or j % stride >= stride - summary)}[pattern]
    config = {"pattern": pattern, "stride": stride, "summary": summary}
    if released:
        # As google-research/long-range-arena's sparse_attention.py merges Fixed1Pattern and Fixed2Pattern, and pads for its class token.
        allowed = lambda i, j: j <= i and (j // stride == i // stride or j % stride == 0 or j % stride >= stride - summary)  # noqa: E731
        config["lra_compat"] = True
    if class_token:
        behind = allowed
        allowed = lambda i, j: i == 0 or j == 0 or behind(i - 1, j - 1)  # noqa: E731
        config["causal"] = False
    masked(name, "sparse", config, time, allowed, "union of both sets in every head")


def luna(name, time, length, dim=32, heads=4):
    d = Draw(name)
    p = projections(d, dim) | {f"pack_{n}": v for n, v in projections(d, dim, names="qkv").items()}
    p["p"] = d.normal(length, dim)

    def run(module, p, i):
        def attend(prefix, q, kv):
            q, k, v = (split(linear(p, f"{prefix}{n}_proj", s), heads) for n, s in zip("qkv", (q, kv, kv)))
            return join(F.scaled_dot_product_attention(q, k, v))
        packed = attend("pack_", p["p"].expand(BATCH, -1, -1), i["x"])
        return linear(p, "o_proj", attend("", i["x"], packed)), {}

    golden(name, "luna", {"dim": dim, "heads": heads, "length": length}, p, {"x": d.normal(BATCH, time, dim)}, run,
           zero=["grad.w.k_proj.bias", "grad.w.pack_k_proj.bias"], versions={},
           reference="torch scaled_dot_product_attention twice, joined as in the equation", script="lra.py")


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
    synthesizer("synthesizer_mixture", "dense", 25, True, mix="factorised_random")
    synthesizer("synthesizer_released", "random", 25, False, mix="dot_product", mix_sum=True)
    longformer("longformer", 32, 4, 2)
    bigbird("bigbird", 10)
    sparse("sparse_fixed", "fixed", 45, 12, 3)
    sparse("sparse_strided", "strided", 45, 9, 1)
    sparse("sparse_strided_class", "strided", 40, 9, 1, class_token=True)
    sparse("sparse_released", "fixed", 70, 10, 2, released=True)
    sparse("sparse_released_class", "fixed", 71, 10, 2, released=True, class_token=True)
    luna("luna", 37, 6)
