"""Faults that are not simulated: file systems that run full, readers that die, truncated files, limits, devices that go
away. (Storage that hangs in the kernel: test_hung_storage.py.)

After each of them: the guest's data is exactly right, the snapshot returns the bytes of the cut or raises and says
which side it was, and nothing is left behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import MIB, missing, require, run, run_python, wait_for
from fault_kit import (
    CLUSTER,
    POLICIES,
    SLACK,
    STAGE,
    STEP,
    Guest,
    Running,
    cut,
    expect_empty,
    make_guest,
    nothing_left,
    timed,
    unreadable,
)

import pyfleece

TIMEOUT = 0.3


@pytest.fixture(autouse=True)
def nothing_is_left(no_leaks: None) -> None:
    """No test here leaves a file open or a thread running."""


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    with make_guest(tmp_path) as guest:
        yield guest


# ---- a file system that runs full ----


class SmallFileSystem:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ballast = directory / "ballast"

    @property
    def free(self) -> int:
        found = os.statvfs(self.directory)
        return found.f_bfree * found.f_frsize

    def leave_free(self, count: int) -> None:
        with self.ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, self.free - count)


@pytest.fixture
def small(tmp_path: Path, loop_device: Callable[..., str]) -> Iterator[SmallFileSystem]:
    """An ext4 of 32 MiB. That it can be unmounted afterwards shows that nobody holds on to a file of it."""
    require("mkfs.ext4", "mount")
    device = loop_device(32 * MIB)
    run("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", device)
    directory = tmp_path / "small"
    directory.mkdir()
    if "mount:" in run("mount", device, directory, check=False):
        missing("permission to mount")
    yield SmallFileSystem(directory)
    wait_for(lambda: run("umount", directory, check=False) == "", 10)


def fill(guest: Guest, snapshot: pyfleece.Snapshot) -> int:
    """Overwrite until there is no more room for old data; where the first write was that was refused or that nothing
    could be saved of.
    """
    for offset in range(0, guest.size, STEP):
        took, error = timed(guest.write, offset)
        assert took < TIMEOUT + SLACK + 0.5      # this one writes to a real disk, too
        if error is not None:
            assert isinstance(error, pyfleece.ImageError)
            assert (error.errno, error.side) == (errno.ENOSPC, "fleecing")
            return offset
        if snapshot.broken or snapshot.stats.clusters_lost:
            return offset
    raise AssertionError("it did not run full")


def test_the_fleecing_file_runs_full_breaking_the_snapshot(guest: Guest, small: SmallFileSystem) -> None:
    small.leave_free(4 * MIB)
    free = small.free
    with cut(guest, small.directory, "break-snapshot", TIMEOUT) as snapshot:
        full_at = fill(guest, snapshot)
        assert full_at >= 3 * MIB
        _, error = timed(guest.overwrite, full_at, guest.size)
        assert error is None
        assert snapshot.broken is not None
        assert (snapshot.broken.side, snapshot.broken.cause) == ("fleecing", errno.ENOSPC)
        assert "No space left" in str(snapshot.broken)
        for offset in (0, full_at, guest.size - 1):
            with pytest.raises(pyfleece.SnapshotBrokenError):
                snapshot.pread(1, offset)
        wait_for(lambda: small.free == free)            # a broken snapshot needs no room
    guest.check()
    small.ballast.unlink()
    state = guest.now
    with cut(guest, small.directory, "break-snapshot", TIMEOUT) as snapshot:
        guest.overwrite(0, guest.size)
        assert unreadable(snapshot, state) == []


def test_the_fleecing_file_runs_full_breaking_guest_writes(
    guest: Guest, small: SmallFileSystem, tmp_path: Path
) -> None:
    free = small.free
    small.leave_free(4 * MIB)
    state = guest.now
    with cut(guest, small.directory, "break-guest-write", TIMEOUT) as snapshot:
        full_at = fill(guest, snapshot)
        guest.check()
        assert unreadable(snapshot, state) == []
        guest.overwrite(0, full_at)                     # saved already: nothing to find room for
        guest.check()
        small.ballast.unlink()
        wait_for(lambda: timed(guest.write, full_at)[1] is None)
        guest.overwrite(full_at, guest.size)
        guest.check()
        assert unreadable(snapshot, state) == []
        pyfleece.backup(snapshot, tmp_path / "backup.raw")
        assert (tmp_path / "backup.raw").read_bytes() == state
        expect_empty(snapshot)
        wait_for(lambda: small.free >= free - STEP)     # punched out, but for a few blocks of the file system's own
    wait_for(lambda: small.free == free)


def test_the_fleecing_file_runs_full_losing_ranges(guest: Guest, small: SmallFileSystem, tmp_path: Path) -> None:
    small.leave_free(4 * MIB)
    state = guest.now
    with cut(guest, small.directory, "lose-range", TIMEOUT) as snapshot:
        full_at = fill(guest, snapshot)
        guest.overwrite(full_at, full_at + MIB)
        lost = unreadable(snapshot, state, pyfleece.LostError)
        assert lost[0] >= full_at
        assert sum(extent.length for extent in snapshot.lost) == len(lost) * CLUSTER

        small.ballast.unlink()                          # what is lost stays lost; the rest is saved again
        wait_for(lambda: snapshot.stats.staged_bytes <= STAGE * 3 // 4)
        guest.overwrite(full_at, guest.size)
        guest.check()
        assert unreadable(snapshot, state, pyfleece.LostError) == lost
        result = pyfleece.backup(snapshot, tmp_path / "backup.raw")
        assert result.lost_bytes == len(lost) * CLUSTER
        copy = (tmp_path / "backup.raw").read_bytes()
        at = 0
        for extent in (*result.lost, pyfleece.Extent(guest.size, 0, "lost")):
            assert copy[at : extent.offset] == state[at : extent.offset]
            at = extent.offset + extent.length


def test_a_guest_write_waits_until_there_is_space_again(guest: Guest, small: SmallFileSystem) -> None:
    small.leave_free(4 * MIB)
    state = guest.now
    with cut(guest, small.directory, "break-snapshot", 60.0) as snapshot:
        writing = Running(guest.overwrite, 0, guest.size)
        wait_for(lambda: snapshot.stats.spill_errors >= 2)
        wait_for(lambda: snapshot.stats.staged_bytes == STAGE)
        assert writing.runs
        small.ballast.unlink()
        writing.join(30)
        guest.check()
        assert snapshot.stats.room_timeouts == 0
        assert unreadable(snapshot, state) == []


def test_the_file_system_of_the_target_runs_full(guest: Guest, small: SmallFileSystem, tmp_path: Path) -> None:
    small.leave_free(4 * MIB)
    free, state = small.free, guest.now
    with cut(guest, None) as snapshot:
        guest.overwrite(0, 4 * MIB)
        for kind in ("file", "stream"):
            with contextlib.ExitStack() as stack, pytest.raises(pyfleece.ImageError) as caught:
                target: object = small.directory / "backup.raw"
                if kind == "stream":
                    target = stack.enter_context(tempfile.TemporaryFile(dir=small.directory, buffering=0))
                pyfleece.backup(snapshot, target, discard_source=False)
            assert (caught.value.side, caught.value.errno) == ("target", errno.ENOSPC)
            assert caught.value.offset is not None
            assert set(os.listdir(small.directory)) == {"ballast", "lost+found"}
            wait_for(lambda: small.free == free)
        guest.overwrite(0, guest.size)
        guest.check()
        pyfleece.backup(snapshot, tmp_path / "backup.raw")
        assert (tmp_path / "backup.raw").read_bytes() == state


# ---- pipes ----


@pytest.mark.parametrize("way", ["exits", "is killed"])
def test_a_pipe_whose_reader_dies(guest: Guest, tmp_path: Path, way: str) -> None:
    state = guest.now
    command = ["head", "-c", "100000"] if way == "exits" else ["sleep", "60"]
    with nothing_left(), cut(guest, None) as snapshot:
        reader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        assert reader.stdin is not None
        job = pyfleece.Backup(snapshot, reader.stdin, discard_source=False)
        job.start()
        guest.overwrite(0, 4 * MIB)
        if way == "is killed":
            time.sleep(0.2)
            assert not job.done                         # the pipe is full
            reader.kill()
        with pytest.raises(BrokenPipeError) as caught:
            job.wait(10)
        assert isinstance(caught.value, pyfleece.ImageError)
        assert (caught.value.side, caught.value.cause) == ("target", errno.EPIPE)
        assert caught.value.offset is not None
        reader.wait()
        with contextlib.suppress(BrokenPipeError):      # Python has a buffer of its own
            reader.stdin.close()
        guest.overwrite(0, guest.size)
        guest.check()
        pyfleece.backup(snapshot, tmp_path / "backup.raw")
        assert (tmp_path / "backup.raw").read_bytes() == state


GARBAGE = """
import gc, sys
import pyfleece

def use():
    with pyfleece.open(sys.argv[1], "r+") as source, pyfleece.Disk(source).snapshot() as snapshot:
        chunk = next(snapshot.chunks())
        cycle = [chunk, chunk.buffer, chunk.buffer[1:]]
        cycle.append(cycle)

use()
gc.collect()
"""


def test_the_garbage_that_a_failure_leaves(guest: Guest) -> None:
    """A traceback refers to the chunk that could not be written, to its buffer and to what was left to write of it.
    Collecting all that must not crash: interpreters up to 3.12 do where a memoryview that others were made of is
    cleared before them.
    """
    path = guest.disk.source.path
    guest.disk.source.close()
    run_python(GARBAGE, str(path))


# ---- a source that is truncated under us ----

CUT_OFF = 5 * MIB + 1000                        # in the middle of a cluster
SAVED = (8 * MIB, 9 * MIB)                      # overwritten between the cut and the truncation


@pytest.fixture(params=["full", "sparse"])
def holes(request: pytest.FixtureRequest, guest: Guest) -> None:
    """Sparse: the source has holes, some of which begin before the end-to-be and some behind it."""
    if request.param == "sparse":
        for offset in range(CLUSTER, guest.size, MIB):
            guest.disk.zero(MIB * 3 // 4, offset)
            guest.truth[offset : offset + MIB * 3 // 4] = bytes(MIB * 3 // 4)


def truncate(guest: Guest) -> None:
    assert guest.disk.source.path is not None
    os.truncate(guest.disk.source.path, CUT_OFF)


def cut_off(offset: int) -> bool:
    """Is this cluster of the cut neither in the store nor on the source any more?"""
    return offset + CLUSTER > CUT_OFF and not SAVED[0] <= offset < SAVED[1]


@pytest.mark.usefixtures("holes")
def test_reading_a_truncated_source(guest: Guest, tmp_path: Path) -> None:
    state = guest.now
    with cut(guest, None) as snapshot:
        guest.overwrite(*SAVED)
        truncate(guest)
        assert snapshot.pread(CUT_OFF, 0) == guest.disk.pread(CUT_OFF, 0) == state[:CUT_OFF]
        for read in (snapshot.pread, guest.disk.pread):
            for offset, count in ((CUT_OFF, 1), (CUT_OFF - 1, 2), (6 * MIB, MIB), (guest.size - 1, 1)):
                with pytest.raises(pyfleece.TruncatedError, match="truncated") as caught:
                    read(count, offset)
                assert (caught.value.side, caught.value.errno) == ("source", errno.EIO)
        expected = [offset for offset in range(0, guest.size, CLUSTER) if cut_off(offset)]
        assert unreadable(snapshot, state, pyfleece.TruncatedError) == expected
        with pytest.raises(pyfleece.TruncatedError):
            list(snapshot.extents())
        assert snapshot.broken is None


@pytest.mark.usefixtures("holes")
@pytest.mark.parametrize("kind", ["file", "image", "stream", "chunks"])
def test_backing_up_a_truncated_source(guest: Guest, tmp_path: Path, kind: str) -> None:
    with cut(guest, None) as snapshot:
        guest.overwrite(*SAVED)
        truncate(guest)
        with pytest.raises(pyfleece.TruncatedError) as caught:
            if kind == "file":
                pyfleece.backup(snapshot, tmp_path / "backup.raw")
            elif kind == "image":
                with pyfleece.create(tmp_path / "image.raw", guest.size) as image:
                    pyfleece.backup(snapshot, image, target_is_zero=True)
            elif kind == "stream":
                with open(os.devnull, "wb") as stream:
                    pyfleece.backup(snapshot, stream)
            else:
                with snapshot.chunks() as chunks:
                    for chunk in chunks:
                        chunk.ack()
        assert caught.value.side == "source"
        assert not list(tmp_path.glob("backup*"))


def test_a_small_write_behind_a_truncated_end_does_not_move_it(tmp_path: Path) -> None:
    """The write makes the file longer again, and what is between then reads as zeros: a snapshot must not."""
    path = tmp_path / "vm.raw"
    path.write_bytes(b"\x07" * (4 * MIB))
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(pyfleece.open(path, "r+"))
        disk = stack.enter_context(pyfleece.Disk(source, bitmap_file=False))
        snapshot = stack.enter_context(disk.snapshot("memory", on_cbw_error="lose-range"))
        os.truncate(path, MIB)
        disk.pwrite(b"x" * 4096, 3 * MIB)
        assert path.stat().st_size == 3 * MIB + 4096
        assert snapshot.pread(4096, MIB - 4096) == b"\x07" * 4096
        for offset in (MIB, 2 * MIB, 3 * MIB - 4096):
            with pytest.raises(pyfleece.TruncatedError):
                snapshot.pread(4096, offset)


@pytest.mark.usefixtures("holes")
@pytest.mark.parametrize("policy", POLICIES)
def test_writing_to_a_truncated_source(guest: Guest, policy: str) -> None:
    """A write whose old data is gone meets the policy."""
    state, at = guest.now, 12 * MIB
    with cut(guest, None, policy) as snapshot:
        guest.overwrite(*SAVED)
        truncate(guest)
        _, error = timed(guest.write, at)
        if policy == "break-snapshot":
            assert snapshot.broken is not None
            assert snapshot.broken.side == "source"
            assert "truncated" in str(snapshot.broken)
        if policy == "break-guest-write":
            assert isinstance(error, pyfleece.TruncatedError)
            assert error.side == "source"
        else:
            assert error is None
            with open(guest.disk.source.path or "", "rb") as file:
                assert os.pread(file.fileno(), STEP, at) == guest.truth[at : at + STEP]
        if policy == "lose-range":
            assert [(extent.offset, extent.length) for extent in snapshot_lost(snapshot, guest)] == [(at, STEP)]
        if policy != "break-snapshot":
            lost = unreadable(snapshot, state, pyfleece.TruncatedError, pyfleece.LostError)
            assert lost == [offset for offset in range(0, guest.size, CLUSTER) if cut_off(offset)]


def snapshot_lost(snapshot: pyfleece.Snapshot, guest: Guest) -> list[pyfleece.Extent]:
    """Without asking the source for its extents, which raises."""
    found = []
    for offset in range(0, guest.size, STEP):
        try:
            found += [extent for extent in snapshot.extents(offset, STEP) if extent.kind == "lost"]
        except pyfleece.TruncatedError:
            pass
    return found


@pytest.mark.usefixtures("holes")
def test_a_guest_that_makes_a_truncated_source_longer_again(guest: Guest, tmp_path: Path) -> None:
    """Clusters that need no saving any more are written without being read, far behind the end. What was cut off then
    looks like a hole; but once a read has met the end, what was behind it stays lost.
    """
    state = guest.now
    with cut(guest, None) as snapshot:
        guest.overwrite(*SAVED)
        truncate(guest)
        assert unreadable(snapshot, state, pyfleece.TruncatedError)
        timed(guest.write, SAVED[1] - STEP)
        snapshot.discard(MIB, guest.size - MIB)
        timed(guest.write, guest.size - STEP)
        unreadable(snapshot, state, pyfleece.TruncatedError, pyfleece.DiscardedError)
        with pytest.raises((pyfleece.TruncatedError, pyfleece.DiscardedError)):
            pyfleece.backup(snapshot, tmp_path / "backup.raw")


# ---- limits on file sizes ----

LIMITED = """
import errno, os, resource, sys
import pyfleece

MIB, CLUSTER = 1 << 20, 4096
source = pyfleece.open(sys.argv[1], "r+")
disk = pyfleece.Disk(source)
state = disk.pread(disk.size, 0)
directory = os.path.dirname(sys.argv[1])
scratch = pyfleece.open(os.path.join(directory, "scratch.raw"), "r+")
target = pyfleece.open(os.path.join(directory, "target.raw"), "r+")

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

limit(2 * MIB)

def raises(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except pyfleece.Error as error:
        return error
    raise AssertionError("it did not raise")
"""


@pytest.fixture
def limited(guest: Guest, tmp_path: Path) -> Callable[[str], None]:
    """limited(script): run it where no file may be written beyond 2 MiB; there are a source, a scratch and a target
    image of 16 MiB.
    """
    for name in ("scratch.raw", "target.raw"):
        pyfleece.create(tmp_path / name, guest.size).close()
    path = guest.disk.source.path
    guest.disk.close()
    guest.disk.source.close()
    return lambda script: print(run_python(LIMITED + script, str(path)))


def test_limited_target(limited: Callable[[str], None], tmp_path: Path) -> None:
    limited("""
with disk.snapshot("memory") as snapshot:
    for made in (target, os.path.join(directory, "backup.raw"), open(os.path.join(directory, "stream"), "wb")):
        error = raises(pyfleece.backup, snapshot, made, discard_source=False)
        assert (error.errno, error.side) == (errno.EFBIG, "target"), error
    disk.pwrite(b"goes on", 0)
    assert snapshot.pread(disk.size, 0) == state
    """)
    assert not list(tmp_path.glob("backup.raw*"))


def test_limited_fleecing_file(limited: Callable[[str], None], tmp_path: Path) -> None:
    limited("""
for policy in ("break-snapshot", "break-guest-write", "lose-range"):
    limit(resource.RLIM_INFINITY)
    state = os.urandom(disk.size)
    disk.pwrite(state, 0)
    limit(2 * MIB)
    with disk.snapshot(scratch, on_cbw_error=policy, cluster_size=CLUSTER, stage_size=MIB, cbw_timeout=0.3) as snapshot:
        try:
            for offset in range(0, disk.size, 65536):       # makes holes: only the fleecing file is written
                disk.zero(65536, offset)
        except pyfleece.Error as error:
            assert policy == "break-guest-write" and (error.errno, error.side) == (errno.EFBIG, "fleecing"), error
            assert offset >= 2 * MIB and disk.pread(disk.size, 0) == bytes(offset) + state[offset:]
            assert snapshot.pread(disk.size, 0) == state
            continue
        assert not any(disk.pread(disk.size, 0))
        if policy == "break-snapshot":
            assert (snapshot.broken.cause, snapshot.broken.side) == (errno.EFBIG, "fleecing"), snapshot.broken
            continue
        assert policy == "lose-range" and snapshot.lost
        for extent in snapshot.extents():
            if extent.kind != "lost":
                assert snapshot.pread(extent.length, extent.offset) == state[extent.offset:][:extent.length]
for fleecing in (None, directory):                          # a nameless file as large as a disk can't even be made
    error = raises(disk.snapshot, fleecing)
    assert error.side == "fleecing" and "too large" in str(error), error
    """)


def test_limited_source(limited: Callable[[str], None]) -> None:
    limited("""
with disk.snapshot("memory") as snapshot:
    error = raises(disk.pwrite, b"new" * 1000, 4 * MIB)
    assert (error.errno, error.side) == (errno.EFBIG, "source"), error
    disk.pwrite(b"new", 0)
    assert disk.pread(disk.size, 0) == b"new" + state[3:]
    assert snapshot.pread(disk.size, 0) == state
    """)


# ---- devices that go away, or are too small ----


def drop_cache(device: str) -> None:
    with open(device, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def attached(device: str) -> bool:
    return device in run("losetup", "--list", "--noheadings", "--output", "NAME")


def test_a_loop_device_is_detached_while_it_is_the_source(loop_device: Callable[..., str], tmp_path: Path) -> None:
    """The kernel keeps it until its last user is gone."""
    device = loop_device(16 * MIB)
    with pyfleece.open(device, "r+") as source:
        guest = Guest(source)
        state = guest.now
        with cut(guest, None) as snapshot:
            guest.overwrite(0, 4 * MIB)
            run("losetup", "--detach", device)
            guest.overwrite(2 * MIB, guest.size)
            pyfleece.backup(snapshot, tmp_path / "backup.raw")
        guest.check()
        guest.disk.flush()
    assert (tmp_path / "backup.raw").read_bytes() == state
    wait_for(lambda: not attached(device))
    assert (tmp_path / "loop0.backing").read_bytes() == guest.truth


def test_a_source_device_loses_what_is_behind_it(loop_device: Callable[..., str], tmp_path: Path) -> None:
    device = loop_device(16 * MIB)
    with pyfleece.open(device, "r+") as source:
        guest = Guest(source)
        guest.disk.flush()
        state = guest.now
        with cut(guest, None) as snapshot:
            guest.overwrite(*SAVED)
            guest.disk.flush()
            os.truncate(tmp_path / "loop0.backing", 5 * MIB)
            drop_cache(device)
            try:
                with open(device, "rb") as raw:
                    assert any(os.pread(raw.fileno(), CLUSTER, 14 * MIB))
                    zeros = True
            except OSError:
                zeros = False
            except AssertionError:
                zeros = True
            if zeros:
                pytest.skip("this kernel's loop driver invents the zeros itself")
            gone = unreadable(snapshot, state, pyfleece.ImageError)
            assert all(offset >= 5 * MIB and not SAVED[0] <= offset < SAVED[1] for offset in gone)
            assert len(gone) >= 7 * MIB // CLUSTER
            with pytest.raises(pyfleece.ImageError) as caught:
                pyfleece.backup(snapshot, tmp_path / "backup.raw")
            assert (caught.value.side, caught.value.errno) == ("source", errno.EIO)
            assert not list(tmp_path.glob("backup*"))
            os.truncate(tmp_path / "loop0.backing", 16 * MIB)


def test_a_fleecing_device_loses_what_is_behind_it(
    loop_device: Callable[..., str], guest: Guest, tmp_path: Path
) -> None:
    """Whatever the device answers, zeros too: the checksums tell."""
    device, state = loop_device(32 * MIB), guest.now
    with pyfleece.open(device, "r+", direct=True) as fleecing, cut(guest, fleecing) as snapshot:
        guest.overwrite(0, 8 * MIB)
        wait_for(lambda: snapshot.stats.staged_bytes <= STAGE * 3 // 4)
        os.truncate(tmp_path / "loop0.backing", 2 * MIB)
        drop_cache(device)
        gone = unreadable(snapshot, state, pyfleece.ImageError)
        assert len(gone) >= 4 * MIB // CLUSTER
        os.truncate(tmp_path / "loop0.backing", 32 * MIB)       # longer again: zeros, without any error
        drop_cache(device)
        assert unreadable(snapshot, state, pyfleece.ImageError) == gone
        with pytest.raises(pyfleece.ImageError, match="did not keep") as caught:
            snapshot.pread(CLUSTER, gone[0])
        assert (caught.value.side, caught.value.errno) == ("fleecing", errno.EIO)
        with pytest.raises(pyfleece.ImageError):
            pyfleece.backup(snapshot, tmp_path / "backup.raw")
        assert not list(tmp_path.glob("backup*"))
        guest.overwrite(0, guest.size)
        guest.check()


def test_a_target_device_runs_full(
    loop_device: Callable[..., str], small: SmallFileSystem, guest: Guest, tmp_path: Path
) -> None:
    """A device that turns out to be full only when what it was given is flushed: that is a failure too, and not a
    success.
    """
    small.leave_free(4 * MIB)
    with (small.directory / "thin").open("wb") as thin:
        thin.truncate(guest.size)
    device = loop_device(small.directory / "thin")
    try:
        state = guest.now
        with cut(guest, None) as snapshot:
            with pytest.raises(pyfleece.ImageError) as caught:
                pyfleece.backup(snapshot, device, discard_source=False)
            assert caught.value.side == "target"
            assert caught.value.errno in (errno.ENOSPC, errno.EIO)
            guest.overwrite(0, guest.size)
            guest.check()
            pyfleece.backup(snapshot, tmp_path / "backup.raw")
            assert (tmp_path / "backup.raw").read_bytes() == state
    finally:
        run("losetup", "--detach", device)
        wait_for(lambda: not attached(device))


def test_a_target_device_that_is_too_small(loop_device: Callable[..., str], guest: Guest) -> None:
    device = loop_device(guest.size - 512)
    with cut(guest, None) as snapshot, pytest.raises(pyfleece.ImageError) as caught:
        pyfleece.backup(snapshot, device)
    assert (caught.value.side, caught.value.errno, caught.value.length) == ("target", errno.ENOSPC, 512)
    with open(device, "rb") as raw:
        assert not any(raw.read())                              # it was told before anything was written
