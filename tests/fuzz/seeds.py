"""Make the seeds of the corpus with qemu-img: small images of every kind, each behind the script that fuzz.h describes.

    python3 tests/fuzz/seeds.py tests/fuzz/corpus

What is there already is left alone: the images differ a little each time (dates, padding).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

WRITES = ("write -P 1 0 9k", "write -P 2 40k 3000", "write -z 20k 4k", "discard 2k 2k", "write -P 3 100k 700")
# name: (options of qemu-img create, size, commands of qemu-io, further steps, repair and write bits of the script)
SEEDS = {
    "v3": ("cluster_size=512", "128k", WRITES, (), 6),
    "v2": ("cluster_size=512,compat=0.10", "128k", ("write -P 1 0 9k", "write -P 2 40k 3000"), (), 6),
    "4k": ("cluster_size=4096", "256k", ("write -P 1 3k 3k", "write -z 20k 4k"), (), 4),
    "empty": ("cluster_size=512", "64k", (), (), 4),
    "1bit": ("cluster_size=512,refcount_bits=1", "128k", WRITES, (), 6),
    "64bit": ("cluster_size=512,refcount_bits=64", "128k", WRITES, (), 6),
    "snapshot": (
        "cluster_size=512",
        "64k",
        ("write -P 1 0 9k", "write -P 2 40k 3000"),
        ("snapshot", "write -P 4 3k 2k"),
        6,
    ),
    "snapshot-2bit": (
        "cluster_size=512,refcount_bits=2",
        "64k",
        ("write -P 1 0 4k",),
        ("snapshot", "write -P 4 1k 2k"),
        6,
    ),
    "compressed": (
        "cluster_size=512",
        "64k",
        ("write -c -P 1 0 4k", "write -c -P 2 8k 2k", "write -P 3 16k 1k"),
        (),
        6,
    ),
    "zstd": ("cluster_size=1024,compression_type=zstd", "64k", ("write -c -P 1 0 4k", "write -P 3 16k 1k"), (), 6),
    "bitmap": ("cluster_size=512", "64k", ("write -P 1 0 4k",), ("bitmap", "write -P 2 20k 4k"), 6),
    "raw-backing": (
        "cluster_size=512,backing_file=base.raw,backing_fmt=raw",
        "96k",
        ("write -P 1 1k 3k", "discard 1k 1k"),
        (),
        4,
    ),
    "qcow2-backing": (
        "cluster_size=512,backing_file=base.qcow2,backing_fmt=qcow2",
        "96k",
        ("write -P 1 1k 3k",),
        (),
        4,
    ),
    "v2-backing": (
        "cluster_size=512,compat=0.10,backing_file=base.raw,backing_fmt=raw",
        "48k",
        ("write -P 1 1k 3k",),
        (),
        4,
    ),
    "preallocated": ("cluster_size=512,preallocation=metadata", "16k", (), (), 6),
    "large": ("cluster_size=4096", "2G", ("write -P 1 1G 100",), (), 6),
}


def run(*command: str | Path, check: bool = True) -> None:
    subprocess.run([str(word) for word in command], check=check, capture_output=True)


def make(image: Path, options: str, size: str, commands: tuple[str, ...], steps: tuple[str, ...]) -> None:
    run("qemu-img", "create", "-f", "qcow2", "-u", "-o", options, image, size)
    everything = [*commands, *steps]
    for step in everything:
        if step == "snapshot":
            run("qemu-img", "snapshot", "-c", "one", image)
        elif step == "bitmap":
            run("qemu-img", "bitmap", "--add", "-g", "512", image, "b0")
        else:
            run("qemu-io", "-f", "qcow2", "-c", step, image)


def main(directory: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for name, size in (("base.raw", 65536), ("base.qcow2", 0)):
            (Path(scratch) / name).write_bytes(bytes(size))
        run("qemu-img", "create", "-f", "qcow2", Path(scratch) / "base.qcow2", "100000")
        for name, (options, size, commands, steps, bits) in SEEDS.items():
            seed = directory / f"seed-{name}"
            if seed.exists():
                continue
            image = Path(scratch) / f"{name}.qcow2"
            make(image, options, size, commands, steps)
            seed.write_bytes(bytes([bits, 0, 11, *range(3, 16)]) + image.read_bytes())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
