"""Time to the first token of every turn of a conversation, by a server that keeps the state of the turns before.

    python bench/conversation.py target/release/anyformer [--turns 20] [--dim 256] [--layers 6] [--threads 2]

Models of random weights and equal width around mamba, gla and attention, reading bytes. Every turn names the state of the turn before, reads
400 bytes more and makes 32 tokens; the state is kept under the same name. The conversations of the models take turns, three times; the
table has the median of each turn, and how much slower the last five turns are than turns 2 to 6. Last row: attention that reads the
whole text again every turn, as a server without kept states does.
"""

import argparse
import pathlib
import random
import statistics
import subprocess
import tempfile

from serving import first_token, serve

NEW, MADE, REPEATS = 400, 32, 3


def words(seed, count):
    chance = random.Random(seed)
    return "".join(chance.choice("etaoin shrdlu") for _ in range(count))


def conversation(port, turns, name, keep):
    times, text = [], ""
    for turn in range(turns):
        new = words(turn, NEW)
        text += new
        body = {"max_tokens": MADE, "temperature": 0}
        if keep:
            body |= {"prompt": new, "save_state": name} | ({"state": name} if turn else {})
        else:
            body |= {"prompt": text}
        times.append(first_token(port, body)[0])
        text += words(1000 + turn, MADE)
    return times


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("binary")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    root = pathlib.Path(tempfile.mkdtemp())
    context = str((NEW + MADE) * args.turns + 1024)
    found = {}
    kinds = {"mamba": ["model.channel.name=none"], "gla": [], "attention": []}
    for name, more in kinds.items():
        run = [args.binary, "train", "task.name=text", "task.time=64", f"model.dim={args.dim}", f"model.layers={args.layers}", "train.steps=1",
               "train.warmup=0", "train.batch=1", "train.eval_batches=1", f"model.mixers.0.name={name}", "--quiet", "--out", str(root / name), *more]
        subprocess.run(run, check=True, capture_output=True)
    for repeat in range(REPEATS):
        for name in kinds:
            with serve(args.binary, root / name, args.threads, "--context", context) as port:
                conversation(port, 2, "warm", True)
                found.setdefault(f"{name}, state kept", []).append(conversation(port, args.turns, f"talk{repeat}", True))
    with serve(args.binary, root / "attention", args.threads, "--context", context, "--state-memory", "0") as port:
        found["attention, read again"] = [conversation(port, args.turns, "", False)]
    turns = [turn for turn in (1, 2, 5, 10, 15, args.turns) if turn <= args.turns]
    print("| time to first token, ms | " + " | ".join(f"turn {turn}" for turn in turns) + " | last 5 / turns 2 to 6 |")
    print("|---|" + "---|" * (len(turns) + 1))
    for name, runs in found.items():
        median = [1000 * statistics.median(run[turn] for run in runs) for turn in range(args.turns)]
        ratio = statistics.median(median[-5:]) / statistics.median(median[1:6])
        print(f"| {name} | " + " | ".join(f"{median[turn - 1]:.1f}" for turn in turns) + f" | {ratio:.2f} |")


if __name__ == "__main__":
    main()
