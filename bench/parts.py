"""What single parts cost: bitmaps, writes by cluster size, reads of snapshots, the cut, and Python's share of a call.

    python bench/parts.py [--directory DIR] [--json FILE] [PYTEST OPTION ...]

Runs `python -m pytest bench --benchmark-only` (which works as well, and has pytest-benchmark's own tables, histograms
and comparisons; BENCH_DIRECTORY says where the files go), and prints a table in Markdown: the time of one operation,
median, least and most over the rounds, and how often the bare system call would fit in. Needs gcc, pytest-benchmark,
and about 1 GiB in DIR. One side is measured after the other, so small differences mean nothing: vs_qemu.py takes
turns.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

from kit import ROOT, machine


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", default="/var/tmp", help="on the file system to measure (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="all that pytest-benchmark knows")
    options, others = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(options.json or os.path.join(scratch, "parts.json")).absolute()
        command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", f"--benchmark-json={path}", *others]
        environment = {**os.environ, "BENCH_DIRECTORY": os.path.abspath(options.directory)}
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr)
        if done.returncode:
            sys.exit(done.returncode)
        results = json.loads(path.read_text(encoding="utf-8"))
    print(f"{machine(options.directory)}, Python {sys.version.split()[0]}\n")
    print("| what | one operation | least to most | of the system call |\n|---|---|---|---|")
    groups: dict[str, dict[str, list[float]]] = {}
    floors: dict[str, float] = {}
    for entry in results["benchmarks"]:
        group, more = entry["group"], entry["extra_info"]
        times = [seconds / more["operations"] for seconds in entry["stats"]["data"]]
        groups.setdefault(group, {})[more["what"]] = times
        if more["floor"]:
            floors[group] = statistics.median(times)
    for group, members in groups.items():
        print(f"| **{group}** | | | |")
        for what, times in members.items():
            median = statistics.median(times)
            ratio = f"{median / floors[group]:.3g}" if group in floors else ""
            print(f"| {what} | {duration(median)} | {duration(min(times))} to {duration(max(times))} | {ratio} |")


if __name__ == "__main__":
    main()
