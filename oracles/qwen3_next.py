"""Second opinion on the gated delta net goldens: transformers' Qwen3-Next layer. Writes nothing.

Run in an environment WITHOUT fla, or transformers hands the recurrence to fla's kernels.
"""

import importlib.util
import json

import torch
import transformers
from common import GOLDENS, call, difference, load
from safetensors import safe_open
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

assert importlib.util.find_spec("fla") is None


def check(name):
    with safe_open(GOLDENS / f"{name}.safetensors", "pt") as file:
        c = json.loads(file.metadata()["config"])
    golden = load(name)
    h, dk = c["heads"], c["head_dim"]
    hub = transformers.Qwen3NextConfig(
        hidden_size=c["dim"], linear_num_key_heads=h, linear_num_value_heads=h, linear_key_head_dim=dk,
        linear_value_head_dim=dk * c["expand_v"], linear_conv_kernel_dim=c["conv_size"], rms_norm_eps=c["norm_eps"],
        num_hidden_layers=1, layer_types=["linear_attention"])
    p = {k[2:]: v.clone().requires_grad_(True) for k, v in golden.items() if k.startswith("w.")}
    x = golden["x"].clone().requires_grad_(True)

    def per_head(*names):
        return torch.cat([p[n].view(h, -1, c["dim"]) for n in names], 1).flatten(0, 1)

    fused = {
        "in_proj_qkvz.weight": per_head("q_proj.weight", "k_proj.weight", "v_proj.weight", "g_proj.weight"),
        "in_proj_ba.weight": per_head("b_proj.weight", "a_proj.weight"),
        "conv1d.weight": torch.cat([p[f"{n}_conv1d.weight"] for n in "qkv"]),
        "dt_bias": p["dt_bias"], "A_log": p["A_log"], "norm.weight": p["o_norm.weight"], "out_proj.weight": p["o_proj.weight"],
    }
    y = call(Qwen3NextGatedDeltaNet(hub, layer_idx=0), fused, x)
    (y * golden["cotangent"]).sum().backward()
    pairs = {"y": y, "grad.x": x.grad} | {f"grad.w.{k}": v.grad for k, v in p.items()}
    worst = max((difference(v, golden[k]), k) for k, v in pairs.items())
    print(f"{name:34} Qwen3-Next differs by {worst[0]:.1e} in {worst[1]}")
    assert worst[0] < 3e-5


if __name__ == "__main__":
    check("gated_delta_net")
    check("gated_delta_net_long")
