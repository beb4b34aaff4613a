"""Bitmaps: single bits and whole scans in C, on as many bits as a disk of 16 TiB has clusters of 64 KiB; and a dirty
bitmap of a disk of 1 TiB through the Python API.
"""

from __future__ import annotations

import ctypes
import os
import random
from array import array
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from part import TIB, c_loops, measure, open_disk, pointer, shuffled, workplace

import pyfleece

UNIT = 65536
BITS, SCANS, DISK = "bitmap in C, random bits", "bitmap in C, scans", "DirtyBitmap of 1 TiB"


class Bitmap:
    """A bitmap of the library's, by the C loops."""

    def __init__(self, loops: ctypes.CDLL, bits: int) -> None:
        self.loops, self.bits = loops, bits
        self.made = ctypes.c_void_p(loops.loop_bitmap_new(ctypes.c_uint64(bits)))
        assert self.made.value

    def set(self, some: array[int]) -> None:
        self.loops.loop_bitmap_set(self.made, *pointer(some))

    def set_all(self) -> None:
        self.loops.loop_bitmap_set_range(self.made, ctypes.c_uint64(0), ctypes.c_uint64(self.bits))

    def clear(self, some: array[int]) -> None:
        self.loops.loop_bitmap_clear(self.made, *pointer(some))

    def test(self, some: array[int]) -> int:
        return int(self.loops.loop_bitmap_test(self.made, *pointer(some)))

    def runs(self) -> int:
        return int(self.loops.loop_bitmap_runs(self.made))

    def count(self) -> int:
        return int(self.loops.loop_bitmap_count(self.made))

    def merge(self, other: Bitmap) -> None:
        self.loops.loop_bitmap_merge(self.made, other.made)

    def free(self) -> None:
        self.loops.loop_bitmap_free(self.made)


@pytest.fixture(scope="module")
def loops() -> Iterator[ctypes.CDLL]:
    with c_loops() as loops:
        yield loops


@pytest.fixture(scope="module")
def some(request) -> array[int]:
    """A sample of the bits, in no order."""
    bits = 1 << (16 if request.config.option.benchmark_disable else 28)
    return array("Q", random.Random(1).sample(range(bits), bits // 256))


@pytest.fixture
def bitmaps(request, loops) -> Iterator[list[Bitmap]]:
    """Two of them, empty."""
    made = [Bitmap(loops, 1 << (16 if request.config.option.benchmark_disable else 28)) for _ in range(2)]
    yield made
    for bitmap in made:
        bitmap.free()


def test_test(benchmark, bitmaps, some):
    bitmaps[0].set(some)
    measure(benchmark, BITS, "test", len(some), lambda: bitmaps[0].test(some))
    assert bitmaps[0].test(some) == len(some)


def test_set(benchmark, bitmaps, some):
    def setup() -> None:
        bitmaps[0].free()
        bitmaps[0] = Bitmap(bitmaps[0].loops, bitmaps[0].bits)

    measure(benchmark, BITS, "set, in memory that was never touched", len(some), lambda: bitmaps[0].set(some), setup)
    assert bitmaps[0].count() == len(some)


def test_set_again(benchmark, bitmaps, some):
    bitmaps[0].set(some)
    measure(benchmark, BITS, "set what is set", len(some), lambda: bitmaps[0].set(some))
    assert bitmaps[0].count() == len(some)


def test_clear(benchmark, bitmaps, some):
    measure(benchmark, BITS, "clear", len(some), lambda: bitmaps[0].clear(some), lambda: bitmaps[0].set(some))
    assert bitmaps[0].count() == 0


def test_scan_of_nothing(benchmark, bitmaps):
    measure(benchmark, SCANS, "next over all, nothing is set", 1, bitmaps[0].runs)
    assert bitmaps[0].runs() == 0


def test_scan_of_everything(benchmark, bitmaps):
    bitmaps[0].set_all()
    measure(benchmark, SCANS, "next over all, everything is set", 1, bitmaps[0].runs)
    assert bitmaps[0].runs() == 1


def test_scan_of_single_bits(benchmark, bitmaps, some):
    bitmaps[0].set(some)
    runs = bitmaps[0].runs()
    assert len(some) * 0.9 < runs <= len(some)
    measure(benchmark, SCANS, "next set and next clear, a run among single bits", runs, bitmaps[0].runs)


def test_count(benchmark, bitmaps, some):
    bitmaps[0].set(some)
    measure(benchmark, SCANS, "count", 1, bitmaps[0].count)
    assert bitmaps[0].count() == len(some)


def test_merge(benchmark, bitmaps, some):
    bitmaps[0].set(some)
    measure(benchmark, SCANS, "merge", 1, lambda: bitmaps[1].merge(bitmaps[0]))
    assert bitmaps[1].count() == len(some)


# ---- of a disk ----


@pytest.fixture
def disk(request) -> Iterator[pyfleece.Disk]:
    """Of 1 TiB, with some units dirty in "all"; "daily" is empty."""
    with workplace() as directory, ExitStack() as stack:
        path = os.path.join(directory, "sparse.raw")
        with open(path, "wb") as file:
            file.truncate(TIB)
        disk = stack.enter_context(open_disk(path))
        disk.bitmaps.add("all", UNIT)
        count = 100 if request.config.option.benchmark_disable else 10_000
        for offset in shuffled(count, TIB // count // UNIT * UNIT):
            disk.pwrite(b"x", offset)
        disk.bitmaps["all"].disable()
        disk.bitmaps.add("daily", UNIT)
        yield disk


def test_dirty_count(benchmark, disk):
    measure(benchmark, DISK, "count", 1, lambda: disk.bitmaps["all"].count)
    assert disk.bitmaps["all"].count % UNIT == 0 < disk.bitmaps["all"].count


def test_dirty_extents(benchmark, disk):
    found = len(list(disk.bitmaps["all"].extents()))
    assert found == 2 * (disk.bitmaps["all"].count // UNIT)
    measure(benchmark, DISK, "extents, each", found, lambda: list(disk.bitmaps["all"].extents()))


def test_dirty_merge(benchmark, disk):
    measure(benchmark, DISK, "merge", 1, lambda: disk.bitmaps["daily"].merge("all"))
    assert disk.bitmaps["daily"].count == disk.bitmaps["all"].count


def test_dirty_clear(benchmark, disk):
    daily = disk.bitmaps["daily"]
    measure(benchmark, DISK, "clear", 1, daily.clear, lambda: daily.merge("all"))
    assert daily.count == 0
