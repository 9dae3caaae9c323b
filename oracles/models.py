"""Whole tiny language models by transformers: logits and every gradient, under their own names.

`y` holds the logits and `grad.*` are the gradients of sum(y * cotangent), as in the other goldens.
`ce.loss` is the mean next-token cross entropy with the ids as labels, and `ce.grad.*` its gradients.
"""

import torch
import transformers
from common import SEED, Draw, call, difference, float64_everywhere, write

BATCH, VOCAB = 2, 64
NORMS = ("norm.weight", "layernorm.weight", "norm_f.weight")


def draw_parameters(module, draw):
    p = {}
    for name, v in module.named_parameters():
        if name.endswith(NORMS) or name.endswith(".D"):
            p[name] = draw.gain(*v.shape)
        elif name.endswith("A_log") and v.dim() == 2:
            p[name] = torch.log(torch.arange(1.0, v.shape[1] + 1)) + draw.normal(*v.shape, std=0.3)
        elif name.endswith("A_log"):
            p[name] = draw.uniform(*v.shape, low=-1.0, high=1.0)
        elif name.endswith(("dt_proj.bias", "dt_bias")):
            p[name] = draw.dt_bias(v.shape[0], low=0.05, high=0.5)
        elif name.endswith(".bias"):
            p[name] = draw.bias(v.shape[0])
        elif "embed" in name:
            p[name] = draw.normal(*v.shape, std=0.5)
        else:
            p[name] = draw.weight(*v.shape)
    return p


def model(name, make, time, note):
    draw = Draw(name)
    hub = make().config
    params = draw_parameters(make(), draw)
    ids = draw.ints(BATCH, time, high=VOCAB)
    cotangent = draw.normal(BATCH, time, VOCAB, std=0.1)

    def run(dtype):
        module = make().to(dtype).eval()
        tied = getattr(module.config, "tie_word_embeddings", False)
        p = {k: v.to(dtype, copy=True).requires_grad_(True) for k, v in params.items()}
        out = call(module, p, input_ids=ids, labels=ids, use_cache=False)
        assert tied == ("lm_head.weight" not in params)
        result = {"y": out.logits.detach(), "ce.loss": out.loss.detach().reshape(1)}
        grads = torch.autograd.grad((out.logits * cotangent.to(dtype)).sum(), list(p.values()), retain_graph=True)
        result |= {f"grad.w.{k}": g for k, g in zip(p, grads)}
        grads = torch.autograd.grad(out.loss, list(p.values()))
        return result | {f"ce.grad.{k}": g for k, g in zip(p, grads)}

    with float64_everywhere():
        exact = run(torch.float64)
    plain = run(torch.float32)
    assert all(v.dtype == torch.float64 and v.abs().max() > 1e-6 for v in exact.values())
    worst = max((difference(plain[k].double(), exact[k]), k) for k in exact)
    assert worst[0] < 3e-5, worst
    keep = {k: v for k, v in hub.to_dict().items() if isinstance(v, (int, float, str, bool, list)) or k == "rope_parameters"}
    # An infinite limit is no JSON number, and means no limit.
    keep = {k: None if k == "time_step_limit" and v[1] == float("inf") else v for k, v in keep.items()}
    keep |= {"tie_word_embeddings": hub.tie_word_embeddings, "model_type": hub.model_type}
    tensors = {"ids": ids} | {f"w.{k}": v for k, v in params.items()} | exact | {"cotangent": cotangent}
    write(name, "model", keep, tensors, {
        "reference": f"transformers {make().__class__.__name__}",
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "precision": "float64, stored as float32; the same code in float32 differs by at most %.1e (%s)" % worst,
        "seed": SEED, "script": "oracles/models.py", "note": note,
    })
    print(f"{name:34} y {tuple(exact['y'].shape)}  float32 differs by {worst[0]:.1e} in {worst[1]}, loss {exact['ce.loss'].item():.4f}")


if __name__ == "__main__":
    model("model_llama", lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, max_position_embeddings=64, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False, attn_implementation="eager")), 19, "pre-norm RMSNorm, grouped rotary attention, SwiGLU, untied head")
    model("model_mamba", lambda: transformers.MambaForCausalLM(transformers.MambaConfig(
        vocab_size=VOCAB, hidden_size=24, state_size=8, num_hidden_layers=2, conv_kernel=4, expand=2, time_step_rank=2,
        layer_norm_epsilon=1e-5, use_mambapy=False, residual_in_fp32=True, tie_word_embeddings=True)), 19,
        "pre-norm RMSNorm, tied head (backbone.embeddings.weight)")
    model("model_mamba2", lambda: transformers.Mamba2ForCausalLM(transformers.Mamba2Config(
        vocab_size=VOCAB, hidden_size=24, state_size=8, num_hidden_layers=2, conv_kernel=4, expand=2, head_dim=12, num_heads=4,
        n_groups=2, chunk_size=16, layer_norm_epsilon=1e-5, tie_word_embeddings=False)), 19, "pre-norm RMSNorm, untied head")
