"""Softmax attention and its windowed form: transformers (Llama, Mistral, MPT, Bloom) and torch."""

import torch
import transformers
from common import Draw, call, golden
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

VERSIONS = {"transformers": transformers.__version__}
BATCH = 2


def config(dim, heads, kv_heads=None, query_heads=None, head_dim=None, causal=True, position="rope",
           rope_base=10000.0, bias=False, **more):
    return {
        "dim": dim, "heads": heads, "kv_heads": kv_heads or heads, "query_heads": query_heads or heads,
        "head_dim": head_dim or dim // heads, "causal": causal, "position": position,
        "rope_base": rope_base, "bias": bias,
    } | more


def parameters(draw, c):
    q, kv, d = c["query_heads"] * c["head_dim"], c["kv_heads"] * c["head_dim"], c["dim"]
    p = {}
    for name, rows, columns in (("q_proj", q, d), ("k_proj", kv, d), ("v_proj", kv, d), ("o_proj", d, q)):
        p[f"{name}.weight"] = draw.weight(rows, columns)
        if c["bias"]:
            p[f"{name}.bias"] = draw.bias(rows)
    # Sharper than the usual initial attention, so that errors in the scores show.
    p["q_proj.weight"] *= 2
    return p


def rotary(name, c, time, family="llama", note=""):
    """Llama or Mistral attention with their own rotary module and mask."""
    draw = Draw(name)
    window = c.get("window")
    hub = dict(hidden_size=c["dim"], num_attention_heads=c["query_heads"], num_key_value_heads=c["kv_heads"],
               head_dim=c["head_dim"], num_hidden_layers=1, max_position_embeddings=256, vocab_size=8,
               intermediate_size=8, attn_implementation="eager",
               rope_parameters={"rope_type": "default", "rope_theta": c["rope_base"]})
    if family == "llama":
        from transformers.models.llama import modeling_llama as m
        hub = transformers.LlamaConfig(attention_bias=c["bias"], **hub)
        attention, rope = m.LlamaAttention, m.LlamaRotaryEmbedding
    else:
        from transformers.models.mistral import modeling_mistral as m
        hub = transformers.MistralConfig(sliding_window=window, **hub)
        attention, rope = m.MistralAttention, m.MistralRotaryEmbedding

    def run(module, p, i):
        x = i["x"]
        position = torch.arange(time)[None]
        mask = None
        if c["causal"]:
            make_mask = create_sliding_window_causal_mask if window else create_causal_mask
            mask = make_mask(config=hub, inputs_embeds=x, attention_mask=None, past_key_values=None, position_ids=position)
        y, weights = call(module, p, x, position_embeddings=rope(hub)(x, position), attention_mask=mask)
        if window:
            assert (weights.detach()[0, 0, time - 1] > 0).sum() == window
        elif not c["causal"]:
            assert (weights.detach() > 0).all()
        return y, {}

    golden(name, "local" if window else "attention", c, parameters(draw, c),
           {"x": draw.normal(BATCH, time, c["dim"])}, run, lambda: attention(hub, layer_idx=0),
           reference=f"transformers {attention.__name__} and {rope.__name__}", versions=VERSIONS, note=note,
           script="attention.py")


def sinks(name, c, time):
    """A cache that keeps the first tokens and the last: at each step its keys are turned by their places in it."""
    from transformers.models.llama import modeling_llama as m
    draw, first, window = Draw(name), c["sinks"], c["window"]
    width, heads = c["head_dim"], c["query_heads"]
    hub = transformers.LlamaConfig(hidden_size=c["dim"], num_attention_heads=heads, head_dim=width, max_position_embeddings=256,
                                   rope_parameters={"rope_type": "default", "rope_theta": c["rope_base"]})

    def run(module, p, i):
        x = i["x"]
        q, k, v = ((x @ p[f"{n}_proj.weight"].mT).unflatten(-1, (-1, width)).transpose(1, 2) for n in "qkv")
        k, v = (s.repeat_interleave(heads // s.shape[1], 1) for s in (k, v))
        out = []
        for t in range(time):
            kept = [j for j in range(t + 1) if j < first or j > t - window]
            cos, sin = m.LlamaRotaryEmbedding(hub)(x, torch.arange(len(kept))[None])
            turn = lambda s, cos, sin: m.apply_rotary_pos_emb(s, s, cos, sin)[0]
            keys, query = turn(k[:, :, kept], cos, sin), turn(q[:, :, t:t + 1], cos[:, -1:], sin[:, -1:])
            out.append((query @ keys.mT / width**0.5).softmax(-1) @ v[:, :, kept])
        return torch.cat(out, 2).transpose(1, 2).flatten(2) @ p["o_proj.weight"].mT, {}

    golden(name, "attention", c, parameters(draw, c), {"x": draw.normal(BATCH, time, c["dim"])}, run,
           reference="torch loop over steps, transformers LlamaRotaryEmbedding", versions=VERSIONS,
           note="positions are places in the cache, as StreamingLLM has them", script="attention.py")


def bidirectional(name, c, time):
    draw = Draw(name)

    def run(module, p, i):
        fused = {
            "in_proj_weight": torch.cat([p[f"{n}_proj.weight"] for n in "qkv"]),
            "out_proj.weight": p["o_proj.weight"],
        }
        if c["bias"]:
            fused |= {"in_proj_bias": torch.cat([p[f"{n}_proj.bias"] for n in "qkv"]), "out_proj.bias": p["o_proj.bias"]}
        y, _ = call(module, fused, i["x"], i["x"], i["x"], need_weights=False)
        return y, {}

    golden(name, "attention", c, parameters(draw, c), {"x": draw.normal(BATCH, time, c["dim"])}, run,
           lambda: torch.nn.MultiheadAttention(c["dim"], c["heads"], bias=c["bias"], batch_first=True),
           reference="torch.nn.MultiheadAttention", versions={},
           note="in_proj cut into q, k, v" + ("; a key bias does not change a softmax without rotary" if c["bias"] else ""),
           zero=["grad.w.k_proj.bias"] if c["bias"] else [], script="attention.py")


def alibi_mpt(name, c, time):
    from transformers.models.mpt.modeling_mpt import MptAttention, build_mpt_alibi_tensor
    draw = Draw(name)
    hub = transformers.MptConfig(d_model=c["dim"], n_heads=c["heads"], n_layers=1, max_seq_len=time, attn_implementation="eager")

    def run(module, p, i):
        fused = {"Wqkv.weight": torch.cat([p[f"{n}_proj.weight"] for n in "qkv"]), "out_proj.weight": p["o_proj.weight"]}
        future = torch.ones(time, time, dtype=torch.bool).triu(1)
        y, _ = call(module, fused, i["x"], position_bias=build_mpt_alibi_tensor(c["heads"], time), attention_mask=future)
        return y, {}

    golden(name, "attention", c, parameters(draw, c), {"x": draw.normal(BATCH, time, c["dim"])}, run,
           lambda: MptAttention(hub), reference="transformers MptAttention, build_mpt_alibi_tensor", versions=VERSIONS,
           note="Wqkv cut into q, k, v; future positions masked by hand", script="attention.py")


def alibi_bloom(name, c, time):
    from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor
    draw = Draw(name)
    h, d = c["heads"], c["head_dim"]
    hub = transformers.BloomConfig(hidden_size=c["dim"], n_head=h, n_layer=1, hidden_dropout=0.0, attention_dropout=0.0)

    def run(module, p, i):
        def fuse(kind):
            return torch.stack([p[f"{n}_proj.{kind}"].view(h, d, -1) for n in "qkv"], 1).reshape(3 * h * d, -1)
        fused = {"query_key_value.weight": fuse("weight"), "query_key_value.bias": fuse("bias")[:, 0],
                 "dense.weight": p["o_proj.weight"], "dense.bias": p["o_proj.bias"]}
        x = i["x"]
        mask = torch.zeros(time, time).masked_fill(torch.ones(time, time, dtype=torch.bool).triu(1), float("-inf"))
        bias = build_alibi_tensor(torch.ones(BATCH, time, dtype=torch.long), h, x.dtype)
        y, _ = call(module, fused, x, residual=torch.zeros_like(x), alibi=bias, attention_mask=mask)
        return y, {}

    golden(name, "attention", c, parameters(draw, c), {"x": draw.normal(BATCH, time, c["dim"])}, run,
           lambda: BloomAttention(hub, layer_idx=0), reference="transformers BloomAttention, build_alibi_tensor",
           versions=VERSIONS, note="query_key_value cut into q, k, v per head; residual 0; future masked by hand; "
           "6 heads: slopes of 4 heads, then every other slope of 8 heads; a key bias changes nothing",
           zero=["grad.w.k_proj.bias"], script="attention.py")


if __name__ == "__main__":
    rotary("attention_mha_rope", config(32, 4), 37)
    rotary("attention_gqa_rope", config(32, 4, kv_heads=2, rope_base=500.0, bias=True), 37, note="kv head j serves query heads 2j, 2j+1")
    rotary("attention_gqa_rope_long", config(32, 4, kv_heads=2), 130)
    rotary("attention_mqa", config(32, 4, kv_heads=1), 37)
    rotary("attention_sqa", config(64, 8, kv_heads=2, query_heads=4), 37,
           note="SQA as grouped attention of 4 query heads with head_dim = dim / 8; o_proj [dim, 4 * head_dim]")
    rotary("attention_bidirectional_rope", config(32, 4, causal=False), 37, note="Llama attention without a mask")
    rotary("local", config(32, 4, window=8), 37, family="mistral", note="query i sees keys i-7..i")
    rotary("local_gqa_long", config(32, 4, kv_heads=2, window=16), 130, family="mistral", note="query i sees keys i-15..i")
    sinks("attention_sinks", config(32, 4, kv_heads=2, window=8, sinks=3), 37)
    bidirectional("attention_bidirectional", config(32, 4, causal=False, position="none", bias=True), 37)
    bidirectional("attention_bidirectional_nobias", config(32, 2, causal=False, position="none"), 37)
    alibi_mpt("attention_alibi", config(32, 4, position="alibi"), 37)
    alibi_bloom("attention_alibi_bloom", config(48, 6, position="alibi", bias=True), 37)
