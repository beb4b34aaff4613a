"""Why the defaults are what they are: cluster size and granularity, measured.

    python bench/defaults.py [--directory DIR] [--rounds N]

Two tables in Markdown. Each figure is a ratio within one run: the program beside the plain system call or `cp`, in
turn, on the same file; the median over the rounds, and in brackets the least and the most. Needs gcc and the installed
package, no peer. Uses about 2 GiB in DIR.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time

from kit import build, machine, spread

import pyfleece

CLUSTERS = [4096, 16384, 65536]
GRANULARITIES = [64 << 10, 256 << 10, 1 << 20, 4 << 20]
WRITES = [
    ("random 4 KiB", 4096, "random"),
    ("random 64 KiB", 65536, "random"),
    ("sequential 1 MiB", 1 << 20, "sequential"),
]


def first_touch(program: str, directory: str, rounds: int) -> None:
    print("Rate of first writes to a cluster, of the plain rate for the same writes (512 MiB, 64 MiB stage).\n")
    print("| cluster | " + " | ".join(name for name, _, _ in WRITES) + " |")
    print("|---|" + "---|" * len(WRITES))
    for cluster in CLUSTERS:
        cells = []
        for _, size, order in WRITES:
            files = [os.path.join(directory, "disk.raw"), directory]
            command = [program, *files, "512", str(size), str(cluster), "64", order, str(rounds)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            runs = [json.loads(line) for line in output.splitlines()]
            cells.append(spread([run["first"] / run["plain"] for run in runs[1:] or runs]))  # the first one warms up
        print(f"| {cluster >> 10} KiB | " + " | ".join(cells) + " |", flush=True)


def backups(directory: str, rounds: int) -> None:
    source, target = os.path.join(directory, "half.raw"), os.path.join(directory, "copy.raw")
    size = 1 << 30
    with pyfleece.create(source, size) as image:
        block = os.urandom(1 << 20)
        for offset in range(0, size, 2 << 20):
            image.pwrite(block, offset)
    times: dict[int, list[float]] = {granularity: [] for granularity in GRANULARITIES}
    for _ in range(rounds + 1):
        begin = time.monotonic()
        subprocess.run(["cp", "--sparse=always", source, target], check=True)
        subprocess.run(["sync", target], check=True)  # ours does
        floor = time.monotonic() - begin
        for granularity in GRANULARITIES:
            os.unlink(target)
            with pyfleece.open(source) as image, pyfleece.Disk(image).snapshot(fleecing="memory") as snap:
                begin = time.monotonic()
                pyfleece.backup(snap, target, granularity=granularity)
                times[granularity].append((time.monotonic() - begin) / floor)
    print("\nTime of an idle backup to a raw file, of `cp --sparse=always` and sync (1 GiB, half holes).\n")
    print("| granularity | time |\n|---|---|")
    for granularity, values in times.items():
        print(f"| {granularity >> 10} KiB | {spread(values[1:])} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", default="/var/tmp", help="on the file system to measure (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"{machine(options.directory)}\n")
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        first_touch(build(directory, "first_touch"), directory, options.rounds)
        backups(directory, options.rounds)


if __name__ == "__main__":
    main()
