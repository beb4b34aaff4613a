"""Backups as Python sees them: targets of every kind, what a failure leaves, waiting, progress, groups, Ctrl-C."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import MIB, content, require, run, wait_for

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
    """A snapshot of a disk that is written to all the time."""
    stop = threading.Event()

    def write():
        number = 0
        while not stop.is_set():
            number += 7919
            disk.pwrite(number.to_bytes(8, "big") * 100, number % (disk.size - 800))

    with disk.snapshot(cluster_size=CLUSTER) as snapshot:
        threads = [threading.Thread(target=write) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            yield snapshot
        finally:
            stop.set()
            for thread in threads:
                thread.join()


@pytest.fixture
def slow(disk):
    """A backup that takes minutes: slow(target, **options)."""
    disk.pwrite(content(disk.size, 9, hole=disk.size) or b"", 0)
    disk.pwrite(b"\x05" * disk.size, 0)
    with disk.snapshot(cluster_size=CLUSTER) as snapshot:
        yield lambda target, **options: pyfleece.Backup(snapshot, target, speed=10_000, granularity=CLUSTER, **options)


# ---- files ----


def test_to_a_new_file(snapshot, state, tmp_path):
    require("qemu-img")
    target = tmp_path / "backup.raw"
    result = pyfleece.backup(snapshot, target)
    assert target.read_bytes() == state
    assert result.total == result.data_bytes + result.zero_bytes == len(state)
    assert (result.lost_bytes, result.lost) == (0, [])
    assert result.seconds > 0
    assert snapshot.stats.fleecing_bytes == snapshot.stats.staged_bytes == 0
    (tmp_path / "expected.raw").write_bytes(state)
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", target, tmp_path / "expected.raw")


def test_a_new_file_is_sparse(disk, tmp_path):
    disk.zero(disk.size, 0)
    disk.pwrite(b"x", MIB // 2)
    target = tmp_path / "backup.raw"
    with disk.snapshot() as snapshot:
        result = pyfleece.backup(snapshot, target)
    assert target.stat().st_blocks * 512 <= 128 << 10
    assert result.zero_bytes > MIB // 2
    assert target.stat().st_size == disk.size


def test_format_of_a_new_file(snapshot, state, tmp_path):
    for name in ("backup", "backup.bak"):
        with pytest.raises(pyfleece.FormatError, match="format=") as caught:
            pyfleece.backup(snapshot, tmp_path / name)
        assert caught.value.side == "target"
    pyfleece.backup(snapshot, os.fsencode(tmp_path / "backup"), format="raw")
    assert (tmp_path / "backup").read_bytes() == state


def test_the_name_appears_only_when_it_is_complete(slow, tmp_path):
    target = tmp_path / "backup.raw"
    target.write_bytes(b"the backup of yesterday")
    with slow(target) as job:
        wait_for(lambda: job.progress.done)
        assert (tmp_path / "backup.raw.partial").exists()
        assert target.read_bytes() == b"the backup of yesterday"
        job.cancel()
        with pytest.raises(pyfleece.CancelledError):
            job.wait()
    assert target.read_bytes() == b"the backup of yesterday"
    assert sorted(os.listdir(tmp_path)) == ["backup.raw", "vm.raw"]


def test_an_older_backup_is_replaced(snapshot, state, tmp_path):
    target = tmp_path / "backup.raw"
    target.write_bytes(b"the backup of yesterday")
    pyfleece.backup(snapshot, target)
    assert target.read_bytes() == state
    assert not (tmp_path / "backup.raw.partial").exists()


def test_what_a_killed_backup_left_is_replaced(snapshot, state, tmp_path):
    (tmp_path / "backup.raw.partial").write_bytes(b"half a backup" * MIB)
    pyfleece.backup(snapshot, tmp_path / "backup.raw")
    assert (tmp_path / "backup.raw").read_bytes() == state


def test_two_backups_to_one_target(slow, snapshot, tmp_path):
    with slow(tmp_path / "backup.raw"):
        with pytest.raises(pyfleece.ImageLockedError):
            pyfleece.backup(snapshot, tmp_path / "backup.raw")
        assert (tmp_path / "backup.raw.partial").exists()


def test_source_and_fleecing_image_are_no_targets(disk, state, tmp_path):
    with pyfleece.create(tmp_path / "fleece.raw", 4 * MIB) as fleecing, disk.snapshot(fleecing) as snapshot:
        for target in (disk.source, disk.source.path, fleecing, fleecing.path):
            with pytest.raises(pyfleece.ImageError, match="is the source"):
                pyfleece.backup(snapshot, target)
        assert snapshot.pread(snapshot.size, 0) == state
    assert not list(tmp_path.glob("*.partial"))


def test_a_target_in_use_by_another_program_is_not_replaced(snapshot, tmp_path):
    with pyfleece.create(tmp_path / "backup.raw", 4096), pytest.raises(pyfleece.ImageLockedError) as caught:
        pyfleece.backup(snapshot, tmp_path / "backup.raw")
    assert caught.value.side == "target"


def test_targets_that_are_none(snapshot, tmp_path):
    with pytest.raises(IsADirectoryError):
        pyfleece.backup(snapshot, tmp_path)
    with pytest.raises(FileNotFoundError):
        pyfleece.backup(snapshot, tmp_path / "missing" / "backup.raw")
    with pytest.raises(TypeError):
        pyfleece.backup(snapshot, 5)
    with pytest.raises(TypeError, match="Snapshot"):
        pyfleece.backup(snapshot.disk, tmp_path / "backup.raw")


def test_a_failure_leaves_nothing(make_image, tmp_path):
    with pyfleece.open(make_image()[0], "r+") as inner, FaultyImage(inner) as source:
        disk = pyfleece.Disk(source)
        disk.pwrite(b"\x05" * disk.size, 0)
        with disk.snapshot(cluster_size=CLUSTER) as snapshot:
            source.fail("read", offset=MIB // 2, length=1, times=None)
            with pytest.raises(pyfleece.ImageError) as caught:
                pyfleece.backup(snapshot, tmp_path / "backup.raw")
            assert (caught.value.side, caught.value.errno) == ("source", errno.EIO)
            assert os.listdir(tmp_path) == ["vm.raw"]
            source.clear()
            # the snapshot is as good as before, but for what was copied and discarded already
            assert snapshot.broken is None


# ---- images and devices ----


@pytest.mark.parametrize("is_zero", [False, True])
def test_to_an_open_image(snapshot, state, tmp_path, is_zero):
    with pyfleece.create(tmp_path / "backup.raw", MIB + 10_000) as target:
        if not is_zero:
            target.pwrite(b"\xee" * target.size, 0)
        pyfleece.backup(snapshot, target, target_is_zero=is_zero)
        assert target.pread(len(state), 0) == state
        assert target.pread(3, target.size - 3) == (bytes(3) if is_zero else b"\xee" * 3)
        assert not target.closed


def test_a_target_that_is_too_small(snapshot, state, tmp_path):
    with pyfleece.create(tmp_path / "backup.raw", MIB) as target:
        with pytest.raises(OSError) as caught:
            pyfleece.backup(snapshot, target)
        assert (caught.value.side, caught.value.errno) == ("target", errno.ENOSPC)
    assert snapshot.pread(len(state), 0) == state


def test_a_target_that_fails(snapshot, tmp_path):
    with pyfleece.create(tmp_path / "backup.raw", 2 * MIB) as inner, FaultyImage(inner) as target:
        target.fail("write", error=errno.ENOSPC)
        with pytest.raises(pyfleece.ImageError) as caught:
            pyfleece.backup(snapshot, target)
        assert (caught.value.side, caught.value.errno) == ("target", errno.ENOSPC)
        assert caught.value.offset is not None
    assert snapshot.broken is None


def test_to_a_block_device(snapshot, state, loop_device):
    device = loop_device(2 * MIB)
    with open(device, "wb") as raw:
        raw.write(b"\xee" * 2 * MIB)
    pyfleece.backup(snapshot, device)
    with open(device, "rb") as raw:
        assert raw.read(len(state)) == state
        assert raw.read(3) == b"\xee" * 3


# ---- files in Python ----


class Partial(io.RawIOBase):
    """Takes at most 1000 bytes at a time."""

    def __init__(self):
        self.data = bytearray()

    def writable(self):
        return True

    def write(self, buffer):
        self.data += buffer[:1000]
        return min(len(buffer), 1000)


class Simple:
    """Takes all and tells nothing."""

    def __init__(self):
        self.data = bytearray()

    def write(self, buffer):
        self.data += buffer


@pytest.mark.parametrize("kind", [Partial, Simple])
def test_to_anything_with_a_write(snapshot, state, kind):
    target = kind()
    result = pyfleece.backup(snapshot, target)
    assert target.data == state
    assert result.total == result.data_bytes + result.zero_bytes == len(state)
    assert snapshot.stats.staged_bytes == 0


def test_to_a_file_object(snapshot, state, tmp_path):
    with open(tmp_path / "backup", "wb") as file:
        file.write(b"header")
        pyfleece.backup(snapshot, file)
        assert not file.closed
        assert (tmp_path / "backup").read_bytes() == b"header" + state  # it was flushed


@pytest.mark.parametrize("blocking", [True, False])
def test_to_a_pipe(snapshot, state, blocking):
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, blocking)
    got = []

    def read():
        with open(read_end, "rb") as file:
            got.append(file.read())

    thread = threading.Thread(target=read)
    thread.start()
    with open(write_end, "wb", buffering=0) as file:
        pyfleece.backup(snapshot, file)
    thread.join()
    assert got == [state]


def test_to_a_named_pipe(snapshot, state, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    got = []
    thread = threading.Thread(target=lambda: got.append(fifo.read_bytes()))
    thread.start()
    pyfleece.backup(snapshot, fifo)
    thread.join()
    assert got == [state]


def test_a_pipe_whose_reader_dies(snapshot):
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "wb", buffering=0) as file, pytest.raises(BrokenPipeError) as caught:
        pyfleece.backup(snapshot, file)
    assert isinstance(caught.value, pyfleece.ImageError)
    assert (caught.value.side, caught.value.offset) == ("target", 0)
    assert snapshot.broken is None


def test_a_write_that_raises_something_else(snapshot):
    class Broken:
        def write(self, buffer):
            raise LookupError("no such bucket")

    with pytest.raises(LookupError, match="no such bucket"):
        pyfleece.backup(snapshot, Broken())


def test_a_pipe_that_nobody_reads_can_be_cancelled(disk):
    disk.pwrite(b"\x05" * disk.size, 0)
    read_end, write_end = os.pipe()
    with open(write_end, "wb", buffering=0) as file, disk.snapshot(cluster_size=CLUSTER) as snapshot:
        job = pyfleece.Backup(snapshot, file)
        job.start()
        time.sleep(0.1)
        begun = time.monotonic()
        assert not job.cancel()
        assert time.monotonic() - begun < 1
        job.close()
        snapshot.close()
        os.close(read_end)  # ends the write
        with pytest.raises(pyfleece.Error):
            job._done.wait(5)
            job.result  # noqa: B018


# ---- options ----


def test_what_was_copied_is_discarded_or_not(disk, state, tmp_path):
    with disk.snapshot() as snapshot:
        pyfleece.backup(snapshot, tmp_path / "one.raw", discard_source=False)
        assert snapshot.pread(len(state), 0) == state
        pyfleece.backup(snapshot, tmp_path / "two.raw", granularity=64 << 10, workers=3)
        with pytest.raises(pyfleece.DiscardedError):
            snapshot.pread(1, 0)
        with pytest.raises(pyfleece.DiscardedError):
            pyfleece.backup(snapshot, tmp_path / "three.raw")
        skipped = pyfleece.backup(snapshot, tmp_path / "four.raw", skip_lost=True)
        assert skipped.lost_bytes == skipped.total == len(state)
    assert (tmp_path / "one.raw").read_bytes() == (tmp_path / "two.raw").read_bytes() == state
    assert not (tmp_path / "three.raw").exists()


@pytest.mark.parametrize("stream", [False, True])
def test_lost_ranges_are_listed(disk, tmp_path, stream):
    disk.pwrite(b"\x05" * disk.size, 0)
    options = {"cluster_size": CLUSTER, "stage_size": CLUSTER, "cbw_timeout": 0, "on_cbw_error": "lose-range"}
    with disk.snapshot("memory", **options) as snapshot:
        disk.pwrite(b"new", 0)
        disk.pwrite(b"new", 5 * CLUSTER)
        target = io.BytesIO() if stream else tmp_path / "backup.raw"
        result = pyfleece.backup(snapshot, target)
        assert result.lost_bytes == CLUSTER
        assert [(extent.offset, extent.length) for extent in result.lost] == [(5 * CLUSTER, CLUSTER)]
    data = target.getvalue() if stream else target.read_bytes()
    assert len(data) == disk.size
    expected = bytearray(b"\x05" * disk.size)
    expected[5 * CLUSTER : 6 * CLUSTER] = bytes(CLUSTER)
    assert data == expected


def test_lost_ranges_fail_the_backup_if_asked(disk, tmp_path):
    disk.pwrite(b"\x05" * disk.size, 0)
    options = {"cluster_size": CLUSTER, "stage_size": CLUSTER, "cbw_timeout": 0, "on_cbw_error": "lose-range"}
    with disk.snapshot("memory", **options) as snapshot:
        disk.pwrite(b"new", 0)
        disk.pwrite(b"new", 5 * CLUSTER)
        with pytest.raises(pyfleece.LostError):
            pyfleece.backup(snapshot, tmp_path / "backup.raw", skip_lost=False)


@pytest.mark.parametrize(
    "options", [{"granularity": 5000}, {"workers": 0}, {"workers": 1000}, {"speed": -1}, {"progress": "loud"}]
)
def test_options_that_make_no_sense(snapshot, state, tmp_path, options):
    with pytest.raises(ValueError):
        pyfleece.backup(snapshot, tmp_path / "backup.raw", **options)
    assert os.listdir(tmp_path) == ["vm.raw"]


def test_workers_step_back_behind_the_guest(slow, tmp_path):
    def of_threads(name):
        for task in Path("/proc/self/task").iterdir():
            if (task / "comm").read_text().strip() == name:
                tid = int(task.name)
                yield os.sched_getscheduler(tid), os.getpriority(os.PRIO_PROCESS, tid)

    nice = os.getpriority(os.PRIO_PROCESS, 0)
    with slow(tmp_path / "t.raw") as job:
        end = time.monotonic() + 30
        while not (workers := set(of_threads("fl-backup"))) <= {(os.SCHED_BATCH, max(nice, 10))} or not workers:
            assert time.monotonic() < end, workers
            time.sleep(0.01)
        assert os.getpriority(os.PRIO_PROCESS, 0) == nice  # nobody else does
        job.cancel()


def test_speed_can_be_changed(slow, tmp_path):
    begun = time.monotonic()
    with slow(tmp_path / "backup.raw") as job:
        assert job.speed == 10_000
        with pytest.raises(TimeoutError):
            job.wait(0.3)
        assert job.progress.done < MIB // 2
        job.speed = None
        job.wait(10)
    assert time.monotonic() - begun < 5


# ---- progress and the background ----


def test_progress(slow, tmp_path):
    seen = []
    with slow(tmp_path / "backup.raw", progress=seen.append) as job:
        threading.Timer(0.6, lambda: setattr(job, "speed", None)).start()
        result = job.wait()
    assert 4 <= len(seen) <= 30
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert seen[-1].finished and not seen[0].finished
    assert seen[-1].done == seen[-1].total == result.total
    assert (seen[-1].fraction, seen[-1].data_bytes) == (1.0, result.data_bytes)
    assert seen[-1].rate > 0


def test_a_progress_callback_that_raises_ends_it(slow, tmp_path):
    def progress(_):
        raise LookupError("the screen is gone")

    with pytest.raises(LookupError, match="screen"), slow(tmp_path / "backup.raw", progress=progress) as job:
        job.wait()
    assert not (tmp_path / "backup.raw.partial").exists()


def test_bar(slow, snapshot, tmp_path, monkeypatch):
    screen = io.StringIO()
    bar = pyfleece.Bar(screen, force=True, label="vm")
    with slow(tmp_path / "backup.raw", progress=bar) as job:
        threading.Timer(0.3, lambda: setattr(job, "speed", None)).start()
        job.wait()
    lines = screen.getvalue().split("\r")
    assert "100%" in lines[-1] and lines[-1].endswith("\n")
    assert lines[1].startswith("vm [") and "of 1.0 MiB" in lines[1]
    assert max(map(len, lines)) <= 111
    nowhere = io.StringIO()
    monkeypatch.setattr(sys, "stderr", nowhere)
    pyfleece.backup(snapshot, tmp_path / "backup.raw", progress="bar")
    assert nowhere.getvalue() == ""  # not a terminal


def test_in_the_background(snapshot, state, tmp_path):
    job = pyfleece.Backup(snapshot, tmp_path / "backup.raw")
    assert job.progress.done == 0
    with pytest.raises(ValueError, match="not started"):
        job.wait()
    job.start()
    with pytest.raises(ValueError, match="started before"):
        job.start()
    wait_for(lambda: job.done)
    assert (tmp_path / "backup.raw").read_bytes() == state  # although nobody waited
    assert job.result is job.wait()
    assert job.progress.finished
    assert job.cancel()  # too late
    assert job.result.total == len(state)
    job.close()
    job.close()


def test_result_while_it_runs(slow, tmp_path):
    with slow(tmp_path / "backup.raw") as job:
        assert job.result is None
        assert not job.done
        assert job.cancel()
        with pytest.raises(pyfleece.CancelledError):
            job.result  # noqa: B018
    job = slow(tmp_path / "backup.raw")
    job.close()
    with pytest.raises(pyfleece.ClosedError):
        job.start()


def test_closing_the_snapshot_cancels(slow, tmp_path):
    job = slow(tmp_path / "backup.raw")
    job.start()
    job.snapshot.close()
    with pytest.raises(pyfleece.CancelledError):
        job.wait(5)
    assert os.listdir(tmp_path) == ["vm.raw"]


def test_a_target_that_hangs_can_be_cancelled(disk, tmp_path):
    disk.pwrite(b"\x05" * disk.size, 0)
    with pyfleece.create(tmp_path / "backup.raw", 2 * MIB) as inner, FaultyImage(inner) as target:
        target.hang("write", times=None)
        with disk.snapshot(cluster_size=CLUSTER) as snapshot:
            job = pyfleece.Backup(snapshot, target)
            job.start()
            wait_for(lambda: target.hanging)
            begun = time.monotonic()
            job.cancel()
            assert time.monotonic() - begun < 1.0
            disk.pwrite(b"the guest goes on", 0)
            snapshot.close()
        assert time.monotonic() - begun < 4
        target.clear()


def test_progress_tells_what_the_fleecing_image_holds(disk, tmp_path):
    data = b"\x05" * disk.size
    disk.pwrite(data, 0)
    with pyfleece.create(tmp_path / "backup.raw", 2 * MIB) as inner, FaultyImage(inner) as target:
        target.hang("write", times=None)
        with disk.snapshot(cluster_size=CLUSTER, stage_size=8 * CLUSTER) as snapshot:
            disk.pwrite(b"\x06" * disk.size, 0)
            wait_for(lambda: snapshot.stats.staged_bytes <= 6 * CLUSTER)
            with pyfleece.Backup(snapshot, target) as job:
                wait_for(lambda: target.hanging)
                assert job.progress.fleecing_bytes == snapshot.stats.fleecing_bytes >= MIB - 8 * CLUSTER
                target.clear()
                job.wait(30)
                assert job.progress.fleecing_bytes == 0
        assert inner.pread(len(data), 0) == data


def test_a_forgotten_backup_leaves_no_partial_file_at_exit(make_image, tmp_path):
    path, _ = make_image()
    script = """
import sys, pyfleece
disk = pyfleece.Disk(pyfleece.open(sys.argv[1], "r+"))
job = pyfleece.Backup(disk.snapshot(cluster_size=4096), sys.argv[1] + ".backup.raw", speed=1000, granularity=4096)
job.start()
"""
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == ["vm.raw"]


# ---- groups ----


@pytest.fixture
def group(make_image):
    with (
        pyfleece.open(make_image(name="a.raw", seed=1)[0], "r+") as a,
        pyfleece.open(make_image(name="b.raw", seed=2)[0], "r+") as b,
    ):
        disks = [pyfleece.Disk(a), pyfleece.Disk(b)]
        with pyfleece.snapshot_group(disks, cluster_size=CLUSTER) as group:
            yield group


def test_a_group(group, tmp_path):
    states = [snapshot.pread(snapshot.size, 0) for snapshot in group]
    for snapshot in group:
        snapshot.disk.pwrite(b"\xff" * 300_000, 0)
    targets = [tmp_path / "a.backup.raw", tmp_path / "b.backup.raw"]
    seen = []
    result = pyfleece.backup_group(group, targets, progress=seen.append)
    assert [target.read_bytes() for target in targets] == states
    assert result.ok and result.uuid.version == 4
    assert [part.total for part in result.results] == [len(state) for state in states]
    assert seen[-1].finished and seen[-1].total == sum(map(len, states))
    assert sorted(os.listdir(tmp_path)) == ["a.backup.raw", "a.raw", "b.backup.raw", "b.raw"]


def test_a_group_is_all_or_nothing(group, tmp_path):
    with pyfleece.create(tmp_path / "t.raw", 2 * MIB) as inner, FaultyImage(inner) as bad:
        bad.fail("flush", error=errno.EDQUOT)  # at the very end, when the other one may be done
        with pytest.raises(pyfleece.ImageError) as caught:
            pyfleece.backup_group(group, {group[0]: tmp_path / "a.backup.raw", group[1]: bad})
        assert (caught.value.errno, caught.value.side) == (errno.EDQUOT, "target")
    assert sorted(os.listdir(tmp_path)) == ["a.raw", "b.raw", "t.raw"]


def test_a_group_that_cannot_start_leaves_nothing(group, tmp_path):
    with pytest.raises(FileNotFoundError):
        pyfleece.backup_group(group, [tmp_path / "a.backup.raw", tmp_path / "missing" / "b.backup.raw"])
    assert sorted(os.listdir(tmp_path)) == ["a.raw", "b.raw"]
    for targets in ([tmp_path / "a.backup.raw"], {group[0]: tmp_path / "a.backup.raw"}):
        with pytest.raises(ValueError, match="targets"):
            pyfleece.backup_group(group, targets)


def test_a_group_where_each_one_counts(group, tmp_path):
    state = group[0].pread(group[0].size, 0)
    targets = [tmp_path / "a.backup.raw", tmp_path / "missing" / "b.backup.raw"]
    result = pyfleece.backup_group(group, targets, all_or_nothing=False)
    assert targets[0].read_bytes() == state
    assert not result.ok
    assert list(result.failures) == [1]
    assert isinstance(result.failures[1], FileNotFoundError)
    assert result.results[0].total == len(state)
    assert result.results[1] is None


# ---- Ctrl-C ----

CTRL_C = """
import os, signal, sys, threading, time
import pyfleece
from pyfleece.image import create_nameless
from pyfleece.testing import FaultyImage
def press():
    time.sleep(0.4)
    global pressed
    pressed = time.monotonic()
    os.kill(os.getpid(), signal.SIGINT)
def hung_target():
    global target
    target = FaultyImage(create_nameless(os.path.dirname(sys.argv[1]), 2 << 20))
    target.hang("write", times=None)
    return target
source = pyfleece.open(sys.argv[1], "r+")
disk = pyfleece.Disk(source)
disk.pwrite(b"5" * disk.size, 0)
threading.Thread(target=press, daemon=True).start()
options = dict(cluster_size=4096, stage_size=65536, cbw_timeout=30, on_cbw_error="break-guest-write")
try:
    with disk.snapshot("memory", **options) as snapshot:
        BODY
    print("not interrupted")
except KeyboardInterrupt:
    took = time.monotonic() - pressed
    assert took < 0.2, took
assert snapshot.closed
disk.pwrite(b"the disk goes on", 0)
source.close()
assert sorted(os.listdir(os.path.dirname(sys.argv[1]))) == ["vm.raw"]
print("clean")
"""


@pytest.mark.parametrize(
    "body",
    [
        'pyfleece.backup(snapshot, sys.argv[1] + ".backup.raw", speed=100000, granularity=4096)',
        'pyfleece.backup(snapshot, open("/dev/null", "wb"), speed=100000, granularity=4096)',
        'pyfleece.backup_group([snapshot], [sys.argv[1] + ".backup.raw"], speed=100000, granularity=4096)',
        'pyfleece.backup(snapshot, open(os.pipe()[1], "wb", buffering=0))',
        "pyfleece.backup(snapshot, hung_target())",
        "disk.pwrite(b'6' * disk.size, 0)",
        "disk.zero(disk.size, 0)",
        "held = snapshot.chunks(granularity=4096, buffers=2); taken = [next(held) for _ in range(3)]",
        "pyfleece.snapshot_group([disk], freeze=lambda: time.sleep(5))",
        "while True: snapshot.pread(1000, 0)",
    ],
    ids=["backup", "stream", "group", "stuck pipe", "hung target", "write", "zero", "chunks", "freeze", "read"],
)
def test_ctrl_c(make_image, body):
    path, _ = make_image()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CTRL_C.replace("BODY", body), path],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stdout == "clean\n", done.stdout + done.stderr


def test_what_a_signal_handler_raises_comes_out_of_the_call(disk):
    class Alarm(Exception):
        pass

    def ring(*_):
        raise Alarm

    old = signal.signal(signal.SIGALRM, ring)
    try:
        disk.pwrite(b"5" * disk.size, 0)
        with disk.snapshot(
            "memory", cluster_size=CLUSTER, stage_size=CLUSTER, on_cbw_error="break-guest-write"
        ) as snapshot:
            disk.pwrite(b"6", 0)
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            begun = time.monotonic()
            with pytest.raises(Alarm):
                disk.pwrite(b"6", CLUSTER)
            assert time.monotonic() - begun < 0.5
            assert disk.pread(1, CLUSTER) == b"5"
            assert snapshot.pread(2 * CLUSTER, 0) == b"5" * 2 * CLUSTER
    finally:
        signal.signal(signal.SIGALRM, old)


def test_a_signal_handler_that_returns_does_not_disturb(disk):
    rung = []
    old = signal.signal(signal.SIGALRM, lambda *_: rung.append(True))
    try:
        disk.pwrite(b"5" * disk.size, 0)
        options = {
            "cluster_size": CLUSTER,
            "stage_size": CLUSTER,
            "cbw_timeout": 0.5,
            "on_cbw_error": "break-guest-write",
        }
        with disk.snapshot("memory", **options):
            disk.pwrite(b"6", 0)
            signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
            with pytest.raises(OSError) as caught:
                disk.pwrite(b"6", CLUSTER)
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert isinstance(caught.value, pyfleece.ImageError)
            assert len(rung) >= 3
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
