"""The goldens of `imports.py` for the models of flash-linear-attention, run on a CPU with the replaced kernels of `linear.py`."""

import linear  # noqa: F401  replaces the kernels
import fla
import torch.nn.functional as F
from fla.models import (
    DeltaNetConfig, DeltaNetForCausalLM, GatedDeltaNetConfig, GatedDeltaNetForCausalLM, GLAConfig, GLAForCausalLM, RetNetConfig,
    RetNetForCausalLM,
)
from fla.layers import attn
from fla.modules import mlp
from fla.modules.norm import layernorm
from fla.ops.attn.naive import naive_parallel_attn
from imports import VOCAB, case


def swiglu(gate, up):
    return F.silu(gate) * up


def rms_norm(x, weight, bias, residual=None, eps=1e-5, prenorm=False, residual_in_fp32=False):
    x = x if residual is None else x + residual
    y = layernorm.rms_norm_ref(x, weight, bias, eps=eps)
    return (y, x) if prenorm else y


def flash_attention(q, k, v, causal, window_size):
    assert causal
    return naive_parallel_attn(q, k, v, window_size=window_size[0] + 1 if window_size[0] >= 0 else None)[0]


attn.flash_attn_func = flash_attention
layernorm.rms_norm = rms_norm
mlp.swiglu = swiglu
mlp.swiglu_linear = lambda gate, up, weight, bias: F.linear(swiglu(gate, up), weight, bias)
SMALL = dict(
    vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_heads=2, intermediate_size=24, norm_eps=1e-3, fuse_cross_entropy=False,
    bos_token_id=None, eos_token_id=None, use_cache=False,
)


def run(model, ids):
    linear.states.clear()
    return model(input_ids=ids, use_cache=False)


def main():
    for name, kind, config in [
        ("gla", GLAForCausalLM, GLAConfig(**SMALL)),
        ("delta_net", DeltaNetForCausalLM, DeltaNetConfig(**SMALL, tie_word_embeddings=True)),
        ("gated_deltanet", GatedDeltaNetForCausalLM, GatedDeltaNetConfig(**SMALL, head_dim=6)),
        ("retnet", RetNetForCausalLM, RetNetConfig(**SMALL)),
        ("gla_hybrid", GLAForCausalLM, GLAConfig(**SMALL, attn=dict(layers=[1], num_heads=4, num_kv_heads=2, qkv_bias=True))),
        ("gated_deltanet_hybrid", GatedDeltaNetForCausalLM, GatedDeltaNetConfig(
            **SMALL | dict(num_hidden_layers=3), head_dim=6, attn=dict(layers=[0, 2], num_heads=2, window_size=4, rope_theta=1000.0))),
    ]:
        case(name, kind, config, run=run, script="imports_fla.py", versions={"fla-core": fla.__version__})


if __name__ == "__main__":
    main()
