"""What dirty bitmaps cost a guest's write: random 4 KiB writes, without a bitmap, and with one of each kind.

    python bench/bitmaps.py [--directory DIR] [--size 4G] [--seconds 3] [--rounds 5]

Prints a table in Markdown: microseconds that one write takes, the median, the least and the most. Rounds of all kinds
take turns, so that whatever else the machine does hits all of them alike.
"first" are writes of which each is the first to its unit (64 KiB apart, in an order that looks random): the worst case.
"repeated" are writes to units that are dirty already. The goal: marking adds less than 2 % to a repeated write. In
write-intent mode a first write waits for a sync of the storage; it is measured with 1 and with 8 writers, who share
syncs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from kit import machine, ratios, spread

import pyfleece
from pyfleece.load import Load

KINDS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "in memory": {},
    "persistent": {"persistent": True},
    "write-intent": {"write_intent": True},
}
UNIT = 65536


def size_of(text: str) -> int:
    shift = {"K": 10, "M": 20, "G": 30, "T": 40}.get(text[-1].upper())
    return int(text[:-1]) << shift if shift else int(text)


def write(disk: pyfleece.Disk, seconds: float, **options: Any) -> float:
    """Microseconds that a write takes, of one of the writers."""
    threads = options.get("threads", 1)
    with Load(disk, **options) as load:
        load.wait(seconds)
        stats = load.stats
    return stats.elapsed / max(stats.operations, 1) * threads * 1e6


def measure(directory: Path, size: int, seconds: float, rounds: int) -> dict[tuple[str, str], list[float]]:
    found: dict[tuple[str, str], list[float]] = {}
    path = directory / "bitmaps-bench.raw"
    with pyfleece.create(path, size) as source:
        for offset in range(0, size, 8 << 20):                  # no write of the measurement allocates
            source.pwrite(b"x" * min(8 << 20, size - offset), offset)
        source.flush()
        for number in range(rounds):
            for kind, options in KINDS.items():
                with pyfleece.Disk(source) as disk:
                    disk.bitmaps.add("all", UNIT)
                    for offset in range(0, size, UNIT):
                        disk.pwrite(b"x", offset)
                    disk.bitmaps["all"].disable()
                    for what, threads in (("first", 1), ("first, 8 writers", 8), ("repeated", 1)):
                        if "daily" in disk.bitmaps:
                            disk.bitmaps.remove("daily")
                        if options is not None:
                            bitmap = disk.bitmaps.add("daily", UNIT, **options)
                            if what == "repeated":
                                bitmap.merge("all")
                                assert bitmap.count == size
                        order = {"order": "random"} if what == "repeated" else {"order": "once", "stride": UNIT}
                        took = write(disk, seconds, threads=threads, seed=number + 1, **order)
                        found.setdefault((what, kind), []).append(took)
                    if options is not None:
                        disk.bitmaps.remove("daily")
    path.unlink()
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", default="/var/tmp", help="on the file system to measure (default: %(default)s)")
    parser.add_argument("--size", type=size_of, default="4G")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        found = measure(Path(directory), options.size, options.seconds, options.rounds)
    print(f"{machine(options.directory)}\n")
    print("| writes | bitmap | us | more than without |\n|---|---|---|---|")
    for what in dict.fromkeys(what for what, _ in found):
        for kind in KINDS:
            took = found[what, kind]
            more = statistics.median(100 * (ratio - 1) for ratio in ratios(took, found[what, "none"]))
            print(f"| {what} | {kind} | {spread(took)} | {more:+.1f} % |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
