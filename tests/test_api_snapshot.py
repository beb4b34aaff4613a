"""Snapshots as Python sees them: reading as a file, extents, what raises what, statistics, chunks."""

from __future__ import annotations

import array
import io
import random
import threading
import time
import zipfile

import pytest
from conftest import MIB, content, wait_for

import pyfleece
from pyfleece.testing import FaultyImage

pytestmark = pytest.mark.usefixtures("no_leaks")
CLUSTER = 4096


@pytest.fixture
def source(make_image):
    path, _ = make_image()
    with pyfleece.open(path, "r+") as image:
        yield image


@pytest.fixture
def disk(source):
    return pyfleece.Disk(source)


@pytest.fixture
def state(disk):
    return disk.pread(disk.size, 0)


@pytest.fixture
def snapshot(disk, state):
    """A snapshot of a disk of which about half was overwritten since."""
    with disk.snapshot(cluster_size=CLUSTER) as snapshot:
        rng = random.Random(4)
        for _ in range(150):
            disk.pwrite(rng.randbytes(rng.randrange(1, 9000)), rng.randrange(disk.size - 9000))
        yield snapshot


def test_reads(snapshot, state):
    assert (snapshot.size, snapshot.cluster_size) == (len(state), CLUSTER)
    assert snapshot.pread(len(state), 0) == state
    assert snapshot.pread(5, MIB + 508) == state[-5:]
    buffer = bytearray(10_000)
    assert snapshot.readinto(buffer, 12_345) == 10_000
    assert buffer == state[12_345:22_345]
    with pytest.raises(pyfleece.OutOfRangeError):
        snapshot.pread(1, snapshot.size)


def test_extents_cover_it_all_and_zeros_are_zeros(snapshot, state):
    at = 0
    for offset, length, kind in snapshot.extents():
        assert offset == at
        assert kind in ("data", "zero")
        if kind == "zero":
            assert state[offset : offset + length].count(0) == length
        at += length
    assert at == snapshot.size
    assert [extent.kind for extent in snapshot.extents(10, 20)] in (["data"], ["zero"])


def test_three_different_exceptions(disk):
    disk.bitmaps.add("daily")
    disk.pwrite(b"x" * 65536 * 2, 0)
    with disk.snapshot("memory", bitmap="daily", cluster_size=CLUSTER, stage_size=CLUSTER, cbw_timeout=0) as snapshot:
        with pytest.raises(pyfleece.OutsideBitmapError):
            snapshot.pread(1, 65536 * 2)
        snapshot.discard(CLUSTER, 0)
        with pytest.raises(pyfleece.DiscardedError) as caught:
            snapshot.pread(10, CLUSTER - 5)
        assert (caught.value.offset, caught.value.length) == (0, CLUSTER)
        assert [extent.kind for extent in snapshot.extents()] == ["discarded", "data", "outside"]
        disk.pwrite(b"y" * 3 * CLUSTER, CLUSTER)
        for offset in (0, CLUSTER, 65536 * 2):
            with pytest.raises(pyfleece.SnapshotBrokenError):
                snapshot.pread(1, offset)


def test_discard_takes_whole_clusters_and_frees_them(disk, state):
    disk.pwrite(b"\x05" * disk.size, 0)
    with disk.snapshot(cluster_size=CLUSTER) as snapshot:
        disk.pwrite(b"\x06" * disk.size, 0)
        staged = snapshot.stats.staged_bytes
        assert staged >= disk.size
        snapshot.discard(2 * CLUSTER, CLUSTER // 2)  # only the second cluster is whole
        assert snapshot.pread(CLUSTER, 0) == b"\x05" * CLUSTER
        assert snapshot.stats.clusters_discarded == 1
        with pytest.raises(pyfleece.DiscardedError):
            snapshot.pread(1, CLUSTER)
        snapshot.discard(snapshot.size, 0)
        assert snapshot.stats.staged_bytes == snapshot.stats.fleecing_bytes == 0
        disk.pwrite(b"\x07" * disk.size, 0)  # nothing is saved any more
        assert snapshot.stats.staged_bytes == 0


def test_stats(disk):
    disk.pwrite(b"\x05" * 10 * CLUSTER, 0)
    disk.zero(10 * CLUSTER, 10 * CLUSTER)
    with disk.snapshot(cluster_size=CLUSTER) as snapshot:
        for cluster in range(20):
            disk.pwrite(b"new", cluster * CLUSTER)
        stats = snapshot.stats
        assert (stats.clusters_saved, stats.zero_clusters) == (10, 10)
        assert stats.bytes_copied == stats.staged_bytes == stats.staged_peak == 10 * CLUSTER
        assert stats.room_timeouts == stats.clusters_lost == 0
        latency = stats.latency
        assert latency.count >= 20
        assert sum(writes for _, writes in latency.histogram) == latency.count
        assert 0 < latency.p50 <= latency.p99 <= latency.max < 5


def test_percentiles():
    latency = pyfleece.Latency(100, 0.9, ((0.1, 50), (0.2, 49), (1.0, 1)))
    assert (latency.p50, latency.p99, latency.percentile(100)) == (0.1, 0.2, 0.9)
    assert pyfleece.Latency(0, 0.0, ()).p99 == 0
    with pytest.raises(ValueError):
        latency.percentile(101)


# ---- as a file ----


def test_file(snapshot, state):
    with snapshot.open() as file:
        assert isinstance(file, io.RawIOBase)
        assert (file.readable(), file.seekable(), file.writable()) == (True, True, False)
        assert file.read(10) == state[:10]
        assert file.tell() == 10
        assert file.seek(-20, io.SEEK_END) == len(state) - 20
        assert file.read(100) == state[-20:]
        assert file.read(100) == b""
        assert file.seek(100) == 100
        assert file.seek(50, io.SEEK_CUR) == 150
        assert file.read() == state[150:]
        file.seek(len(state) + 100)
        assert file.read() == b""
        numbers = array.array("I", bytes(40))
        file.seek(8)
        assert file.readinto(numbers) == 40
        assert numbers.tobytes() == state[8:48]
        with pytest.raises(ValueError):
            file.seek(-1)
        with pytest.raises(ValueError):
            file.seek(0, 9)
        with pytest.raises(io.UnsupportedOperation):
            file.write(b"x")
    with pytest.raises(pyfleece.ClosedError):
        file.read(1)
    assert not snapshot.closed


def test_file_for_other_libraries(disk, snapshot_of):
    """A zip archive in the middle of being overwritten is still whole in the snapshot."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("hello.txt", "hello " * 1000)
    data = archive.getvalue()
    disk.pwrite(data, disk.size - len(data))
    with snapshot_of(disk) as snapshot:
        disk.zero(disk.size, 0)
        with zipfile.ZipFile(io.BufferedReader(snapshot.open())) as found:
            assert found.read("hello.txt") == b"hello " * 1000


@pytest.fixture
def snapshot_of():
    return lambda disk: disk.snapshot(cluster_size=CLUSTER)


def test_file_after_the_snapshot_was_closed(snapshot):
    file = snapshot.open()
    snapshot.close()
    with pytest.raises(ValueError):
        file.read(1)


# ---- chunks ----


def collect(chunks):
    """What they hold, acknowledged one by one."""
    data = bytearray()
    for chunk in chunks:
        assert chunk.offset == len(data)
        data += chunk.buffer if chunk.kind == "data" else bytes(chunk.length)
        chunk.ack()
    return data


def test_chunks_are_complete_and_in_order(snapshot, state):
    with snapshot.chunks(granularity=65536) as chunks:
        assert collect(chunks) == state
        assert chunks.lost == []
    assert snapshot.stats.staged_bytes == 0
    with pytest.raises(pyfleece.DiscardedError):
        snapshot.pread(1, 0)


def test_chunks_can_leave_the_snapshot_as_it_is(snapshot, state):
    with snapshot.chunks(granularity=65536, discard=False) as chunks:
        assert collect(chunks) == state
    for chunk in snapshot.chunks(granularity=65536):
        chunk.ack(discard=False)
    assert snapshot.pread(snapshot.size, 0) == state


def test_chunks_are_acknowledged_in_any_order_by_any_thread(snapshot, state):
    chunks = list_of(snapshot.chunks(granularity=65536, buffers=64))
    random.Random(2).shuffle(chunks)
    data = bytearray(len(state))

    def store(part):
        for chunk in part:
            if chunk.buffer is not None:
                data[chunk.offset : chunk.offset + chunk.length] = chunk.buffer
            chunk.ack()

    threads = [threading.Thread(target=store, args=(chunks[i::3],)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert data == state
    assert all(chunk.buffer is None for chunk in chunks)


def list_of(chunks):
    return [chunk for chunk in chunks]  # noqa: C416  (list() would drop the iterator later)


def test_a_buffer_is_read_only_and_valid_until_ack(disk, state):
    disk.pwrite(b"\x05" * disk.size, 0)
    with disk.snapshot() as snapshot, snapshot.chunks() as chunks:
        chunk = next(chunks)
        buffer = chunk.buffer
        assert buffer.readonly
        assert len(buffer) == chunk.length
        chunk.ack()
        with pytest.raises(ValueError):
            buffer[0]
        with pytest.raises(pyfleece.ArgumentError):
            chunk.ack()


@pytest.mark.parametrize("use", [lambda buffer: buffer[10:20], memoryview, lambda buffer: buffer.cast("H")])
def test_a_chunk_in_use_cannot_be_acknowledged(disk, use):
    """Slices and other views of the buffer count, for the memory is used again after ack."""
    disk.pwrite(b"\x05" * disk.size, 0)
    with disk.snapshot() as snapshot, snapshot.chunks() as chunks:
        chunk = next(chunks)
        kept = use(chunk.buffer)
        with pytest.raises(BufferError, match="in use"):
            chunk.ack()
        assert kept[0] in (5, 0x0505)
        assert chunk.buffer[0] == 5
        assert snapshot.pread(1, chunk.offset) == b"\x05"
        kept.release()
        chunk.ack()
        with pytest.raises(pyfleece.DiscardedError):
            snapshot.pread(1, chunk.offset)


def test_a_buffer_outlives_all_that_it_came_from(make_image):
    path, _ = make_image()
    with pyfleece.open(path, "r+") as source:
        disk = pyfleece.Disk(source)
        disk.pwrite(b"\x05" * disk.size, 0)
        with disk.snapshot() as snapshot:
            chunk = next(snapshot.chunks())
            part = chunk.buffer[100:200]
            del chunk
    del source, disk, snapshot
    assert bytes(part) == b"\x05" * 100


def test_all_buffers_held_is_told(disk):
    disk.pwrite(b"\x05" * disk.size, 0)
    with disk.snapshot(cluster_size=CLUSTER) as snapshot:
        chunks = snapshot.chunks(granularity=CLUSTER, buffers=2, ack_timeout=0.2)
        held = [next(chunks), next(chunks)]
        with pytest.raises(TimeoutError, match="ack"):
            next(chunks)
        held[1].ack()
        assert next(chunks).offset == 2 * CLUSTER


def test_a_slow_source_is_not_taken_for_a_lazy_consumer(make_image):
    path, _ = make_image()
    with pyfleece.open(path, "r+") as inner, FaultyImage(inner) as source:
        disk = pyfleece.Disk(source)
        disk.pwrite(b"\x05" * disk.size, 0)
        with disk.snapshot(cluster_size=CLUSTER) as snapshot:
            source.delay("read", seconds=0.5)
            assert next(snapshot.chunks(ack_timeout=0.1)).offset == 0


def test_leaving_the_loop_ends_the_job(disk, source, no_leaks):
    disk.pwrite(b"\x05" * disk.size, 0)
    with disk.snapshot(cluster_size=CLUSTER) as snapshot:
        for chunk in snapshot.chunks(granularity=CLUSTER):
            assert chunk.offset == 0
            break
        with pytest.raises(pyfleece.ClosedError):
            chunk.ack()
        with snapshot.chunks(granularity=CLUSTER) as chunks:
            chunk = next(chunks)
        with pytest.raises(pyfleece.ClosedError):
            next(chunks)  # and not the end: that would pass for a complete backup


def test_chunks_can_be_acknowledged_after_the_loop(snapshot, state):
    for chunk in list_of(snapshot.chunks(granularity=65536, buffers=64)):
        chunk.ack()
    assert [extent.kind for extent in snapshot.extents()] == ["discarded"]


def test_several_threads_take_chunks(snapshot, state):
    data = bytearray(len(state))
    lock = threading.Lock()
    with snapshot.chunks(granularity=CLUSTER) as chunks:

        def take():
            for chunk in chunks:
                with lock:
                    data[chunk.offset : chunk.offset + chunk.length] = chunk.buffer or bytes(chunk.length)
                chunk.ack()

        threads = [threading.Thread(target=take) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert data == state


def test_a_failure_comes_after_the_chunks_before_it(make_image):
    path, _ = make_image()
    with pyfleece.open(path, "r+") as inner, FaultyImage(inner) as source:
        disk = pyfleece.Disk(source)
        disk.pwrite(content(disk.size, 3, hole=disk.size), 0)
        disk.pwrite(b"\x05" * disk.size, 0)
        with disk.snapshot(cluster_size=CLUSTER) as snapshot:
            source.fail("read", offset=20 * CLUSTER, length=1, times=None)
            offsets = []
            with pytest.raises(pyfleece.ImageError) as caught, snapshot.chunks(granularity=CLUSTER) as chunks:
                for chunk in chunks:
                    offsets.append(chunk.offset)
                    chunk.ack()
            assert caught.value.side == "source"
            assert offsets == [cluster * CLUSTER for cluster in range(20)]


def test_chunks_leave_out_what_was_lost(disk):
    disk.pwrite(b"\x05" * disk.size, 0)
    with disk.snapshot(
        "memory", cluster_size=CLUSTER, stage_size=CLUSTER, cbw_timeout=0, on_cbw_error="lose-range"
    ) as snapshot:
        disk.pwrite(b"new", 0)
        disk.pwrite(b"new", 3 * CLUSTER)
        chunks = snapshot.chunks(granularity=CLUSTER)
        offsets = []
        for chunk in chunks:
            offsets.append(chunk.offset)
            chunk.ack()
        assert 3 * CLUSTER not in offsets
        assert [(extent.offset, extent.length) for extent in chunks.lost] == [(3 * CLUSTER, CLUSTER)]


@pytest.mark.parametrize(
    "options", [{"granularity": 5000}, {"granularity": 0}, {"buffers": 1}, {"workers": 1000}, {"ack_timeout": -1}]
)
def test_options_of_chunks_that_make_no_sense(snapshot, options):
    with pytest.raises(ValueError):
        snapshot.chunks(**options)


def test_closing_from_another_thread_ends_a_wait_for_a_chunk(disk):
    disk.pwrite(b"\x05" * disk.size, 0)
    with disk.snapshot(cluster_size=CLUSTER) as snapshot:
        chunks = snapshot.chunks(granularity=CLUSTER, buffers=2)
        held = [next(chunks), next(chunks)]
        raised = []

        def wait():
            try:
                next(chunks)
            except pyfleece.Error as error:
                raised.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.1)
        snapshot.close()
        wait_for(lambda: raised)
        thread.join()
        assert isinstance(raised[0], (pyfleece.ClosedError, pyfleece.CancelledError))
        assert bytes(held[0].buffer[:3]) == b"\x05\x05\x05"
