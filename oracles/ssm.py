"""Mamba (transformers, with mambapy as second opinion) and Mamba-2 (transformers)."""

import importlib.metadata

import mambapy
import torch
import transformers
from common import Draw, call, difference, golden
from mambapy.mamba import MambaBlock
from mambapy.mamba import MambaConfig as MambapyConfig
from transformers.cache_utils import DynamicCache
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

VERSIONS = {"transformers": transformers.__version__, "mambapy": importlib.metadata.version("mambapy")}
BATCH = 2


def with_cache(module, hub, p, x):
    """Output with gradients, and the states a cached prefill leaves behind."""
    y = call(module, p, x)
    cache = DynamicCache(config=hub)
    with torch.no_grad():
        again = call(module, p, x, cache_params=cache)
    assert difference(again, y.detach()) < 1e-5
    layer = cache.layers[0]
    return y, {"ssm": layer.recurrent_states[0], "conv": layer.conv_states[0]}


def mamba(name, time, dim=32, expand=2, state=8, conv=4, dt_rank=2):
    draw = Draw(name)
    inner = expand * dim
    p = {
        "in_proj.weight": draw.weight(2 * inner, dim),
        "conv1d.weight": draw.weight(inner, 1, conv),
        "conv1d.bias": draw.bias(inner),
        "x_proj.weight": draw.weight(dt_rank + 2 * state, inner),
        "dt_proj.weight": draw.weight(inner, dt_rank),
        "dt_proj.bias": draw.dt_bias(inner),
        "A_log": torch.log(torch.arange(1.0, state + 1)) + draw.normal(inner, state, std=0.3),
        "D": draw.gain(inner),
        "out_proj.weight": draw.weight(dim, inner),
    }
    hub = transformers.MambaConfig(hidden_size=dim, num_hidden_layers=1, state_size=state, conv_kernel=conv, expand=expand,
                                   time_step_rank=dt_rank, vocab_size=8, use_mambapy=False, use_bias=False, use_conv_bias=True)
    other = MambapyConfig(d_model=dim, n_layers=1, d_state=state, expand_factor=expand, d_conv=conv, dt_rank=dt_rank, pscan=False)
    x = draw.normal(BATCH, time, dim)

    def run(module, p, i):
        return with_cache(module, hub, p, i["x"])

    config = {"dim": dim, "expand": expand, "state": state, "conv": conv, "dt_rank": dt_rank}
    exact = golden(name, "mamba", config, p, {"x": x}, run, lambda: MambaMixer(hub, layer_idx=0),
                   reference="transformers MambaMixer (PyTorch path), outputs and gradients also equal mambapy MambaBlock",
                   versions=VERSIONS, note="in_proj rows [x, z]; x_proj rows [dt, B, C]; state.conv: last K columns before the convolution",
                   script="ssm.py")

    # Second opinion, in float32 as mambapy is written.
    leaves = {k: v.clone().requires_grad_(True) for k, v in p.items()}
    x = x.clone().requires_grad_(True)
    y = call(MambaBlock(other), leaves, x)
    from common import load
    (y * load(name)["cotangent"]).sum().backward()
    pairs = {"y": y, "grad.x": x.grad} | {f"grad.w.{k}": v.grad for k, v in leaves.items()}
    worst = max((difference(v.double(), exact[k]), k) for k, v in pairs.items())
    print(f"{'':34} mambapy differs by {worst[0]:.1e} in {worst[1]}")
    assert worst[0] < 3e-5, worst


def mamba2(name, time, dim=32, expand=2, state=8, conv=4, head_dim=16, groups=1, chunk=16):
    draw = Draw(name)
    inner = expand * dim
    heads = inner // head_dim
    channels = inner + 2 * groups * state
    p = {
        "in_proj.weight": draw.weight(inner + channels + heads, dim),
        "conv1d.weight": draw.weight(channels, 1, conv),
        "conv1d.bias": draw.bias(channels),
        "dt_bias": draw.dt_bias(heads, low=0.05, high=0.5),
        "A_log": draw.uniform(heads, low=-1.0, high=1.0),
        "D": draw.gain(heads),
        "norm.weight": draw.gain(inner),
        "out_proj.weight": draw.weight(dim, inner),
    }
    hub = transformers.Mamba2Config(hidden_size=dim, num_hidden_layers=1, state_size=state, conv_kernel=conv, expand=expand,
                                    head_dim=head_dim, num_heads=heads, n_groups=groups, chunk_size=chunk, vocab_size=8,
                                    layer_norm_epsilon=1e-5, use_bias=False, use_conv_bias=True)

    def run(module, p, i):
        assert module.time_step_limit[0] == 0.0 and module.time_step_limit[1] == float("inf")
        return with_cache(module, hub, p, i["x"])

    config = {"dim": dim, "expand": expand, "state": state, "conv": conv, "head_dim": head_dim, "heads": heads,
              "groups": groups, "norm_eps": 1e-5}
    golden(name, "mamba2", config, p, {"x": draw.normal(BATCH, time, dim)}, run, lambda: Mamba2Mixer(hub, layer_idx=0),
           reference=f"transformers Mamba2Mixer (PyTorch path, chunk {chunk})", versions={"transformers": transformers.__version__},
           note="in_proj rows [z, x, B, C, dt]; conv over [x, B, C]; RMS over inner / groups channels of y * silu(z)", script="ssm.py")


if __name__ == "__main__":
    mamba("mamba", 37)
    mamba("mamba_long", 130, dim=16, state=4, dt_rank=3)
    mamba2("mamba2", 37)
    mamba2("mamba2_groups2", 37, groups=2)
    mamba2("mamba2_long", 130, dim=16, state=16, head_dim=8, groups=2, chunk=32)
