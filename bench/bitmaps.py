"""What dirty bitmaps cost a guest's write: 4 KiB, without a bitmap, and with one of each kind.

    python bench/bitmaps.py [--directory DIR] [--size 1G] [--slices 4000] [--synced 100] [--seconds 0.3] [--rounds 30]

One writer (bench/dirty_bits.c): the kinds take turns every 64 writes, and each slice is compared with the one without a
bitmap right beside it; medians, and the quarters around them. "repeated" are writes to units that are dirty already,
"first" are the first ones to their unit of 64 KiB, "synced" are the same in write-intent mode, where they wait for the
storage. The goal: marking adds less than 2 % to a repeated write.

Then 8 writers, who share syncs, in many short rounds.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from kit import build, machine, spread

import pyfleece
from pyfleece.load import Load

KINDS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "in-memory": {},
    "persistent": {"persistent": True},
    "write-intent": {"write_intent": True},
}
UNIT = 65536


def size_of(text: str) -> int:
    shift = {"K": 10, "M": 20, "G": 30, "T": 40}.get(text[-1].upper())
    return int(text[:-1]) << shift if shift else int(text)


def one_writer(directory: str, size: int, slices: int, synced: int) -> None:
    program = build(directory, "dirty_bits")
    command = [program, str(Path(directory) / "bits.raw"), str(size >> 20), str(slices), str(synced)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, dict[str, list[float]]] = {}
    for line in output.splitlines():
        what, kind, took = line.split()
        found.setdefault(what, {}).setdefault(kind, []).append(float(took))
    for what, kinds in found.items():
        for kind, times in kinds.items():
            added = [100 * (took / base - 1) for took, base in zip(times, kinds["none"])]
            low, middle, high = statistics.quantiles(added, n=4) if len(added) > 1 else 3 * added
            us = statistics.median(times) / 1000
            print(f"| 1 writer, {what} | {kind} | {us:.2f} | {middle:+.1f} % ({low:+.1f} to {high:+.1f}) |", flush=True)


def eight_writers(directory: str, size: int, seconds: float, rounds: int) -> None:
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with pyfleece.create(Path(directory) / "load.raw", size) as source:
        for offset in range(0, size, 8 << 20):  # no write of the measurement allocates
            source.pwrite(b"x" * min(8 << 20, size - offset), offset)
        source.flush()
        for number in range(rounds):
            for kind, options in KINDS.items():
                with pyfleece.Disk(source) as disk:
                    if options is not None:
                        disk.bitmaps.add("daily", UNIT, **options)
                    with Load(disk, threads=8, seed=number + 1, order="once", stride=UNIT) as load:
                        load.wait(seconds)
                        stats = load.stop()
                    found[kind].append(stats.elapsed / max(stats.operations, 1) * 8 * 1e6)
                    if options is not None:
                        disk.bitmaps.remove("daily")
    for kind, times in found.items():
        added = [100 * (took / base - 1) for took, base in zip(times, found["none"])]
        print(f"| 8 writers, first | {kind} | {statistics.median(times):.2f} | {spread(added, 1)} % |", flush=True)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="What dirty bitmaps cost a guest's write.")
    parser.add_argument("--directory", default="/var/tmp", help="on the file system to measure (default: %(default)s)")
    parser.add_argument("--size", type=size_of, default="1G")
    parser.add_argument("--slices", type=int, default=4000)
    parser.add_argument("--synced", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args(arguments)
    print(f"{machine(options.directory)}\n\n| what | bitmap | us a write | more than with none |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        one_writer(directory, options.size, options.slices, options.synced)
        eight_writers(directory, options.size, options.seconds, options.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
