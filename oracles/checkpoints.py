"""Folders that transformers saves, read by the binary: its greedy continuation must be transformers' own; and folders that
the binary exports, read by transformers: the logits must be those of the first folder, or for a model trained here its greedy tokens.

    python oracles/checkpoints.py target/release/anyformer [FOLDER]

Makes small random models of every family that transformers can run (windows shorter than the prompt) in bfloat16 with a byte-level
tokenizer, saves them with save_pretrained (the Llama also in shards), and compares 24 greedy tokens. Encoders are exported only.
Run by hand when hub::families changes.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

PROMPT = "To be or not to be, that is the question"
ATTENTION = dict(
    vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, initializer_range=0.3, bos_token_id=None, eos_token_id=None,
)
STATE = dict(
    vocab_size=256, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.3, bos_token_id=None,
    eos_token_id=None, pad_token_id=None,
)
CASES = {
    "llama": (t.LlamaForCausalLM, t.LlamaConfig(**ATTENTION), {}),
    "llama_sharded": (t.LlamaForCausalLM, t.LlamaConfig(**ATTENTION), {"max_shard_size": "20KB"}),
    "llama_tied_bias": (t.LlamaForCausalLM, t.LlamaConfig(**ATTENTION, tie_word_embeddings=True, attention_bias=True), {}),
    "llama_yarn": (t.LlamaForCausalLM, t.LlamaConfig(**ATTENTION | dict(max_position_embeddings=64), rope_parameters=dict(
        rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16)), {}),
    "llama_llama3": (t.LlamaForCausalLM, t.LlamaConfig(**ATTENTION, rope_parameters=dict(
        rope_type="llama3", rope_theta=10000.0, factor=8.0, original_max_position_embeddings=16, low_freq_factor=1.0, high_freq_factor=4.0)), {}),
    "qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config(**ATTENTION, use_sliding_window=True, sliding_window=8, max_window_layers=1), {}),
    "qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config(**ATTENTION, head_dim=12, tie_word_embeddings=True), {}),
    "gpt2": (t.GPT2LMHeadModel, t.GPT2Config(
        vocab_size=256, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3, bos_token_id=None, eos_token_id=None), {}),
    "opt": (t.OPTForCausalLM, t.OPTConfig(
        vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, max_position_embeddings=128,
        word_embed_proj_dim=32, init_std=0.3, bos_token_id=None, eos_token_id=None, pad_token_id=None), {"max_shard_size": "20KB"}),
    "gpt_neox": (t.GPTNeoXForCausalLM, t.GPTNeoXConfig(
        vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=128,
        initializer_range=0.3, bos_token_id=None, eos_token_id=None), {}),
    "mistral": (t.MistralForCausalLM, t.MistralConfig(**ATTENTION, sliding_window=8), {}),
    "mamba": (t.MambaForCausalLM, t.MambaConfig(**STATE), {}),
    "mamba2": (t.Mamba2ForCausalLM, t.Mamba2Config(**STATE, num_heads=4, head_dim=16, n_groups=2, chunk_size=16), {}),
}
ENCODER = dict(vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, initializer_range=0.3)
LABELS = dict(num_labels=3)
DEBERTA = ENCODER | dict(
    relative_attention=True, position_buckets=16, max_relative_positions=-1, share_att_key=True, norm_rel_ebd="layer_norm",
    pos_att_type=["p2c", "c2p"], position_biased_input=False, type_vocab_size=0,
)
ENCODERS = {
    "bert": (t.BertForMaskedLM, t.BertConfig(**ENCODER)),
    "bert_hidden": (t.BertModel, t.BertConfig(**ENCODER)),
    "roberta": (t.RobertaForMaskedLM, t.RobertaConfig(**ENCODER)),
    "distilbert": (t.DistilBertForMaskedLM, t.DistilBertConfig(
        vocab_size=256, dim=32, n_layers=2, n_heads=4, hidden_dim=48, initializer_range=0.3)),
    "albert": (t.AlbertForMaskedLM, t.AlbertConfig(**ENCODER, embedding_size=16)),
    "albert_class": (t.AlbertForSequenceClassification, t.AlbertConfig(**ENCODER, **LABELS, embedding_size=16)),
    "bert_class": (t.BertForSequenceClassification, t.BertConfig(**ENCODER, **LABELS)),
    "roberta_class": (t.RobertaForSequenceClassification, t.RobertaConfig(**ENCODER, **LABELS)),
    "distilbert_class": (t.DistilBertForSequenceClassification, t.DistilBertConfig(
        vocab_size=256, dim=32, n_layers=2, n_heads=4, hidden_dim=48, initializer_range=0.3, **LABELS)),
    "deberta": (t.DebertaV2ForMaskedLM, t.DebertaV2Config(**DEBERTA)),
    "deberta_conv": (t.DebertaV2Model, t.DebertaV2Config(**DEBERTA | dict(conv_kernel_size=3, share_att_key=False, position_biased_input=True))),
    "deberta_class": (t.DebertaV2ForSequenceClassification, t.DebertaV2Config(**DEBERTA, **LABELS)),
    "llama_class": (t.LlamaForSequenceClassification, t.LlamaConfig(**ATTENTION, **LABELS)),
}


def exported(binary, root, name, model, ids):
    """Whether the logits of an exported folder are those of `model`."""
    subprocess.run([binary, "export", root / name, "--to", root / f"{name}_out", "--quiet"], check=True, capture_output=True)
    with torch.no_grad():
        again = type(model).from_pretrained(root / f"{name}_out", dtype=torch.float32).eval()
        a, b = (next(iter(one(ids).values())) for one in (model.eval(), again))
    return ((a - b).abs().max() / a.abs().max()).item() < 1e-6


def trained(binary, root):
    """A model trained by the binary: greedy tokens there and, exported, in transformers."""
    for name, model in [
        ("trained_attention", ["model.mixers.0.name=attention"]),
        ("trained_mamba2", ["model.mixers.0.name=mamba2", "model.mixers.0.head_dim=16", "model.channel.name=none"]),
    ]:
        run = [binary, "train", "task.name=text", "task.time=32", "model.dim=32", "model.layers=2", "train.steps=20", "train.warmup=2",
               "train.eval_batches=1", "--quiet", "--out", root / name, *model]
        subprocess.run(run, check=True, capture_output=True)
        subprocess.run([binary, "export", root / name, "--to", root / f"{name}_out", "--quiet"], check=True, capture_output=True)
        model = t.AutoModelForCausalLM.from_pretrained(root / f"{name}_out", dtype=torch.float32)
        ids = torch.tensor([t.AutoTokenizer.from_pretrained(root / f"{name}_out")(PROMPT).input_ids])
        ours, theirs = greedy(binary, root / name), continued(model, ids)
        yield name, ours == theirs, f"ours {ours}, theirs {theirs}"


def greedy(binary, folder):
    call = [binary, "generate", folder, "--prompt", PROMPT, "--max-tokens", "24", "--temperature", "0", "--json", "--quiet"]
    ran = subprocess.run(call, capture_output=True, text=True)
    return json.loads(ran.stdout)["tokens"] if ran.returncode == 0 else ran.stderr


def continued(model, ids):
    theirs = ids
    for _ in range(24):
        theirs = torch.cat([theirs, model(theirs).logits[:, -1:].argmax(-1)], 1)
    return theirs[0, ids.shape[1] :].tolist()


def tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def main():
    binary = sys.argv[1]
    root = pathlib.Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp())
    words, results = tokenizer(), []
    ids = torch.tensor([words.encode(PROMPT).ids])
    for name, (kind, config, options) in CASES.items():
        torch.manual_seed(0)
        model = kind(config).to(torch.bfloat16)
        model.save_pretrained(root / name, **options)
        words.save(str(root / name / "tokenizer.json"))
        model = kind.from_pretrained(root / name, dtype=torch.float32)
        ours, theirs = greedy(binary, root / name), continued(model, ids)
        results.append((name, ours == theirs, f"ours {ours}, theirs {theirs}"))
        results.append((f"{name} exported", exported(binary, root, name, model, ids), "logits"))
    for name, (kind, config) in ENCODERS.items():
        torch.manual_seed(0)
        model = kind(config)
        model.save_pretrained(root / name)
        results.append((f"{name} exported", exported(binary, root, name, model, ids), "logits"))
    results.extend(trained(binary, root))
    for name, equal, detail in results:
        print(name, "equal" if equal else f"DIFFERS: {detail}")
    wrong = sum(not equal for _, equal, _ in results)
    print(f"transformers {t.__version__}, torch {torch.__version__}: {wrong} of {len(results)} differ")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
