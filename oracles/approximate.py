"""Performer (performer-pytorch), Linformer (linformer), and bidirectional linear attention."""

import importlib.metadata

import torch
import torch.nn.functional as F
from common import Draw, call, golden
from linformer.linformer import LinformerSelfAttention
from performer_pytorch.performer_pytorch import (
    FastAttention,
    causal_linear_attention_noncuda,
    gaussian_orthogonal_random_matrix,
    linear_attention,
    softmax_kernel,
)

BATCH = 2


def version(*names):
    return {n: importlib.metadata.version(n) for n in names}


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def between_linears(p, x, heads, attend):
    """Projections without bias around an attention over [batch, heads, time, head_dim]."""
    q, k, v = (split(F.linear(x, p[f"{n}_proj.weight"]), heads) for n in "qkv")
    return F.linear(attend(q, k, v).transpose(1, 2).flatten(2), p["o_proj.weight"])


def performer(name, time, causal, dim=32, heads=4, features=24):
    d = Draw(name)
    p = {f"{n}_proj.weight": d.weight(dim, dim) for n in "qkvo"}
    x = d.normal(BATCH, time, dim)
    # Their own draw: orthogonal blocks, rows of chi-distributed length.
    torch.manual_seed(7)
    matrix = gaussian_orthogonal_random_matrix(features, dim // heads, scaling=0)

    def run(module, p, i):
        module.projection_matrix.copy_(i["projection_matrix"])
        return between_linears(p, i["x"], heads, module), {}

    golden(name, "performer", {"dim": dim, "heads": heads, "head_dim": dim // heads, "nb_features": features, "causal": causal,
                               "eps": 1e-4, "denominator_eps": 1e-6 if causal else 0.0},
           p, {"x": x, "projection_matrix": matrix}, run, lambda: FastAttention(dim // heads, features, causal=causal),
           buffers=["projection_matrix"], reference="performer-pytorch FastAttention (softmax kernel), torch linears around it",
           versions=version("performer-pytorch"),
           note="stabilisers are detached: queries max over features per position, keys max over positions and features per head; "
           + ("causal sums in chunks, denominator phi(q).(sum phi(k) + 1e-6); the key maximum runs over all positions, later ones too"
              if causal else "no eps in the denominator"), script="approximate.py")


def performer_exact(name, time, dim=32, heads=4, features=24):
    """Causal Performer with both eps zero: the stabilisers cancel, so that any choice of them must agree."""
    d = Draw(name)
    p = {f"{n}_proj.weight": d.weight(dim, dim) for n in "qkvo"}
    x = d.normal(BATCH, time, dim)
    torch.manual_seed(8)
    matrix = gaussian_orthogonal_random_matrix(features, dim // heads, scaling=0)

    def run(module, p, i):
        def attend(q, k, v):
            q, k = (softmax_kernel(t, projection_matrix=i["projection_matrix"], is_query=t is q, eps=0.0) for t in (q, k))
            return causal_linear_attention_noncuda(q, k, v, eps=0.0)
        return between_linears(p, i["x"], heads, attend), {}

    golden(name, "performer", {"dim": dim, "heads": heads, "head_dim": dim // heads, "nb_features": features, "causal": True,
                               "eps": 0.0, "denominator_eps": 0.0},
           p, {"x": x, "projection_matrix": matrix}, run, buffers=["projection_matrix"],
           reference="performer-pytorch softmax_kernel, causal_linear_attention_noncuda with eps 0", versions=version("performer-pytorch"),
           note="with eps 0 the stabilisers cancel: nothing depends on later positions", script="approximate.py")


def linformer(name, time, dim=32, heads=4, k=12, max_time=40, share_kv=False, one_kv_head=False):
    d = Draw(name)
    kv = dim // heads if one_kv_head else dim
    p = {"q_proj.weight": 2 * d.weight(dim, dim), "k_proj.weight": d.weight(kv, dim)}
    if not share_kv:
        p["v_proj.weight"] = d.weight(kv, dim)
    p["proj_k"] = d.normal(max_time, k, std=k**-0.5)
    if not share_kv:
        p["proj_v"] = d.normal(max_time, k, std=k**-0.5)
    p |= {"o_proj.weight": d.weight(dim, dim), "o_proj.bias": d.bias(dim)}
    rename = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "o_proj": "to_out"}

    def run(module, p, i):
        theirs = {".".join([rename.get(part, part) for part in n.split(".")]): v for n, v in p.items()}
        return call(module, theirs, i["x"]), {}

    golden(name, "linformer", {"dim": dim, "heads": heads, "head_dim": dim // heads, "k": k, "max_time": max_time,
                               "share_kv": share_kv, "one_kv_head": one_kv_head},
           p, {"x": d.normal(BATCH, time, dim)}, run,
           lambda: LinformerSelfAttention(dim, max_time, k=k, heads=heads, share_kv=share_kv, one_kv_head=one_kv_head),
           reference="linformer LinformerSelfAttention", versions=version("linformer"),
           note=f"uses the first {time} of {max_time} rows of proj_k and proj_v; the other rows get zero gradient"
           + ("; values are the keys before projection, and proj_k serves both" if share_kv else ""), script="approximate.py")


def bidirectional_linear(name, time, dim=32, heads=4):
    d = Draw(name)
    p = {f"{n}_proj.weight": d.weight(dim, dim) for n in "qkvo"}

    def run(module, p, i):
        return between_linears(p, i["x"], heads, lambda q, k, v: linear_attention(F.elu(q) + 1, F.elu(k) + 1, v)), {}

    golden(name, "linear_attention", {"dim": dim, "heads": heads, "head_dim": dim // heads, "feature_map": "elu",
                                      "normalise": True, "causal": False, "eps": 0.0},
           p, {"x": d.normal(BATCH, time, dim)}, run, reference="performer-pytorch linear_attention on elu + 1 features",
           versions=version("performer-pytorch"), note="no eps, no scale", script="approximate.py")


if __name__ == "__main__":
    performer("performer_bidirectional", 37, causal=False)
    performer_exact("performer_causal_eps0", 130)
    linformer("linformer", 37)
    linformer("linformer_full_length", 40, heads=2)
    linformer("linformer_shared", 37, share_kv=True, one_kv_head=True)
    bidirectional_linear("linear_attention_bidirectional", 37)
