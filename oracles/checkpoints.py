"""Folders that transformers saves, read by the binary: its greedy continuation must be transformers' own.

    python oracles/checkpoints.py target/release/anyformer [FOLDER]

Makes small random Llama, Mistral (with a window shorter than the prompt), Mamba and Mamba-2 models in bfloat16 with a byte-level tokenizer,
saves them with save_pretrained (the Llama also in shards), and compares 24 greedy tokens. Run by hand when hub::families changes.
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
    "mistral": (t.MistralForCausalLM, t.MistralConfig(**ATTENTION, sliding_window=8), {}),
    "mamba": (t.MambaForCausalLM, t.MambaConfig(**STATE), {}),
    "mamba2": (t.Mamba2ForCausalLM, t.Mamba2Config(**STATE, num_heads=4, head_dim=16, n_groups=2, chunk_size=16), {}),
}


def tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def main():
    binary = sys.argv[1]
    root = pathlib.Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp())
    words, wrong = tokenizer(), 0
    ids = torch.tensor([words.encode(PROMPT).ids])
    for name, (kind, config, options) in CASES.items():
        torch.manual_seed(0)
        model = kind(config).to(torch.bfloat16)
        model.save_pretrained(root / name, **options)
        words.save(str(root / name / "tokenizer.json"))
        model = kind.from_pretrained(root / name, dtype=torch.float32)
        theirs = ids
        for _ in range(24):
            theirs = torch.cat([theirs, model(theirs).logits[:, -1:].argmax(-1)], 1)
        theirs = theirs[0, ids.shape[1] :].tolist()
        call = [binary, "generate", root / name, "--prompt", PROMPT, "--max-tokens", "24", "--temperature", "0", "--json", "--quiet"]
        ran = subprocess.run(call, capture_output=True, text=True)
        ours = json.loads(ran.stdout)["tokens"] if ran.returncode == 0 else ran.stderr
        wrong += ours != theirs
        print(name, "equal" if ours == theirs else f"DIFFERS: ours {ours}, theirs {theirs}")
    print(f"transformers {t.__version__}, torch {torch.__version__}: {wrong} of {len(CASES)} differ")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
