"""One training step of a small GPT, ours beside PyTorch on the CPU, interleaved in one run.

    python bench/gpt_step.py target/release/anyformer [--rounds 7] [--compile]

Vocabulary 1024, width 256, 4 layers, 4 heads, length 512, batch 8, LayerNorm, MLP with GELU, learned positions, tied head;
a step is forward, backward, clipping to norm 1 and AdamW, f32. PyTorch runs scaled_dot_product_attention, its fused AdamW, and
2 threads; `bf16` adds autocast to bfloat16, `compile` wraps the model in torch.compile. Unset OPENBLAS_* first. Prints the median
over rounds of each side and the median of the ratios ours/theirs (below 1: ours is faster). Beside f32 ours runs f32; beside
autocast it runs precision = "bf16" (bf16 operands of linear layers, everything else f32).
"""

import argparse
import json
import statistics
import subprocess
import time

import torch
import torch.nn.functional as F
from torch import nn

torch.set_num_threads(2)
VOCAB, DIM, LAYERS, HEADS, TIME, BATCH = 1024, 256, 4, 4, 512, 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.up, self.down = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, x):
        split = lambda y: y.view(BATCH, TIME, HEADS, -1).transpose(1, 2)
        q, k, v = map(split, self.qkv(self.n1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.n2(x))))


class Gpt(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCAB, DIM), nn.Embedding(TIME, DIM)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(DIM)

    def forward(self, ids, targets):
        x = self.blocks(self.embed(ids) + self.place.weight)
        return F.cross_entropy((self.norm(x) @ self.embed.weight.T).flatten(0, 1), targets.flatten())


def stepper(bf16, compiled):
    torch.manual_seed(0)
    model = Gpt()
    run = torch.compile(model) if compiled else model
    adam = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(VOCAB, (BATCH, TIME + 1))

    def step():
        began = time.perf_counter()
        adam.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = run(ids[:, :-1], ids[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        return time.perf_counter() - began

    step()
    step()
    return step


def main():
    flags = argparse.ArgumentParser()
    flags.add_argument("binary")
    flags.add_argument("--rounds", type=int, default=7)
    flags.add_argument("--compile", action="store_true")
    flags = flags.parse_args()
    words = [
        flags.binary, "bench", "--step", "--json", "--quiet", "--threads", "2", "--mixers", "attention", "--batch", str(BATCH),
        "--lengths", str(TIME), "--dim", str(DIM), "--layers", str(LAYERS), "--runs", "1", f"model.reads.tokens.vocab={VOCAB}",
        "model.norm=layer", "model.channel.name=mlp", "model.positions=learned", f"model.mixers.0.heads={HEADS}",
        "model.mixers.0.position=none",
    ]

    def ours(bf16):
        precision = "model.precision=" + ("bf16" if bf16 else "f32")
        said = subprocess.run(words + [precision], capture_output=True, check=True, text=True).stdout
        return json.loads(said)["rows"][0]["update_s"]

    kinds = [("f32", False, False), ("bf16 autocast", True, False)]
    if flags.compile:
        kinds += [("f32, compiled", False, True), ("bf16 autocast, compiled", True, True)]
    theirs = [(name, bf16, stepper(bf16, compiled)) for name, bf16, compiled in kinds]
    rounds = []
    for _ in range(flags.rounds):
        mine = {bf16: ours(bf16) for bf16 in (False, True)}
        rounds.append([(mine[bf16], step()) for _, bf16, step in theirs])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    print("| PyTorch runs | ours, ms | PyTorch, ms | ours / theirs |\n|---|---|---|---|")
    for at, (name, *_) in enumerate(theirs):
        mine = statistics.median(times[at][0] for times in rounds) * 1e3
        other = statistics.median(times[at][1] for times in rounds) * 1e3
        ratio = statistics.median(times[at][0] / times[at][1] for times in rounds)
        print(f"| {name} | {mine:.0f} | {other:.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
