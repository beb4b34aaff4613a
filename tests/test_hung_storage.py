"""Storage that hangs in the kernel, or goes away: a fleecing file or a target on a FUSE file system whose server is
stopped.

The guest does not notice while the stage has room, then for cbw_timeout; close() and cancel() return within a second or
so; and when the storage comes back everything is freed.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import MIB, missing, wait_for
from fault_kit import (
    CLOSES_WITHIN,
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
from fuse_kit import Mount, fuse_mount, why_not

import pyfleece


@pytest.fixture(autouse=True)
def nothing_is_left(no_leaks: None) -> None:
    """No test here leaves a file open or a thread running."""


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    with make_guest(tmp_path) as guest:
        yield guest


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[Mount]:
    reason = why_not()
    if reason:
        missing(reason)
    try:
        manager = fuse_mount(tmp_path / "fuse")
        mount = manager.__enter__()
    except OSError:
        missing("permission to mount")
    try:
        yield mount
    finally:
        manager.__exit__(None, None, None)


def scratch(mount: Mount, size: int = 32 * MIB) -> Path:
    path = mount.directory / "scratch.raw"
    with path.open("wb") as file:
        file.truncate(size)
    return path


def spill_some(guest: Guest, snapshot: pyfleece.Snapshot) -> int:
    """Overwrite so much that most of it is in the fleecing file; where it ended."""
    guest.overwrite(0, 4 * MIB)
    wait_for(lambda: snapshot.stats.staged_bytes <= STAGE * 3 // 4)
    assert snapshot.stats.fleecing_bytes >= 3 * MIB
    return 4 * MIB


def exhaust_the_stage(guest: Guest, snapshot: pyfleece.Snapshot, at: int) -> int:
    """With the storage stopped: write until the stage is all but full. None of that may wait."""
    waits = snapshot.stats.room_waits
    while snapshot.stats.staged_bytes + STEP <= STAGE:
        guest.write(at)
        at += STEP
    assert snapshot.stats.room_waits == waits
    return at


def test_hung_storage_is_not_felt_while_the_stage_has_room(guest: Guest, hanging: Mount, tmp_path: Path) -> None:
    state = guest.now
    with nothing_left(), cut(guest, scratch(hanging)) as snapshot:
        at = spill_some(guest, snapshot)
        hanging.stop()
        at = exhaust_the_stage(guest, snapshot, at)
        waiting = Running(guest.write, at)          # this one waits, for less than cbw_timeout
        time.sleep(0.3)
        assert waiting.runs
        hanging.go_on()
        waiting.join(5)
        guest.overwrite(0, guest.size)
        guest.check()
        assert snapshot.stats.room_timeouts == 0
        pyfleece.backup(snapshot, tmp_path / "backup.raw")
        assert (tmp_path / "backup.raw").read_bytes() == state
        expect_empty(snapshot)


@pytest.mark.parametrize("where", ["path", "nameless"])
@pytest.mark.parametrize("policy", POLICIES)
def test_hung_storage_and_a_full_stage(guest: Guest, hanging: Mount, policy: str, where: str) -> None:
    state, timeout = guest.now, 0.5
    fleecing = scratch(hanging) if where == "path" else hanging.directory
    with nothing_left():
        snapshot = cut(guest, fleecing, policy, timeout)
        at = spill_some(guest, snapshot)
        hanging.stop()
        at = exhaust_the_stage(guest, snapshot, at)
        took, error = timed(guest.write, at)
        assert timeout - 0.05 < took < timeout + SLACK
        took, error_again = timed(guest.write, at + STEP)
        assert took < SLACK                             # it does not wait again
        if policy == "break-guest-write":
            for raised in (error, error_again):
                assert isinstance(raised, TimeoutError)
                assert raised.side == "fleecing"
        else:
            assert error is error_again is None
        guest.check()
        if policy == "break-snapshot":
            assert snapshot.broken is not None
            assert (snapshot.broken.side, snapshot.broken.cause) == ("fleecing", errno.ETIMEDOUT)
        else:
            lost = [at, at + STEP] if policy == "lose-range" else []
            # in memory, lost or not, on the source
            for offset in (4 * MIB, at - STEP, at, at + STEP, guest.size - STEP):
                if offset in lost:
                    with pytest.raises(pyfleece.LostError):
                        snapshot.pread(STEP, offset)
                else:
                    assert snapshot.pread(STEP, offset) == state[offset : offset + STEP]

        took, error = timed(snapshot.close)
        assert error is None
        assert took < CLOSES_WITHIN
        guest.overwrite(0, guest.size)                  # nobody is in the way of anything
        guest.check()
        with cut(guest, "memory") as other:
            now = guest.now
            guest.write(0)
            assert other.pread(STEP, 0) == now[:STEP]
        hanging.go_on()


def test_a_reader_that_hangs_in_the_kernel(guest: Guest, hanging: Mount) -> None:
    """The guest does not wait for it, nor does close(). It raises in the end."""
    with nothing_left():
        snapshot = cut(guest, scratch(hanging), "break-snapshot", 0.5)
        at = spill_some(guest, snapshot)
        hanging.stop()
        reading = Running(snapshot.pread, MIB, 0)
        time.sleep(0.2)
        took, error = timed(guest.overwrite, at, at + MIB // 4)
        assert error is None
        assert took < SLACK
        assert snapshot.broken is None
        took, error = timed(snapshot.close)
        assert error is None
        assert took < CLOSES_WITHIN
        assert reading.runs, reading.error
        guest.overwrite(0, guest.size)
        guest.check()
        hanging.go_on()
        with pytest.raises(pyfleece.ClosedError):
            reading.join(5)
        del reading


@pytest.mark.parametrize("where", ["path", "nameless"])
@pytest.mark.parametrize("spilled", [False, True])
def test_closing_an_idle_snapshot_on_hung_storage(guest: Guest, hanging: Mount, where: str, spilled: bool) -> None:
    """Nothing is being written to the storage, so closing the file is the first thing that can hang."""
    with nothing_left():
        snapshot = cut(guest, scratch(hanging) if where == "path" else hanging.directory)
        if spilled:
            spill_some(guest, snapshot)
        hanging.stop()
        closing = Running(snapshot.close)
        time.sleep(1.2)
        hung = closing.runs
        hanging.go_on()
        closing.join(5)
        del closing
        assert not hung, "close() waits for hung storage"


def test_a_backup_that_reads_hung_storage(guest: Guest, hanging: Mount, tmp_path: Path) -> None:
    with nothing_left():
        snapshot = cut(guest, scratch(hanging), "break-snapshot", 0.5)
        spill_some(guest, snapshot)
        hanging.stop()
        job = pyfleece.Backup(snapshot, tmp_path / "backup.raw")
        job.start()
        time.sleep(0.3)
        took, error = timed(guest.write, guest.size - STEP)
        assert error is None
        assert took < SLACK
        took, _ = timed(job.cancel)
        assert took < 1.0 + SLACK
        assert os.listdir(tmp_path).count("backup.raw") == os.listdir(tmp_path).count("backup.raw.partial") == 0
        took, error = timed(snapshot.close)
        assert error is None
        assert took < CLOSES_WITHIN
        guest.overwrite(0, guest.size)
        guest.check()
        hanging.go_on()
        with pytest.raises(pyfleece.CancelledError):
            job.wait(5)
        assert not list(tmp_path.glob("backup*"))


def test_a_target_that_hangs(guest: Guest, hanging: Mount, tmp_path: Path) -> None:
    """It never slows the guest, and the backup can be cancelled; what it left is removed when the storage comes back.

    """
    state = guest.now
    with nothing_left():
        with cut(guest, None) as snapshot:
            job = pyfleece.Backup(snapshot, hanging.directory / "backup.raw", speed=8 * MIB, discard_source=False)
            job.start()
            wait_for(lambda: job.progress.done)
            hanging.stop()
            _, error = timed(guest.overwrite, 0, 4 * MIB)
            assert error is None
            assert snapshot.stats.room_timeouts == 0
            cancelling = Running(job.cancel)
            time.sleep(1.0 + SLACK)
            hung = cancelling.runs
            guest.overwrite(4 * MIB, guest.size)
            if not hung:
                assert unreadable(snapshot, state) == []
            hanging.go_on()
            cancelling.join(5)
            del cancelling
            assert not hung, "cancel() waits for a hung target"
            with pytest.raises(pyfleece.CancelledError):
                job.wait(5)
            wait_for(lambda: os.listdir(hanging.directory) == [])
            pyfleece.backup(snapshot, tmp_path / "backup.raw")
            assert (tmp_path / "backup.raw").read_bytes() == state
        guest.check()


@pytest.mark.parametrize("policy", POLICIES)
def test_fleecing_storage_that_goes_away(guest: Guest, hanging: Mount, policy: str) -> None:
    """What was spilled is gone, and reading it says so; what was not is right."""
    state = guest.now
    with nothing_left(), cut(guest, scratch(hanging), policy, 0.3) as snapshot:
        at = spill_some(guest, snapshot)
        hanging.kill()
        at = exhaust_the_stage(guest, snapshot, at)
        took, error = timed(guest.write, at)
        assert took < 0.3 + SLACK
        guest.check()
        if policy == "break-snapshot":
            assert snapshot.broken is not None
            assert (snapshot.broken.side, snapshot.broken.cause) == ("fleecing", errno.ENOTCONN)
            return
        if policy == "break-guest-write":
            assert isinstance(error, pyfleece.ImageError)
            assert (error.side, error.cause) == ("fleecing", errno.ENOTCONN)
        with pytest.raises(pyfleece.ImageError) as caught:
            snapshot.pread(guest.size, 0)
        assert (caught.value.side, caught.value.errno) == ("fleecing", errno.ENOTCONN)
        gone = unreadable(snapshot, state, pyfleece.ImageError, pyfleece.LostError)
        assert 3 * MIB // CLUSTER <= len(gone) < guest.size // CLUSTER
