"""Guessing ahead in batches: tokens made in a second with and without, the same texts.

    python bench/speculate.py target/release/anyformer FOLDER_OR_GGUF [--batches 1,4,8] [--guess 6] [--tokens 96] [--threads 2] [--rounds 3]

Every prompt holds a table and asks for it again, so that there is something to guess. Two servers in turn, one with --speculate; prompts
of a batch are sent at once and answered greedily; their prompts are read before (kept states), so that only making tokens is timed.
The texts are compared: they must be equal.
"""

import argparse
import json
import statistics
import threading
import time

from serving import request, serve


def prompt(number):
    rows = [f"| item {number}{at} | {17 * number + 31 * at} | grade {'ABCD'[(number + at) % 4]} |" for at in range(6)]
    table = "\n".join(rows)
    return f"Here is a table:\n{table}\n\nHere is the same table again:\n{table}\n\nHere is the same table again:\n"


def ask(port, texts, count):
    """Texts of answers and the time from the first request to the last answer."""
    answers = [None] * len(texts)

    def one(at):
        body = {"prompt": texts[at], "max_tokens": count, "temperature": 0}
        status, made = request(port, "POST", "/v1/completions", body)
        assert status == 200, made
        answers[at] = json.loads(made)

    threads = [threading.Thread(target=one, args=(at,)) for at in range(len(texts))]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    made = sum(answer["usage"]["completion_tokens"] for answer in answers)
    return [answer["choices"][0]["text"] for answer in answers], made / took


def metric(port, name):
    lines = [line for line in request(port, "GET", "/metrics")[1].decode().splitlines() if line.startswith(name)]
    return float(lines[0].split()[-1]) if lines else 0.0


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("binary")
    parser.add_argument("folder")
    parser.add_argument("--batches", default="1,4,8")
    parser.add_argument("--guess", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print("| answers at once | tokens/s | with guesses, tokens/s | ratio | guesses that held |")
    print("|---|---|---|---|---|")
    plain = serve(args.binary, args.folder, args.threads)
    ahead = serve(args.binary, args.folder, args.threads, "--speculate", str(args.guess))
    with plain as port, ahead as other:
        for batch in map(int, args.batches.split(",")):
            texts = [prompt(number) for number in range(batch)]
            made = {}
            before = [metric(other, f"anyformer_{kind}_tokens_total") for kind in ("guessed", "accepted")]
            for number in range(args.rounds + 1):
                for name, at in (("plain", port), ("ahead", other)):
                    words, speed = ask(at, texts, args.tokens)
                    made.setdefault(name, []).append((words, speed))
            after = [metric(other, f"anyformer_{kind}_tokens_total") for kind in ("guessed", "accepted")]
            assert all(words == made["plain"][0][0] for words, _ in made["plain"] + made["ahead"]), "the texts differ"
            # The first round read the prompts.
            plain_speed, ahead_speed = (statistics.median(speed for _, speed in made[name][1:]) for name in ("plain", "ahead"))
            guessed, accepted = (b - a for a, b in zip(before, after))
            print(f"| {batch} | {plain_speed:.0f} | {ahead_speed:.0f} | {ahead_speed / plain_speed:.2f} | {accepted:.0f} of {guessed:.0f} |", flush=True)


if __name__ == "__main__":
    main()
