"""Snapshots: reading what was not overwritten (from the source), what was (from the stage, or from the fleecing file),
and making them, on disks of any size.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from part import GIB, KIB, MIB, TIB, fill, measure, open_disk, shuffled, workplace

READS = {"4 KiB, random": 4 * KIB, "1 MiB": MIB}
SIZES = {"1 GiB": GIB, "1 TiB": TIB, "16 TiB": 16 * TIB}


@pytest.fixture(scope="module")
def source(request) -> Iterator[str]:
    with workplace() as directory:
        size = (8 if request.config.option.benchmark_disable else 128) * MIB
        yield fill(os.path.join(directory, "disk.raw"), size)


def offsets_of(source: str, size: int) -> list[int]:
    """Of the first half: what was saved last may still be in the stage."""
    return shuffled(os.path.getsize(source) // 2 // size, size)


def read_each(read: Callable[[bytearray, int], int], size: int, offsets: list[int]) -> None:
    buffer = bytearray(size)
    for offset in offsets:
        read(buffer, offset)


@pytest.mark.parametrize("read", READS)
def test_read_of_the_file(benchmark, source, read):
    offsets = offsets_of(source, READS[read])
    with open(source, "rb", buffering=0) as file:

        def preadv(buffer: bytearray, offset: int) -> int:
            return os.preadv(file.fileno(), [buffer], offset)

        function = functools.partial(read_each, preadv, READS[read], offsets)
        measure(benchmark, f"read of {read}", "os.preadv of the disk's file", len(offsets), function, floor=True)


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("where", ["not saved", "from the stage", "from the fleecing file"])
def test_read_of_a_snapshot(benchmark, source, where, read):
    offsets = offsets_of(source, READS[read])
    fleecing = os.path.dirname(source) if where == "from the fleecing file" else "memory"
    stage = 64 * KIB if where == "from the fleecing file" else 2 * os.path.getsize(source)
    with open_disk(source) as disk, disk.snapshot(fleecing, stage_size=stage) as snapshot:
        if where != "not saved":
            block = os.urandom(MIB)
            for offset in range(0, disk.size, MIB):
                disk.pwrite(block, offset)
        stats = snapshot.stats
        if where == "from the fleecing file":
            assert stats.bytes_spilled >= disk.size - stage > disk.size // 2
        else:
            assert stats.staged_bytes == (disk.size if where == "from the stage" else 0)
        function = functools.partial(read_each, snapshot.readinto, READS[read], offsets)
        measure(benchmark, f"read of {read}", f"Snapshot.readinto, {where}", len(offsets), function)


@pytest.mark.parametrize("kept", ["in memory", "in a nameless file"])
@pytest.mark.parametrize("name", SIZES)
def test_cut(benchmark, name, kept):
    with workplace() as directory:
        path = os.path.join(directory, "sparse.raw")
        with open(path, "wb") as file:
            try:
                file.truncate(min(SIZES[name], 16 * TIB - 4096))  # where ext4 ends
            except OSError as error:
                pytest.skip(f"no file of this size here: {error}")
        with open_disk(path) as disk, ExitStack() as cut:

            def function() -> None:
                cut.enter_context(disk.snapshot(directory if kept == "in a nameless file" else "memory"))

            what = f"{name}, old data {kept}"
            measure(benchmark, "cut, by size of the disk", what, 1, function, cut.close, rounds=100)
