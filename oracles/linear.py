"""Linear-recurrent mixers: the layers of flash-linear-attention on a CPU.

The layers are theirs. Only their Triton kernels are replaced: the recurrences by their own naive
PyTorch references, and the small kernels (norm, rotary, short convolution) by their PyTorch
references where the package has one, else by one-line PyTorch equivalents (see `CPU`).
Run with the environment that holds fla, not with the one of the other scripts.
"""

import warnings

warnings.filterwarnings("ignore")

import fla
import torch
import torch.nn.functional as F
from common import Draw, call, difference, golden
from fla.layers import delta_net, gated_deltanet, gla, linear_attn, multiscale_retention
from fla.modules.causal_conv1d import ops as conv_ops
from fla.modules.norm import fused_norm_gate, layernorm
from fla.modules.rotary import ops as rotary_ops
from fla.ops.delta_rule.naive import delta_rule_recurrence
from fla.ops.gated_delta_rule.gate import naive_gdn_gate
from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule, naive_recurrent_gated_delta_rule
from fla.ops.gla.naive import naive_recurrent_gla
from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
from fla.ops.retention.naive import naive_retention
from fla.ops.simple_gla.naive import naive_recurrent_simple_gla

VERSIONS = {"fla-core": fla.__version__}
BATCH = 2
CPU = ("layer of fla with its kernels replaced: recurrence by the package's naive reference, rms_norm_ref and rotary_embedding_ref "
       "by the package; causal conv by torch conv1d, the swish gate by F.silu, l2 norm by x / sqrt(sum x^2 + 1e-6)")

# The states the replaced kernels leave behind, newest last.
states = []


def cpu_conv(x, weight, bias=None, activation=None, **rest):
    assert rest.get("initial_state") is None and rest.get("residual") is None
    channels, width = weight.shape
    y = F.conv1d(F.pad(x.transpose(1, 2), (width - 1, 0)), weight[:, None], bias, groups=channels).transpose(1, 2)
    assert activation in (None, "silu", "swish")
    return (F.silu(y) if activation else y), None


def cpu_rms_norm(x, weight, bias, residual=None, eps=1e-5, prenorm=False, residual_in_fp32=False):
    assert residual is None and not prenorm
    return layernorm.rms_norm_ref(x, weight, bias, eps=eps)


def cpu_rms_norm_gated(x, g, weight, bias, activation="swish", residual=None, eps=1e-6, **rest):
    assert activation == "swish" and residual is None
    return layernorm.rms_norm_ref(x, weight, bias, eps=eps) * F.silu(g)


def cpu_rotary(x, cos, sin, interleaved=False, seqlen_offsets=0, cu_seqlens=None, **rest):
    assert seqlen_offsets == 0 and cu_seqlens is None
    time = x.shape[1]
    return rotary_ops.rotary_embedding_ref(x, cos[:time], sin[:time], interleaved=interleaved)


def l2(x):
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def heads_first(*tensors):
    return [t.transpose(1, 2) for t in tensors]


def cpu_linear_attn(q, k, v, normalize=False, **rest):
    o, state = naive_recurrent_linear_attn(q, k, v, normalize=normalize, output_final_state=True)
    kv, z = state
    states.append({"kv": kv, "z": z.squeeze(1)})
    return o, None


def cpu_retention(q, k, v, **rest):
    o = naive_retention(*heads_first(q, k, v)).transpose(1, 2)
    gamma = 1 - 2.0 ** (-5 - torch.arange(q.shape[2], dtype=q.dtype))
    again, state = naive_recurrent_simple_gla(q, k, v, gamma.log().expand(q.shape[:3]), output_final_state=True)
    assert difference(again.detach(), o.detach()) < 1e-4
    states.append({"recurrent": state})
    return o, None


def cpu_gla(q, k, v, gk=None, g=None, **rest):
    o, state = naive_recurrent_gla(q, k, v, gk if gk is not None else g, output_final_state=True)
    states.append({"recurrent": state})
    return o, None


def cpu_delta_rule(q, k, v, beta, use_qk_l2norm_in_kernel=False, **rest):
    if use_qk_l2norm_in_kernel:
        q, k = l2(q), l2(k)
    o, state = delta_rule_recurrence(*heads_first(q, k, v, beta))
    states.append({"recurrent": state})
    return o.transpose(1, 2), None


def cpu_gated_delta_rule(q, k, v, g, beta, A_log=None, dt_bias=None, **rest):
    assert rest["use_qk_l2norm_in_kernel"] and rest["use_beta_sigmoid_in_kernel"] and rest["use_gate_in_kernel"]
    assert not rest["allow_neg_eigval"]
    q, k, beta = l2(q), l2(k), beta.sigmoid()
    g = naive_gdn_gate(g, A_log, dt_bias, output_dtype=q.dtype)
    o, state = naive_recurrent_gated_delta_rule(q, k, v, beta, g, output_final_state=True)
    again, state2 = naive_chunk_gated_delta_rule(q, k, v, g, beta, chunk_size=16, output_final_state=True)
    assert difference(again.detach(), o.detach()) < 1e-4 and difference(state2.detach(), state.detach()) < 1e-4
    states.append({"recurrent": state})
    return o, None


conv_ops.causal_conv1d = gated_deltanet.causal_conv1d = cpu_conv
layernorm.rms_norm = cpu_rms_norm
fused_norm_gate.rms_norm_gated = cpu_rms_norm_gated
rotary_ops.rotary_embedding = cpu_rotary
linear_attn.chunk_linear_attn = linear_attn.fused_recurrent_linear_attn = cpu_linear_attn
multiscale_retention.chunk_retention = multiscale_retention.fused_recurrent_retention = cpu_retention
gla.chunk_gla = gla.fused_recurrent_gla = cpu_gla
delta_net.chunk_delta_rule = delta_net.fused_recurrent_delta_rule = cpu_delta_rule
gated_deltanet.chunk_gated_delta_rule = gated_deltanet.fused_recurrent_gated_delta_rule = cpu_gated_delta_rule


def layer(name, mixer, config, p, time, make, reference, rename=(), note=""):
    rename = dict(rename)

    def run(module, p, i):
        states.clear()
        y = call(module, {rename.get(k, k): v for k, v in p.items()}, i["x"])[0]
        assert len(states) == 1
        return y, states[0]

    x = Draw(name + "/x").normal(BATCH, time, config["dim"])
    return golden(name, mixer, config, p, {"x": x}, run, make, reference=reference, versions=VERSIONS,
                  note=". ".join(filter(None, [note, CPU])), script="linear.py")


def linear_attention(name, time, dim=32, heads=4):
    d = Draw(name)
    p = {f"{n}_proj.weight": d.weight(dim, dim) for n in "qkvo"}
    config = {"dim": dim, "heads": heads, "head_dim": dim // heads, "feature_map": "elu", "normalise": True, "causal": True,
              "scale": (dim // heads) ** -0.5, "eps": 1e-10}
    layer(name, "linear_attention", config, p, time,
          lambda: linear_attn.LinearAttention(hidden_size=dim, num_heads=heads, feature_map="elu", output_norm="identity",
                                              do_feature_map_norm=True),
          "fla LinearAttention, naive_recurrent_linear_attn",
          note="q scaled by head_dim^-0.5 (cancels); y = (phi(q) S) / (phi(q).z + 1e-10); state.kv [b, h, dk, dv], state.z [b, h, dk]")


def retention(name, time, dim=32, heads=4, expand_v=2):
    d = Draw(name)
    value = expand_v * dim
    p = {
        "q_proj.weight": d.weight(dim, dim), "k_proj.weight": d.weight(dim, dim), "v_proj.weight": d.weight(value, dim),
        "g_proj.weight": d.weight(value, dim), "g_norm.weight": d.gain(value // heads), "o_proj.weight": d.weight(dim, value),
    }
    config = {"dim": dim, "heads": heads, "expand_k": 1, "expand_v": expand_v, "rope_base": 10000.0, "norm_eps": 1e-5}
    layer(name, "retention", config, p, time,
          lambda: multiscale_retention.MultiScaleRetention(hidden_size=dim, num_heads=heads, expand_k=1, expand_v=expand_v),
          "fla MultiScaleRetention, naive_retention", rename={"g_norm.weight": "g_norm_swish_gate.weight"},
          note="rotary halves on q and k, then q * dk^-0.5; gamma_h = 1 - 2^(-5-h); state by naive_recurrent_simple_gla with log gamma")


def gated_linear(name, time, dim=32, heads=4, expand_k=0.5, expand_v=1, rank=16, gate_std=1.0):
    d = Draw(name)
    key, value = int(expand_k * dim), int(expand_v * dim)
    p = {
        "q_proj.weight": d.weight(key, dim), "k_proj.weight": d.weight(key, dim), "v_proj.weight": d.weight(value, dim),
        "g_proj.weight": d.weight(value, dim), "gk_proj.0.weight": d.weight(rank, dim),
        "gk_proj.1.weight": gate_std * d.weight(key, rank), "gk_proj.1.bias": d.normal(key, std=gate_std),
        "g_norm.weight": d.gain(value // heads), "o_proj.weight": d.weight(dim, value),
    }
    config = {"dim": dim, "heads": heads, "expand_k": expand_k, "expand_v": expand_v, "gate_low_rank_dim": rank,
              "gate_logit_normalizer": 16, "norm_eps": 1e-5}
    layer(name, "gla", config, p, time,
          lambda: gla.GatedLinearAttention(hidden_size=dim, num_heads=heads, expand_k=expand_k, expand_v=expand_v,
                                           gate_low_rank_dim=rank, gate_logit_normalizer=16),
          "fla GatedLinearAttention, naive_recurrent_gla", rename={"g_norm.weight": "g_norm_swish_gate.weight"},
          note="gk = logsigmoid(.) / 16; q * dk^-0.5; state read after the update")


def delta(name, time, dim=32, heads=4, conv=4):
    d = Draw(name)
    p = {f"{n}_proj.weight": d.weight(dim, dim) for n in "qkv"}
    p["b_proj.weight"] = d.weight(heads, dim)
    p |= {f"{n}_conv1d.weight": d.weight(dim, 1, conv) for n in "qkv"}
    p |= {"o_norm.weight": d.gain(dim // heads), "o_proj.weight": d.weight(dim, dim)}
    config = {"dim": dim, "heads": heads, "conv_size": conv, "use_short_conv": True, "qk_norm": "l2", "beta": "sigmoid",
              "l2_eps": 1e-6, "norm_eps": 1e-5}
    layer(name, "delta_net", config, p, time,
          lambda: delta_net.DeltaNet(hidden_size=dim, num_heads=heads, conv_size=conv),
          "fla DeltaNet, delta_rule_recurrence", note="silu after each conv; l2 eps inside the root; q * dk^-0.5 after the l2 norm; no gate")


def gated_delta(name, time, dim=32, heads=2, head_dim=12, expand_v=2, conv=4):
    d = Draw(name)
    key, value = heads * head_dim, heads * head_dim * expand_v
    p = {
        "q_proj.weight": d.weight(key, dim), "k_proj.weight": d.weight(key, dim), "v_proj.weight": d.weight(value, dim),
        "a_proj.weight": d.weight(heads, dim), "b_proj.weight": d.weight(heads, dim), "g_proj.weight": d.weight(value, dim),
        "q_conv1d.weight": d.weight(key, 1, conv), "k_conv1d.weight": d.weight(key, 1, conv),
        "v_conv1d.weight": d.weight(value, 1, conv), "A_log": d.uniform(heads, low=-1.0, high=1.0),
        "dt_bias": d.dt_bias(heads, low=0.05, high=0.5), "o_norm.weight": d.gain(value // heads), "o_proj.weight": d.weight(dim, value),
    }
    config = {"dim": dim, "heads": heads, "head_dim": head_dim, "expand_v": expand_v, "conv_size": conv, "l2_eps": 1e-6, "norm_eps": 1e-5}
    layer(name, "gated_delta_net", config, p, time,
          lambda: gated_deltanet.GatedDeltaNet(hidden_size=dim, num_heads=heads, head_dim=head_dim, expand_v=expand_v, conv_size=conv),
          "fla GatedDeltaNet, naive_recurrent_gated_delta_rule (= naive_chunk_gated_delta_rule)",
          note="g = -exp(A_log) softplus(a_proj x + dt_bias); decay before the delta step. Also equal to transformers Qwen3-Next: qwen3_next.py")


if __name__ == "__main__":
    gated_linear("gla", 37)
    gated_linear("gla_long", 130, rank=8, gate_std=6.0)
    delta("delta_net", 37)
    delta("delta_net_long", 130)
    gated_delta("gated_delta_net", 37)
    gated_delta("gated_delta_net_long", 130)
    retention("retention", 37)
    retention("retention_long", 130)
    linear_attention("linear_attention", 37)
    linear_attention("linear_attention_long", 130)
