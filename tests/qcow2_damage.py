"""qcow2 images made by qemu-img, and ways to damage what is in their tables, for the tests of the check.

The images are small: what is tested is their structure.
"""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

OFFSET = 0x00FFFFFFFFFFFE00
COPIED, COMPRESSED, ZERO = 1 << 63, 1 << 62, 1

WRITES = (
    "write -P 1 0 300k",
    "write -P 2 1M 64k",
    "write -z 512k 128k",
    "write -z -u 2M 64k",
    "discard 0 64k",
    "write -P 3 3M 17k",
)
COMPRESSING = ("write -c -P 1 0 64k", "write -c -P 2 64k 64k", "write -c -P 4 1536k 64k", "write -P 5 640k 64k")
# name: (options, size, commands of qemu-io; "snapshot NAME" and "bitmap NAME GRANULARITY" are done by qemu-img)
KINDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "plain": ("", "4M", WRITES),
    "v2": ("compat=0.10", "4M", ("write -P 1 0 300k", "write -P 2 1M 64k")),
    "512": ("cluster_size=512", "1M", ("write -P 1 0 300k", "write -z 400k 8k", "discard 0 10k")),
    "2M": ("cluster_size=2M", "32M", ("write -P 1 0 3M",)),
    "1bit": ("refcount_bits=1,cluster_size=4096", "4M", WRITES),
    "64bit": ("refcount_bits=64,cluster_size=1024", "4M", (*WRITES, "snapshot one", "write -P 5 0 100k")),
    "2bit": (
        "refcount_bits=2",
        "4M",
        (*WRITES, "snapshot one", "write -P 5 0 100k", "snapshot two", "write -P 7 64k 8k"),
    ),
    "snapshots": (
        "cluster_size=4096",
        "4M",
        (*WRITES, "snapshot one", "write -P 5 0 100k", "snapshot two", "write -P 6 64k 8k"),
    ),
    "bitmaps": ("", "4M", (*WRITES, "bitmap b0 65536", "bitmap b1 512", "write -P 9 700k 80k")),
    "zlib": ("", "4M", COMPRESSING),
    "zstd": ("compression_type=zstd", "4M", COMPRESSING),
    "preallocated": ("preallocation=metadata,cluster_size=4096", "4M", ()),
    "empty": ("", "4M", ()),
}


def tool(*command: str | Path, expect: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode in expect, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def make(path: Path, kind: str) -> Path:
    options, size, steps = KINDS[kind]
    tool("qemu-img", "create", "-q", "-f", "qcow2", *(["-o", options] if options else []), path, size)
    for step in steps:
        words = step.split()
        if words[0] == "snapshot":
            tool("qemu-img", "snapshot", "-c", words[1], path)
        elif words[0] == "bitmap":
            tool("qemu-img", "bitmap", "--add", "-g", words[2], path, words[1])
        else:
            tool("qemu-io", "-f", "qcow2", "-c", step, path)
    return path


def qemu_check(path: Path, *options: str) -> tuple[int, dict[str, int]]:
    """The exit status of qemu-img check, and its counts (it leaves out those that are 0)."""
    command = ["qemu-img", "check", "-f", "qcow2", "--output=json", *options, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout) if done.stdout.startswith("{") else {}


def qemu_read(path: Path, snapshot: str | None = None) -> bytes | None:
    """The disk as QEMU reads it; None: it can't all be read."""
    raw = path.with_suffix(".read")
    which = ["-l", snapshot] if snapshot else []
    command = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", *which, str(path), str(raw)]
    done = subprocess.run(command, capture_output=True, check=False)
    return raw.read_bytes() if done.returncode == 0 else None


class Tables:
    """Where things are in the bytes of an image, which can be changed: `image[offset]` is the number of 8 bytes
    there.
    """

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        self.version, bits = self.number(4, 4), self.number(20, 4)
        self.cluster = 1 << bits
        self.l1, self.l1_entries = self[40], self.number(36, 4)
        self.reftable = self[48]
        self.snapshot_table, self.snapshots = self[64], self.number(60, 4)
        self.order = self.number(96, 4) if self.version > 2 else 4

    def number(self, offset: int, width: int) -> int:
        return int.from_bytes(self.data[offset : offset + width], "big")

    def put(self, offset: int, width: int, value: int) -> None:
        self.data[offset : offset + width] = value.to_bytes(width, "big")

    def __getitem__(self, offset: int) -> int:
        return self.number(offset, 8)

    def __setitem__(self, offset: int, value: int) -> None:
        self.put(offset, 8, value)

    @property
    def block(self) -> int:
        """The first refcount block."""
        return self[self.reftable]

    def l2(self, index: int = 0) -> int:
        return self[self.l1 + 8 * index] & OFFSET

    def entry(self, guest: int) -> int:
        """Where the L2 entry of a guest offset is."""
        index, inside = divmod(guest // self.cluster, self.cluster // 8)
        return self.l2(index) + 8 * inside

    def set_refcount(self, host: int, count: int) -> None:
        """Of 8 bits and wider."""
        width = (1 << self.order) // 8
        self.put(self.block + host // self.cluster * width, width, count)

    def grow(self, clusters: int) -> int:
        """Make the file end at a cluster, and so many clusters longer; where the new ones begin."""
        end = -(-len(self.data) // self.cluster) * self.cluster
        self.data += bytes(end + clusters * self.cluster - len(self.data))
        return end

    def bitmap_directory(self) -> int:
        at = self.number(100, 4)
        while self.number(at, 4) != 0x23852875:
            at += 8 + (self.number(at + 4, 4) + 7) // 8 * 8
        return self[at + 24]

    def places(self) -> Iterator[tuple[int, int]]:
        """Offset and length of all that a mutation may hit."""
        yield self.l1, 8 * self.l1_entries
        yield self.reftable, 64
        l1s = [(self.l1, self.l1_entries)]
        at = self.snapshot_table
        for _ in range(self.snapshots):
            l1s.append((self[at], self.number(at + 8, 4)))
            yield l1s[-1][0], 8 * l1s[-1][1]
            at += 40 + self.number(at + 36, 4) + self.number(at + 12, 2) + self.number(at + 14, 2) + 7
            at &= ~7
        if self.snapshots:
            yield self.snapshot_table, 12
        entries = {self[table + 8 * i] & OFFSET for table, count in l1s for i in range(count)}
        for l2 in sorted(entries - {0}):
            yield l2, self.cluster
        yield self.block, min(self.cluster, len(self.data) // self.cluster * 2 + 8)


def mutate(image: Tables, rng: random.Random) -> str:
    """Change one number of some table; what was done."""
    places = list(image.places())
    offset, length = rng.choice(places)
    used = [at for at in range(offset, min(offset + length, len(image.data) - 8), 8) if image[at]]
    at = rng.choice(used) if used and rng.random() < 0.9 else offset + 8 * rng.randrange(max(length // 8, 1))
    old, what = image[at], rng.random()
    if what < 0.6:
        image[at] ^= 1 << rng.randrange(64)
    elif what < 0.7:
        image[at] = 0
    elif what < 0.85:
        other, other_length = rng.choice(places)
        image[at] = image[other + 8 * rng.randrange(max(other_length // 8, 1))]
    else:
        image[at] = rng.randrange(len(image.data) // image.cluster + 2) * image.cluster | rng.choice((0, COPIED))
    return f"{at:#x} of the table at {offset:#x}: {old:#x} became {image[at]:#x}"
