"""The tokenizer.json that transformers makes of a DeBERTa's spm.model, and the tokens that it gives.

    python oracles/unigram.py

Trains a small unigram model by sentencepiece on the book's pages (with its default normalisation, as the published models have), lets
transformers' DebertaV2Tokenizer translate it, and writes beside it the tokens of texts, most of them those of sentencepiece itself. Needs sentencepiece and transformers.
"""

import json
import pathlib
import tempfile

import sentencepiece as spm
import transformers as t
from common import GOLDENS
from spm_gguf import TEXTS

VOCAB = 400


def main():
    root = pathlib.Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as folder:
        corpus = pathlib.Path(folder) / "corpus.txt"
        pages = sorted((root / "docs" / "src" / "architectures").glob("*.md"))
        corpus.write_text("\n".join(page.read_text() for page in pages))
        spm.SentencePieceTrainer.train(
            input=str(corpus), model_prefix=f"{folder}/spm", vocab_size=VOCAB, model_type="unigram", character_coverage=0.9995,
            pad_id=0, bos_id=1, eos_id=2, unk_id=3, pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]", unk_piece="[UNK]",
            minloglevel=2, num_threads=1)
        model = spm.SentencePieceProcessor(model_file=f"{folder}/spm.model")
        made = t.DebertaV2Tokenizer.from_pretrained(folder)
        made.save_pretrained(folder)
        text = (pathlib.Path(folder) / "tokenizer.json").read_text()
    cases, apart = [], 0
    for words in TEXTS:
        theirs = made(words).input_ids
        # transformers normalises by an expression of its own instead of the model's rules: rare spaces differ.
        apart += theirs != [made.cls_token_id] + model.encode(words) + [made.sep_token_id]
        cases.append({"text": words, "ids": theirs})
    assert apart <= 3, apart
    named = {
        "reference": "transformers DebertaV2Tokenizer", "versions": {"transformers": t.__version__, "sentencepiece": spm.__version__},
        "script": "oracles/unigram.py", "cases": cases, "tokenizer": json.loads(text),
    }
    (GOLDENS / "deberta_tokenizer.json").write_text(json.dumps(named, ensure_ascii=True) + "\n")
    print(len(text), "bytes;", len(cases), "texts, in", apart, "of them sentencepiece itself gives other tokens")


if __name__ == "__main__":
    main()
