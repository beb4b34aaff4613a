"""A guest's 4 KiB write, by cluster size: the bare system call, and Disk.pwrite with no snapshot, as the first one to
its cluster, and to a cluster that was copied before.

One write in each cluster of a disk full of data, in an order that looks random. First touches of the whole disk are
eight stages long, so that the fleecing file is written to meanwhile.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from part import KIB, MIB, fill, measure, open_disk, shuffled, workplace

import pyfleece

STAGE = 32 * MIB
CLUSTERS = {"4 KiB": 4 * KIB, "16 KiB": 16 * KIB, "64 KiB": 64 * KIB, "4 MiB": 4 * MIB}
DATA = os.urandom(4 * KIB)


@pytest.fixture(scope="module")
def source(request) -> Iterator[str]:
    with workplace() as directory:
        size = (8 if request.config.option.benchmark_disable else 256) * MIB
        yield fill(os.path.join(directory, "disk.raw"), size)


def write_each(write: Callable[[bytes, int], int], offsets: list[int]) -> None:
    for offset in offsets:
        write(DATA, offset)


def cut(disk: pyfleece.Disk, source: str, cluster: str) -> pyfleece.Snapshot:
    return disk.snapshot(os.path.dirname(source), cluster_size=CLUSTERS[cluster], stage_size=STAGE)


def group(cluster: str) -> str:
    return f"4 KiB write, one in each {cluster}"


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_system_call(benchmark, source, cluster):
    offsets = shuffled(os.path.getsize(source) // CLUSTERS[cluster], CLUSTERS[cluster])
    fd = os.open(source, os.O_WRONLY)
    try:
        function = functools.partial(write_each, functools.partial(os.pwrite, fd), offsets)
        measure(benchmark, group(cluster), "os.pwrite", len(offsets), function, floor=True)
    finally:
        os.close(fd)
    with open(source, "rb") as file:
        assert file.read(len(DATA)) == DATA


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_no_snapshot(benchmark, source, cluster):
    offsets = shuffled(os.path.getsize(source) // CLUSTERS[cluster], CLUSTERS[cluster])
    with open_disk(source) as disk:
        function = functools.partial(write_each, disk.pwrite, offsets)
        measure(benchmark, group(cluster), "Disk.pwrite, no snapshot", len(offsets), function)


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_first_touch(benchmark, source, cluster):
    offsets = shuffled(os.path.getsize(source) // CLUSTERS[cluster], CLUSTERS[cluster])
    with open_disk(source) as disk, ExitStack() as stack:

        def setup() -> None:
            stack.close()
            stack.enter_context(cut(disk, source, cluster))

        function = functools.partial(write_each, disk.pwrite, offsets)
        measure(benchmark, group(cluster), "Disk.pwrite, first touch", len(offsets), function, setup)


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_copied_before(benchmark, source, cluster):
    offsets = shuffled(os.path.getsize(source) // CLUSTERS[cluster], CLUSTERS[cluster])
    with open_disk(source) as disk, cut(disk, source, cluster) as snapshot:
        write_each(disk.pwrite, offsets)
        saved = snapshot.stats.clusters_saved
        assert saved == len(offsets)
        function = functools.partial(write_each, disk.pwrite, offsets)
        measure(benchmark, group(cluster), "Disk.pwrite, copied before", len(offsets), function)
        assert snapshot.stats.clusters_saved == saved
