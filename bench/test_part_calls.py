"""What Python adds to a call: the same write from a C loop, through cffi's function, and by Disk.pwrite; beside the
system call from a C loop and by os.pwrite. A write of nothing leaves out what the kernel does to move the data.
"""

from __future__ import annotations

import ctypes
import functools
import os
from array import array
from collections.abc import Iterator

import pytest
from part import KIB, MIB, c_loops, fill, measure, open_disk, pointer, shuffled, workplace

import pyfleece
from pyfleece._native import ffi, lib

SIZES = {"4 KiB": 4 * KIB, "nothing": 0}


@pytest.fixture(scope="module")
def loops() -> Iterator[ctypes.CDLL]:
    with c_loops() as loops:
        yield loops


@pytest.fixture(scope="module")
def disk(request) -> Iterator[pyfleece.Disk]:
    with workplace() as directory:
        size = (1 if request.config.option.benchmark_disable else 32) * MIB
        with open_disk(fill(os.path.join(directory, "disk.raw"), size)) as disk:
            yield disk


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "way", ["C loop, pwrite", "C loop, fl_disk_pwrite", "os.pwrite", "fl_disk_pwrite through cffi", "Disk.pwrite"]
)
def test_call(benchmark, loops, disk, way, size):
    data, offsets = os.urandom(SIZES[size]), shuffled(disk.size // (4 * KIB), 4 * KIB)
    numbers = array("Q", offsets)
    pwrite = ctypes.c_void_p(int(ffi.cast("uintptr_t", ffi.addressof(lib, "fl_disk_pwrite"))))
    handle = ctypes.c_void_p(int(ffi.cast("uintptr_t", disk._handle)))
    length = ctypes.c_size_t(len(data))
    fd = os.open(disk.source.path, os.O_WRONLY)

    def through_cffi() -> None:
        error = ffi.new("fl_error *")
        for offset in offsets:
            if lib.fl_disk_pwrite(disk._handle, data, len(data), offset, error):
                raise AssertionError(ffi.string(error.text))

    def by(write: object) -> None:
        for offset in offsets:
            write(data, offset)

    def succeed(function: object, *arguments: object) -> None:
        assert function(*arguments) == 0

    functions = {
        "C loop, pwrite": functools.partial(succeed, loops.loop_pwrite, fd, data, length, *pointer(numbers)),
        "C loop, fl_disk_pwrite": functools.partial(
            succeed, loops.loop_disk_pwrite, pwrite, handle, data, length, *pointer(numbers)
        ),
        "os.pwrite": functools.partial(by, functools.partial(os.pwrite, fd)),
        "fl_disk_pwrite through cffi": through_cffi,
        "Disk.pwrite": functools.partial(by, disk.pwrite),
    }
    try:
        floor = way == "C loop, pwrite"
        measure(benchmark, f"write of {size}, no snapshot", way, len(offsets), functions[way], floor=floor)
    finally:
        os.close(fd)
    assert disk.pread(len(data), 0) == data
