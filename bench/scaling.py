"""How cost grows: with the disk's size, its extents, the share that is dirty, the workers, and the disks of a group.

    python bench/scaling.py [--directory DIR] [--rounds N] [--only TABLE] [--json FILE] [--quick]

Prints tables in Markdown: medians, with the least and the most. Each figure is taken in a process of its own, so that
memory means what it says, and each round visits all points of a table before the next one does. A backup's time is that
until all is copied, and that until the target is synced as well, which depends on the storage. Needs 9 GiB in DIR.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kit import brief, copy, machine, resident, resident_peak, timed, warm_memory

import pyfleece
from pyfleece.load import Load

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
UNIT = 64 * KIB
DATA = 256  # units of data, wherever the disk ends
# Of the disks of a table: 8 KiB for each of a million extents. And for a test that all of it works.
SIZES = {"extents": 8 * GIB, "dirty": GIB, "workers": GIB, "disks": 128 * MIB}
QUICK = {"extents": 16 * MIB, "dirty": 64 * MIB, "workers": 16 * MIB, "disks": 4 * MIB}
Figures = dict[str, float]


@dataclass(frozen=True)
class Table:
    title: str  # may have the {size} in it
    head: str  # of the first column
    points: list[float]
    quick: list[float]
    label: Callable[[float], str]
    prepare: Callable[[str, float], None]  # once for each point: the files
    measure: Callable[[str, float], Figures]  # in a process of its own; the names are the other columns
    most_rounds: int = 1000


# ---- files ----


def sparse(path: str, size: float, block: int, step: int, count: int) -> None:
    """A file with `block` bytes of data at each of the first multiples of `step`, on stable storage."""
    data = os.urandom(block)
    with open(path, "wb") as file:
        file.truncate(min(int(size), 16 * TIB - 4096))  # where ext4 ends
        for index in range(count):
            os.pwrite(file.fileno(), data, index * step)
        os.fsync(file.fileno())


def step_of(size: float, count: float) -> int:
    """From one of `count` blocks all over the disk to the next one."""
    return int(size / count) // 4096 * 4096


@contextlib.contextmanager
def open_disk(path: str) -> Iterator[pyfleece.Disk]:
    with pyfleece.open(path, "r+", format="raw") as image, pyfleece.Disk(image, bitmap_file=False) as disk:
        yield disk


def backup(snapshot: pyfleece.Snapshot, directory: str, what: str, **options: int) -> Figures:
    target = os.path.join(directory, "target.raw")
    copied, synced = copy(snapshot, target, **options)
    os.unlink(target)
    return {f"{what}, s": copied, f"{what} and sync, s": synced}


def cut(disk: pyfleece.Disk) -> tuple[float, float]:
    """Milliseconds, the median of some; and KiB of memory, of the first one."""
    times, memory = [], []
    for _ in range(11):
        made: list[pyfleece.Snapshot] = []
        before = resident()
        times.append(timed(lambda kept=made: kept.append(disk.snapshot("memory"))) * 1000)
        memory.append((resident() - before) / KIB)
        made[0].close()
    return statistics.median(times), memory[0]


def mark(disk: pyfleece.Disk, step: int, count: int) -> None:
    """Write a block at each of the first multiples of `step`: these units of "daily" are dirty then."""
    with Load(disk, stride=step, order="sequential", operations=count) as load:
        while not load.wait(1):
            pass
    disk.flush()


# ---- the tables ----


def disk_path(directory: str, point: float) -> str:
    return os.path.join(directory, f"disk-{point:g}.raw")


def prepare_size(directory: str, size: float) -> None:
    sparse(disk_path(directory, size), size, UNIT, step_of(size, DATA), DATA)


def measure_size(directory: str, size: float) -> Figures:
    with open_disk(disk_path(directory, size)) as disk:
        milliseconds, memory = cut(disk)
        with disk.snapshot("memory") as snapshot:
            whole = backup(snapshot, directory, "whole")
        disk.bitmaps.add("daily", UNIT)
        mark(disk, step_of(size, DATA), DATA)
        with disk.snapshot("memory", bitmap="daily") as snapshot:
            incremental = backup(snapshot, directory, "incremental")
    return {
        "cut, ms": milliseconds,
        "memory of it, KiB": memory,
        **whole,
        **incremental,
        "process, most, MiB": resident_peak() / MIB,
    }


def prepare_extents(directory: str, extents: float) -> None:
    sparse(disk_path(directory, extents), SIZES["extents"], 4096, step_of(SIZES["extents"], extents), int(extents))


def measure_extents(directory: str, extents: float) -> Figures:
    with open_disk(disk_path(directory, extents)) as disk:
        milliseconds, memory = cut(disk)
        with disk.snapshot("memory") as snapshot:
            listing = timed(lambda: sum(1 for _ in snapshot.extents()))
            whole = backup(snapshot, directory, "whole")
        disk.bitmaps.add("daily", 4096)
        mark(disk, step_of(SIZES["extents"], extents), int(extents))
        dirty = disk.bitmaps["daily"].count
        with disk.snapshot("memory", bitmap="daily") as snapshot:
            incremental = backup(snapshot, directory, "incremental")
    assert dirty == extents * 4096, dirty
    return {
        "cut, ms": milliseconds,
        "memory of it, KiB": memory,
        "listing them, s": listing,
        **whole,
        **incremental,
        "process, most, MiB": resident_peak() / MIB,
    }


def prepare_dirty(directory: str, percent: float) -> None:
    path = os.path.join(directory, "disk.raw")
    if not os.path.exists(path):
        sparse(path, SIZES["dirty"], MIB, MIB, SIZES["dirty"] // MIB)


def measure_dirty(directory: str, percent: float) -> Figures:
    with open_disk(os.path.join(directory, "disk.raw")) as disk:
        disk.bitmaps.add("daily", UNIT)
        mark(disk, int(UNIT * 100 / percent), int(SIZES["dirty"] / UNIT * percent / 100))
        dirty = disk.bitmaps["daily"].count
        cuts: list[pyfleece.Snapshot] = []
        seconds = timed(lambda: cuts.append(disk.snapshot("memory", bitmap="daily")))
        with cuts[0] as snapshot:
            before = time.process_time()
            incremental = backup(snapshot, directory, "incremental")
            used = time.process_time() - before
    return {
        "dirty, MiB": dirty / MIB,
        "cut, ms": seconds * 1000,
        **incremental,
        "CPU, s": used,
        "process, most, MiB": resident_peak() / MIB,
    }


def prepare_workers(directory: str, workers: float) -> None:
    path = os.path.join(directory, "disk.raw")
    if not os.path.exists(path):
        sparse(path, SIZES["workers"], MIB, 2 * MIB, SIZES["workers"] // MIB // 2)


def measure_workers(directory: str, workers: float) -> Figures:
    with open_disk(os.path.join(directory, "disk.raw")) as disk, disk.snapshot("memory") as snapshot:
        before = time.process_time()
        whole = backup(snapshot, directory, "whole", workers=int(workers))
        used = time.process_time() - before
    return {
        **whole,
        "CPU, s": used,
        "process, most, MiB": resident_peak() / MIB,
    }


def prepare_disks(directory: str, disks: float) -> None:
    for index in range(int(disks)):
        path = os.path.join(directory, f"disk{index}.raw")
        if not os.path.exists(path):
            sparse(path, SIZES["disks"], MIB, MIB, SIZES["disks"] // MIB)


def group_cuts(directory: str, disks: list[pyfleece.Disk]) -> list[float]:
    """Milliseconds of some cuts."""
    times = []
    for _ in range(20):
        with contextlib.ExitStack() as stack:
            enter = stack.enter_context
            times.append(timed(lambda into=enter: into(pyfleece.snapshot_group(disks, directory))) * 1000)
    return times


def measure_disks(directory: str, count: float) -> Figures:
    with contextlib.ExitStack() as stack:
        paths = [os.path.join(directory, f"disk{index}.raw") for index in range(int(count))]
        disks = [stack.enter_context(open_disk(path)) for path in paths]
        idle = group_cuts(directory, disks)
        with contextlib.ExitStack() as guests:
            for seed, disk in enumerate(disks):
                guests.enter_context(Load(disk, seed=seed))
            busy = group_cuts(directory, disks)
        for disk in disks:
            disk.flush()
        targets = [os.path.join(directory, f"target{index}.raw") for index in range(int(count))]
        with pyfleece.snapshot_group(disks, directory) as group:
            whole = timed(lambda: pyfleece.backup_group(group, targets))
        for target in targets:
            os.unlink(target)
    return {
        "cut, ms": statistics.median(idle),
        "cut while each is written, ms": statistics.median(busy),
        "the longest of 20, ms": max(busy),
        "whole of all and sync, s": whole,
        "process, most, MiB": resident_peak() / MIB,
    }


def bytes_of(size: float) -> str:
    unit, name = next((pair for pair in ((TIB, "TiB"), (GIB, "GiB")) if size >= pair[0]), (MIB, "MiB"))
    return f"{size / unit:g} {name}"


def number(value: float) -> str:
    return f"{value:,.0f}"


TABLES = {
    "size": Table(
        f"Size of the disk: sparse, {DATA} x 64 KiB of data all over it, and the same dirty.",
        "disk",
        [GIB, 16 * GIB, 256 * GIB, TIB, 4 * TIB, 16 * TIB],
        [TIB],
        bytes_of,
        prepare_size,
        measure_size,
    ),
    "extents": Table(
        "Extents: of 4 KiB, all over a disk of {size}, and the same dirty (granularity 4 KiB).",
        "extents",
        [1, 1_000, 10_000, 100_000, 1_000_000],
        [1_000],
        number,
        prepare_extents,
        measure_extents,
        most_rounds=3,
    ),
    "dirty": Table(
        "Dirty share: units of 64 KiB, all over a disk of {size} full of data.",
        "dirty",
        [0.01, 0.1, 1, 10, 100],
        [1],
        lambda percent: f"{percent:g} %",
        prepare_dirty,
        measure_dirty,
    ),
    "workers": Table(
        "Workers: a whole backup of {size}, every other MiB a hole.",
        "workers",
        [1, 2, 4, 8, 16],
        [1, 16],
        number,
        prepare_workers,
        measure_workers,
    ),
    "disks": Table(
        "Disks cut at one instant, each of {size} full of data; written at random by one guest each.",
        "disks",
        [1, 2, 4, 8],
        [2],
        number,
        prepare_disks,
        measure_disks,
    ),
}


def in_a_process(name: str, directory: str, point: float, quick: bool) -> Figures:
    command = [sys.executable, __file__, "--directory", directory, "--point", name, repr(point)]
    command += ["--quick"] if quick else []
    os.sync()
    warm_memory(16 * MIB if quick else GIB)
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures: Figures = json.loads(output)
    return figures


def run(name: str, directory: str, rounds: int, quick: bool) -> dict[str, dict[str, list[float]]]:
    """The figures of a table: by point, by column, of all rounds."""
    table, points = TABLES[name], []
    found: dict[str, dict[str, list[float]]] = {}
    for point in table.quick if quick else table.points:
        try:
            table.prepare(directory, point)
            points.append(point)
        except OSError as error:
            if error.errno != errno.EFBIG:
                raise
            print(f"{name}: no file of {table.label(point)} here", file=sys.stderr)
    for index in range(min(rounds, table.most_rounds)):
        for point in points:
            print(f"{name}: round {index + 1}, {table.label(point)}", file=sys.stderr)
            columns = found.setdefault(table.label(point), {})
            for column, figure in in_a_process(name, directory, point, quick).items():
                columns.setdefault(column, []).append(figure)
    return found


def show(name: str, found: dict[str, dict[str, list[float]]]) -> None:
    columns = list(next(iter(found.values())))
    title = TABLES[name].title.format(size=bytes_of(SIZES.get(name, 0)))
    print(f"\n{title}\n\n| {TABLES[name].head} | {' | '.join(columns)} |")
    print("|---|" + "---|" * len(columns))
    for label, figures in found.items():
        print(f"| {label} | {' | '.join(brief(figures[column]) for column in columns)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", default="/var/tmp", help="on the file system to measure (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=TABLES, action="append")
    parser.add_argument("--json", metavar="FILE", help="a file for the figures of all rounds")
    parser.add_argument("--quick", action="store_true", help="few and small points, to see that it works")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        SIZES.update(QUICK)
    if options.point:
        name, point = options.point
        json.dump(TABLES[name].measure(options.directory, float(point)), sys.stdout)
        return
    print(machine(options.directory))
    told = {}
    for name in options.only or TABLES:
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            told[name] = run(name, directory, options.rounds, options.quick)
        show(name, told[name])
    if options.json:
        text = json.dumps({"machine": machine(options.directory), "tables": told}, indent=2)
        pathlib.Path(options.json).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
