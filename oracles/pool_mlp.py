"""Average-pool mixers (timm, torch) and channel mixers (timm Mlp, transformers LlamaMLP)."""

import timm
import torch
import torch.nn.functional as F
import transformers
from common import Draw, call, golden
from timm.layers import Mlp
from timm.models.metaformer import Pooling
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

BATCH = 2


def pool_2d(name, height, width, dim=32):
    def run(module, p, i):
        x = i["x"].transpose(1, 2).unflatten(2, (height, width))
        return module(x).flatten(2).transpose(1, 2), {}

    golden(name, "pool", {"dim": dim, "kind": "2d", "height": height, "width": width, "pool_size": 3}, {},
           {"x": Draw(name).normal(BATCH, height * width, dim)}, run, Pooling, reference="timm Pooling (PoolFormer)",
           versions={"timm": timm.__version__}, note="token t is row t / width, column t % width; padding is not counted; minus x",
           script="pool_mlp.py")


def pool_1d(name, time, dim=32):
    def run(module, p, i):
        x = i["x"].transpose(1, 2)
        y = F.avg_pool1d(x, 3, stride=1, padding=1, count_include_pad=False) - x
        return y.transpose(1, 2), {}

    golden(name, "pool", {"dim": dim, "kind": "1d", "pool_size": 3}, {}, {"x": Draw(name).normal(BATCH, time, dim)}, run,
           reference="torch avg_pool1d minus x", versions={}, note="sees one position ahead: not causal", script="pool_mlp.py")


def mlp(name, time, dim=32, hidden=80):
    d = Draw(name)
    p = {"fc1.weight": d.weight(hidden, dim), "fc1.bias": d.bias(hidden), "fc2.weight": d.weight(dim, hidden), "fc2.bias": d.bias(dim)}
    golden(name, "mlp", {"dim": dim, "hidden": hidden, "activation": "gelu", "bias": True}, p, {"x": d.normal(BATCH, time, dim)},
           lambda module, p, i: (call(module, p, i["x"]), {}), lambda: Mlp(dim, hidden), reference="timm Mlp",
           versions={"timm": timm.__version__}, note="exact (erf) gelu", script="pool_mlp.py")


def swiglu(name, time, dim=32, hidden=80):
    d = Draw(name)
    p = {"gate_proj.weight": d.weight(hidden, dim), "up_proj.weight": d.weight(hidden, dim), "down_proj.weight": d.weight(dim, hidden)}
    hub = transformers.LlamaConfig(hidden_size=dim, intermediate_size=hidden, num_attention_heads=4)
    golden(name, "swiglu", {"dim": dim, "hidden": hidden, "bias": False}, p, {"x": d.normal(BATCH, time, dim)},
           lambda module, p, i: (call(module, p, i["x"]), {}), lambda: LlamaMLP(hub), reference="transformers LlamaMLP",
           versions={"transformers": transformers.__version__}, note="down(silu(gate x) * up x)", script="pool_mlp.py")


def moe(name, time, dim=16, hidden=12, experts=4, top_k=2):
    """Mixtral's block; its fused matrices are stacked from ours, gate over up."""
    d = Draw(name)
    p = {"router.weight": d.weight(experts, dim)}
    for e in range(experts):
        p |= {f"experts.{e}.{n}_proj.weight": d.weight(hidden, dim) for n in ("gate", "up")}
        p |= {f"experts.{e}.down_proj.weight": d.weight(dim, hidden)}
    hub = transformers.MixtralConfig(hidden_size=dim, intermediate_size=hidden, num_local_experts=experts, num_experts_per_tok=top_k,
                                     router_jitter_noise=0.0)
    hub._experts_implementation = "eager"

    def run(module, p, i):
        both = [torch.cat([p[f"experts.{e}.gate_proj.weight"], p[f"experts.{e}.up_proj.weight"]]) for e in range(experts)]
        theirs = {"gate.weight": p["router.weight"], "experts.gate_up_proj": torch.stack(both),
                  "experts.down_proj": torch.stack([p[f"experts.{e}.down_proj.weight"] for e in range(experts)])}
        y = call(module, theirs, i["x"])
        return y[0] if isinstance(y, tuple) else y, {}

    golden(name, "moe", {"dim": dim, "hidden": hidden, "experts": experts, "top_k": top_k}, p, {"x": d.normal(BATCH, time, dim)},
           run, lambda: MixtralSparseMoeBlock(hub), reference="transformers MixtralSparseMoeBlock",
           versions={"transformers": transformers.__version__}, note="top-k of a softmax, renormalised; no balance loss in the gradients",
           script="pool_mlp.py")


if __name__ == "__main__":
    pool_2d("pool_2d", 5, 7)
    pool_1d("pool_1d", 37)
    mlp("mlp", 37)
    swiglu("swiglu", 37)
    moe("moe", 23)
