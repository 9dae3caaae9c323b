"""The rest of Long Range Arena's mixers: transformers and routing-transformer where they have them, else the paper's equation
written out token by token or as a dense matrix."""

import importlib.metadata
import math

import torch
import torch.nn.functional as F
import transformers
from common import Draw, golden
from lra import BATCH, DENSE, HF, join, linear, projections, split
from routing_transformer.routing_transformer import KmeansAttention
from torch.func import functional_call
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

LOOP = "torch loop over tokens written from the equation, no packaged implementation"


def s4d(name, time, causal, state=6, dim=16):
    d = Draw(name)
    modes = state // 2
    p = {"log_dt": d.uniform(dim, low=math.log(0.01), high=math.log(0.3)), "log_A_real": d.normal(dim, modes, std=0.3, mean=-0.7),
         "A_imag": d.normal(dim, modes, std=2.0), "C": d.normal(dim, modes, 2), "D": d.normal(dim),
         "output_linear.weight": d.weight(2 * dim, dim), "output_linear.bias": d.bias(2 * dim)}
    if not causal:
        p["C_back"] = d.normal(dim, modes, 2)

    def run(module, p, i):
        x = i["x"]
        dt, a = p["log_dt"].exp()[:, None], torch.complex(-p["log_A_real"].exp(), p["A_imag"])

        def states(c, x):
            """The recurrence, a token at a time: outputs after each."""
            gain = torch.view_as_complex(p[c].contiguous()) * (torch.exp(dt * a) - 1) / a
            h, out = torch.zeros(BATCH, dim, modes, dtype=a.dtype), []
            for u in x.unbind(1):
                h = torch.exp(dt * a) * h + u[..., None]
                out.append(2 * (gain * h).sum(-1).real)
            return torch.stack(out, 1)
        y = states("C", x) + p["D"] * x
        if not causal:
            y = y + F.pad(states("C_back", x.flip(1)), (0, 0, 1, -1)).flip(1)
        return F.glu(linear(p, "output_linear", F.gelu(y))), {}

    golden(name, "s4d", {"dim": dim, "state": state, "causal": causal}, p, {"x": d.normal(BATCH, time, dim)}, run,
           reference=LOOP, versions={}, note="complex recurrence", script="lra_more.py")


def lru(name, time, state=10, dim=16):
    d = Draw(name)
    p = {"nu_log": d.normal(state, std=0.5, mean=-1.5), "theta_log": d.normal(state, std=0.5), "gamma_log": d.normal(state, std=0.3, mean=-0.5),
         "B_re": d.weight(state, dim), "B_im": d.weight(state, dim), "C_re": d.weight(dim, state), "C_im": d.weight(dim, state),
         "D": d.normal(dim), "output_linear.weight": d.weight(2 * dim, dim), "output_linear.bias": d.bias(2 * dim)}

    def run(module, p, i):
        x = i["x"]
        lam = torch.exp(torch.complex(-p["nu_log"].exp(), p["theta_log"].exp()))
        b, c = (torch.complex(p[f"{n}_re"], p[f"{n}_im"]) for n in "BC")
        h, out = torch.zeros(BATCH, state, dtype=lam.dtype), []
        for u in x.unbind(1):
            h = lam * h + p["gamma_log"].exp() * (u.to(b.dtype) @ b.T)
            out.append((h @ c.T).real + p["D"] * u)
        return F.glu(linear(p, "output_linear", F.gelu(torch.stack(out, 1)))), {}

    golden(name, "lru", {"dim": dim, "state": state}, p, {"x": d.normal(BATCH, time, dim)}, run, reference=LOOP, versions={},
           note="complex recurrence", script="lra_more.py")


def segments(name, mixer, time, segment, memory, rate=1, slots=0, conv=False, dim=32, heads=4):
    d = Draw(name)
    p = projections(d, dim, bias=False) | {"r_proj.weight": d.weight(dim, dim), "u": d.normal(heads, dim // heads), "v": d.normal(heads, dim // heads)}
    config = {"dim": dim, "heads": heads, "segment": segment, "memory": memory}
    if mixer == "compressive":
        config |= {"rate": rate, "slots": slots, "compression": "conv" if conv else "mean"}
    if conv:
        p["compress.weight"] = d.weight(dim, rate * dim)

    def run(module, p, i):
        x, out = i["x"], []
        freq = 10000.0 ** (-torch.arange(0, dim, 2, dtype=x.dtype) / dim)
        for t in range(time):
            start = t // segment * segment
            low = max(0, start - memory)
            old = x[:, :low].unflatten(1, (-1, rate)) if low else x[:, :0, None]
            old = linear(p, "compress", old.flatten(2)) if conv and low else old.mean(2)
            seen = torch.cat([old[:, max(0, old.shape[1] - slots):], x[:, low:t + 1]], 1)
            angle = torch.arange(seen.shape[1] - 1, -1, -1, dtype=x.dtype)[:, None] * freq
            r = linear(p, "r_proj", torch.cat([angle.sin(), angle.cos()], -1)).unflatten(-1, (heads, -1))
            q = linear(p, "q_proj", x[:, t]).unflatten(-1, (heads, -1))
            k, v = (linear(p, f"{n}_proj", seen).unflatten(-1, (heads, -1)) for n in "kv")
            a = torch.einsum("bhd,bjhd->bhj", q + p["u"], k) + torch.einsum("bhd,jhd->bhj", q + p["v"], r)
            a = (a / (dim // heads) ** 0.5).softmax(-1)
            out.append(torch.einsum("bhj,bjhd->bhd", a, v).flatten(1))
        return linear(p, "o_proj", torch.stack(out, 1)), {}

    golden(name, mixer, config, p, {"x": d.normal(BATCH, time, dim)}, run, reference=LOOP, versions={},
           note="gradients flow into the memory", script="lra_more.py")


def sinkhorn(name, time, block, iterations=5, temperature=0.75, dim=32, heads=4):
    d = Draw(name)
    p = projections(d, dim, bias=False)
    count = time // block

    def run(module, p, i):
        q, k, v = (split(linear(p, f"{n}_proj", i["x"]), heads).unflatten(2, (count, block)) for n in "qkv")
        scale = (dim // heads) ** -0.5
        r = q.mean(3) @ k.mean(3).mT * scale / temperature
        for _ in range(iterations):
            r = r - r.logsumexp(-1, keepdim=True)
            r = r - r.logsumexp(-2, keepdim=True)
        # The dense matrix over all tokens: own block and, spread by the sorting, the same offset of every block.
        ks, vs = (torch.einsum("bhuv,bhvtd->bhutd", r.exp(), s) for s in (k, v))
        a = (torch.cat([q @ k.mT, q @ ks.mT], -1) * scale).softmax(-1)
        o = a[..., :block] @ v + a[..., block:] @ vs
        return linear(p, "o_proj", join(o.flatten(2, 3))), {}

    golden(name, "sinkhorn", {"dim": dim, "heads": heads, "block": block, "iterations": iterations, "temperature": temperature}, p,
           {"x": d.normal(BATCH, time, dim)}, run, reference=DENSE, versions={},
           note="sinkhorn-transformer takes keys for values in its sorted part and adds noise, so it is not used", script="lra_more.py")


def sinkhorn_causal(name, time, block, iterations=3, temperature=0.75, dim=32, heads=4):
    """Block by block: what a block knows of the sorting is made from the rows up to its own."""
    d = Draw(name)
    p = projections(d, dim, bias=False)
    width = dim // heads

    def run(module, p, i):
        q, k, v = (split(linear(p, f"{n}_proj", i["x"]), heads) for n in "qkv")
        out, table = [], {}
        for b in range(math.ceil(time / block)):
            start, end = b * block, min(time, (b + 1) * block)
            query = q[:, :, :start + 1].mean(2)
            row = [(query * k[:, :, j * block:(j + 1) * block].mean(2)).sum(-1) / width**0.5 / temperature for j in range(b)]
            keys, values = k[:, :, start:end], v[:, :, start:end]
            if row:
                row = torch.stack(row, -1)
                # The history of the iterations, so that columns know their sums down to this row.
                history = [row - row.logsumexp(-1, keepdim=True)]
                for n in range(iterations):
                    columns = []
                    for j in range(b):
                        above = [table[a][n][..., j] for a in range(j + 1, b)] + [history[n][..., j]]
                        columns.append(history[n][..., j] - torch.stack(above, -1).logsumexp(-1))
                    columns = torch.stack(columns, -1)
                    history.append(columns - columns.logsumexp(-1, keepdim=True))
                table[b] = history
                weights = history[-1].exp()
                mixed = lambda s: torch.einsum("bhj,bhjtd->bhtd", weights, s[:, :, :start].unflatten(2, (b, block)))
                keys, values = torch.cat([mixed(k), keys], 2), torch.cat([mixed(v), values], 2)
            for t in range(start, end):
                seen = keys.shape[2] - (end - t - 1)
                a = torch.einsum("bhd,bhjd->bhj", q[:, :, t], keys[:, :, :seen]) / width**0.5
                out.append(torch.einsum("bhj,bhjd->bhd", a.softmax(-1), values[:, :, :seen]))
        return linear(p, "o_proj", torch.stack(out, 2).transpose(1, 2).flatten(2)), {}

    config = {"dim": dim, "heads": heads, "block": block, "iterations": iterations, "temperature": temperature, "causal": True}
    golden(name, "sinkhorn", config, p, {"x": d.normal(BATCH, time, dim)}, run, reference=LOOP, versions={},
           note="sinkhorn-transformer's causal form balances nothing, so it is not used", script="lra_more.py")


def local_released(name, time, window, dim=32, heads=4):
    """The reshape of the released code: [window, groups], attention over the first."""
    d = Draw(name)
    p = projections(d, dim, bias=False)

    def run(module, p, i):
        x = F.pad(i["x"], (0, 0, 0, window - time % window))
        q, k, v = (linear(p, f"{n}_proj", x).unflatten(1, (window, -1)).unflatten(-1, (heads, -1)) for n in "qkv")
        a = torch.einsum("bignd,bjgnd->bgnij", q, k) / (dim // heads) ** 0.5
        o = torch.einsum("bgnij,bjgnd->bignd", a.softmax(-1), v)
        return linear(p, "o_proj", o.flatten(1, 2).flatten(2)[:, :time]), {}

    golden(name, "local", {"dim": dim, "heads": heads, "window": window, "lra_compat": True}, p, {"x": d.normal(BATCH, time, dim)}, run,
           reference=DENSE, versions={}, note="zeros at the end take part, as the released mask pads with a true value", script="lra_more.py")


def routing_causal(name, clusters, window, dim=32, heads=4):
    """Tokens near their cluster's direction, as many in each: then the nearest of a cluster are its members."""
    d = Draw(name)
    p = {f"{n}_proj.weight": d.weight(dim, dim) for n in "qvo"}
    time, width = clusters * window, dim // heads
    means = F.normalize(d.normal(heads, clusters, width), dim=-1)
    member = torch.stack([torch.from_numpy(d.rng.permutation(time) % clusters) for _ in range(BATCH * heads)]).view(BATCH, heads, time)
    q = torch.stack([means[h][member[:, h]] for h in range(heads)], 2) * 2 + d.normal(BATCH, time, heads, width, std=0.15)
    x = torch.linalg.solve(p["q_proj.weight"].double(), q.flatten(2).double().mT).mT.float()

    def make():
        module = KmeansAttention(clusters, window, heads, width, causal=True, shared_qk=True).eval()
        module.kmeans.initted.fill_(True)
        return module

    def run(module, p, i):
        module.kmeans.means.data = i["means"].to(i["x"].dtype)
        q, v = (split(linear(p, f"{n}_proj", i["x"]), heads) for n in "qv")
        nearest = torch.einsum("bhtd,hcd->bhtc", q, i["means"].to(q.dtype)).argmax(-1)
        assert (nearest == member).all(), "the tokens are not where they were meant to be"
        return linear(p, "o_proj", join(module(q, q, v)[0])), {}

    golden(name, "routing", {"dim": dim, "heads": heads, "clusters": clusters, "causal": True}, p, {"x": x, "means": means}, run, make,
           buffers=["means"], tolerance=3e-5, reference="routing-transformer KmeansAttention, torch linear around it",
           versions={"routing-transformer": importlib.metadata.version("routing-transformer")},
           note="clusters of one size, where its choice of the nearest tokens is that of the nearest clusters", script="lra_more.py")


def routing(name, clusters, window, dim=32, heads=4):
    d = Draw(name)
    p = projections(d, dim, bias=False)
    time = clusters * window
    means = F.normalize(d.normal(heads, clusters, dim // heads), dim=-1)

    def make():
        module = KmeansAttention(clusters, window, heads, dim // heads).eval()
        module.kmeans.initted.fill_(True)
        return module

    def run(module, p, i):
        module.kmeans.means.data = i["means"].to(i["x"].dtype)
        q, k, v = (split(linear(p, f"{n}_proj", i["x"]), heads) for n in "qkv")
        return linear(p, "o_proj", join(module(q, k, v)[0])), {}

    golden(name, "routing", {"dim": dim, "heads": heads, "clusters": clusters, "iterations": 0}, p,
           {"x": d.normal(BATCH, time, dim), "means": means}, run, make, buffers=["means"], tolerance=3e-5,
           reference="routing-transformer KmeansAttention, torch linear around it",
           versions={"routing-transformer": importlib.metadata.version("routing-transformer")},
           note="fixed means, no running mean over training", script="lra_more.py")


def reformer(name, time, chunk, buckets, hashes, dim=32, heads=4):
    d = Draw(name)
    p = {"query_key.weight": d.weight(dim, dim), "value.weight": d.weight(dim, dim), "o_proj.weight": d.weight(dim, dim)}
    rotations = d.normal(heads, dim // heads, hashes, buckets // 2)
    config = transformers.ReformerConfig(hidden_size=dim, num_attention_heads=heads, attention_head_size=dim // heads, num_buckets=buckets,
                                         num_hashes=hashes, lsh_attn_chunk_length=chunk, lsh_num_chunks_before=1, lsh_num_chunks_after=0,
                                         is_decoder=False, lsh_attention_probs_dropout_prob=0.0)

    def run(module, p, i):
        drawn, torch.randn = torch.randn, lambda *_, **__: i["rotations"].to(i["x"].dtype)
        try:
            theirs = {k: p[k] for k in ("query_key.weight", "value.weight")}
            o = functional_call(module, theirs, (i["x"],)).hidden_states
        finally:
            torch.randn = drawn
        return linear(p, "o_proj", o), {}

    golden(name, "reformer", {"dim": dim, "heads": heads, "chunk": chunk, "buckets": buckets, "hashes": hashes}, p,
           {"x": d.normal(BATCH, time, dim), "rotations": rotations}, run, lambda: LSHSelfAttention(config).eval(), buffers=["rotations"],
           reference="transformers LSHSelfAttention, torch linear after it", versions=HF, note="its random rotations are replaced by ours",
           script="lra_more.py")


def combiner(name, pattern, time, segment, causal, dim=32, heads=4, summary=None):
    """The dense matrix of effective weights, query by query: direct tokens and regions in one softmax."""
    d = Draw(name)
    p = projections(d, dim, bias=False)
    if summary and "proj" in summary:
        p |= {f"row_summary.{n}.weight": d.weight(dim, dim) for n in ("hidden", "key")}
        p |= {"row_summary.norm.weight": d.gain(dim), "row_summary.norm.bias": d.bias(dim)}

    def run(module, p, i):
        q, k, v = (split(linear(p, f"{n}_proj", i["x"]), heads) for n in "qkv")
        q = q * (dim // heads) ** -0.5

        def inner(query, places):
            """The inner distribution of a region under a query, as a row over all tokens."""
            w = torch.zeros(BATCH, heads, time, dtype=q.dtype)
            return w.index_copy(2, torch.tensor(places), torch.einsum("bhd,bhjd->bhj", query, k[:, :, places]).softmax(-1))

        def region(places):
            """Key and inner distribution of tokens summed up by their maxima."""
            return k[:, :, places].amax(2), inner(q[:, :, places].amax(2), places)

        blocks = [list(range(b, min(time, b + segment))) for b in range(0, time, segment)]
        row_keys = k
        if summary:
            # Token by token, the attention of its whole row.
            given = [torch.einsum("bhj,bhjd->bhd", inner(q[:, :, t], blocks[t // segment]), k if "wsum" in summary else v) for t in range(time)]
            row_keys = torch.stack(given, 2)
            if "proj" in summary:
                hidden = i["x"] + linear(p, "row_summary.hidden", join(row_keys))
                hidden = F.layer_norm(hidden, (dim,), p["row_summary.norm.weight"], p["row_summary.norm.bias"], 1e-5)
                row_keys = split(linear(p, "row_summary.key", hidden), heads)
        rows = []
        for t in range(time):
            s, c = divmod(t, segment)
            own = [j for j in range(s * segment, min(time, (s + 1) * segment)) if j <= t or not causal]
            if pattern == "fixed":
                direct, regions = own, [region(b) for n, b in enumerate(blocks) if n < s or not causal]
            elif pattern == "logsparse":
                direct, regions = [t], []
                for level in range(time.bit_length()):
                    size = 1 << level
                    if t >> level & 1:
                        start = (t // size - 1) * size
                        regions.append(region(list(range(start, start + size))))
            elif pattern == "axial":
                direct, regions = own, []
                for n, b in enumerate(blocks):
                    if (n < s if causal else True) and c < len(b):
                        regions.append((row_keys[:, :, b[c]], inner(q[:, :, b[c]], b)))
            else:
                direct = own + [n * segment + c for n in range(s)]
                regions = []
                for column in range(segment):
                    if column != c and s > 0:
                        regions.append(region([n * segment + column for n in range(s)]))
                for n in range(s):
                    left, right = blocks[n][:c], blocks[n][c + 1:]
                    regions += [region(r) for r in (left, right) if r]
            logits = [torch.einsum("bhd,bhjd->bhj", q[:, :, t], k[:, :, direct])]
            logits += [torch.einsum("bhd,bhd->bh", q[:, :, t], key)[..., None] for key, _ in regions]
            weights = torch.cat(logits, -1).softmax(-1)
            row = torch.zeros(BATCH, heads, time, dtype=q.dtype).index_copy(2, torch.tensor(direct), weights[..., :len(direct)])
            for n, (_, spread) in enumerate(regions):
                row = row + weights[..., len(direct) + n, None] * spread
            rows.append(row)
        w = torch.stack(rows, 2)
        assert (w.sum(-1) - 1).abs().max() < 1e-4
        if causal:
            assert w.triu(1).abs().max() == 0 and w.tril().masked_select(torch.ones(time, time).tril().bool()).min() > 0
        return linear(p, "o_proj", join(w @ v)), {}

    config = {"dim": dim, "heads": heads, "pattern": pattern, "segment": segment, "causal": causal} | ({"row_summary": summary} if summary else {})
    golden(name, "combiner", config, p,
           {"x": d.normal(BATCH, time, dim)}, run, reference=DENSE, versions={},
           note="every row of the matrix sums to one, and is above zero exactly where it may look", script="lra_more.py")


if __name__ == "__main__":
    s4d("s4d", 45, True)
    s4d("s4d_bidirectional", 37, False)
    lru("lru", 45)
    segments("transformer_xl", "transformer_xl", 21, 6, 4)
    segments("compressive", "compressive", 30, 4, 4, rate=2, slots=5)
    segments("compressive_conv", "compressive", 30, 6, 3, rate=3, slots=4, conv=True)
    sinkhorn("sinkhorn", 30, 6)
    sinkhorn_causal("sinkhorn_causal", 28, 6)
    local_released("local_released", 22, 5)
    routing("routing", 5, 7)
    routing_causal("routing_causal", 4, 6)
    reformer("reformer", 36, 6, 4, 2)
    combiner("combiner_fixed", "fixed", 23, 5, True)
    combiner("combiner_fixed_bidirectional", "fixed", 23, 5, False)
    combiner("combiner_logsparse", "logsparse", 21, 5, True)
    combiner("combiner_axial", "axial", 23, 5, True)
    combiner("combiner_axial_bidirectional", "axial", 20, 5, False)
    for summary in ("wsum", "proj", "wsum_proj"):
        combiner(f"combiner_axial_{summary}", "axial", 23, 5, True, summary=summary)
    combiner("combiner_mixture", "mixture", 23, 5, True)
