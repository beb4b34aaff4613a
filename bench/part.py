"""What the benchmarks of single parts (bench/test_part_*.py) share: where they work, how one is timed, the C loops."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import random
import subprocess
import tempfile
from array import array
from collections.abc import Callable, Iterator
from typing import Any

from kit import FLAGS, ROOT

import pyfleece

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40


@contextlib.contextmanager
def workplace() -> Iterator[str]:
    """A directory that is gone afterwards, on the file system to measure."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIRECTORY", "/var/tmp")) as directory:
        yield directory


def measure(
    benchmark: Any,
    group: str,
    what: str,
    operations: int,
    function: Callable[[], object],
    setup: Callable[[], None] | None = None,
    rounds: int = 7,
    floor: bool = False,
) -> None:
    """Time `function`, which does so many operations; `setup` runs before each round, and is not timed. `floor`: this
    is what bench/parts.py compares the others of the group with.
    """
    benchmark.group = group
    benchmark.extra_info.update(what=what, operations=operations, floor=floor)
    benchmark.pedantic(function, setup=setup, rounds=rounds, warmup_rounds=1)


def fill(path: str, size: int) -> str:
    """A file full of data, all of it in the page cache and on the disk."""
    block = os.urandom(MIB)
    with open(path, "wb") as file:
        for _ in range(size // MIB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return path


def shuffled(count: int, step: int) -> list[int]:
    """Offsets 0, step, ..., each once, in an order that looks random and is always the same."""
    offsets = [index * step for index in range(count)]
    random.Random(1).shuffle(offsets)
    return offsets


@contextlib.contextmanager
def open_disk(path: str | os.PathLike[str]) -> Iterator[pyfleece.Disk]:
    with pyfleece.open(path, "r+", format="raw") as image, pyfleece.Disk(image, bitmap_file=False) as disk:
        yield disk


def pointer(numbers: array[int]) -> tuple[ctypes.c_void_p, ctypes.c_size_t]:
    """The arguments that an array of 64-bit numbers is for the loops. It must live as long as they use it."""
    address, count = numbers.buffer_info()
    return ctypes.c_void_p(address), ctypes.c_size_t(count)


@contextlib.contextmanager
def c_loops() -> Iterator[ctypes.CDLL]:
    """bench/loops.c, built and loaded."""
    csrc = ROOT / "csrc"
    sources = [ROOT / "bench" / "loops.c", csrc / "bitmap.c", csrc / "util" / "util.c"]
    with tempfile.TemporaryDirectory() as directory:
        library = pathlib.Path(directory) / "loops.so"
        command = ["gcc", *FLAGS, "-shared", "-fPIC", *map(str, sources), "-o", str(library)]
        subprocess.run(command, check=True)
        loops = ctypes.CDLL(str(library))
    loops.loop_bitmap_new.restype = ctypes.c_void_p
    for name in ("test", "runs", "count"):
        getattr(loops, f"loop_bitmap_{name}").restype = ctypes.c_uint64
    yield loops
