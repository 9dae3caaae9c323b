"""Model folders as transformers saves them, one small random model per family, with the scores of ragged rows.

    python oracles/imports.py [NAME ...]  the families of transformers, or some
    FLA_PYTHON oracles/imports_fla.py    those of flash-linear-attention

Each golden holds the file's tensors (`w.NAME`), its config.json, `ids` of seven rows end to end with their `lengths`
(and `types` for BERT), and `y`: each row run alone by the reference in float64. `stream`, where present: the scores after the last
token of the row of 12, run token by token with the reference's own cache.
"""

import json
import pathlib
import sys
import tempfile

import torch
import transformers as t
from common import SEED, Draw, difference, float64_everywhere, write
from safetensors.torch import load_file

VOCAB = 48
LENGTHS = [9, 1, 5, 12, 3, 7, 2]


def fill(module, draw):
    """Random values that leave no term trivial: norms away from one, biases away from zero."""
    with torch.no_grad():
        for name, value in module.named_parameters():
            if value.dim() == 1 and name.endswith("weight"):
                value.copy_(draw.gain(*value.shape))
            elif name.endswith("A_log"):
                value.copy_(draw.uniform(*value.shape, low=-1.0, high=1.0))
            elif name.endswith("dt_bias"):
                value.copy_(draw.dt_bias(value.shape[0], low=0.05, high=0.5))
            elif value.dim() == 1:
                value.copy_(draw.bias(value.shape[0]))
            elif any(word in name for word in ("embed", "wte", "wpe")):
                value.copy_(draw.normal(*value.shape, std=0.5))
            else:
                value.copy_(draw.weight(*value.shape))


ONLY = sys.argv[1:]


def case(name, kind, config, *, types=False, stream=False, run=None, script="imports.py", versions=None, layout=None):
    if ONLY and name not in ONLY:
        return
    name = f"import_{name}"
    draw = Draw(name)
    module = kind(config).eval()
    fill(module, draw)
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(folder)
        text = json.loads((pathlib.Path(folder) / "config.json").read_text())
        weights = load_file(pathlib.Path(folder) / "model.safetensors")
    if layout:
        text, weights = layout(text, weights)
    rows = [draw.ints(1, length, high=VOCAB - 4) + 4 for length in LENGTHS]
    kinds = [draw.ints(1, length, high=2) for length in LENGTHS]

    def scores(dtype):
        model = kind(config).to(dtype).eval()
        model.load_state_dict(module.state_dict())
        found = []
        for ids, segments in zip(rows, kinds):
            more = {"token_type_ids": segments} if types else {}
            out = run(model, ids) if run else model(input_ids=ids, **more)
            one = (out.logits if hasattr(out, "logits") else out.last_hidden_state)[0]
            found.append(one if one.dim() == 2 else one[None])
        result = {"y": torch.cat(found)}
        if stream:
            model = kind(config).to(dtype).eval()
            model.load_state_dict(module.state_dict())
            cache = None
            for at in range(12):
                out = model(input_ids=rows[3][:, at : at + 1], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
            result["stream"] = out.logits[0, -1]
        return {k: v.detach() for k, v in result.items()}

    with float64_everywhere():
        exact = scores(torch.float64)
    plain = scores(torch.float32)
    assert all(v.dtype == torch.float64 for v in exact.values())
    worst = max((difference(plain[k].double(), exact[k]), k) for k in exact)
    assert worst[0] < 3e-5, (name, worst)
    tensors = {"ids": torch.cat(rows, 1)[0], "lengths": torch.tensor(LENGTHS)} | {f"w.{k}": v for k, v in weights.items()} | exact
    if types:
        tensors["types"] = torch.cat(kinds, 1)[0]
    write(name, "import", text, tensors, {
        "reference": f"transformers {kind.__name__}" if versions is None else f"fla {kind.__name__}",
        "versions": (versions or {}) | {"transformers": t.__version__, "torch": torch.__version__},
        "precision": "float64, stored as float32; the same code in float32 differs by at most %.1e (%s)" % worst,
        "seed": SEED, "script": f"oracles/{script}", "note": "saved with save_pretrained; each row alone",
    })
    print(f"{name:34} y {tuple(exact['y'].shape)}  float32 differs by {worst[0]:.1e} in {worst[1]}")


LLAMA = dict(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=8, bos_token_id=None, eos_token_id=None, attn_implementation="eager",
)
LONG = LLAMA | dict(hidden_size=32, num_attention_heads=2, num_key_value_heads=1, intermediate_size=16, num_hidden_layers=1)
BERT = dict(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16,
    attn_implementation="eager",
)


def original(text, weights):
    """The names and the config of mamba_ssm, by the table that transformers' own conversion script uses."""
    inner = {"d_state": text["state_size"], "d_conv": text["conv_kernel"], "expand": text["expand"]}
    if text["model_type"] == "mamba2":
        inner |= {"layer": "Mamba2", "headdim": text["head_dim"], "ngroups": text["n_groups"]}
    else:
        inner |= {"dt_rank": text["time_step_rank"]}
    config = {
        "d_model": text["hidden_size"], "n_layer": text["num_hidden_layers"], "vocab_size": text["vocab_size"] - 5, "ssm_cfg": inner,
        "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8, "tie_embeddings": True,
    }
    return config, {name.replace("backbone.embeddings.", "backbone.embedding."): value for name, value in weights.items()}


def rope(kind, **rest):
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=1000.0, **rest))


def main():
    llama = lambda name, config, **more: case(name, t.LlamaForCausalLM, t.LlamaConfig(**config), **more)
    llama("llama_bias", LLAMA | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True))
    llama("llama_linear", LONG | rope("linear", factor=4.0))
    llama("llama_dynamic", LONG | rope("dynamic", factor=2.0), stream=True)
    llama("llama_yarn", LONG | rope("yarn", factor=4.0, original_max_position_embeddings=8, beta_fast=4.0, beta_slow=0.5))
    llama("llama_llama3", LONG | dict(max_position_embeddings=64) | rope(
        "llama3", factor=8.0, original_max_position_embeddings=32, low_freq_factor=1.0, high_freq_factor=4.0))
    case("mistral", t.MistralForCausalLM, t.MistralConfig(**LLAMA, sliding_window=4))
    case("qwen2", t.Qwen2ForCausalLM, t.Qwen2Config(
        **LLAMA, use_sliding_window=True, sliding_window=4, max_window_layers=1, tie_word_embeddings=True))
    case("qwen3", t.Qwen3ForCausalLM, t.Qwen3Config(**LLAMA, head_dim=6, rms_norm_eps=1e-3))
    case("gpt2", t.GPT2LMHeadModel, t.GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=None, eos_token_id=None, attn_implementation="eager"))
    case("opt", t.OPTForCausalLM, t.OPTConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24, max_position_embeddings=16,
        word_embed_proj_dim=16, attn_implementation="eager"))
    neox = dict(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, attn_implementation="eager")
    case("gpt_neox", t.GPTNeoXForCausalLM, t.GPTNeoXConfig(**neox, rotary_pct=0.5))
    case("gpt_neox_serial", t.GPTNeoXForCausalLM, t.GPTNeoXConfig(**neox, rotary_pct=1.0, use_parallel_residual=False))
    case("bert", t.BertForMaskedLM, t.BertConfig(**BERT), types=True)
    case("bert_hidden", t.BertModel, t.BertConfig(**BERT))
    case("roberta", t.RobertaForMaskedLM, t.RobertaConfig(**BERT))
    case("distilbert", t.DistilBertForMaskedLM, t.DistilBertConfig(
        vocab_size=VOCAB, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=16, attn_implementation="eager"))

    deberta = BERT | dict(relative_attention=True, position_buckets=8, max_relative_positions=-1, share_att_key=True, norm_rel_ebd="layer_norm",
                          pos_att_type=["p2c", "c2p"], position_biased_input=False, type_vocab_size=0)
    case("deberta", t.DebertaV2ForMaskedLM, t.DebertaV2Config(**deberta))
    case("deberta_conv", t.DebertaV2Model, t.DebertaV2Config(**deberta | dict(
        position_buckets=-1, max_relative_positions=6, share_att_key=False, norm_rel_ebd="none", position_biased_input=True, type_vocab_size=2,
        conv_kernel_size=3, conv_act="gelu")), types=True)
    case("deberta_class", t.DebertaV2ForSequenceClassification, t.DebertaV2Config(**deberta | dict(
        pos_att_type=["p2c"], share_att_key=False, num_labels=3)))
    case("albert", t.AlbertForMaskedLM, t.AlbertConfig(**BERT, embedding_size=8), types=True)
    case("albert_hidden", t.AlbertModel, t.AlbertConfig(**BERT | dict(num_hidden_layers=3), embedding_size=12))
    labels = dict(num_labels=3)
    case("bert_class", t.BertForSequenceClassification, t.BertConfig(**BERT, **labels), types=True)
    case("roberta_class", t.RobertaForSequenceClassification, t.RobertaConfig(**BERT))
    case("distilbert_class", t.DistilBertForSequenceClassification, t.DistilBertConfig(
        vocab_size=VOCAB, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=16, attn_implementation="eager", **labels))
    case("albert_class", t.AlbertForSequenceClassification, t.AlbertConfig(**BERT, embedding_size=8, **labels))
    case("llama_class", t.LlamaForSequenceClassification, t.LlamaConfig(**LLAMA, **labels))
    case("qwen2_class", t.Qwen2ForSequenceClassification, t.Qwen2Config(**LLAMA, num_labels=4))
    state = dict(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    case("mamba_ssm", t.MambaForCausalLM, t.MambaConfig(**state, time_step_rank=3), layout=original)
    case("mamba2_ssm", t.Mamba2ForCausalLM, t.Mamba2Config(
        **state, num_heads=4, head_dim=8, n_groups=2, chunk_size=16, tie_word_embeddings=True), layout=original)


if __name__ == "__main__":
    main()
