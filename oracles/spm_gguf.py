"""A GGUF file with a SentencePiece tokenizer inside, and what sentencepiece itself makes of some texts.

    python oracles/spm_gguf.py

Trains a small BPE model with byte fallback by sentencepiece on the book's pages, writes its pieces, scores and types by the package gguf as
the files of Llama have them, and beside it the tokens (begin token in front, as Llama asks) of texts. Needs sentencepiece and gguf.
"""

import json
import pathlib
import tempfile

import gguf
import numpy as np
import sentencepiece as spm
from common import GOLDENS

VOCAB = 700
TEXTS = [
    "The state stands for its tokens.", "", " ", "a", "  two  spaces  ", "tab\tand\nline\r\n", "Grüße aus Köln", "日本語のテキスト", "🙂 emoji 🧑‍🚀",
    "x" * 30, "model model models modelling", "1234567890 3.14", "def f(x):\n    return x + 1\n", "\u00a0non-breaking\u3000wide", "▁ literal", "<0x41> <s>x",
    "café", "cafe\u0301", "Ünïcödé", "the the the The THE", "a,b;c.d!e?f", "\x00nul\x07", "end ", " begin",
]


def main():
    root = pathlib.Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as folder:
        corpus = pathlib.Path(folder) / "corpus.txt"
        pages = sorted((root / "docs" / "src" / "architectures").glob("*.md"))
        corpus.write_text("\n".join(page.read_text() for page in pages))
        spm.SentencePieceTrainer.train(
            input=str(corpus), model_prefix=f"{folder}/m", vocab_size=VOCAB, model_type="bpe", byte_fallback=True, character_coverage=0.995,
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True, minloglevel=2,
            user_defined_symbols=["<tool>"], num_threads=1)
        model = spm.SentencePieceProcessor(model_file=f"{folder}/m.model")
    count = model.get_piece_size()
    pieces = [model.id_to_piece(i) for i in range(count)]
    types = [
        2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 4 if pieces[i] == "<tool>" else 1
        for i in range(count)
    ]
    writer = gguf.GGUFWriter(GOLDENS / "llama_tokenizer.gguf", "llama")
    writer.add_embedding_length(4)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_feed_forward_length(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_scores([model.get_score(i) for i in range(count)])
    writer.add_token_types(types)
    writer.add_unk_token_id(model.unk_id())
    writer.add_bos_token_id(model.bos_id())
    writer.add_eos_token_id(model.eos_id())
    writer.add_add_bos_token(True)
    writer.add_tensor("token_embd.weight", np.zeros((count, 4), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    # Control tokens in a text are text to sentencepiece, and behind tokens of the user it puts no space; llama.cpp and we read the first as
    # tokens and begin anew behind the second, so both stay out of the texts.
    texts = [text for text in TEXTS if "<s>" not in text]
    cases = [{"text": text, "ids": [model.bos_id()] + model.encode(text)} for text in texts]
    named = {"reference": "sentencepiece", "versions": {"sentencepiece": spm.__version__}, "script": "oracles/spm_gguf.py", "cases": cases}
    (GOLDENS / "llama_tokenizer.json").write_text(json.dumps(named, indent=1, ensure_ascii=True) + "\n")
    print(count, "pieces;", sum(len(case["ids"]) for case in cases), "tokens of", len(cases), "texts")


if __name__ == "__main__":
    main()
