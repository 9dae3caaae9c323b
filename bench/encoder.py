"""An encoder in BERT-base's shape on ragged batches: ours, padding-free, beside padded PyTorch and padded onnxruntime.

    python bench/encoder.py target/release/anyformer [--cases 1x64,8x128,...] [--repeats 7] [--threads 2] [--precision bf16]

Random weights (12 layers of 768, 12 heads, 3072), the same for all. Lengths are drawn with an average of 0.6 of the longest; a batch of
one is as long as the longest. PyTorch runs transformers' BertModel with scaled_dot_product_attention and a mask; onnxruntime the export
of the same model; both pool by the mean. Ours is asked over HTTP (/v1/embeddings, token ids), so its time holds the JSON too.
One run of each in turn, medians of `repeats`; the vectors are compared first. --precision bf16: ours rounds the operands of its products,
PyTorch's model is bf16 as a whole, onnxruntime stays f32.
"""

import argparse
import json
import pathlib
import random
import statistics
import tempfile
import time

import numpy as np
import onnxruntime
import torch
import transformers as t
from serving import request, serve
from tokenizers import Tokenizer, models

CASES = "1x64,1x256,1x1024,8x64,8x256,8x1024,16x64,16x256,16x1024"


class Pooled(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        mask = mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        return pooled / pooled.norm(dim=1, keepdim=True)


def lengths(batch, longest):
    """`batch` lengths, the first the longest, 0.6 of it on average."""
    if batch == 1:
        return [longest]
    chance = random.Random(batch * longest)
    rest = [chance.uniform(0.2, 1.0) for _ in range(batch - 1)]
    wanted = 0.6 * batch - 1
    rest = [x * wanted / sum(rest) for x in rest]
    return [longest] + [max(1, min(longest, round(x * longest))) for x in rest]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("binary")
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=["f32", "bf16"], default="f32")
    args = parser.parse_args()
    brief = args.precision == "bf16"
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    root = pathlib.Path(tempfile.mkdtemp())
    config = t.BertConfig(max_position_embeddings=1024, attn_implementation="sdpa")
    model = t.BertModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(root / "bert")
    Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")).save(str(root / "bert" / "tokenizer.json"))
    pooled = Pooled(model).eval()
    example = (torch.ones(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64))
    axes = {name: {0: "batch", 1: "time"} for name in ("ids", "mask")}
    torch.onnx.export(pooled, example, str(root / "bert.onnx"), input_names=["ids", "mask"], output_names=["y"], dynamic_axes=axes,
                      opset_version=18, dynamo=False)
    if brief:
        pooled = Pooled(model.to(torch.bfloat16)).eval()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    session = onnxruntime.InferenceSession(str(root / "bert.onnx"), options, providers=["CPUExecutionProvider"])
    print(f"torch {torch.__version__}, transformers {t.__version__}, onnxruntime {onnxruntime.__version__}, {args.threads} threads")
    print("| batch x longest | tokens, with padding | PyTorch, ms | onnxruntime, ms | ours, ms | PyTorch / ours | onnxruntime / ours |")
    print("|---|---|---|---|---|---|---|")
    # The others do not wait for more texts either.
    with serve(args.binary, root / "bert", args.threads, "--wait", "0", "--precision", args.precision) as port, torch.inference_mode():
        for case in args.cases.split(","):
            batch, longest = map(int, case.split("x"))
            counts = lengths(batch, longest)
            chance = random.Random(1)
            rows = [[chance.randrange(1000, 30000) for _ in range(count)] for count in counts]
            ids, mask = (np.zeros((batch, longest), np.int64) for _ in range(2))
            for index, row in enumerate(rows):
                ids[index, : len(row)], mask[index, : len(row)] = row, 1
            tensors = torch.from_numpy(ids), torch.from_numpy(mask)

            def ours():
                status, body = request(port, "POST", "/v1/embeddings", {"input": rows})
                assert status == 200, body
                return np.array([one["embedding"] for one in json.loads(body)["data"]])

            runs = {
                "torch": lambda: pooled(*tensors).float().numpy(), "ort": lambda: session.run(None, {"ids": ids, "mask": mask})[0], "ours": ours,
            }
            made = {name: run() for name, run in runs.items()}
            for name in ("torch", "ort"):
                apart = np.abs(made[name] - made["ours"]).max()
                assert apart < (3e-2 if brief else 1e-4), (case, name, apart)
            times = {name: [] for name in runs}
            for _ in range(args.repeats):
                for name, run in runs.items():
                    # Threads of PyTorch and onnxruntime go on waiting actively for a while after a run.
                    time.sleep(0.2)
                    began = time.perf_counter()
                    run()
                    times[name].append(1000 * (time.perf_counter() - began))
            torch_ms, ort_ms, ours_ms = (statistics.median(times[name]) for name in ("torch", "ort", "ours"))
            print(f"| {case} | {sum(counts)} of {batch * longest} | {torch_ms:.0f} | {ort_ms:.0f} | {ours_ms:.0f} | "
                  f"{torch_ms / ours_ms:.2f} | {ort_ms / ours_ms:.2f} |", flush=True)


if __name__ == "__main__":
    main()
